"""Where choices lie in what the model reads, against a search for them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtllm_jax.tasks.multiple_choice import choice_segments, choice_text, kept_tokens

WORDS = st.text("ab ", min_size=1, max_size=6).filter(lambda text: text.strip())
CHOICES = st.lists(WORDS, min_size=1, max_size=5)


def test_the_text():
    text, spans = choice_text("A story.", "Who?", ("he", "she and he"))
    assert text == "A story. Who?\n1 he\n2 she and he"
    assert [text[a:b] for a, b in spans] == ["he", "she and he"]


@given(WORDS, WORDS, CHOICES)
def test_tokens_of_one_character(context, question, choices):
    text, spans = choice_text(context, question, choices)
    segments = choice_segments([(i, i + 1) for i in range(len(text))], spans)
    for number, choice in enumerate(choices, 1):
        assert "".join(c for c, n in zip(text, segments, strict=True) if n == number) == choice
    others = "".join(c for c, n in zip(text, segments, strict=True) if n == 0)
    numbers = "".join(f"\n{number} " for number in range(1, len(choices) + 1))
    assert others == f"{context} {question}{numbers}"


def test_tokens_that_reach_beyond_a_choice():
    """Spaces and line ends may be in a choice's token; special tokens stand nowhere."""
    _, spans = choice_text("A", "B", ("he", "we"))
    assert spans == [(6, 8), (11, 13)]
    offsets = [(0, 0), (0, 3), (3, 5), (5, 9), (9, 10), (10, 12), (12, 13), (0, 0)]
    assert choice_segments(offsets, spans) == [0, 0, 0, 1, 0, 2, 2, 0]
    for empty in ("", " "):
        _, spans = choice_text("A", "B", ("he", empty))
        with pytest.raises(ValueError, match="choice 2 has no token; it must be a text"):
            choice_segments(offsets[:4], spans)


@given(WORDS, WORDS, CHOICES, st.integers(1, 60))
def test_what_is_cut(context, question, choices, max_length):
    """The end of the context and nothing else, no more than must be."""
    text, _ = choice_text(context, question, choices)
    offsets = [(0, 0), *((i, i + 1) for i in range(len(text))), (0, 0)]
    others = len(offsets) - len(context)
    if others > max_length:
        with pytest.raises(ValueError, match=f"are {others} tokens; they may be {max_length}"):
            kept_tokens(offsets, len(context), max_length)
        return
    kept = kept_tokens(offsets, len(context), max_length)
    assert len(kept) == min(len(offsets), max_length)
    left = len(context) - (len(offsets) - len(kept))
    assert kept == [0, *range(1, left + 1), *range(len(context) + 1, len(offsets))]
