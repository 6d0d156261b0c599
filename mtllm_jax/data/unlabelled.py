"""Rows to be answered, read from a file a window at a time: files may be larger than memory.

A row has `text`, `language` and perhaps `text_pair`, or what `choice_row` reads; whatever else it
holds is carried through. What is wrong with a file as such (its kind, its columns, a line that is
no JSON, a row with too few cells) is an error; what is wrong with one row is the row's `problem`.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mtllm_jax.data import formats
from mtllm_jax.data.benchmarks import source_language
from mtllm_jax.data.files import ROW_SUFFIXES, cell_value, check_columns

_READ = ("text", "text_pair", "language")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of the file: its line (in Parquet: row), its cells, and why it has no answer, or ""."""

    line: int
    cells: dict[str, Any]
    problem: str


@dataclasses.dataclass(frozen=True)
class Window:
    """Entries that follow each other. place: of the window, from 0."""

    place: int
    entries: list[Entry]

    @property
    def size(self) -> int:
        return len(self.entries)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The cells of those that can be answered."""
        return [entry.cells for entry in self.entries if not entry.problem]


@dataclasses.dataclass
class Scan:
    """What one look at all of a file finds. types: of the cells of each column but None; a
    whole number beyond 64 bits counts as text."""

    rows: int
    types: dict[str, set[type]]


def scan(
    path: Path,
    *,
    required: Sequence[str],
    reserved: Collection[str],
    instead: Mapping[str, str] = {},
) -> Scan:
    """Read all of a file, to know at the door what is wrong with it as such.

    required: columns of the first row. instead: those that may take their place. reserved: columns
    that it may not have, as answers are called so. Raises ValueError as `formats.records`, for a
    first row without a required column, and for a file without rows.
    """
    formats.check_file(path, ROW_SUFFIXES)
    found = Scan(0, {})
    for line, cells in formats.stream(path):
        if not found.rows:
            wanted = [name for name in required if instead.get(name) not in cells]
            check_columns(cells, wanted, formats.header_at(path))
        for name in reserved:
            if name in cells:
                raise ValueError(
                    f"{formats.at(path, line)}: there is a column {name!r}, which is what answers"
                    " are called; rename it."
                )
        found.rows += 1
        for name, cell in cells.items():
            types = found.types.setdefault(name, set())
            if cell is not None:
                huge = isinstance(cell, int) and abs(cell) >= 2**63
                types.add(str if huge else type(cell))
    if not found.rows:
        raise ValueError(f"{path} holds no rows.")
    return found


def windows(
    path: Path,
    size: int,
    *,
    language: str,
    readable: Collection[str],
    refusal: Callable[[dict[str, Any]], str] | None = None,
) -> Iterator[Window]:
    """All rows, `size` to a window. language: of rows that do not say theirs; "" = they must.
    readable: the languages that the model knows. refusal: of rows of multiple choice, why one has
    no answer, or ""; None for rows of texts."""

    @functools.cache  # to look for what is near an unknown one takes a while
    def problem(code: str) -> str:
        try:
            source_language(code, readable)
        except ValueError as error:
            return str(error)
        return ""

    return in_windows(
        path, size, lambda line, cells: _entry(line, cells, language, problem, refusal)
    )


def in_windows(
    path: Path, size: int, entry: Callable[[int, dict[str, Any]], Entry]
) -> Iterator[Window]:
    """The entries that are made of all lines and cells, `size` to a window."""
    rest = formats.stream(path)
    for place in itertools.count():
        entries = [
            entry(line, {name: _json_cell(cell) for name, cell in cells.items()})
            for line, cells in itertools.islice(rest, size)
        ]
        if not entries:
            return
        yield Window(place, entries)


def _entry(
    line: int,
    cells: dict[str, Any],
    language: str,
    problem: Callable[[str], str],
    refusal: Callable[[dict[str, Any]], str] | None,
) -> Entry:
    if language and cells.get("language") in (None, ""):
        cells["language"] = language
    try:
        for name in _READ if refusal is None else ("language",):
            if name not in cells and name != "text_pair":
                raise ValueError(f"row: there is no {name}.")
            if name in cells:
                cell = "" if cells[name] is None else cells[name]
                cells[name] = cell_value(cell, str, name, "row")
    except ValueError as error:
        return Entry(line, cells, str(error).removeprefix("row: ").rstrip("."))
    reason = problem(cells["language"])
    if refusal is not None and not reason:
        reason = refusal(cells)
    return Entry(line, cells, reason)


def _json_cell(cell: Any) -> Any:
    """The cell as JSON can hold it: no NaN, no dates."""
    if isinstance(cell, float):
        return cell if math.isfinite(cell) else None
    if isinstance(cell, dict):
        return {str(name): _json_cell(inner) for name, inner in cell.items()}
    if isinstance(cell, list):
        return [_json_cell(inner) for inner in cell]
    return cell if isinstance(cell, str | int | None) else str(cell)
