"""What an exported stack is loaded with: torch and transformers alone, copied into each folder."""
