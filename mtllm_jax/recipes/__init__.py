"""The papers: the stages in order, each = data + objective + what is trained."""
