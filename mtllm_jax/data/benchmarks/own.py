"""A user's own task, from files with the columns text[, text_pair | choices], label, language.

`text` alone is a classification of single texts; with `text_pair`, one of pairs. With `choices` (as
`read_rows` takes them) it is multiple choice: `text` is the context, a column `question` may stand
beside it, and the label is the number of the right choice, from 1.
"""

from collections.abc import Collection
from pathlib import Path

from mtllm_jax.data.benchmarks.benchmark import Benchmark, sample
from mtllm_jax.data.benchmarks.layouts import COLUMNS, Kind, Row
from mtllm_jax.data.files import label_names, read_rows
from mtllm_jax.languages import ENGLISH, LANGUAGES


def read_own(
    train: str | Path,
    test: str | Path,
    *,
    dev: str | Path = "",
    name: str = "",
    english: str = ENGLISH,
    readable: Collection[str] = tuple(LANGUAGES),
    limit: int | None = None,
) -> Benchmark:
    """train, dev: rows in `english`, where the column `language` may be absent. test: rows in
    languages that are `readable`. name: by default that of the training file. limit: as of
    `read_benchmark`.

    Raises ValueError as `read_rows` does, for one label alone, for files of different kinds, and
    for test rows in `english` alone.
    """
    kind, labels, rows = read_labelled(train, (english,), english)
    if len(labels) < 2:
        raise ValueError(f"{train} holds one label alone, {labels[0]!r}.")
    read = {"train": rows, "dev": [], "test": []}
    for split, path, languages in (("dev", dev, (english,)), ("test", test, readable)):
        if not path:
            continue
        other, read[split] = _read(path, labels, languages, english if split == "dev" else None)
        if other != kind:
            raise ValueError(f"{path} holds rows of the kind {other}, and {train} of {kind}.")
    if all(row["language"] == english for row in read["test"]):
        raise ValueError(
            f"{test} holds rows in {english} alone; what is evaluated are other languages."
        )
    return Benchmark(
        name=name or Path(train).name.split(".")[0],
        kind=kind,
        labels=labels,
        train=read["train"],
        dev=read["dev"],
        test=sample(read["test"], limit) if limit is not None else read["test"],
        licence="your own files",
    )


def read_labelled(
    path: str | Path, languages: Collection[str], english: str | None = None
) -> tuple[Kind, tuple[str, ...], list[Row]]:
    """The rows of one file in the `languages`, their kind, and all labels: those that occur, or the
    numbers of the choices. english: the language of rows that do not say theirs; None where they
    must. ValueError as `read_rows`."""
    kind, rows = _read(path, None, languages, english)
    if kind != "choice":
        return kind, label_names(rows), rows
    labels = tuple(str(i) for i in range(1, len(rows[0]["choices"]) + 1))
    return kind, labels, _read(path, labels, languages, english)[1]


def _read(
    path: str | Path,
    labels: tuple[str, ...] | None,
    languages: Collection[str],
    english: str | None,
) -> tuple[Kind, list[Row]]:
    """english: the language of rows that do not say theirs; None where they must."""
    rows = read_rows(
        path,
        columns={"text": str, "label": str, "language": str},
        optional=("id", "text_pair", "question", "choices"),
        labels=labels,
        languages=languages,
        defaults={"language": english} if english else None,
    )
    kind: Kind = "choice" if "choices" in rows[0] else "pair" if "text_pair" in rows[0] else "text"
    if kind == "choice":
        rows = [{"question": ""} | row | {"context": row["text"]} for row in rows]
    wanted = ("id", "language", "label", *COLUMNS[kind])
    return kind, [{name: row[name] for name in wanted} for row in rows]
