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


@dataclass(frozen=True)
class Layout:
    """One form in which a data set is published.

    pattern: the place of its files below the folder, with {split}, {language} and {part} where
    their names have these, and * for what repeats one of them. splits: ours, and what they are
    called there. languages: theirs, and FLORES-200 codes; None where these are the same. language:
    the one of files whose names have no {language}. names, values, blank, quoting: as `read_rows`
    has them; `names` may have "split" and "language" where columns say what they are; rows with a
    value that stands for "" are left out. keep_blank: whether rows with a blank text are kept.
    """

    pattern: str
    splits: Mapping[str, str]
    names: Mapping[str, str | Sequence[str]]
    languages: Mapping[str, str] | None = None
    language: str = ""
    values: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    blank: Collection[str] = ()
    keep_blank: bool = True
    quoting: bool = True

    @property
    def shown(self) -> str:
        """The pattern as errors name it: "data/<language>/<split>.tsv"."""
        return re.sub(r"\{(\w+)\}", r"<\1>", self.pattern)

    def files(self, folder: Path) -> Files:
        """Those that there are. ValueError where parts of one are missing."""
        ours = {theirs: split for split, theirs in self.splits.items()}
        form = re.escape(self.pattern).replace(r"\*", "[^/]+")
        form = form.replace(r"\{part\}", r"\d+-of-(?P<part>\d+)(-[0-9a-f]+)?")  # the hub's
        form = re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^/]+)", form)
        found: Files = {}
        parts: dict[tuple[str, str], int] = {}
        for path in sorted(folder.glob(re.sub(r"\{\w+\}", "*", self.pattern))):
            match = re.fullmatch(form, path.relative_to(folder).as_posix())
            if match is None:
                continue
            said = match.groupdict()
            splits = [ours.get(said["split"])] if "split" in said else [*self.splits]
            for split in filter(None, splits):
                for code in self._codes(said.get("language")):
                    found.setdefault((split, code), []).append(path)
                    parts[split, code] = int(said.get("part", 1))
        for key, paths in found.items():
            if len(paths) != parts[key]:
                raise ValueError(
                    f"{paths[0].parent}: there must be {parts[key]} of files like {paths[0].name},"
                    f" {len(paths)} were found."
                )
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
    ) -> tuple[list[Row], int]:
        """The rows of one split, languages in the order of `codes`, each in that of its files; and
        how many were left out."""
        read: dict[Path, list[Row]] = {}
        rows: list[Row] = []
        left_out = 0
        for code in codes:
            of_language: list[Row] = []
            for path in files[split, code]:
                if path not in read:
                    read[path] = self._read_file(path, kind, labels)
                of_language += [
                    row
                    for row in read[path]
                    if row.get("language", code) == code and row.get("split", split) == split
                ]
            if not of_language:
                raise ValueError(f"{path} holds no {split} rows in {code}.")
            for number, row in enumerate(of_language):
                id_ = row["id"] if "id" in self.names else str(number)
                cells = {name: row[name] for name in COLUMNS[kind]}
                made = {"id": id_, "language": code, "label": row["label"], **cells}
                if all(row[n] for n in self.values) and (self.keep_blank or not is_blank(made)):
                    rows.append(made)
                else:
                    left_out += 1
        return rows, left_out

    def _read_file(self, path: Path, kind: Kind, labels: Sequence[str]) -> list[Row]:
        """All rows of a file, of whatever split and language."""
        columns: dict[str, type] = {"label": str, **COLUMNS[kind]}
        columns |= dict.fromkeys((n for n in ("id", "split", "language") if n in self.names), str)
        values = {"label": dict(zip(labels, labels, strict=True)), **self.values}
        if "language" in self.names:
            values["language"] = dict(self.languages or {})
        if "split" in self.names:
            values["split"] = {theirs: ours for ours, theirs in self.splits.items()}
        return read_rows(
            path,
            columns=columns,
            optional=(),
            names=self.names,
            values=values,
            blank=self.blank,
            quoting=self.quoting,
        )


def is_blank(row: Row) -> bool:
    """Whether one of the row's texts is."""
    texts = (text for cell in row.values() for text in ([cell] if isinstance(cell, str) else cell))
    return not all(text.strip() for text in texts)
