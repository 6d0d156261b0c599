"""English texts for general adaptation, of one or several sources (`sources`), by number.

They are read once, a piece at a time, and kept as Arrow has them: in memory, or in a file of this
process where they are more than a little, of which the system holds in memory what it has room for.
"""

import dataclasses
import hashlib
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mtllm_jax.data.sources import Source, parse
from mtllm_jax.runfolder import scratch

_IN_MEMORY = 1 << 28  # bytes of texts, beyond which they are kept in a file
_SCHEMA = pa.schema([("text", pa.large_string())])


@dataclasses.dataclass(frozen=True)
class Read:
    """What was read of a source. name: the source's, without its folder. files: their names; none
    for a data set by its name. texts: that are kept. dropped: that were unwanted. sha256: of what
    is kept."""

    name: str
    files: tuple[str, ...]
    texts: int
    dropped: int
    sha256: str


class Texts(Sequence[str]):
    """Texts by number, those of each source after those of the source before.

    reads: the sources, in their order; `sizes`: how many texts there are of each.
    """

    def __init__(self, column: pa.ChunkedArray, sizes: Sequence[int], reads: Sequence[Read] = ()):
        self._column = column
        self.sizes = tuple(sizes)
        self.reads = tuple(reads)

    def __len__(self) -> int:
        return len(self._column)

    @overload
    def __getitem__(self, i: int) -> str: ...

    @overload
    def __getitem__(self, i: slice) -> list[str]: ...

    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[place] for place in range(len(self))[i]]
        return self._column[int(i)].as_py()

    @property
    def dropped(self) -> int:
        """Texts of all sources that were unwanted."""
        return sum(read.dropped for read in self.reads)

    def first(self, count: int) -> "Texts":
        """At most so many of each source."""
        begins = np.cumsum((0, *self.sizes)).tolist()
        sizes = [min(size, count) for size in self.sizes]
        parts = [
            self._column.slice(begin, size) for begin, size in zip(begins, sizes, strict=False)
        ]
        chunks = [chunk for part in parts for chunk in part.chunks]
        return Texts(pa.chunked_array(chunks, pa.large_string()), sizes, self.reads)

    def without(self, unwanted: Collection[str]) -> "Texts":
        """Those that are, blanks around them aside, none of these."""
        values = pa.array([text.strip() for text in unwanted], pa.large_string())
        trimmed = pc.utf8_trim_whitespace(self._column)
        kept_N = pc.invert(pc.is_in(trimmed, value_set=values)).to_numpy()
        parts = np.split(kept_N, np.cumsum(self.sizes)[:-1])
        return Texts(self._column.filter(kept_N), [int(part.sum()) for part in parts], self.reads)


def read_texts(*sources: str | Path, unwanted: Collection[str] = ()) -> Texts:
    """All texts of the sources but those that are, blanks around them aside, unwanted.

    Raises ValueError, with the file and line where there is one, for what cannot be read, and for a
    source with no text that is wanted.
    """
    values = pa.array([text.strip() for text in unwanted], pa.large_string())
    store = _Store()
    reads = [_read(parse(str(source)), values, store) for source in sources]
    return Texts(store.column(), [read.texts for read in reads], reads)


def texts_of(texts: Iterable[str]) -> Texts:
    """Texts that are in memory, of one source."""
    column = pa.chunked_array([pa.array(texts, pa.large_string())])
    return Texts(column, [len(column)])


def _read(source: Source, unwanted: pa.Array, store: "_Store") -> Read:
    files = source.files()
    kept = seen = 0
    lengths, content = hashlib.sha256(), hashlib.sha256()
    for piece in source.pieces():
        seen += len(piece)
        if len(unwanted):
            piece = piece.filter(
                pc.invert(pc.is_in(pc.utf8_trim_whitespace(piece), value_set=unwanted))
            )
        if len(piece):
            kept += len(piece)
            store.add(piece)
            _, ends, text = piece.buffers()
            ends_N = np.frombuffer(ends, np.int64)[piece.offset : piece.offset + len(piece) + 1]
            lengths.update(np.diff(ends_N).astype("<i8").tobytes())
            content.update(memoryview(text)[ends_N[0] : ends_N[-1]])
    if not kept:
        why = "that is not one of the test's or of a probe's" if seen else ""
        raise ValueError(f"{source.given} holds no text {why}".rstrip() + ".")
    return Read(
        name=source.given if source.kind != "files" else Path(source.given).name,
        files=tuple(file.name for file in files),
        texts=kept,
        dropped=seen - kept,
        sha256=hashlib.sha256(lengths.digest() + content.digest()).hexdigest(),
    )


class _Store:
    """Pieces of a column on their way in."""

    def __init__(self) -> None:
        self._pieces: list[pa.Array] = []
        self._bytes = 0
        self._path: Path | None = None
        self._writer: Any = None

    def add(self, piece: pa.Array) -> None:
        self._pieces.append(piece)
        self._bytes += piece.nbytes
        if self._bytes <= _IN_MEMORY:
            return
        try:
            if self._path is None:
                self._path = scratch() / "texts.arrow"
                self._writer = pa.ipc.new_file(self._path, _SCHEMA)
            for held in self._pieces:
                self._writer.write_batch(pa.record_batch([held], _SCHEMA))
        except OSError as error:
            raise ValueError(
                f"{self._bytes / 1e9:.1f} GB of texts cannot be kept in {self._path}"
                f" ({str(error).splitlines()[0]}); TMPDIR names another folder."
            ) from None
        self._pieces = []

    def column(self) -> pa.ChunkedArray:
        if self._path is None:
            return pa.chunked_array(self._pieces, pa.large_string())
        self._writer.close()
        column = pa.ipc.open_file(pa.memory_map(str(self._path))).read_all()["text"]
        self._path.unlink()  # what is mapped stays as long as it is used
        return column
