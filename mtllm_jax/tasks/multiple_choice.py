"""Multiple choice: one text of context, question and all choices, and where each choice lies in it.

A row is read once, "context question\\n1 a\\n2 b …", so that the choices see each other; a choice's
vector is the mean of the states at its tokens, and one linear map scores it [code].

Plain Python: exported stacks are shipped with this file.
"""

from collections.abc import Sequence

Span = tuple[int, int]  # [start, end) in characters


def choice_text(context: str, question: str, choices: Sequence[str]) -> tuple[str, list[Span]]:
    """What the model reads, and where each choice stands in it."""
    text = f"{context} {question}"
    spans = []
    for number, choice in enumerate(choices, 1):
        text += f"\n{number} "
        spans.append((len(text), len(text) + len(choice)))
        text += choice
    return text, spans


def choice_segments(offsets: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """For each token the number, from 1, of the choice that it holds characters of; 0 for none.

    offsets: where each token stands in the text. ValueError for a choice without a token.
    """
    segments = [
        next((n for n, (start, end) in enumerate(spans, 1) if a < end and b > start), 0)
        for a, b in offsets
    ]
    for number in range(1, len(spans) + 1):
        if number not in segments:
            raise ValueError(f"choice {number} has no token; it must be a text")
    return segments


def kept_tokens(offsets: Sequence[Span], context_length: int, max_length: int) -> list[int]:
    """Places of at most `max_length` tokens: of a longer text, the end of its context is cut.

    context_length: in characters. ValueError if question and choices alone are longer.
    """
    context = [i for i, (start, end) in enumerate(offsets) if start < end <= context_length]
    if (others := len(offsets) - len(context)) > max_length:
        raise ValueError(f"question and choices are {others} tokens; they may be {max_length}")
    excess = max(len(offsets) - max_length, 0)
    cut = set(context[len(context) - excess :])
    return [i for i in range(len(offsets)) if i not in cut]
