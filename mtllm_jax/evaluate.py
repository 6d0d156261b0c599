"""A model on labelled rows in many languages: what `launch/evaluate.py` does.

DIR/predictions/mt_llm.jsonl holds the answers as a run's folder does, results.json all scores,
results.md and report.html the same to read. Answers that are there are not made again.
"""

import dataclasses
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import pandas as pd
from etils import epath

import mtllm_jax
from mtllm_jax import api, distributed, scores
from mtllm_jax.data import formats
from mtllm_jax.data.benchmarks import STAND_INS, read_benchmark, source_language
from mtllm_jax.data.benchmarks.benchmark import sample
from mtllm_jax.data.benchmarks.layouts import Kind
from mtllm_jax.data.benchmarks.own import read_labelled
from mtllm_jax.data.files import check_columns, label_names
from mtllm_jax.languages import ENGLISH, LANGUAGES
from mtllm_jax.metrics import Console, Stage
from mtllm_jax.parts import Parts, cut, digest_of
from mtllm_jax.predict import answer, check_model, open_model
from mtllm_jax.report import Table, write_report
from mtllm_jax.resource_classes import resource_class
from mtllm_jax.results import (
    SYSTEM_NAMES,
    language_name,
    languages_of,
    results_table,
    script_name,
    system_name,
)
from mtllm_jax.runfolder import (
    differing_fields,
    is_remote,
    read_json,
    write_json,
    write_jsonl,
    write_text,
)
from mtllm_jax.tasks.task import TEXTS, Row

_SYSTEM = "mt_llm"
_PREDICTIONS = f"predictions/{_SYSTEM}.jsonl"
ABOUT = "evaluation.json"
_SCOPE = (
    "It shows how one trained model does on these rows. Intervals are of the rows: other rows would"
    " give other values within them, and another training seed may move them further. Means weigh"
    " all languages but English alike. Resource classes are those of Joshi et al. (2020)."
)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the rows are from: a published benchmark, or a file of one's own.

    task, data, english_data: as of `read_benchmark`. test: the file, with the columns text (and
    text_pair), label, language. languages: FLORES-200 codes; () = all that there are. limit: rows
    of each language; None = all.
    """

    task: str
    data: str
    english_data: str
    test: str
    languages: tuple[str, ...]
    limit: int | None

    def check(self) -> None:
        """Raise ValueError for flags that do not go together."""
        if bool(self.task) == bool(self.test):
            both = "both are" if self.task else "neither is"
            raise ValueError(f"{both} given of --task and --test; it must be one of them.")
        if self.task and not self.data:
            raise ValueError(f"--data is missing; it must name the folder of --task={self.task}.")
        for name in ("data", "english_data"):
            if self.test and getattr(self, name):
                raise ValueError(f"--{name} has no effect with --test.")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit is {self.limit}; it must be at least 1.")

    @property
    def name(self) -> str:
        return self.task or Path(self.test).name.split(".")[0]


@dataclasses.dataclass(frozen=True)
class Rows:
    """What is evaluated. kind: of the task. labels: all that there are; of choices their numbers.
    notes: sentences for who reads the results."""

    kind: Kind
    rows: Sequence[Row]
    labels: tuple[str, ...]
    notes: tuple[str, ...]


def evaluate(
    model: str,
    source: Source,
    *,
    against: str,
    to: str,
    batch_rows: int,
    fsdp: int,
    console: Console,
) -> dict[str, Any]:
    """Answer the rows, go on where an earlier start stopped, and write all scores to a folder.

    against: predictions of another system, a .jsonl file or the folder of a run or an evaluation;
    "" = none. to: the folder; "" = evaluations/NAME-MODEL. batch_rows, fsdp: as of `open_model`.
    All processes of a job call it. Returns what results.json holds.

    Raises ValueError, naming the flag, for what does not go together: rows in a language that the
    model does not know and that was asked for, labels that are not the model's, a folder with
    another evaluation.
    """
    source.check()
    if is_remote(to):
        raise ValueError(f"--to={to} is remote; it must be a local folder, to be copied from.")
    fingerprint = check_model(model)
    read = _read(source)
    other = _Other(against) if against else None
    if other is not None:
        other.on_rows_of(pd.DataFrame(read.rows))
    folder = epath.Path(to or f"evaluations/{source.name}-{Path(model).absolute().name}")
    about = {"model": fingerprint, "name": source.name, "rows": digest_of(read.rows)}
    distributed.by_first(lambda: check_folder(folder, about))
    if distributed.by_first((folder / _PREDICTIONS).exists):
        console.print(f"the answers are those in {folder / _PREDICTIONS}")
    else:
        opened = open_model(model, batch_rows=batch_rows, fsdp=fsdp)
        _check_labels(source, read, model, opened)
        _answer(opened, _readable(source, read, opened.languages), folder, about, console)
    if not distributed.is_first():
        return {}
    found = pd.DataFrame([cells for _, cells in formats.json_records(Path(folder / _PREDICTIONS))])
    values = read_json(epath.Path(model) / "config.json")
    results = _results(source, found, folder, model, values)
    if other is not None:
        _compare(results, found, other)
    tables = _tables(results)
    write_json(folder / "results.json", results)
    write_text(folder / "results.md", _markdown(results, tables))
    facts = facts_of(results, len(found), _SCOPE)
    config = {"evaluated": dataclasses.asdict(source) | {"against": against}, "model": values}
    write_report(folder, results, config, {}, facts, tables, _steps(model, folder))
    console.print(results_table(results, None, console.width))
    for title, columns, rows in tables[1:]:
        console.table(columns, rows, title)
    console.print(f"{folder}: predictions/, results.json, results.md, report.html")
    return results


# ---------------------------------------------------------------- rows


def _read(source: Source) -> Rows:
    if source.task:
        read = read_benchmark(
            source.task,
            source.data,
            languages=source.languages or "all",
            english_data=source.english_data or None,
            splits=("test",),
            limit=source.limit,
        )
        return Rows(read.kind, read.test, read.labels, read.notes)
    kind, labels, rows = read_labelled(source.test, (*LANGUAGES, *STAND_INS))
    if missing := [code for code in source.languages if code not in {r["language"] for r in rows}]:
        raise ValueError(f"--languages names {missing[0]}; {source.test} has no rows in it.")
    rows = [row for row in rows if not source.languages or row["language"] in source.languages]
    if source.limit is not None:
        rows = sample(rows, source.limit)
    if kind != "choice":
        labels = label_names(rows)
    return Rows(kind, rows, labels, ())


def _check_labels(source: Source, read: Rows, model: str, opened: api.Model) -> None:
    """Those of a file may be fewer than the model's, as it may be small. Choices have none."""
    of_choices = opened.kind == "multiple_choice"
    if (read.kind == "choice") != of_choices:
        raise ValueError(
            f"{source.test or source.task} is {'' if read.kind == 'choice' else 'not '}multiple"
            f" choice, and --model={model} was {'' if of_choices else 'not '}trained for it."
        )
    labels = opened.labels
    if of_choices:
        return
    if set(read.labels) == set(labels) or (source.test and set(read.labels) <= set(labels)):
        return
    theirs = ", ".join(map(repr, labels)) if labels else "none, as it has no head"
    raise ValueError(
        f"the labels of {source.test or source.task} are {', '.join(map(repr, read.labels))}, and"
        f" those of --model={model} {theirs}; they must be the same."
    )


def _readable(source: Source, read: Rows, readable: Sequence[str]) -> Rows:
    """The rows in languages that the model knows; ValueError for one that was asked for by name."""
    unknown = []
    for code in dict.fromkeys(row["language"] for row in read.rows):
        try:
            source_language(code, readable)
        except ValueError as error:
            if code in source.languages:
                raise ValueError(f"--languages: {error}.") from None
            unknown.append(code)
    rows = [row for row in read.rows if row["language"] not in unknown]
    if not rows:
        raise ValueError(f"--model knows none of the languages of the rows: {', '.join(unknown)}.")
    left_out = f"Left out, as the encoder does not know them: {', '.join(unknown)}."
    return dataclasses.replace(read, rows=rows, notes=(*read.notes, *([left_out] * bool(unknown))))


# ---------------------------------------------------------------- answers


def check_folder(folder: epath.Path, about: Mapping[str, Any]) -> None:
    """ValueError for a folder of something else than the evaluation that is told about."""
    path = folder / ABOUT
    if path.exists():
        different = differing_fields(read_json(path)["about"], dict(about))
        if different:
            raise ValueError(
                f"--to={folder} holds another evaluation ({', '.join(different[:3])}); choose"
                " another folder."
            )
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"--to={folder} is not an empty folder, nor an evaluation; choose another."
        )


def _answer(
    model: api.Model,
    read: Rows,
    folder: epath.Path,
    about: Mapping[str, Any],
    console: Console,
) -> None:
    """Write predictions/mt_llm.jsonl, and what is to be known of it beside."""
    stage = Stage()
    write_json(folder / ABOUT, {"about": about})
    parts = Parts(Path(folder) / "parts", about)
    count = len(read.rows)
    answer(model, parts, cut(read.rows, api.WINDOW), count, vectors=False, console=console)
    if distributed.is_first():
        kept = ("id", "language", *TEXTS, "label")
        written = [
            {name: row[name] for name in kept if name in row}
            | {"prediction": model.answer(row, share_C)["prediction"]}
            for window in cut(read.rows, api.WINDOW)
            for row, share_C in zip(window.rows, parts.read(window), strict=True)
        ]
        told = {
            "about": about,
            "labels": read.labels if read.kind == "choice" else model.labels,
            "notes": read.notes,
            "seconds": round(stage.seconds, 2),
        }
        write_json(folder / ABOUT, told)
        write_jsonl(folder / _PREDICTIONS, written)
        parts.remove()


# ---------------------------------------------------------------- scores


class _Other:
    """Another system's predictions, by their file or the folder that they lie in."""

    def __init__(self, given: str) -> None:
        path = Path(given)
        self.path = path / _PREDICTIONS if path.is_dir() else path
        if not self.path.is_file():
            raise ValueError(
                f"--against={given}: {self.path} is not a file; it must be predictions in JSON"
                " lines, or the folder of a run or an evaluation."
            )
        rows = []
        for line, cells in formats.json_records(self.path):
            required = ("id", "language", "label", "prediction")
            check_columns(cells, required, f"--against: {formats.at(self.path, line)}")
            rows.append({name: str(cells[name]) for name in (*required, *TEXTS) if name in cells})
        if not rows:
            raise ValueError(f"--against={given}: {self.path} holds no rows.")
        self.answers = pd.DataFrame(rows)
        stem = self.path.stem
        self.name = path.absolute().name if path.is_dir() else stem
        if stem in SYSTEM_NAMES and not path.is_dir():
            self.name = f"{system_name(stem)} of {self.path.absolute().parents[1].name}"

    def on_rows_of(self, ours: pd.DataFrame) -> pd.DataFrame:
        """Its answers to our rows. ValueError where there are none, or two to a row."""
        same = [name for name in ("id", "language", *TEXTS) if name in self.answers]
        same = [name for name in same if name in ours]
        found = self.answers.merge(ours[same].map(str), on=same)  # choices are a list
        if found.empty:
            raise ValueError(f"--against: {self.path} has no row in common with these.")
        twice = found[found.duplicated(["id", "language"])]
        if len(twice):
            row = twice.iloc[0]
            raise ValueError(
                f"--against: {self.path} has the row {row['id']!r} in {row['language']} twice."
            )
        return found


def _results(
    source: Source,
    found: pd.DataFrame,
    folder: epath.Path,
    model: str,
    values: Mapping[str, Any],
) -> dict[str, Any]:
    """All of results.json that is about the model alone."""
    told = read_json(folder / ABOUT)
    english = _english(found)
    foreign = found[found["language"] != english]
    return {
        "task": source.name,
        "model": model,
        "seeds": [values["seed"]] if "seed" in values else [],
        "metric": "accuracy",
        "majority": scores.majority(found["label"]),
        "rows": found.groupby("language", sort=False).size().to_dict(),
        "systems": {_SYSTEM: scores.entry([found], english)},
        "scripts": scores.by_group(found, english, lambda code: script_name(code) or "unknown"),
        "resource_classes": scores.by_group(found, english, resource_class),
        "confusion": {
            "labels": told["labels"],
            "counts": scores.confusion(foreign, told["labels"]).tolist(),
        },
        "notes": list(told["notes"]),
        "seconds": {"answers": told["seconds"]},
    }


def _english(found: pd.DataFrame) -> str:
    """English, which stands apart from the others; "" where there are no others."""
    return ENGLISH if (found["language"] != ENGLISH).any() else ""


def _compare(results: dict[str, Any], ours: pd.DataFrame, other: _Other) -> None:
    """Add another system, on the rows that both have answered, and the paired tests."""
    theirs = other.on_rows_of(ours)
    english = _english(ours)
    try:
        groups = {"all languages but English": scores.compare(_but(ours, english), theirs)}
        if english in set(theirs["language"]):
            groups["English"] = scores.compare(ours[ours["language"] == english], theirs)
    except ValueError as error:
        raise ValueError(f"--against: {other.path}: {error}.") from None
    results["systems"][other.name] = scores.entry([theirs], _english(theirs))
    results["against"] = {"name": other.name, "tests": groups}
    if len(theirs) < len(ours):
        results["notes"].append(
            f"{other.name} has answered {len(theirs)} of the {len(ours)} rows; its values, and the"
            " paired tests, are of those."
        )


def _but(answers: pd.DataFrame, language: str) -> pd.DataFrame:
    return answers[answers["language"] != language]


# ---------------------------------------------------------------- what is read


def _tables(results: Mapping[str, Any]) -> list[Table]:
    """By language, then other cuts; values in per cent."""
    mine = results["systems"][_SYSTEM]
    others = [name for name in results["systems"] if name != _SYSTEM]
    codes = languages_of({"systems": {_SYSTEM: mine}})
    if mine["english"] is not None:
        codes.insert(0, ENGLISH)
    by_language = []
    for code in codes:
        accuracy = mine["english"] if code == ENGLISH else mine["languages"][code]
        f1 = mine["macro_f1"]
        row = [language_name(code), code, resource_class(code), str(results["rows"][code])]
        row += [shown(accuracy), shown_range(mine["intervals"][code])]
        row += [shown(f1["english"] if code == ENGLISH else f1["languages"][code])]
        for name in others:
            theirs = results["systems"][name]
            row.append(
                shown(theirs["english"] if code == ENGLISH else theirs["languages"].get(code))
            )
        by_language.append(row)
    columns = ["language", "code", "class", "rows", "accuracy", "95 %", "macro-F1", *others]
    tables: list[Table] = [("By language", columns, by_language)]
    for title, key in (("By script", "scripts"), ("By resource class", "resource_classes")):
        columns = [title.removeprefix("By "), "languages", "accuracy", "95 %", "macro-F1"]
        rows = [
            [
                name,
                str(one["languages"]),
                shown(one["mean"]),
                shown_range(one["interval"]),
                shown(one["macro_f1"]),
            ]
            for name, one in sorted(results[key].items())
        ]
        tables.append((title, columns, rows))
    labels, counts = results["confusion"]["labels"], results["confusion"]["counts"]
    rows = [[label, *map(str, row)] for label, row in zip(labels, counts, strict=True)]
    tables.append(("Confusion: label by prediction", ["label", *labels], rows))
    if "against" in results:
        rows = [
            [
                name,
                str(test["rows"]),
                signed(test["difference"]),
                " to ".join(map(signed, test["interval"])),
                str(test["only_ours"]),
                str(test["only_theirs"]),
                f"{test['p']:.2g}",
            ]
            for name, test in results["against"]["tests"].items()
        ]
        columns = ["", "rows", "points", "95 %", "right here alone", "right there alone", "p"]
        tables.append((f"Against {results['against']['name']}, row by row", columns, rows))
    return tables


def shown(value: float | None) -> str:
    """In per cent."""
    return "–" if value is None else f"{100 * value:.1f}"


def signed(value: float) -> str:
    """A difference, in points."""
    return f"{100 * value:+.1f}".replace("-", "−")


def shown_range(interval: Sequence[float] | None) -> str:
    """Of values, in per cent."""
    return "–" if interval is None else " to ".join(map(shown, interval))


def _markdown(results: Mapping[str, Any], tables: Sequence[Table]) -> str:
    mine = results["systems"][_SYSTEM]
    lines = [
        f"# {results['task']}: {Path(results['model']).name}",
        "",
        f"Accuracy in %: {shown(mine['mean'])} ({shown_range(mine['interval'])}) on average over"
        f" {len(mine['languages'])} languages, {shown(mine['english'])} in English; always the"
        f" most frequent class: {shown(results['majority'])}. {_SCOPE}",
        *[f"\n{note}" for note in results["notes"]],
    ]
    return "\n".join([*lines, *markdown_tables(tables)]) + "\n"


def markdown_tables(tables: Sequence[Table]) -> list[str]:
    """The lines of tables under their titles."""
    lines = []
    for title, columns, rows in tables:
        lines += ["", f"## {title}", "", _markdown_row(columns)]
        lines.append("|" + " --- |" + " ---: |" * (len(columns) - 1))
        lines += map(_markdown_row, rows)
    return lines


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def facts_of(results: Mapping[str, Any], count: int, scope: str) -> dict[str, Any]:
    """What a report tells beside its tables. count: of the rows."""
    packages = ("jax", "flax", "transformers")
    device = jax.devices()[0]
    return {
        "scope": scope,
        "versions": {
            "mtllm_jax": mtllm_jax.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "device": f"{jax.device_count()} × {device.device_kind}",
        "model": Path(results["model"]).name,
        "test rows": count,
        **({"notes": " ".join(results["notes"])} if results["notes"] else {}),
    }


def _steps(model: str, folder: epath.Path) -> list[tuple[str, str]]:
    again = f"python launch/evaluate.py --model={model}"
    return [
        ("answers", f"{folder}/{_PREDICTIONS}"),
        ("compare", f"{again} … --to={folder} --against=PREDICTIONS.jsonl"),
        ("label", f"python launch/predict.py --model={model} --input=FILE --output=FILE"),
    ]
