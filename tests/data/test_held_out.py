"""What is held out of training is nowhere in it, and nothing else is missing from it."""

import math

import numpy as np
import pyarrow as pa
import pytest

from mtllm_jax.data.held_out import hold_out_rows, hold_out_texts
from mtllm_jax.data.packing import pack
from mtllm_jax.data.texts import Texts, texts_of


def test_texts_held_out_are_spread_and_nowhere_else():
    texts = [f"text {i}" for i in range(10)]
    texts[7] = " text 4 "  # the same as one that is held out, but for blanks
    left, held = hold_out_texts(two_sources(texts), 2)
    assert held == ["text 4", "text 9"]
    assert list(left) == [text for i, text in enumerate(texts) if i not in (4, 7, 9)]
    assert left.sizes == (5, 2)


def two_sources(texts):
    return Texts(pa.chunked_array([texts[:6], texts[6:]], pa.large_string()), (6, len(texts) - 6))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 11])
def test_rows_held_out_and_the_others_are_all_rows(count):
    rng = np.random.default_rng(0)
    texts = [
        {"source": np.full(rng.integers(1, 9), i), "target": np.full(rng.integers(1, 7), i)}
        for i in range(40)
    ]
    rows = pack(texts, {"source": 16, "target": 12}, {"source": 1, "target": 0})
    left, held = hold_out_rows(rows, count)

    def numbers(part):
        found = np.concatenate([part[i]["example"] for i in range(len(part))])
        return found[found > 0].tolist()

    assert len(held) == math.ceil(count * len(rows) / len(texts))
    assert sorted(numbers(left) + numbers(held)) == list(range(1, 41))
    for part in (left, held):
        ids = numbers(part)
        assert part.counts.texts == len(ids) and part.counts.rows == len(part)
        for stream, tokens in part.counts.tokens.items():
            assert tokens == sum(len(texts[i - 1][stream]) for i in ids)
            assert 0 < part.fill[stream] <= 1
    assert len({rows.digest, left.digest, held.digest}) == 3
    # In their order, and no two of those held out beside each other.
    places = {numbers_of(rows, i): i for i in range(len(rows))}
    for part in (left, held):
        found = [places[numbers_of(part, i)] for i in range(len(part))]
        assert found == sorted(found)
    assert np.all(np.diff([places[numbers_of(held, i)] for i in range(len(held))]) > 1)


def numbers_of(rows, i):
    return tuple(rows[i]["example"])


def test_what_cannot_be_held_out():
    with pytest.raises(ValueError, match="6 are to be held out for development, and there are 10"):
        hold_out_texts(texts_of(map(str, range(10))), 6)
    with pytest.raises(ValueError, match="no other text is left of 4"):
        hold_out_texts(texts_of(["same"] * 4), 1)
