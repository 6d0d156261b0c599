"""A user's files → rows of a labelled task.

Files are read whole and checked whole before anything is trained: each error is one sentence that
names the file and the line where the row starts (in Parquet, which has no lines, the row). Lines
and rows count from 1.
"""

import difflib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mtllm_jax.data import formats
from mtllm_jax.languages import LANGUAGES, check_language

ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".tsv", ".parquet")
_CHOICES = tuple(f"choice{i}" for i in range(1, 27))


def read_rows(
    path: str | Path,
    *,
    columns: Mapping[str, type],
    optional: Sequence[str] = ("id", "text_pair"),
    labels: Sequence[str] | None = None,
    languages: Collection[str] | None = None,
    defaults: Mapping[str, Any] | None = None,
    names: Mapping[str, str | Sequence[str]] | None = None,
    values: Mapping[str, Mapping[str, str]] | None = None,
    blank: Collection[str] = (),
    quoting: bool = True,
) -> list[dict[str, Any]]:
    """The rows of one .jsonl, .jsonl.gz, .csv, .tsv or .parquet file, in their order.

    columns: what must be there, by name, as str, int or list. A whole number is taken for a str,
    so that a label may be 1 or "1". The one list is "choices", two texts or more, as many in each
    row: a list in JSON and Parquet, the same as a text elsewhere, or columns choice1, choice2, ….
    optional: columns that may be absent. Other columns are left out. defaults: the value of a
    required column that the file does not have. labels, languages: what these two columns may
    hold; by default any label, and any FLORES-200 code.

    For files in a form of their own: names, what a column is called there (for choices: their
    columns; for a str: several, whose cells are joined by a blank). values: what a column may hold
    there, and what stands for it in the row. blank: the columns that may be empty. quoting: False
    for a CSV or TSV file in which a quote is a letter like others.

    Each row has the same keys. `id` is the file's, or the row's number from 0; it may not occur
    twice in a language (parallel rows share theirs across languages).

    Raises ValueError for a file that is missing, of another kind, damaged, empty or not UTF-8, and
    for a row with a missing column, an empty cell, too few or many cells, a value of a wrong type,
    an unknown label or language, or a repeated id.
    """
    path = Path(path)
    defaults, names = defaults or {}, names or {}
    values = dict(values or {})
    if labels is not None:
        values.setdefault("label", dict(zip(labels, labels, strict=True)))
    kinds = {name: list if name == "choices" else str for name in optional} | dict(columns)
    required = [name for name in columns if name not in defaults]
    codes = tuple(LANGUAGES if languages is None else languages)
    used: dict[str, tuple[str, ...]] = {}  # the file's columns, by ours
    header: Collection[str] = ()
    rows: list[dict[str, Any]] = []
    first_lines: dict[tuple[Any, Any], int] = {}
    formats.check_file(path, ROW_SUFFIXES)
    wanted = [theirs for name in kinds for theirs in _candidates(name, names)]
    for line, cells in formats.records(path, wanted, quoting=quoting):
        where = formats.at(path, line)
        if not rows or cells.keys() != header:
            header_at = where if rows else formats.header_at(path)
            found = _find_columns(kinds, required, names, cells, header_at)
            if rows and found != used:
                _raise_at_other_columns(path, line, found, used)
            header, used = cells.keys(), found
        row = {}
        for name, theirs in used.items():
            given = [cells[column] for column in theirs]
            row[name] = _read_cells(given, kinds[name], theirs, where, name in blank)
            if name in values:
                row[name] = _stands_for(row[name], values[name], theirs[0], where)
        if rows and "choices" in row and len(row["choices"]) != len(rows[0]["choices"]):
            raise ValueError(
                f"{where}: there are {len(row['choices'])} choices, and {len(rows[0]['choices'])}"
                " in the first row; it must be as many in each."
            )
        if "language" in row:
            _check_language(row["language"], codes, where)
        if "id" in row:
            key = (row.get("language"), row["id"])
            if key in first_lines:
                first = f"{formats.unit(path)} {first_lines[key]}"
                raise ValueError(
                    f"{where}: the id {formats.show(row['id'])} was already given in {first}."
                )
            first_lines[key] = line
        absent = {name: value for name, value in defaults.items() if name not in row}
        rows.append({"id": str(len(rows))} | row | absent)
    if not rows:
        raise ValueError(f"{path} holds no rows.")
    return rows


def label_names(rows: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """The labels that occur, sorted: a class's number is its place here."""
    return tuple(sorted({row["label"] for row in rows}))


def check_columns(names: Collection[str], required: Sequence[str], where: str) -> None:
    """ValueError for a required column that is not among the names, with the nearest there is."""
    for name in required:
        if name not in names:
            there = ", ".join(repr(n) for n in names) or "none"
            raise ValueError(
                f"{where}: there is no column {name!r}; there is {there}{_nearest(name, names)}."
            )


def choice_row(cells: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The "context", "question" and "choices" of a row of multiple choice.

    The context is in the column context or text; a question need not be there; choices are as of
    `read_rows`. ValueError, beginning with `where`, for what is missing or of another kind.
    """
    columns = _choice_columns(cells, where)
    if not all(column in cells for column in columns):
        raise ValueError(f"{where}: there are no choices.")
    context = "context" if "context" in cells else "text"
    check_columns(cells, [context], where)
    question = cells.get("question")
    return {
        "context": cell_value(cells[context], str, context, where),
        "question": cell_value(question, str, "question", where, may_be_blank=True),
        "choices": _read_cells([cells[c] for c in columns], list, columns, where, False),
    }


def _choice_columns(cells: Collection[str], where: str) -> list[str]:
    """The columns that choices are in; the one that they would be in where there are none."""
    wanted = ["choices"] if "choices" in cells else [c for c in _CHOICES if c in cells]
    if wanted not in (["choices"], [*_CHOICES[: len(wanted)]]):
        raise ValueError(
            f"{where}: there are the columns {', '.join(map(repr, wanted))}; choices must be"
            " numbered from 1 on."
        )
    return wanted or ["choices"]


def _check_language(code: str, allowed: Sequence[str], where: str) -> None:
    if len(allowed) == 1 and code not in allowed:
        raise ValueError(f"{where}: the language is {formats.show(code)}, it must be {allowed[0]}.")
    try:
        check_language(code, allowed)
    except ValueError as error:
        raise ValueError(f"{where}: {str(error).rstrip('.')}.") from None


def _candidates(name: str, names: Mapping[str, str | Sequence[str]]) -> Sequence[str]:
    """The columns that `name` may be read from."""
    if name == "choices" and name not in names:
        return [name, *_CHOICES]
    theirs = names.get(name, name)
    return [theirs] if isinstance(theirs, str) else theirs


def _find_columns(
    kinds: Mapping[str, type],
    required: Sequence[str],
    names: Mapping[str, str | Sequence[str]],
    cells: Collection[str],
    where: str,
) -> dict[str, tuple[str, ...]]:
    """The columns that are there, by our name: of several that are one of ours, all or none."""
    found = {}
    for name in kinds:
        wanted = _candidates(name, names)
        if name == "choices" and name not in names:
            wanted = _choice_columns(cells, where)
        if name in required:
            check_columns(cells, wanted, where)
        if all(column in cells for column in wanted):
            found[name] = tuple(wanted)
    return found


def _raise_at_other_columns(
    path: Path, line: int, found: Mapping[str, object], used: Mapping[str, object]
) -> NoReturn:
    name = next(name for name in [*found, *used] if found.get(name) != used.get(name))
    there, not_there = (line, 1) if name in found else (1, line)
    raise ValueError(f"{path}: line {there} has the field {name!r} and line {not_there} has not.")


def _read_cells(
    cells: Sequence[object], kind: type, columns: Sequence[str], where: str, may_be_blank: bool
) -> Any:
    """One value of the kind. A list is in one cell, or its texts are in one each."""
    if kind is list and len(cells) == 1:
        (given,) = cells
        if isinstance(given, str):
            try:
                given = json.loads(given)
            except ValueError:
                pass  # said below
        if not isinstance(given, list) or len(given) < 2:
            raise ValueError(
                f"{where}: the {columns[0]} are {formats.show(cells[0])}, they must be a list of"
                " two texts or more."
            )
        cells, columns = given, [f"choice {i}" for i in range(1, len(given) + 1)]
    each = str if kind is list else kind
    read = [
        cell_value(cell, each, column, where, may_be_blank)
        for cell, column in zip(cells, columns, strict=True)
    ]
    return read if kind is list else read[0] if len(read) == 1 else " ".join(read)


def _stands_for(value: str, known: Mapping[str, str], name: str, where: str) -> str:
    if value not in known:
        there = ", ".join(map(repr, known))
        raise ValueError(
            f"{where}: the {name} is {formats.show(value)}, it must be one of"
            f" {there}{_nearest(value, known)}."
        )
    return known[value]


def cell_value(value: object, kind: type, name: str, where: str, may_be_blank: bool = False) -> Any:
    """A cell as str or int. ValueError for one that is empty, or cannot be that."""
    if may_be_blank and value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(
            f"{where}: the {name} is {formats.show(value)}, it must be a string or a whole number."
        )
    if not value.strip() and not may_be_blank:
        raise ValueError(f"{where}: the {name} is empty.")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell it, UTF-8 and so the tokenizers cannot
        raise ValueError(
            f"{where}: the {name} holds half of a surrogate pair, {formats.show(value)}."
        ) from None
    if kind is int:
        try:
            return int(value)
        except ValueError:
            raise ValueError(
                f"{where}: the {name} is {formats.show(value)}, it must be a whole number."
            ) from None
    return value


def _nearest(name: str, candidates: Iterable[str]) -> str:
    """ " (nearest: 'that')", or nothing where no candidate is like `name`, whatever the case."""
    by_lower = {candidate.lower().strip(): candidate for candidate in candidates}
    close = difflib.get_close_matches(name.lower().strip(), by_lower, 1)
    return f" (nearest: {by_lower[close[0]]!r})" if close else ""
