"""An LLM's folder on published benchmarks by prompts: what `launch/evaluate.py` does with one.

DIR/predictions/llm.jsonl holds each row's prompt, label and answer, prompt.txt the template,
results.json all scores, results.md and report.html the same to read. Answers that are there are not
made again. With another model's answers to the same rows every line has before, after, and the
interval of the change.
"""

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from mtllm_jax import distributed
from mtllm_jax.asking import answering
from mtllm_jax.asking.answering import LLM, Answers, Means, filled
from mtllm_jax.asking.measures import Measure, Resamples, together
from mtllm_jax.asking.prompts import read_prompt
from mtllm_jax.asking.tasks import TASKS, Asked, Questions
from mtllm_jax.asking.translation import Pieces
from mtllm_jax.config import naming
from mtllm_jax.data import formats
from mtllm_jax.data.files import check_columns
from mtllm_jax.data.templates import Template
from mtllm_jax.data.tokenise import TargetTokenizer
from mtllm_jax.evaluate import (
    ABOUT,
    Source,
    check_folder,
    facts_of,
    markdown_tables,
    shown,
    shown_range,
    signed,
)
from mtllm_jax.hf.files import local_files
from mtllm_jax.hf.llama import check_llama
from mtllm_jax.hf.locate import locate
from mtllm_jax.languages import ENGLISH
from mtllm_jax.metrics import Console, Stage
from mtllm_jax.models.llama import FAMILIES
from mtllm_jax.parts import digest_of
from mtllm_jax.predict import check_model
from mtllm_jax.report import Table, write_report
from mtllm_jax.results import language_name, languages_of, system_name
from mtllm_jax.runfolder import is_remote, read_json, write_json, write_jsonl, write_text

_PREDICTIONS = "predictions/llm.jsonl"
_KEY = ("id", "language")
_SCOPE = (
    "It shows how one LLM, asked by this prompt and answering by its likeliest tokens, does on"
    " these rows; another prompt may move all lines. Intervals are of the rows: 95 % by the"
    " bootstrap over items, each with all its languages. Means weigh all languages but English"
    " alike. The LLM may have seen these public rows in pretraining; nothing here rules that out."
)
_SHOWN_ANSWERS = 200  # characters of an answer that the report quotes


@dataclasses.dataclass(frozen=True)
class How:
    """How a benchmark is asked. prompt: a file; "" = the package's. template: as of `Template`;
    "" = "chat" where the tokenizer has a chat template, else "none". max_new_tokens: None = as many
    as the benchmark's answers need. spm: a sentencepiece model that translations are cut by for
    spBLEU; "" = there is none."""

    prompt: str = ""
    template: str = ""
    max_new_tokens: int | None = None
    spm: str = ""


def is_llm(model: str, task: str) -> bool:
    """Whether --model is to be asked by prompts: a causal LLM's folder, or a name on the hub.

    ValueError for the folder of an SDRRL run, which has several.
    """
    config = epath.Path(model) / "config.json"
    if config.exists():
        values = read_json(config)
        if isinstance(values, dict) and values.get("recipe") == "sdrrl":
            raise ValueError(
                f"--model={model} is a run of SDRRL; it must be one of its LLMs, as"
                f" {model}/sdrrl/model."
            )
        return isinstance(values, dict) and values.get("model_type") in FAMILIES
    return task in TASKS and not epath.Path(model).exists()


def evaluate(
    model: str,
    source: Source,
    how: How,
    *,
    against: str,
    to: str,
    means: Means,
    console: Console,
) -> dict[str, Any]:
    """Ask the rows of a benchmark, go on where an earlier start stopped, write all scores.

    against: the folder of such an evaluation of another model, or its predictions; "" = none. to:
    the folder; "" = evaluations/TASK-MODEL. All processes of a job call it. Returns what
    results.json holds.

    Raises ValueError, naming the flag, before weights are read: for a benchmark that is not there,
    a prompt that it does not fill, a folder with another evaluation.
    """
    source.check()
    task = _task(source)
    if is_remote(to):
        raise ValueError(f"--to={to} is remote; it must be a local folder, to be copied from.")
    prompt = read_prompt(source.task, task.prompt, how.prompt, tuple(task.fields))
    max_new_tokens = _limit(source, task, how)
    pieces = _pieces(source, task, how)
    llm = _llm(model, how)
    asked = task.read(source)
    other = _Other(against, asked) if against else None
    name = name_of(model)
    folder = epath.Path(to or f"evaluations/{source.task}-{name}")
    about = {
        "model": check_model(llm.folder),
        "name": source.task,
        "rows": digest_of(list(asked.rows)),
        "prompt": digest_of(prompt),
        "template": llm.template_name,
        "max_new_tokens": max_new_tokens,
        "dtype": means.dtype,
    }
    distributed.by_first(lambda: check_folder(folder, about))
    if distributed.by_first((folder / _PREDICTIONS).exists):
        console.print(f"the answers are those in {folder / _PREDICTIONS}")
    else:
        told = {"about": about, "model": name}
        _answer(llm, task, asked, prompt, max_new_tokens, folder, told, means, console)
    if not distributed.is_first():
        return {}
    rows = list(formats.json_records(Path(folder / _PREDICTIONS)))
    answers = [row["answer"] for _, row in rows]
    results = _results(source, task, asked, folder, model, name, answers, other, pieces)
    results |= {"prompt": prompt, "template": llm.template_name}
    problems = [row["problem"] for _, row in rows if "problem" in row]
    if problems:
        results["notes"].append(
            f"{len(problems)} of the {len(rows)} rows have no answer and count as such, the first"
            f" as {problems[0]}; predictions/llm.jsonl has the reason of each."
        )
    if cut := sum(not row.get("ended", True) for _, row in rows):
        results["notes"].append(
            f"{cut} of the {len(rows)} answers were cut at {max_new_tokens} tokens."
        )
    tables = _tables(results)
    write_json(folder / "results.json", results)
    write_text(folder / "results.md", _markdown(results, tables))
    first = filled(task, prompt, asked.rows[0])
    texts = [("Prompt", prompt), ("The first row's prompt", first)]
    config = {
        "evaluated": dataclasses.asdict(source)
        | dataclasses.asdict(how)
        | {"against": against, "template": llm.template_name, "max_new_tokens": max_new_tokens},
        "model": read_json(epath.Path(llm.folder) / "config.json"),
    }
    write_report(
        folder,
        results,
        config,
        {},
        facts_of(results, len(rows), _SCOPE),
        [*tables, _examples(asked, answers)],
        _steps(model, source, folder),
        texts=texts,
    )
    for measure, (_, columns, lines) in zip(results["measures"], tables, strict=True):
        console.table(columns, lines, f"{measure['name']}, %")
        console.print(f" {measure['about']}\n", style="dim")
    for note in results["notes"]:
        console.print(f" {note}", style="dim")
    console.print(f"{folder}: predictions/, prompt.txt, results.json, results.md, report.html")
    return results


def name_of(model: str) -> str:
    """What a model is called: its folder, or that above one that is just called "model"."""
    path = Path(model).absolute()
    return path.parent.name if path.name == "model" else path.name


# ---------------------------------------------------------------- at the door


def _task(source: Source) -> Asked:
    if source.test:
        raise ValueError(
            "--test is for a trained stack; an LLM's folder is asked a benchmark, --task=NAME of"
            f" {', '.join(TASKS)}."
        )
    if source.task not in TASKS:
        raise ValueError(
            f"--task={source.task} is not one that an LLM's folder is asked: these are"
            f" {', '.join(TASKS)}."
        )
    if source.english_data and source.task != "xcopa":
        raise ValueError(
            f"--english_data has no effect on --task={source.task}; xcopa alone has its English"
            " rows elsewhere."
        )
    return TASKS[source.task]


def _limit(source: Source, task: Asked, how: How) -> int:
    """Of an answer, in tokens; 0 where the LLM chooses."""
    if task.options is not None:
        if how.max_new_tokens is not None:
            raise ValueError(
                f"--max_new_tokens has no effect on --task={source.task}: nothing is written, but"
                " choices are weighed."
            )
        return 0
    if how.max_new_tokens is not None and how.max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens is {how.max_new_tokens}; it must be at least 1.")
    return how.max_new_tokens or task.max_new_tokens


def _pieces(source: Source, task: Asked, how: How) -> Pieces | None:
    if not how.spm:
        return None
    if not task.takes_pieces:
        raise ValueError(
            f"--spm has no effect on --task={source.task}: nothing there is cut by it."
        )
    return Pieces(Path(how.spm))


def _llm(model: str, how: How) -> LLM:
    with naming("model", "--"):
        folder = distributed.after_first(lambda: locate(model)).folder
        sizes = check_llama(folder)
        tokenizer = TargetTokenizer(local_files(folder))
    name = how.template or ("chat" if tokenizer.has_chat_template else "none")
    return LLM(str(folder), sizes, tokenizer, Template(name, tokenizer), name)


class _Other:
    """Another model's answers to the same rows."""

    def __init__(self, given: str, asked: Questions) -> None:
        """ValueError for what is no such file, answers other rows, or answers a row twice."""
        path = Path(given)
        file = path / _PREDICTIONS if path.is_dir() else path
        if not file.is_file():
            raise ValueError(
                f"--against={given}: {file} is not a file; it must be what this tool wrote of"
                " another LLM, its folder or its predictions/llm.jsonl."
            )
        rows = {(row["id"], row["language"]): row for row in asked.rows}
        self.answers: dict[tuple[str, str], str] = {}
        for line, cells in formats.json_records(file):
            where = f"--against: {formats.at(file, line)}"
            check_columns(cells, (*_KEY, "label", "answer"), where)
            key = (str(cells["id"]), str(cells["language"]))
            if key in self.answers:
                raise ValueError(f"{where}: the row {key[0]!r} in {key[1]} is there twice.")
            if key in rows:
                if cells["label"] != rows[key]["label"]:
                    raise ValueError(
                        f"{where}: the row {key[0]!r} in {key[1]} has another label than here; it"
                        " must be of the same benchmark."
                    )
                self.answers[key] = str(cells["answer"])
        if not self.answers:
            raise ValueError(f"--against: {file} has no row in common with these.")
        about = file.absolute().parents[1] / ABOUT
        told = read_json(epath.Path(about)) if about.is_file() else {}
        self.about, self.name = told.get("about", {}), str(told.get("model") or file.stem)


# ---------------------------------------------------------------- answers


def _answer(
    llm: LLM,
    task: Asked,
    asked: Questions,
    prompt: str,
    max_new_tokens: int,
    folder: epath.Path,
    told: Mapping[str, Any],
    means: Means,
    console: Console,
) -> None:
    """Write predictions/llm.jsonl, prompt.txt, and what is told of them."""
    stage = Stage()
    if distributed.is_first():
        write_json(folder / ABOUT, told)
        write_text(folder / "prompt.txt", prompt + "\n")
    distributed.meet()
    work = Path(folder) / "answering"
    distributed.by_first(lambda: work.mkdir(exist_ok=True))
    fitted = [answering.fitted(llm, task, prompt, row, max_new_tokens) for row in asked.rows]
    prompts = [text for text, _ in fitted]
    answers: Answers
    if task.options is None:
        named = [
            {name: row[name] for name in _KEY} | {"prompt": text}
            for row, text in zip(asked.rows, prompts, strict=True)
        ]
        answers = answering.written(llm, named, max_new_tokens, work, means, console)
    else:
        options = [task.options(row) for row in asked.rows]
        answers = answering.chosen(llm, prompts, options, work, means, console)
    distributed.meet()  # all have read what is removed now
    if distributed.is_first():
        written = [
            {name: row[name] for name in _KEY} | {"prompt": text, "label": row["label"]} | answer
            for row, text, answer in zip(asked.rows, prompts, answers, strict=True)
        ]
        count = sum(is_cut for _, is_cut in fitted)
        cut = f"In {count} prompts the {task.cut} has lost its end, to fit the context."
        notes = [cut] * bool(count)
        write_json(folder / ABOUT, {**told, "notes": notes, "seconds": round(stage.seconds, 2)})
        write_jsonl(folder / _PREDICTIONS, written)
        shutil.rmtree(work)


# ---------------------------------------------------------------- scores


def _results(
    source: Source,
    task: Asked,
    asked: Questions,
    folder: epath.Path,
    model: str,
    name: str,
    answers: Sequence[str],
    other: _Other | None,
    pieces: Pieces | None,
) -> dict[str, Any]:
    """All of results.json but for the prompt."""
    told = read_json(folder / ABOUT)
    rows, notes = asked.rows, [*asked.notes, *told["notes"]]
    languages = [row["language"] for row in rows]
    english = ENGLISH if set(languages) != {ENGLISH} else ""
    draws = Resamples([row["id"] for row in rows], languages, english)
    ours = task.measures(rows, answers, pieces)
    theirs: list[Measure] = []
    before = ""
    if other is not None:
        before = other.name if other.name != name else f"{other.name} before"
        keys = [(row["id"], row["language"]) for row in rows]
        answered = np.array([key in other.answers for key in keys])
        both = task.measures(rows, [other.answers.get(key, "") for key in keys], pieces)
        theirs = together(both, answered)
        notes.append(f"Before is {system_name(before)}, after {system_name(name)}.")
        notes += _differences(other, told["about"], before, answered)
    measures = []
    for place, mine in enumerate(ours):
        drawn = draws.of(mine)
        systems = {name: draws.entry(drawn)}
        entry: dict[str, Any] = {"name": mine.name, "about": mine.about, "systems": systems}
        if theirs:
            then = draws.of(theirs[place])
            systems[before] = draws.entry(then)
            if not answered.all():
                drawn = draws.of(*together([mine], answered))
            entry["change"] = draws.change(drawn, then)
        measures.append(entry)
    return {
        "task": source.task,
        "model": model,
        "seeds": [],
        "metric": ours[0].name,
        "rows": {code: languages.count(code) for code in dict.fromkeys(languages)},
        "systems": measures[0]["systems"],
        "measures": measures,
        "notes": notes,
        "seconds": {"answers": told["seconds"]},
    }


def _differences(
    other: _Other, mine: Mapping[str, Any], name: str, answered: np.ndarray
) -> list[str]:
    """Sentences on what else than the model is another one. mine: what ours is about."""
    notes = []
    if not answered.all():
        notes.append(
            f"{name} has answered {int(answered.sum())} of the {len(answered)} rows; its values,"
            " and the changes, are of those."
        )
    names = {"prompt": "the prompt", "template": "the template", "max_new_tokens": "the length"}
    asked = [
        text for key, text in names.items() if other.about and other.about.get(key) != mine[key]
    ]
    if asked:
        notes.append(f"{name} was asked otherwise: {', '.join(asked)} was another one.")
    return notes


# ---------------------------------------------------------------- what is read


def _tables(results: Mapping[str, Any]) -> list[Table]:
    """One a measure: English, which is to be retained, the mean, then each language."""
    return [_table(results, measure) for measure in results["measures"]]


def _table(results: Mapping[str, Any], measure: Mapping[str, Any]) -> Table:
    mine, *others = measure["systems"].values()
    change = measure.get("change")
    values = [system_name(*measure["systems"])] if change is None else ["before", "after"]

    def line(label: str, code: str, at: str) -> list[str]:
        """at: the place in an entry: "english", "mean", or a language's code."""

        def value(entry: Mapping[str, Any]) -> float | None:
            return entry[at] if at in ("english", "mean") else entry["languages"][at]

        inner = ENGLISH if at == "english" else at
        interval = mine["interval"] if at == "mean" else mine["intervals"].get(inner)
        rows = sum(mine["rows"][code] for code in codes) if at == "mean" else mine["rows"][inner]
        cells = [label, code, str(rows), *(shown(value(entry)) for entry in others)]
        cells += [shown(value(mine)), shown_range(interval)]
        if change is not None:
            changed = change[at] if at in ("english", "mean") else change["languages"][at]
            cells += ["–", "–"] if changed is None else _changed(**changed)
        return cells

    codes = languages_of({"systems": {"": mine}})
    lines = []
    if mine["english"] is not None:
        lines.append(line("English", ENGLISH, "english"))
    lines.append(line(f"mean of {len(codes)} language{'s' * (len(codes) > 1)}", "", "mean"))
    lines += [line(language_name(code), code, code) for code in codes]
    columns = ["language", "code", "rows", *values, "95 %"]
    if change is not None:
        columns += ["change", "95 %"]
    return f"{measure['name']}, %: {measure['about']}", columns, lines


def _changed(difference: float, interval: Sequence[float] | None) -> list[str]:
    return [signed(difference), " to ".join(map(signed, interval)) if interval else "–"]


def _examples(asked: Questions, answers: Sequence[str]) -> Table:
    """The first row of each language."""
    lines, seen = [], set()
    for row, answer in zip(asked.rows, answers, strict=True):
        if row["language"] not in seen:
            seen.add(row["language"])
            label = row["label"] if isinstance(row["label"], str) else " / ".join(row["label"])
            lines.append([language_name(row["language"]), row["id"], _cut(label), _cut(answer)])
    return "The first answer of each language", ["language", "id", "label", "answer"], lines


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_ANSWERS else f"{text[:_SHOWN_ANSWERS]}…"


def _markdown(results: Mapping[str, Any], tables: Sequence[Table]) -> str:
    lines = [
        f"# {results['task']}: {name_of(results['model'])}",
        "",
        _SCOPE,
        *[f"\n{note}" for note in results["notes"]],
        "",
        f"The prompt, in the template `{results['template']}`:",
        "",
        "````text",
        results["prompt"],
        "````",
        *markdown_tables(tables),
    ]
    return "\n".join(lines) + "\n"


def _steps(model: str, source: Source, folder: epath.Path) -> list[tuple[str, str]]:
    again = f"python launch/evaluate.py --task={source.task} --data={source.data}"
    return [
        ("answers", f"{folder}/{_PREDICTIONS}"),
        ("compare", f"{again} --model=TUNED --against={folder}"),
        ("other prompt", f"{again} --model={model} --prompt=FILE --to=DIR"),
    ]
