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
from mtllm_jax.data.benchmarks.layouts import Files, Kind, Layout, Row, Split
from mtllm_jax.languages import ENGLISH, check_language

_SEED = 0  # of `sample`, for all benchmarks and runs


@dataclass(frozen=True)
class Benchmark:
    """labels: in the order of their class numbers; each language's rows have all of them.

    translated: the test rows in other languages than English that there are translations of, with
    English in the place of their texts: what translate-test reads. notes: what a reader of results
    should know, one sentence each.
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

    source: where it is published. english_layouts: of rows in English that are not among
    `layouts`, below the benchmark's folder or another. amend: (rows in other languages, those in
    English) → corrected rows.
    """

    kind: Kind
    labels: tuple[str, ...]
    layouts: Sequence[Layout]
    source: str
    licence: str
    english_layouts: Sequence[Layout] = ()
    amend: Callable[[Sequence[Row], Sequence[Row]], list[Row]] | None = None


def read_published(
    name: str,
    published: Published,
    path: str | Path,
    *,
    languages: Sequence[str] | Literal["all"] = "all",
    english: str = ENGLISH,
    english_path: str | Path | None = None,
    splits: Sequence[Split] = ("train", "dev", "test"),
    limit: int | None = None,
) -> Benchmark:
    """`read_benchmark`, of one whose particulars are given."""
    folder = Path(path)
    layout, files = _find(name, published, folder)
    english_folders = [folder] + ([Path(english_path)] if english_path is not None else [])
    read: dict[Split, list[Row]] = {"train": [], "dev": [], "test": []}
    for split in splits:
        read[split] = _read_english(name, published, layout, files, english_folders, split, english)
    if "test" in splits:
        codes = sorted(code for split, code in files if split == "test" and code != english)
        if languages != "all":
            for code in languages:
                try:
                    check_language(code, [english, *codes])
                except ValueError as error:
                    raise ValueError(f"{folder}: {error}.") from None
            codes = [code for code in codes if code in languages]
        foreign = layout.read(files, published.kind, published.labels, "test", codes)
        if published.amend:
            foreign = published.amend(foreign, read["test"])
        read["test"] = sorted(read["test"] + foreign, key=lambda row: row["language"])
    check_labels(read["train"], published.labels, "train")
    check_labels(read["test"], published.labels, "test")
    check_parallel(read["test"])
    return Benchmark(
        name=name,
        kind=published.kind,
        labels=tuple(sorted(published.labels)),
        train=read["train"],
        dev=read["dev"],
        test=sample(read["test"], limit) if limit is not None else read["test"],
        licence=published.licence,
        notes=tuple(_notes(read)),
    )


def _find(name: str, published: Published, folder: Path) -> tuple[Layout, Files]:
    """The form that the folder has. ValueError where it has none."""
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a folder; {name} is read from one with {published.source}."
        )
    for layout in published.layouts:
        files = layout.files(folder)
        if any(split == "test" for split, _ in files):
            return layout, files
    patterns = " or ".join(layout.shown for layout in published.layouts)
    raise ValueError(
        f"{folder} holds no test rows of {name}, which lie in {patterns} of {published.source}."
    )


def _read_english(
    name: str,
    published: Published,
    layout: Layout,
    files: Files,
    folders: Sequence[Path],
    split: Split,
    english: str,
) -> list[Row]:
    """The rows of a split in `english`; none where only a test could have had them."""
    if (split, english) in files:
        return layout.read(files, published.kind, published.labels, split, [english])
    for folder in folders:
        for other in published.english_layouts:
            elsewhere = other.files(folder)
            if (split, english) in elsewhere:
                return other.read(elsewhere, published.kind, published.labels, split, [english])
    if split == "test" and not any("test" in other.splits for other in published.english_layouts):
        return []
    patterns = [
        other.shown for other in (layout, *published.english_layouts) if split in other.splits
    ]
    raise ValueError(
        f"{' and '.join(map(str, folders))} hold no {split} rows of {name} in {english}:"
        f" these lie in {' or '.join(patterns)}."
    )


def check_labels(rows: Iterable[Row], labels: Sequence[str], what: str) -> None:
    """ValueError unless the rows of each language have every label."""
    found: dict[str, set[str]] = collections.defaultdict(set)
    for row in rows:
        found[row["language"]].add(row["label"])
    for language, those in found.items():
        if missing := [label for label in labels if label not in those]:
            raise ValueError(
                f"the {what} rows in {language} have no label {missing[0]!r}, which others have."
            )


def check_parallel(rows: Iterable[Row]) -> None:
    """ValueError unless rows of one id, which are translations of each other, have one label."""
    first: dict[str, Row] = {}
    for row in rows:
        other = first.setdefault(row["id"], row)
        if row["label"] != other["label"]:
            raise ValueError(
                f"row {row['id']!r} has the label {row['label']!r} in {row['language']} and"
                f" {other['label']!r} in {other['language']}; they must be the same."
            )


def sample(rows: Sequence[Row], limit: int) -> list[Row]:
    """At most `limit` rows of each language, in their order: labels in the proportions they have
    in it, and wherever languages share ids, the same ids.

    Each id has a rank, the same always and everywhere; the rows of a label with the lowest are
    taken.
    """
    if limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1.")
    by_language: dict[str, list[Row]] = collections.defaultdict(list)
    for row in rows:
        by_language[row["language"]].append(row)
    kept: set[tuple[str, str]] = set()
    for language, of_language in by_language.items():
        ids: dict[str, list[str]] = collections.defaultdict(list)
        for row in of_language:
            ids[row["label"]].append(row["id"])
        quotas = _quotas({label: len(those) for label, those in ids.items()}, limit)
        for label, those in ids.items():
            kept |= {(language, id_) for id_ in sorted(those, key=_rank)[: quotas[label]]}
    return [row for row in rows if (row["language"], row["id"]) in kept]


def _rank(id_: str) -> bytes:
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


def _notes(read: dict[Split, list[Row]]) -> Iterable[str]:
    for split, rows in read.items():
        blank = collections.Counter(
            row["language"] for row in rows if not all(map(_is_said, row.values()))
        )
        for language, count in sorted(blank.items()):
            yield (
                f"{count} {split} rows in {language} have a blank text in the published files;"
                " they are kept and scored like others."
            )
    for code in dict.fromkeys(row["language"] for row in read["test"]):
        if code in STAND_INS:
            yield (f"An encoder without the code {code} is told {STAND_INS[code]} in its place.")


def _is_said(cell: str | list[str]) -> bool:
    return bool(cell.strip()) if isinstance(cell, str) else all(map(_is_said, cell))
