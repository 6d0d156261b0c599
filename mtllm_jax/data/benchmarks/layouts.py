"""Where the files of a published data set lie, how its rows are written, and reading them."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mtllm_jax.data.files import read_rows

Kind = Literal["text", "pair", "choice"]
Split = Literal["train", "dev", "test"]
Row = dict[str, Any]
Files = dict[tuple[str, str], list[Path]]  # by split and FLORES-200 code

COLUMNS: Mapping[Kind, Mapping[str, type]] = {
    "text": {"text": str},
    "pair": {"text": str, "text_pair": str},
    "choice": {"context": str, "question": str, "choices": list},
}
_CODE = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")
_PART = re.compile(r"\d+-of-(\d+)(-[0-9a-f]+)?")  # of a Parquet file on the hub: 00000-of-00001


@dataclass(frozen=True)
class Layout:
    """One form in which a data set is published.

    pattern: the place of its files below the folder, with {split}, {language} and {part} where
    their names have these. splits: ours, and what they are called there. languages: theirs, and
    FLORES-200 codes; None where these are the same. language: the one of files whose names have no
    {language}. names, values, blank, quoting: as `read_rows` has them; `names` may have "split" and
    "language" where columns say what they are; rows with a value that stands for "" are left out.
    """

    pattern: str
    splits: Mapping[str, str]
    names: Mapping[str, str | Sequence[str]]
    languages: Mapping[str, str] | None = None
    language: str = ""
    values: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    blank: Collection[str] = ()
    quoting: bool = True

    @property
    def shown(self) -> str:
        """The pattern as errors name it: "data/<language>/<split>.tsv"."""
        return re.sub(r"\{(\w+)\}", r"<\1>", self.pattern)

    def files(self, folder: Path) -> Files:
        """Those that there are. ValueError where parts of one are missing."""
        ours = {theirs: split for split, theirs in self.splits.items()}
        groups = (f"(?P<{name}>[^/]+)" for name in ("split", "language", "part"))
        form = re.compile(
            _filled(re.escape(self.pattern).replace(r"\{", "{").replace(r"\}", "}"), *groups)
        )
        found: Files = {}
        for path in sorted(folder.glob(_filled(self.pattern, "*", "*", "*"))):
            match = form.fullmatch(path.relative_to(folder).as_posix())
            assert match is not None
            said = match.groupdict()
            if "part" in said and not _PART.fullmatch(said["part"]):
                continue
            splits = [ours.get(said["split"])] if "split" in said else [*self.splits]
            for split in filter(None, splits):
                for code in self._codes(said.get("language")):
                    found.setdefault((split, code), []).append(path)
        for paths in found.values():
            _check_parts(paths)
        return found

    def _codes(self, theirs: str | None) -> list[str]:
        """The languages that a file of this name holds rows in; none where it is of no language."""
        if theirs is None:
            return [self.language] if self.language else [*(self.languages or {}).values()]
        if self.languages is None:
            return [theirs] if _CODE.fullmatch(theirs) else []
        return [self.languages[theirs]] if theirs in self.languages else []

    def read(
        self, files: Files, kind: Kind, labels: Sequence[str], split: str, codes: Sequence[str]
    ) -> list[Row]:
        """The rows of one split, languages in the order of `codes`, each in that of its files."""
        columns = {"label": str, **COLUMNS[kind]}
        columns |= dict.fromkeys((n for n in ("id", "split", "language") if n in self.names), str)
        values = {"label": dict(zip(labels, labels, strict=True)), **self.values}
        if "language" in self.names:
            values["language"] = dict(self.languages or {})
        if "split" in self.names:
            values["split"] = {name: ours for ours, name in self.splits.items()}
        read: dict[Path, list[Row]] = {}
        rows: list[Row] = []
        for code in codes:
            of_language: list[Row] = []
            for path in files[split, code]:
                if path not in read:
                    read[path] = read_rows(
                        path,
                        columns=columns,
                        optional=(),
                        names=self.names,
                        values=values,
                        blank=self.blank,
                        quoting=self.quoting,
                    )
                of_language += [
                    row
                    for row in read[path]
                    if row.get("language", code) == code and row.get("split", split) == split
                ]
            for number, row in enumerate(of_language):
                if all(row[name] for name in self.values):
                    id_ = row["id"] if "id" in self.names else str(number)
                    cells = {name: row[name] for name in COLUMNS[kind]}
                    rows.append({"id": id_, "language": code, "label": row["label"], **cells})
        return rows


def _filled(pattern: str, split: str, language: str, part: str) -> str:
    return pattern.format(split=split, language=language, part=part)


def _check_parts(paths: Sequence[Path]) -> None:
    """All parts of a Parquet file are there, or it is one file."""
    match = re.search(_PART, paths[0].name)
    expected = int(match[1]) if match else 1
    if len(paths) != expected:
        raise ValueError(
            f"{paths[0]} is one of {expected} parts, and there are {len(paths)} beside each other."
        )
