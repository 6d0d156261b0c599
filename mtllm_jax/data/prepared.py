"""A folder of packed rows, as `launch/prepare.py` leaves it, read by random access.

    manifest.json                      what it was made from, its shards, what became of the texts
    rows-00000-of-00042.arrayrecord …  the records that `packing` describes, in the global order

While it is being made, each shard that is finished has a note beside it, what the manifest will say
of it. ArrayRecord keeps a checksum of each record and refuses one that does not match; the manifest
holds the sizes of the shards, looked at when the folder is opened, and their SHA-256.
"""

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
from etils import epath

from mtllm_jax.data.packing import ALIGNED, Counts, Rows
from mtllm_jax.runfolder import read_json

MANIFEST = "manifest.json"
FORMAT = 3

# What decides the rows of a text, as the manifest names it, and the config's field.
_FIELDS = {
    "source_length": "adaptation.training.source_length",
    "target_length": "adaptation.training.target_length",
    "packing": "adaptation.training.packing",
    "english": "english",
    "legacy_source_order": "legacy_source_order",
    "subword_sampling": "adaptation.subword_sampling",
    "samplings": "adaptation.samplings",
    "aligns": "adaptation.objective.per_token or bridge_start, which align tokens:",
}
_TOKENIZERS = {"source_tokenizer": "encoder", "target_tokenizer": "llm"}

# What is read of a manifest, and its kinds.
_SIDES = {"source": int, "target": int}
_COUNTS = {"texts": int, "dropped": int, "truncated": _SIDES, "rows": int, "tokens": _SIDES}
_MADE_FROM = dict.fromkeys((*_FIELDS, *_TOKENIZERS), object) | {
    "source_length": int,
    "target_length": int,
    "aligns": bool,
    "pad_ids": _SIDES,
}
_SHARD = {
    "rows": int,
    "most_texts": int,
    "bytes": int,
    "sha256": str,
    "counts": _COUNTS | {"tokens": dict},  # empty where no text had a token
}
_KINDS = {
    dict: "a group of fields",
    list: "a list",
    int: "a whole number",
    str: "a string",
    bool: "true or false",
}


class Prepared:
    """A finished folder. `rows` reads it; `counts` says what became of its texts."""

    def __init__(self, folder: str | os.PathLike[str]):
        """Raises ValueError for a folder that is unfinished, or whose shards are not all there."""
        self._folder = Path(folder)
        manifest = read_manifest(self._folder)
        shards = manifest["shards"]
        if not manifest["finished"]:
            made = sum(
                read_note(self._folder / shard_name(i, len(shards))) is not None
                for i in range(len(shards))
            )
            raise ValueError(
                f"{folder} is unfinished, with {made} of {len(shards)} shards; the command that"
                " began it, launch/prepare.py, goes on."
            )
        for i, shard in enumerate(shards):
            _check_size(self._folder / shard_name(i, len(shards)), shard["bytes"])
        self._manifest = manifest
        self.counts = Counts(**manifest["counts"])

    def check(self, wanted: Mapping[str, Any]) -> None:
        """Raise ValueError, naming the config's field, unless rows are what `wanted` would make.

        wanted: as `Maker.describe` tells. Other texts and another seed are no matter.
        """
        made_from = self._manifest["made_from"]
        for name, field in _FIELDS.items():
            if made_from[name] != wanted[name]:
                raise ValueError(
                    f"{self._folder} was prepared with config.{field} {made_from[name]!r}, here it"
                    f" is {wanted[name]!r}; set it so, or prepare again."
                )
        for name, field in _TOKENIZERS.items():
            if made_from[name] != wanted[name]:
                raise ValueError(
                    f"{self._folder} was prepared with another tokenizer than that of"
                    f" config.{field}; name that model, or prepare again."
                )

    def rows(self) -> Rows:
        """The rows, of which none is read yet."""
        manifest = self._manifest
        made_from, shards = manifest["made_from"], manifest["shards"]
        return Rows(
            records=Records(
                [
                    (os.fspath(self._folder / shard_name(i, len(shards))), shard["rows"])
                    for i, shard in enumerate(shards)
                ]
            ),
            lengths={side: made_from[f"{side}_length"] for side in ("source", "target")}
            | ({ALIGNED: made_from["source_length"]} if made_from["aligns"] else {}),
            pad_ids=made_from["pad_ids"],
            most_texts=max(shard["most_texts"] for shard in shards),
            counts=self.counts,
            digest=hashlib.sha256("".join(s["sha256"] for s in shards).encode()).hexdigest(),
        )


@dataclasses.dataclass(frozen=True)
class _Instruction:
    """What to read of a file, in the words of array_record."""

    filename: str
    take: int
    examples_in_shard: int
    skip: int = 0


class Records(Sequence[bytes]):
    """The records of several files by number. Files are opened when something is read of them."""

    def __init__(self, files: Sequence[tuple[str, int]]):
        """files: names and numbers of records."""
        self._source = grain.sources.ArrayRecordDataSource(
            [_Instruction(name, count, count) for name, count in files]
        )

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: Any) -> Any:
        """The record. ValueError where the file is damaged or gone."""
        i = range(len(self))[i]
        try:
            return self._source[i]
        except RuntimeError as error:
            raise ValueError(
                f"prepared row {i} cannot be read ({str(error).splitlines()[0]}); the command that"
                " prepared it, launch/prepare.py, makes damaged shards again."
            ) from None


def is_prepared(folder: str | os.PathLike[str]) -> bool:
    """Whether this is a folder of prepared rows, finished or not."""
    return (Path(folder) / MANIFEST).is_file()


def holds_rows(folder: str | os.PathLike[str]) -> bool:
    """Whether there are shards in it, which a folder of text has not, though it has a manifest."""
    return is_prepared(folder) and any(Path(folder).glob("rows-*-of-*.arrayrecord"))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest. ValueError where it is none, damaged, or of another version of this package."""
    path = epath.Path(folder / MANIFEST)
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path} is no manifest of prepared rows of format {FORMAT}.")
    try:
        _check_manifest(manifest)
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged, {error}; prepare the text again, with another --to."
        ) from None
    return manifest


def shard_name(shard: int, num_shards: int) -> str:
    """The file of shard number `shard`."""
    return f"rows-{shard:05}-of-{num_shards:05}.arrayrecord"


def note_of(file: Path) -> Path:
    """Where the note of a shard lies until the manifest is finished."""
    return file.with_suffix(".json")


def read_note(file: Path) -> dict[str, Any] | None:
    """The note of a shard, if there is one. A damaged one is none: its shard is made again."""
    note = note_of(file)
    if not note.is_file():
        return None
    try:
        about = read_json(epath.Path(note))
        _check_kind("the note", about, _SHARD)
    except ValueError:
        return None
    return about


def is_whole(file: Path, shard: Mapping[str, Any]) -> bool:
    """Whether the file is there, byte for byte as its line of the manifest says."""
    return (
        file.is_file() and file.stat().st_size == shard["bytes"] and sha256(file) == shard["sha256"]
    )


def sha256(file: Path) -> str:
    """Of the file's bytes, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _check_manifest(manifest: dict[str, Any]) -> None:
    form = {"finished": bool, "made_from": _MADE_FROM, "shards": list}
    _check_kind("", manifest, form)
    if not manifest["shards"]:
        raise ValueError("shards is empty")
    if manifest["finished"]:
        _check_kind("", manifest, {"counts": _COUNTS})
    for i, shard in enumerate(manifest["shards"]):
        if manifest["finished"] or shard is not None:
            _check_kind(f"shards[{i}]", shard, _SHARD)


def _check_kind(name: str, value: Any, form: Any) -> None:
    """Raise ValueError unless a JSON value has the form: a type, or a dict of its fields' forms."""
    kind = dict if isinstance(form, dict) else form
    if value is None:
        raise ValueError(f"{name} is missing")
    if not isinstance(value, kind):
        raise ValueError(f"{name} is not {_KINDS[kind]}")
    if isinstance(form, dict):
        for field, inner in form.items():
            _check_kind(f"{name}.{field}".lstrip("."), value.get(field), inner)


def _check_size(file: Path, size: int) -> None:
    if not file.is_file():
        problem = "is missing"
    elif (there := file.stat().st_size) != size:
        problem = f"has {there} bytes instead of {size}"
    else:
        return
    raise ValueError(f"{file} {problem}; the command that made it, launch/prepare.py, mends it.")
