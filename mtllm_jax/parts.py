"""Work on windows of rows that can be stopped at any time, and done by several processes.

What a window comes to, one array, is a file of its own in a folder, named by the window's place and
a digest of its rows. It appears whole or not at all; a window that has its file is not done again.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath

from mtllm_jax import distributed
from mtllm_jax.runfolder import differing_fields, new_file, read_json, write_json

_ABOUT = "about.json"


class Window(Protocol):
    """Rows that are worked on together, as JSON can hold them. place: of the window, from 0. size:
    those of its rows that there is nothing to do for included."""

    @property
    def place(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def rows(self) -> Sequence[Mapping[str, Any]]: ...


@dataclasses.dataclass(frozen=True)
class Cut:
    """A window of rows that are in memory."""

    place: int
    rows: Sequence[Mapping[str, Any]]

    @property
    def size(self) -> int:
        return len(self.rows)


def cut(rows: Sequence[Mapping[str, Any]], size: int) -> Iterator[Cut]:
    """The windows of rows."""
    for place, begin in enumerate(range(0, len(rows), size)):
        yield Cut(place, rows[begin : begin + size])


def digest_of(value: Any) -> str:
    """Another one for another value. The value is one that JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


class Parts:
    """A folder of parts, new or begun before. All processes open it."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        """about: what the arrays are, as JSON values. ValueError where others are there."""
        self.folder = folder
        distributed.by_first(lambda: self._open(about))
        if not (folder / _ABOUT).exists():
            raise ValueError(
                f"{folder} does not hold what process 0 wrote to it; it must lie where all"
                " processes see it."
            )

    def _open(self, about: Mapping[str, Any]) -> None:
        path = epath.Path(self.folder / _ABOUT)
        if path.exists():
            if different := differing_fields(read_json(path), dict(about)):
                raise ValueError(
                    f"{self.folder} was begun with something else ({', '.join(different)}); remove"
                    " it to begin anew."
                )
            return
        try:
            write_json(path, about)
        except OSError as error:
            raise ValueError(f"{self.folder} cannot be written to: {error.strerror}.") from None

    def fill(
        self,
        windows: Iterable[Window],
        run: Callable[[Sequence[Mapping[str, Any]]], np.ndarray],
        told: Callable[[int], None] = lambda rows: None,
    ) -> None:
        """Work on the windows that have no part yet; of several processes each on its share, and
        all have theirs when it returns.

        told: what it shows progress with, the rows of this process's windows so far. ValueError for
        a window whose rows were others before.
        """
        there = dict(path.stem.split("-") for path in self.folder.glob("*.npy"))
        done = 0
        for window in windows:
            path = self._path(window)
            before = there.get(path.stem.split("-")[0])
            if before not in (None, path.stem.split("-")[1]):
                raise ValueError(
                    f"the rows have changed since {self.folder} was begun (those of window"
                    f" {window.place + 1} are others); remove it to begin anew."
                )
            if window.place % jax.process_count() != jax.process_index():
                continue
            if before is None:
                values = run(window.rows) if window.rows else np.zeros((0, 0), np.float32)
                with new_file(epath.Path(path)) as file:
                    np.save(file, values)
            done += window.size
            told(done)
        distributed.meet()

    def read(self, window: Window) -> np.ndarray:
        """What it came to. ValueError where there is none: its rows have changed."""
        path = self._path(window)
        if not path.exists():
            raise ValueError(
                f"the rows of window {window.place + 1} have changed while they were worked on;"
                f" remove {self.folder} to begin anew."
            )
        return np.load(path)

    def remove(self) -> None:
        shutil.rmtree(self.folder)

    def _path(self, window: Window) -> Path:
        return self.folder / f"{window.place:08}-{digest_of(list(window.rows))}.npy"
