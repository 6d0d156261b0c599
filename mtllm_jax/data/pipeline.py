"""Rows → batches: a shuffled, endless, restartable grain pipeline.

B rows, N texts per row.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np

Batch = dict[str, np.ndarray]


def batches(
    rows: Any,
    *,
    batch_rows: int,
    seed: int,
    add: Callable[[Batch], Batch] | None = None,
) -> grain.DatasetIterator:
    """Iterator over batches of `batch_rows` rows, reshuffled every epoch.

    rows: a random-access source of dicts of equal shapes. add: maps a batch to a batch with more
    arrays (labels, teacher vectors). The iterator's state is its position: it can be saved and
    restored exactly. A batch may span two epochs; nothing is dropped.
    """
    data = grain.MapDataset.source(rows).seed(seed).shuffle().repeat().batch(batch_rows)
    if add is not None:
        data = data.map(add)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(data.to_iter_dataset(options))


def add_by_example(tables: Mapping[str, np.ndarray]) -> Callable[[Batch], Batch]:
    """An `add` for `batches`: for each table [num_texts, ...] its rows by `example`, [B, N, ...].

    A segment without a text gets the first row of the table; `example` == 0 says so.
    """

    def add(batch: Batch) -> Batch:
        place_BN = np.maximum(batch["example"] - 1, 0)
        return {**batch, **{name: table[place_BN] for name, table in tables.items()}}

    return add


def by_length(lengths: Sequence[int], batch_rows: int) -> list[np.ndarray]:
    """Indices of all texts, cut into batches of like length: the longest first.

    The first batch is then the largest, so that memory runs out at the start or not at all.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    return [order[i : i + batch_rows] for i in range(0, len(order), batch_rows)]
