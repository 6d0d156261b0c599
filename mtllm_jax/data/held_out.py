"""Texts that are held out of training, evenly spread over all there are, so that they are like the
others whatever the order of those."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mtllm_jax.data.packing import Counts, Rows, counts_of
from mtllm_jax.data.texts import Texts


def hold_out_texts(texts: Texts, count: int) -> tuple[Texts, list[str]]:
    """(those that are left, `count` that are not): what is left has none of the texts held out.

    ValueError for more than half of the texts, or where nothing is left of one of their sources.
    """
    held = [texts[int(place)] for place in _places(len(texts), count)]
    left = texts.without(held)
    if 0 in left.sizes:
        raise ValueError(
            f"with {count} texts held out for development, no other text is left of"
            f" {'a source' if len(left.sizes) > 1 else f'{len(texts)}'}."
        )
    return left, held


def hold_out_rows(rows: Rows, count: int) -> tuple[Rows, Rows]:
    """The same of rows packed before, as many as hold about `count` texts.

    ValueError for more than half of the rows.
    """
    texts = rows.counts.texts - rows.counts.dropped
    places = _places(len(rows), -(-count * len(rows) // texts))
    stride, num_held = len(rows) // len(places), len(places)

    def among_others(i: int) -> int:
        return i + min(i // (stride - 1), num_held)

    held = _part(rows, "held out", num_held, lambda i: int(places[i]))
    held = dataclasses.replace(held, counts=counts_of(held.records, rows.lengths))
    left = _part(rows, "left", len(rows) - num_held, among_others)
    return dataclasses.replace(left, counts=_less(rows.counts, held.counts)), held


def _places(total: int, count: int) -> np.ndarray:
    """`count` places among `total`, at equal distances."""
    if 2 * count > total:
        raise ValueError(
            f"{count} are to be held out for development, and there are {total}; it may be half of"
            " them at most."
        )
    stride = total // count
    return stride - 1 + stride * np.arange(count)


def _part(rows: Rows, name: str, count: int, place: Callable[[int], int]) -> Rows:
    records = _Chosen(rows.records, count, place)
    return dataclasses.replace(rows, records=records, digest=f"{rows.digest} {name} {count}")


def _less(counts: Counts, held: Counts) -> Counts:
    return dataclasses.replace(
        counts,
        texts=counts.texts - held.texts,
        rows=counts.rows - held.rows,
        tokens={name: number - held.tokens[name] for name, number in counts.tokens.items()},
    )


class _Chosen(Sequence[bytes]):
    """`count` records of a sequence, by a rule of which ones."""

    def __init__(self, records: Sequence[bytes], count: int, place: Callable[[int], int]):
        self._records, self._count, self._place = records, count, place

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: Any) -> Any:
        return self._records[self._place(range(self._count)[i])]
