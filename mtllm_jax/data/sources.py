"""Where English texts are from: what a source is called, and how it is read, a piece at a time.

    PATH[#FIELD]                                    a file, a folder (searched below too) or a glob
    tfds:NAME[/CONFIG][:VERSION][@SPLIT][#FIELD]    of TensorFlow Datasets, on disk already
    hf:NAME[/CONFIG][:REVISION][@SPLIT][#FIELD]     of Hugging Face `datasets`: a name on the hub,
                                                    or a folder, as it is or by `save_to_disk`

.txt holds a text a line (blank lines are skipped). .jsonl (also .gz and .zst) and .parquet have
them under FIELD, "text" where none is named: the layout of web-text collections. An .arrayrecord
file holds a text a record: a JSON object or a tf.train.Example with the FIELD, or UTF-8 and nothing
else; which of the three, its first record tells. SPLIT is "train" where none is named; "train[:N]"
are its first N rows. TensorFlow Datasets are looked for where that library does (TFDS_DATA_DIR).
"""

import dataclasses
import functools
import glob
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from array_record.python.array_record_module import ArrayRecordReader

from mtllm_jax.data import formats
from mtllm_jax.data.files import cell_value, check_columns

TEXT_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrayrecord")
FIELD, SPLIT = "text", "train"

_CHUNK = 1 << 23  # characters that are Python objects at a time, before Arrow packs their bytes
_RECORDS = 1024  # of a data set that are read at a time
_NAMED = re.compile(
    r"(?P<kind>tfds|hf):(?P<name>[^:@#]+)(:(?P<version>[^@#]+))?(@(?P<split>[^#]+))?"
    r"(#(?P<field>.+))?"
)
_UNREADABLE = (OSError, LookupError, ValueError, NotImplementedError)  # by the libraries
_FIRST_ROWS = re.compile(r"(?P<split>[^\[\]]+)(\[:(?P<count>\d+)\])?")


@dataclasses.dataclass(frozen=True)
class Source:
    """One source by its parts; "" for what was not named. given: as it was."""

    given: str
    kind: Literal["files", "tfds", "hf"]
    name: str
    version: str = ""
    split: str = ""
    field: str = ""

    def files(self) -> list[Path]:
        """The files that it stands for, sorted by path; none for a data set by its name.

        A folder must hold one kind of them, so that a licence or a second copy is not read as text.
        ValueError for a folder or glob without files of text.
        """
        return _text_files(self.name) if self.kind == "files" else []

    def pieces(self) -> Iterator[pa.Array]:
        """The texts, large_string [any number of them], in their order.

        A file's text that is empty is an error; rows without one in a data set, which its user
        cannot mend, are left out. ValueError names the file and the line, or the source and row.
        """
        match self.kind:
            case "tfds":
                return _tfds_texts(self)
            case "hf":
                return _hub_texts(self)
        files = self.files()
        return itertools.chain.from_iterable(_file_texts(file, self.field) for file in files)


def parse(given: str) -> Source:
    """What a source's name says. ValueError for one of no such form."""
    if given.startswith(("tfds:", "hf:")):
        if not (found := _NAMED.fullmatch(given)):
            kind = given.partition(":")[0]
            raise ValueError(f"{given} must be {kind}:NAME[/CONFIG][:VERSION][@SPLIT][#FIELD].")
        parts = {name: part or "" for name, part in found.groupdict().items()}
        return Source(given, **parts)  # type: ignore[arg-type]
    path, sign, field = given.rpartition("#")
    if sign and not Path(given).exists():
        return Source(given, "files", path, field=field)
    return Source(given, "files", given)


# ---------------------------------------------------------------- files


def _text_files(path: str) -> list[Path]:
    given = Path(path)
    if given.is_dir():
        below = ((file, file.relative_to(given).parts) for file in given.rglob("*"))
        files = [f for f, parts in below if not any(part.startswith(".") for part in parts)]
        files = [f for f in files if f.is_file() and formats.suffix_of(f) in TEXT_SUFFIXES]
        kinds = sorted({formats.suffix_of(file) for file in files})
        if len(kinds) > 1:
            raise ValueError(
                f"{path} holds {' and '.join(kinds)} files; name one kind, such as"
                f" {given / '**' / ('*' + kinds[0])}."
            )
    elif given.exists() or not any(sign in path for sign in "*?["):
        return [given]
    else:
        files = [Path(f) for f in glob.glob(path, recursive=True) if Path(f).is_file()]
    if not files:
        raise ValueError(f"{path} names no file; {', '.join(TEXT_SUFFIXES)} are read.")
    return sorted(files)


def _file_texts(path: Path, field: str) -> Iterator[pa.Array]:
    formats.check_file(path, TEXT_SUFFIXES)
    match formats.suffix_of(path):
        case ".parquet":
            pieces = _parquet_texts(path, field or FIELD)
        case ".arrayrecord":
            pieces = _packed(_record_texts(path, field))
        case ".txt":
            _check_no_field(path, field)
            lines = (text.rstrip("\r\n") for _, text in formats.lines(path) if text.strip())
            pieces = _packed(lines)
        case _:
            pieces = _packed(
                _text_of(cells, field or FIELD, formats.at(path, line))
                for line, cells in formats.json_records(path)
            )
    empty = True
    for piece in pieces:
        empty = False
        yield piece
    if empty:
        raise ValueError(f"{path} holds no text.")


def _packed(texts: Iterable[str]) -> Iterator[pa.Array]:
    """The texts as Arrow has them, some at a time."""
    held: list[str] = []
    size = 0
    for text in texts:
        held.append(text)
        size += len(text) + 1
        if size >= _CHUNK:
            yield pa.array(held, pa.large_string())
            held, size = [], 0
    if held:
        yield pa.array(held, pa.large_string())


def _text_of(cells: formats.Cells, field: str, where: str) -> str:
    check_columns(cells, [field], where)
    cell = cells[field]
    if isinstance(cell, bytes):
        cell = _decoded(cell, where)
    return cell_value(cell, str, field, where)


def _check_no_field(where: Path, field: str) -> None:
    if field:
        raise ValueError(f"{where} has no fields; leave #{field} out.")


def _parquet_texts(path: Path, field: str) -> Iterator[pa.Array]:
    names, pieces = formats.parquet_column(path, field)
    check_columns(names, [field], formats.header_at(path))
    before = 0
    for piece in pieces:
        if not pa.types.is_string(piece.type) and not pa.types.is_large_string(piece.type):
            raise ValueError(f"{path}: the column {field!r} is {piece.type}, it must be string.")
        texts = piece.cast(pa.large_string())
        if (row := pc.index(_blank(texts), True).as_py()) >= 0:
            raise ValueError(f"{formats.at(path, before + row + 1)}: the {field} is empty.")
        yield texts
        before += len(texts)


def _blank(texts: pa.Array) -> pa.Array:
    return pc.equal(pc.fill_null(pc.utf8_trim_whitespace(texts), ""), "")


# ---------------------------------------------------------------- records


def _record_texts(path: Path, field: str) -> Iterator[str]:
    try:
        reader = ArrayRecordReader(str(path))
        total = reader.num_records()
        cells_of: Callable[[bytes], formats.Cells] | None = None
        for begin in range(0, total, _RECORDS):
            records = reader.read(begin, min(begin + _RECORDS, total))
            for number, record in enumerate(records, begin + 1):
                where = formats.at(path, number)
                if number == 1:
                    cells_of = _reader_of(record)
                if cells_of is None:
                    _check_no_field(path, field)
                    yield cell_value(_decoded(record, where), str, FIELD, where)
                    continue
                try:
                    cells = cells_of(record)
                except ValueError as error:
                    raise ValueError(f"{where}: {error}.") from None
                yield _text_of(cells, field or FIELD, where)
        reader.close()  # which a file of something else, of no records, does not outlive
    except (RuntimeError, IndexError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"{path} cannot be read as ArrayRecord ({reason}).") from None


def _reader_of(record: bytes) -> Callable[[bytes], formats.Cells] | None:
    """How records like this one become cells; None where they are the text itself."""
    for cells_of in (_json_cells, _example_cells):
        try:
            if cells_of(record):
                return cells_of
        except ValueError:
            continue
    return None


def _json_cells(record: bytes) -> formats.Cells:
    try:
        cells = json.loads(record)
    except ValueError:
        raise ValueError("the record is not JSON, as the first one is") from None
    if not isinstance(cells, dict):
        raise ValueError(f"the record is {formats.show(cells)}, it must be a JSON object")
    return cells


def _example_cells(record: bytes) -> formats.Cells:
    """What a tf.train.Example holds by name: bytes, or None for what is not one string."""
    example, decode_error = _example()
    try:
        features = example.FromString(record).features.feature
    except decode_error:
        raise ValueError("the record is no tf.train.Example, as the first one is") from None
    texts = {name: feature.bytes_list.value for name, feature in features.items()}
    return {name: text[0] if len(text) == 1 else None for name, text in texts.items()}


@functools.cache
def _example() -> tuple[Any, type[Exception]]:
    # Late, as few need it and the import takes a while.
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example, DecodeError


def _decoded(text: bytes, where: str) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(formats.not_utf8(where, "text", error)) from None


# ---------------------------------------------------------------- data sets by name


def _tfds_texts(source: Source) -> Iterator[pa.Array]:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.read_only_builder import builder_from_files

    name = f"{source.name}:{source.version}" if source.version else source.name
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    try:
        data = builder_from_files(name).as_data_source(
            source.split or SPLIT, deserialize_method=raw
        )
    except _UNREADABLE as error:
        raise _unreadable(source, error) from None

    def texts() -> Iterator[str]:
        for begin in range(0, len(data), _RECORDS):
            places = range(begin, min(begin + _RECORDS, len(data)))
            for row, record in enumerate(data.data_source.__getitems__(list(places)), begin + 1):
                where = f"{source.given}, row {row}"
                cells, field = _example_cells(record), source.field or FIELD
                check_columns(cells, [field], where)
                text = _decoded(cells[field] or b"", where)
                if text.strip():
                    yield text

    return _packed(texts())


def _hub_texts(source: Source) -> Iterator[pa.Array]:
    field = source.field or FIELD
    for table in _hub_tables(source):
        check_columns(table.column_names, [field], source.given)
        column = table[field].combine_chunks()
        if not pa.types.is_string(column.type) and not pa.types.is_large_string(column.type):
            raise ValueError(
                f"{source.given}: the column {field!r} is {column.type}, it must be string."
            )
        texts = column.cast(pa.large_string())
        yield texts.filter(pc.invert(_blank(texts)))


def _hub_tables(source: Source) -> Iterator[pa.Table]:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{source.given} takes the package datasets: pip install 'mtllm_jax[datasets]'."
        ) from None
    wanted = _FIRST_ROWS.fullmatch(source.split or SPLIT)
    if wanted is None:
        raise ValueError(f"{source.given}: its split must be a name, or NAME[:N], the first rows.")
    path, split = Path(source.name), wanted["split"]
    try:
        if (path / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(path)[split]
        elif (path / "state.json").is_file():  # of one split, which has no name
            rows = datasets.load_from_disk(path)
        else:
            name, config = source.name, None
            if not path.is_dir() and name.count("/") == 2:
                name, _, config = name.rpartition("/")
            revision = source.version or None
            rows = datasets.load_dataset(
                name, config, split=split, revision=revision, streaming=True
            )
        if wanted["count"]:
            rows = rows.take(int(wanted["count"]))
        yield from rows.with_format("arrow").iter(_RECORDS)
    except _UNREADABLE as error:
        raise _unreadable(source, error) from None


def _unreadable(source: Source, error: Exception) -> ValueError:
    reason = str(error).strip().splitlines()[0].rstrip(".")
    return ValueError(f"{source.given} cannot be read ({reason}).")
