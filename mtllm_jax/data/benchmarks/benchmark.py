"""A published benchmark, read and checked: English rows to train on, rows in all languages to test.

Rows are dicts of strings: "id", "language" (a FLORES-200 code), "label", and by kind "text" (text),
"text" and "text_pair" (pair), or "context", "question" and the list "choices" (choice). The label
of a choice is its number from 1, as the model reads it.
"""

import collections
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mtllm_jax.data.benchmarks.codes import STAND_INS
from mtllm_jax.data.benchmarks.layouts import Files, Kind, Layout, Row, Split, is_blank
from mtllm_jax.languages import check_language

_SEED = 0  # of `sample`, for all benchmarks and runs


@dataclass(frozen=True)
class Benchmark:
    """labels: in the order of their class numbers; the rows of each language have all of them.

    translated: the test rows of languages other than English that translations were given of, with
    English in the place of their texts: what translate-test reads. notes: what a reader of results
    should know, a sentence each.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...]
    train: Sequence[Row]
    dev: Sequence[Row]
    test: Sequence[Row]
    licence: str
    translated: Sequence[Row] = ()
    notes: tuple[str, ...] = ()

    @property
    def languages(self) -> tuple[str, ...]:
        """Of the test rows, in their order."""
        return tuple(dict.fromkeys(row["language"] for row in self.test))


@dataclass(frozen=True)
class Published:
    """What is known of a benchmark before its files are read.

    source: where it is published. english_layouts: of the rows in English that are not in
    `layouts`; they are looked for in the benchmark's folder, then in another. parallel: rows of one
    id are translations of each other, and so have one label. amend: (test rows in other languages,
    those in English) → corrected ones. translate: (folder, test rows as the files have them) →
    those that the folder has translations of, in English. translated_by: a sentence on these.
    """

    kind: Kind
    labels: tuple[str, ...]
    layouts: Sequence[Layout]
    source: str
    licence: str
    english_layouts: Sequence[Layout] = ()
    english_source: str = ""
    parallel: bool = True
    amend: Callable[[Sequence[Row], Sequence[Row]], list[Row]] | None = None
    translate: Callable[[Path, Sequence[Row]], list[Row]] | None = None
    translated_by: str = ""
    notes: tuple[str, ...] = ()


def read_published(
    name: str,
    published: Published,
    path: str | Path,
    *,
    languages: Sequence[str] | Literal["all"],
    english: str,
    english_data: str | Path | None,
    translations: str | Path | None,
    splits: Sequence[Split],
    limit: int | None,
) -> Benchmark:
    """`read_benchmark`, of one whose particulars are given."""
    reader = _Reader(name, published, Path(path), english, english_data)
    read = {split: reader.english_rows(split) for split in splits}
    translated: list[Row] = []
    if "test" in read:
        foreign = reader.foreign_rows(languages, bool(read["test"]))
        if published.amend:
            foreign = published.amend(foreign, read["test"])
        if translations is not None:
            if published.translate is None:
                raise ValueError(f"translations is {translations}; there are none of {name}.")
            translated = published.translate(Path(translations), foreign)
        # Sorting is stable: within a language the order of its file stays.
        test = sorted(read["test"] + foreign, key=lambda row: row["language"])
        _check_labels(test, published.labels, f"{path}: the test rows")
        if published.parallel and "id" in reader.layout.names:
            _check_parallel(test, path)
        if limit is not None:
            test = sample(test, limit)
        kept = {(row["language"], row["id"]) for row in test}
        translated = [row for row in translated if (row["language"], row["id"]) in kept]
        read["test"] = test
    _check_labels(read.get("train", []), published.labels, f"{path}: the train rows")
    return Benchmark(
        name=name,
        kind=published.kind,
        labels=tuple(sorted(published.labels)),
        train=read.get("train", []),
        dev=read.get("dev", []),
        test=read.get("test", []),
        licence=published.licence,
        translated=translated,
        notes=(
            *published.notes,
            *([published.translated_by] if translated else []),
            *reader.notes,
            *_notes(read, translated),
        ),
    )


class _Reader:
    """A benchmark's files in the form that a folder has. ValueError where it has none."""

    def __init__(
        self,
        name: str,
        published: Published,
        folder: Path,
        english: str,
        english_data: str | Path | None,
    ):
        self.notes: list[str] = []
        self._name, self._published, self._english = name, published, english
        self._folders = [folder] if english_data is None else [folder, Path(english_data)]
        if english_data is not None and not published.english_source:
            raise ValueError(
                f"english_data is {english_data}; {name} has {english} rows of its own, it must be"
                " empty."
            )
        sources = (published.source, published.english_source)
        for path, source in zip(self._folders, sources, strict=False):
            if not path.is_dir():
                raise ValueError(f"{path} is not a folder; it must be one with {source}.")
        self.layout, self._files = self._find(folder)

    def _find(self, folder: Path) -> tuple[Layout, Files]:
        layouts = self._published.layouts
        for layout in layouts:
            files = layout.files(folder)
            if any(split == "test" for split, _ in files):
                return layout, files
        patterns = " or ".join(layout.shown for layout in layouts)
        raise ValueError(
            f"{folder} holds no test rows of {self._name}: these lie in {patterns} of"
            f" {self._published.source}."
        )

    def english_rows(self, split: Split) -> list[Row]:
        """Those of the benchmark itself, or of another; none for a test that there is not."""
        key = (split, self._english)
        if key in self._files:
            return self._read(self.layout, self._files, split, [self._english])
        layouts = [other for other in self._published.english_layouts if split in other.splits]
        for folder in self._folders:
            for layout in layouts:
                files = layout.files(folder)
                if key in files:
                    return self._read(layout, files, split, [self._english])
        if split == "test" and not layouts:
            return []
        if split in self.layout.splits:
            layouts.insert(0, self.layout)
        source = self._published.english_source
        elsewhere = f" of {source}, the folder english_data" if source else ""
        raise ValueError(
            f"{' and '.join(map(str, self._folders))}: there are no {split} rows of {self._name} in"
            f" {self._english}; these lie in {' or '.join(layout.shown for layout in layouts)}"
            f"{elsewhere}."
        )

    def foreign_rows(self, languages: Sequence[str] | Literal["all"], english: bool) -> list[Row]:
        """The test rows of all other languages, or of these. english: whether it has such rows."""
        codes = sorted({code for split, code in self._files if split == "test"} - {self._english})
        allowed = [*codes, self._english] if english else codes
        for code in [] if languages == "all" else languages:
            try:
                check_language(code, allowed)
            except ValueError as error:
                raise ValueError(f"{self._folders[0]}: {error}.") from None
        wanted = codes if languages == "all" else [code for code in codes if code in languages]
        return self._read(self.layout, self._files, "test", wanted)

    def _read(self, layout: Layout, files: Files, split: Split, codes: Sequence[str]) -> list[Row]:
        kind, labels = self._published.kind, self._published.labels
        rows, left_out = layout.read(files, kind, labels, split, codes)
        if left_out:
            self.notes.append(
                f"Left out, without a label or with a blank text: {left_out} of the {split} rows."
            )
        return rows


def _check_labels(rows: Iterable[Row], labels: Sequence[str], what: str) -> None:
    """ValueError unless the rows of each language have every label."""
    found: dict[str, set[str]] = collections.defaultdict(set)
    for row in rows:
        found[row["language"]].add(row["label"])
    for language, those in found.items():
        if missing := [label for label in labels if label not in those]:
            raise ValueError(
                f"{what} in {language} have no label {missing[0]!r}; they must have each of"
                f" {', '.join(map(repr, labels))}."
            )


def _check_parallel(rows: Iterable[Row], path: str | Path) -> None:
    first: dict[str, Row] = {}
    for row in rows:
        other = first.setdefault(row["id"], row)
        if row["label"] != other["label"]:
            raise ValueError(
                f"{path}: the row {row['id']!r} has the label {row['label']!r} in"
                f" {row['language']} and {other['label']!r} in {other['language']}; they must be"
                " the same."
            )


def sample(rows: Sequence[Row], limit: int) -> list[Row]:
    """At most `limit` rows of each language, in their order: labels in the proportions that they
    have in it, and the same ids wherever languages share them.

    Each id has a rank, always and everywhere the same; of each label the lowest are taken.
    """
    if limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1.")
    ids: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        ids.setdefault(row["language"], {}).setdefault(row["label"], []).append(row["id"])
    kept: set[tuple[str, str]] = set()
    for language, of_labels in ids.items():
        quotas = _quotas({label: len(those) for label, those in of_labels.items()}, limit)
        for label, those in of_labels.items():
            kept |= {(language, id_) for id_ in sorted(those, key=rank)[: quotas[label]]}
    return [row for row in rows if (row["language"], row["id"]) in kept]


def rank(id_: str) -> bytes:
    """Where an id stands in the one order that every sample is drawn by."""
    return hashlib.blake2b(f"{_SEED} {id_}".encode(), digest_size=16).digest()


def _quotas(counts: dict[str, int], limit: int) -> dict[str, int]:
    """How many of each label, by the largest remainder; of equal ones the first in the alphabet."""
    total = sum(counts.values())
    limit = min(limit, total)
    quotas = {label: count * limit // total for label, count in counts.items()}
    by_remainder = sorted(counts, key=lambda label: (-(counts[label] * limit % total), label))
    for label in by_remainder[: limit - sum(quotas.values())]:
        quotas[label] += 1
    return quotas


def _notes(read: dict[Split, list[Row]], translated: Sequence[Row]) -> Iterable[str]:
    for split, rows in read.items():
        blank = collections.Counter(row["language"] for row in rows if is_blank(row))
        for language, count in sorted(blank.items()):
            yield (
                f"Kept and scored, though a text is blank in the published files: {count} of the"
                f" {split} rows in {language}."
            )
    if blank_ones := sum(map(is_blank, translated)):
        yield f"Scored like others, though their text is blank: {blank_ones} of the translations."
    for code in dict.fromkeys(row["language"] for row in read.get("test", [])):
        if code in STAND_INS:
            yield f"An encoder without the code {code} is told {STAND_INS[code]} in its place."
