"""Rows → batches: a shuffled, endless, restartable grain pipeline, over any number of processes.

B rows of a batch that this process holds, N texts per row.

What global batch number n is follows from the rows, the seed and the size of a batch alone. Each
process reads its own rows of it and no others, and n says where a run stands, whatever the number
of processes and of their workers. (The position of grain's own iterators depends on both.)
"""

import dataclasses
import functools
import hashlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

Batch = dict[str, np.ndarray]

# Rows are small and may lie far away: what takes time is to wait for them, one after another.
_THREADS = 8


def batches(
    rows: Any,
    *,
    batch_rows: int,
    seed: int,
    mine: Sequence[int] | np.ndarray | slice | None = None,
    workers: int = 0,
    add: Callable[[Batch], Batch] | None = None,
) -> "Batches":
    """Iterator over batches of `batch_rows` rows, reshuffled every epoch.

    rows: a random-access source of dicts of equal shapes. mine: the places within each global
    batch that this process holds, in this order; None = all. workers: processes that read; 0 =
    threads of this one. add: maps a batch to a batch with more arrays (labels, teacher vectors).
    A batch may span two epochs; nothing is dropped.

    A position goes with its data: rows and `add` tell what they hold by a `digest`, a string, where
    they have one.
    """
    data = grain.MapDataset.source(rows).seed(seed).shuffle().repeat()
    places = np.arange(batch_rows)[slice(None) if mine is None else mine]
    digests = [getattr(part, "digest", "") for part in (rows, add)]
    return Batches(_Local(data, batch_rows, places.tolist()), workers, add, " ".join(digests))


class Batches:
    """What `batches` returns: the iterator, whose state is the number of the next global batch, and
    of which data."""

    def __init__(
        self,
        local: "_Local",
        workers: int,
        add: Callable[[Batch], Batch] | None,
        digest: str,
    ):
        self._local, self._workers, self._add, self._digest = local, workers, add, digest
        self._next = 0
        self._iterator: Any = None  # grain's, from batch `_next` on

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        """{name: [B, ...]}. RuntimeError where a worker has died."""
        if self._iterator is None:
            self._iterator = self._open()
        try:
            batch = next(self._iterator)
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            raise RuntimeError(
                "one of the workers that read rows was killed, as happens where memory is short; "
                f"the same command goes on from the last checkpoint ({error})"
            ) from None
        self._next += 1
        return batch if self._add is None else self._add(batch)

    def get_state(self) -> dict[str, Any]:
        return {"batch": self._next, "data": self._digest}

    def set_state(self, state: dict[str, Any]) -> None:
        """ValueError if the position is one in other data."""
        if state["data"] != self._digest:
            raise ValueError(
                "the data is not what it was at the last checkpoint: its texts, their labels or"
                " their tokens have changed. Put them back as they were, or begin in another"
                " workdir."
            )
        self.close()
        self._next = int(state["batch"])

    def close(self) -> None:
        """End threads and workers; the next batch starts them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _open(self) -> Any:
        data = grain.MapDataset.source(self._local)[self._next :]
        if not self._workers:
            return iter(data.to_iter_dataset(grain.ReadOptions(_THREADS, _THREADS)))
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain asks absl for settings, here left as they are
        read = data.to_iter_dataset(grain.ReadOptions(1, 1))
        options = grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=2)
        return iter(read.mp_prefetch(options, worker_init_fn=begin_worker))


class _Local:
    """This process's rows of global batch n, as grain's random-access sources are."""

    def __init__(self, data: grain.MapDataset, batch_rows: int, places: Sequence[int]):
        self._data, self._batch_rows, self._places = data, batch_rows, places

    def __len__(self) -> int:
        return sys.maxsize // self._batch_rows  # no run gets there

    def __getitem__(self, n: int) -> Batch:
        first = n * self._batch_rows
        rows = [self._data[first + place] for place in self._places]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def begin_worker(*_: int) -> None:
    """What a worker does first: leave Ctrl-C to the process that it works for, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A killed process does not end its workers: they would wait for it for ever.
    parent = multiprocessing.parent_process()
    assert parent is not None  # a worker has one
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def add_by_example(tables: Mapping[str, np.ndarray]) -> Callable[[Batch], Batch]:
    """An `add` for `batches`: for each table [num_texts, ...] its rows by `example`, [B, N, ...].

    A segment without a text gets the first row of the table; `example` == 0 says so.
    """

    return _ByExample(tables)


@dataclasses.dataclass(frozen=True)
class _ByExample:
    tables: Mapping[str, np.ndarray]

    def __call__(self, batch: Batch) -> Batch:
        place_BN = np.maximum(batch["example"] - 1, 0)
        return {**batch, **{name: table[place_BN] for name, table in self.tables.items()}}

    @functools.cached_property
    def digest(self) -> str:
        digest = hashlib.sha256()
        for table in self.tables.values():
            digest.update(np.ascontiguousarray(table).data)
        return digest.hexdigest()


def by_length(lengths: Sequence[int], batch_rows: int) -> list[np.ndarray]:
    """Indices of all texts, cut into batches of like length: the longest first.

    The first batch is then the largest, so that memory runs out at the start or not at all.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    return [order[i : i + batch_rows] for i in range(0, len(order), batch_rows)]
