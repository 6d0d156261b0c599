"""CSV, TSV, JSON lines, Parquet and plain lines → records that know where in the file they stand.

Each error is one sentence that names the file and the line where the record starts (in Parquet,
which has no lines, the row). Lines and rows count from 1.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_PIECE = 1024  # rows of a Parquet file that are in memory at a time
# Otherwise row groups are read whole, and kept until the file is closed.
_A_PIECE_AT_A_TIME: dict[str, Any] = {"buffer_size": 1 << 20, "pre_buffer": False}

Cells = dict[str, Any]


def records(
    path: Path, columns: Sequence[str], *, quoting: bool = True
) -> Iterator[tuple[int, Cells]]:
    """Lines (from 1) and cells by column name.

    Parquet reads `columns` alone: cells of its other columns are None. quoting: False for CSV and
    TSV files in which a quote is a letter like others.
    """
    suffix = suffix_of(path)
    if suffix in _DELIMITERS:
        return _csv_records(
            path, _DELIMITERS[suffix], csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE
        )
    if suffix == ".parquet":
        names, table = read_parquet(path, columns)
        unread = dict.fromkeys(names)
        return ((row, unread | cells) for row, cells in enumerate(table.to_pylist(), 1))
    return json_records(path)


def stream(path: Path) -> Iterator[tuple[int, Cells]]:
    """As `records`, with all columns, and no more of a file in memory than a piece of it."""
    if suffix_of(path) != ".parquet":
        yield from records(path, ())
        return
    row = 0
    try:
        with pq.ParquetFile(path, **_A_PIECE_AT_A_TIME) as file:
            _check_header(file.schema_arrow.names, str(path))
            for piece in file.iter_batches(_PIECE):
                for cells in piece.to_pylist():
                    row += 1
                    yield row, cells
    except UnicodeDecodeError:
        raise ValueError(f"{path}: text behind row {row} is not UTF-8.") from None
    except (OSError, pa.ArrowException) as error:
        raise _not_parquet(path, error) from None


def _csv_records(path: Path, delimiter: str, quoting: Any) -> Iterator[tuple[int, Cells]]:
    texts = (text for _, text in lines(path))
    # strict: a quote left open is an error at its row, not a cell that swallows what follows.
    reader = csv.reader(texts, delimiter=delimiter, quoting=quoting, strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        where = at(path, line)
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{where}: the quoting of this row is broken ({error}).") from None
        if not cells:
            raise ValueError(f"{where}: the line is empty.")
        if not header:
            header = cells
            _check_header(header, where)
            continue
        if len(cells) != len(header):
            raise ValueError(
                f"{where}: the row has {len(cells)} cells and the header has {len(header)}."
            )
        yield line, dict(zip(header, cells, strict=True))


def json_records(path: Path) -> Iterator[tuple[int, Cells]]:
    """Lines (from 1) and the JSON object on each."""
    for line, text in lines(path):
        where = at(path, line)
        if not text.strip():
            raise ValueError(f"{where}: the line is empty.")
        try:
            cells = json.loads(text)
        except json.JSONDecodeError as error:
            problem = f"{error.msg}, column {error.colno}"
            raise ValueError(f"{where}: the line is not JSON ({problem}).") from None
        except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limit
            raise ValueError(f"{where}: the line is not JSON that can be read ({error}).") from None
        if not isinstance(cells, dict):
            raise ValueError(f"{where}: the line is {show(cells)}, it must be a JSON object.")
        yield line, cells


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers and lines with their ends. In UTF-8 no other character holds a line's end."""
    try:
        with _opened(path) as file:
            for line, raw in enumerate(file, 1):
                try:
                    text = raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise ValueError(not_utf8(at(path, line), "line", error)) from None
                yield line, text.removeprefix("\ufeff") if line == 1 else text
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read ({error}).") from None


def _opened(path: Path) -> io.BufferedIOBase:
    """The file's bytes, out of what they are compressed by."""
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path)
        case ".zst":
            return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))
    return path.open("rb")


def parquet_column(path: Path, name: str) -> tuple[list[str], Iterator[pa.Array]]:
    """The names of all columns, and a piece at a time the cells of one of them, which is there.

    Raises ValueError, also as pieces are read, for what is no Parquet, and for text that is not
    UTF-8.
    """
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
    except (OSError, pa.ArrowException) as error:
        raise _not_parquet(path, error) from None
    _check_header(names, str(path))
    return names, _pieces(path, name)


def _pieces(path: Path, name: str) -> Iterator[pa.Array]:
    row = 0
    try:
        with pq.ParquetFile(path, **_A_PIECE_AT_A_TIME) as file:
            for piece in file.iter_batches(_PIECE, columns=[name]):
                cells = piece.column(0)
                try:
                    cells.validate(full=True)
                except pa.ArrowInvalid:
                    _raise_at_bad_row(path, name, cells, row)
                yield cells
                row += len(cells)
    except (OSError, pa.ArrowException) as error:
        raise _not_parquet(path, error) from None


def read_parquet(path: Path, columns: Sequence[str]) -> tuple[list[str], pa.Table]:
    """The names of all columns, and those of `columns` that there are, their UTF-8 checked."""
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _check_header(names, str(path))
            table = file.read([name for name in columns if name in names])
    except (OSError, pa.ArrowException) as error:
        raise _not_parquet(path, error) from None
    for name in table.column_names:
        try:
            table[name].validate(full=True)
        except pa.ArrowInvalid:
            _raise_at_bad_row(path, name, table[name])
    return names, table


def _not_parquet(path: Path, error: Exception) -> ValueError:
    reason = str(error).splitlines()[0].rstrip(".")
    return ValueError(f"{path} cannot be read as Parquet ({reason}).")


def _check_header(names: Sequence[str], where: str) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{where}: the header names the column {twice[0]!r} twice.")


def _raise_at_bad_row(
    path: Path, name: str, column: pa.ChunkedArray | pa.Array, before: int = 0
) -> NoReturn:
    """before: rows of the file that are not in the column."""
    for row, cell in enumerate(column, before + 1):
        try:
            cell.as_py()
        except UnicodeDecodeError as error:
            raise ValueError(not_utf8(at(path, row), name, error)) from None
    raise ValueError(f"{path}: the column {name!r} is damaged.")


def check_file(path: Path, suffixes: Sequence[str]) -> None:
    """Raises ValueError unless `path` is a file that ends in one of `suffixes`."""
    if not path.exists():
        raise ValueError(f"{path} does not exist.")
    if not path.is_file():
        raise ValueError(f"{path} is not a file.")
    if suffix_of(path) not in suffixes:
        raise ValueError(
            f"{path} ends in {suffix_of(path)!r}; the kinds that are read: {', '.join(suffixes)}."
        )


def suffix_of(path: Path) -> str:
    """The ending, in lower case, with what is compressed: ".csv", ".jsonl.gz"."""
    endings = [ending.lower() for ending in path.suffixes[-2:]]
    return "".join(endings if endings[-1:] in ([".gz"], [".zst"]) else endings[-1:])


def unit(path: Path) -> str:
    """What is counted in this file: "line", or "row" in Parquet, "record" in ArrayRecord."""
    return {".parquet": "row", ".arrayrecord": "record"}.get(suffix_of(path), "line")


def at(path: Path, line: int) -> str:
    """The place as errors name it: "rows.csv, line 7"."""
    return f"{path}, {unit(path)} {line}"


def header_at(path: Path) -> str:
    """Where column names stand: in the first line, in JSON with its first row; apart in Parquet."""
    return str(path) if suffix_of(path) == ".parquet" else at(path, 1)


def show(value: object) -> str:
    """The value as errors quote it, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def not_utf8(where: str, what: str, error: UnicodeDecodeError) -> str:
    """The sentence for text that is not UTF-8. what: "line", or the name of a column."""
    byte = error.object[error.start]
    return f"{where}: byte {error.start + 1} of the {what} (0x{byte:02x}) is not UTF-8."
