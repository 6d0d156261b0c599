"""Texts of evaluations, so that none of them is trained on."""

import csv
import functools
import hashlib
import io
import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mtllm_jax.data import formats

_LEAST_BYTES = 30  # of a line that counts by itself: shorter ones, as "Yes.", stand anywhere
_ENDINGS = (".py", ".sh", ".md", ".bleu", ".comet", ".gz", ".zip", ".arrayrecord")


class HeldOut:
    """A set of texts. Two are the same that differ in case, blanks, punctuation or Unicode's forms
    (NFKC) alone.

    holds: whether a text is held out, or a line of it that is long enough to tell.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._digests = {_digest(form) for text in texts if (form := normalised(text))}
        # A row's texts are asked for again with each target.
        self.holds = functools.lru_cache(4096)(self._holds)

    def __len__(self) -> int:
        return len(self._digests)

    def digest(self) -> str:
        """Another one for other texts."""
        return hashlib.sha256(b"".join(sorted(self._digests))).hexdigest()[:16]

    def _holds(self, text: str) -> bool:
        if not self._digests:
            return False
        whole = normalised(text)
        if whole and _digest(whole) in self._digests:
            return True
        lines = (normalised(line) for line in text.splitlines())
        return any(
            _digest(line) in self._digests for line in lines if len(line.encode()) >= _LEAST_BYTES
        )


def normalised(text: str) -> str:
    """Letters, marks and digits in lower case, one blank in the place of all between them."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.translate(_BLANKS).split())


class _Blanks(dict[int, int]):
    """For `str.translate`: a blank for each character that is no letter, mark or digit."""

    def __missing__(self, code: int) -> int:
        self[code] = code if unicodedata.category(chr(code))[0] in "LMN" else ord(" ")
        return self[code]


_BLANKS = _Blanks()


def _digest(form: str) -> bytes:
    return hashlib.blake2b(form.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def read_texts(path: str | Path) -> Iterator[str]:
    """All texts of a file, or of the files below a folder: cells of .jsonl, .csv, .tsv and
    .parquet, lines of others. ValueError for what is not there or cannot be read."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist.")
    if path.is_file():
        yield from _file_texts(path)
        return
    inside = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    files = [p for p in inside if p.suffix not in _ENDINGS]
    if not files:
        raise ValueError(f"{path} holds no file of texts.")
    for file in files:
        yield from _file_texts(file)


def _file_texts(path: Path) -> Iterator[str]:
    suffix = formats.suffix_of(path)
    if suffix == ".parquet":
        for _, cells in formats.stream(path):
            yield from _strings(cells)
    elif suffix in (".jsonl", ".jsonl.gz"):
        for _, cells in formats.json_records(path):
            yield from _strings(cells)
    elif suffix == ".json":
        yield from _strings(json.loads(path.read_text(encoding="utf-8")))
    elif suffix == ".csv":
        text = "".join(line for _, line in formats.lines(path))
        for row in csv.reader(io.StringIO(text, newline="")):
            yield from row
    else:
        for _, line in formats.lines(path):
            for cell in line.rstrip("\r\n").split("\t"):
                yield cell
                if cell.startswith('"') and cell.endswith('"'):
                    yield cell[1:-1].replace('""', '"')


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
