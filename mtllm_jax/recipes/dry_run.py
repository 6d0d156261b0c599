"""A run in a minute that leaves nothing behind: what is read, a step of each stage, what it costs.

The same stages as the run itself, on a part of its texts.
"""

import collections
import contextlib
import dataclasses
import itertools
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from mtllm_jax import distributed
from mtllm_jax.config import MTLLM, TextSizes
from mtllm_jax.data.prepared import Prepared
from mtllm_jax.data.texts import Texts
from mtllm_jax.metrics import Console
from mtllm_jax.recipes import stacking
from mtllm_jax.recipes.inputs import Inputs
from mtllm_jax.recipes.job import Job
from mtllm_jax.recipes.systems import Made, build_systems, train
from mtllm_jax.runfolder import RunFolder
from mtllm_jax.schema import to_dict
from mtllm_jax.tasks.task import Row, texts_in

_SIZES = TextSizes(
    train_pairs=400,
    test_pairs=100,
    dev_pairs=100,
    lists_per_language=100,
    english=3000,
    adaptation=1000,
)
_ROWS_PER_LABEL = 100  # of a task's training rows, and of its development rows
_DEV_TEXTS = 100  # of stage 1
_ROWS_PER_LANGUAGE = 100  # tokenised, to count what the vocabularies lack
_ANSWERED_PER_LANGUAGE = 2  # by each system
_PROBED = 2  # lines of each language
_SHOWN_TEXTS = 3
_SHOWN_TOKENS = 24
_NO_LIMIT = 1 << 20  # tokens

Group = TypeVar("Group")


def dry_run(inputs: Inputs, console: Console) -> None:
    """Take one step of each stage in a folder that is gone afterwards, and print what was seen."""
    config = inputs.config
    small = reduced(config)
    if inputs.adaptation_text is not None and not isinstance(inputs.adaptation_text, Prepared):
        texts = inputs.adaptation_text.first(_SIZES.adaptation)
        inputs = dataclasses.replace(inputs, adaptation_text=texts)
    if inputs.task is not None:
        rows = first_of_each("label", inputs.task.train, _ROWS_PER_LABEL)
        dev = first_of_each("label", inputs.task.dev, _ROWS_PER_LABEL)
        task = dataclasses.replace(inputs.task, train=rows, dev=dev)
        inputs = dataclasses.replace(inputs, task=task)
    if inputs.bitext is not None:
        pairs = {code: (a[:_PROBED], b[:_PROBED]) for code, (a, b) in inputs.bitext.pairs.items()}
        inputs = dataclasses.replace(inputs, bitext=dataclasses.replace(inputs.bitext, pairs=pairs))
    with _passing_folder() as path:
        job = Job(small, RunFolder(path, to_dict(small)), console, inputs.mesh, small.seed)
        made = train(job, inputs)
        with job.stage("evaluation", "evaluation of a few rows"):
            rows = first_of_each("language", _test_rows(made), _ANSWERED_PER_LANGUAGE)
            systems = build_systems(job, made)(small.task_seeds[0])
            answers = {name: system.predict(rows) for name, system in systems.items()}
        job.run.close()
    if made.english is not None:
        _show_stage_1(small, made.parts, made.english, console)
    _show_task(config, made, answers, rows, console)
    _show_vocabularies(config, made, console)
    _show_cost(job, console)
    console.print("Nothing was kept. Without --dry_run the same command runs all of it.")


@contextlib.contextmanager
def _passing_folder() -> Iterator[str]:
    """A folder that is gone afterwards. Of several processes the first makes it; the variable
    TMPDIR then names a folder that all machines see."""
    path = distributed.by_first(lambda: tempfile.mkdtemp(prefix="mtllm-dry-run-"))
    try:
        yield path
    finally:
        if distributed.is_first():
            shutil.rmtree(path)


def reduced(config: MTLLM) -> MTLLM:
    """The same models, batches and lengths, one step and seed, and less of the embedded text."""

    def one_step(group: Group) -> Group:
        """`group` with steps=1 in it and below, where there are any."""
        changes: dict[str, Any] = {}
        for field in dataclasses.fields(group):  # type: ignore[arg-type]
            value = getattr(group, field.name)
            if field.name == "steps":
                changes["steps"] = min(value, 1)
            elif field.name == "samplings":
                changes["samplings"] = 1
            elif field.name == "dev_texts":
                changes["dev_texts"] = min(value, _DEV_TEXTS)
            elif dataclasses.is_dataclass(value):
                changes[field.name] = one_step(value)
        return dataclasses.replace(group, **changes)  # type: ignore[type-var]

    text = config.text and TextSizes(
        **{
            name: min(size, getattr(_SIZES, name))
            for name, size in dataclasses.asdict(config.text).items()
        }
    )
    return dataclasses.replace(one_step(config), text=text, seeds=config.task_seeds[:1])


def _test_rows(made: Made) -> list[Row]:
    return list(itertools.chain.from_iterable(made.task.tests.values()))


def first_of_each(field: str, rows: Iterable[Row], count: int) -> list[Row]:
    """The first `count` rows of each value of `field`, in their order."""
    seen: collections.Counter[str] = collections.Counter()
    chosen = []
    for row in rows:
        seen[row[field]] += 1
        if seen[row[field]] <= count:
            chosen.append(row)
    return chosen


def _show_stage_1(
    config: MTLLM, parts: stacking.Parts, english: Texts | Prepared, console: Console
) -> None:
    """One packed row of English text, on both sides, and its first texts as pieces."""
    texts = english if isinstance(english, Prepared) else english.first(200)
    rows = stacking.adaptation_rows(config, parts, texts, config.seed)
    console.print("\nStage 1, the first row of English text", style="bold")
    for side, tokenizer in (("source", parts.source), ("target", parts.target)):
        ids, segments = rows[0][f"{side}_ids"], rows[0][f"{side}_segments"]
        reader = "MT encoder" if side == "source" else "LLM"
        console.print(
            f"  {reader}: {len(ids)} positions, {segments.max()} texts (segment 0 is padding,"
            " masked)"
        )
        console.print(f"    ids       {_listed(ids)}")
        console.print(f"    segments  {_listed(segments)}")
        for segment in range(1, min(segments.max(), _SHOWN_TEXTS) + 1):
            pieces = " ".join(tokenizer.pieces(ids[segments == segment]))
            console.print(f"    text {segment}    {pieces}")


def _show_task(
    config: MTLLM,
    made: Made,
    answers: dict[str, list[str]],
    rows: Sequence[Row],
    console: Console,
) -> None:
    """Training and test rows with their tokens, and what the untrained systems say to them."""
    task = made.task
    console.print(f"\nTask: {task.name}", style="bold")
    console.print(f"  labels    {', '.join(task.labels)}")
    for row in task.train[:_SHOWN_TEXTS]:
        _show_row("train", row, _tokens(made.parts, [row])[0], console)
    foreign = [i for i, row in enumerate(rows) if row["language"] != config.english]
    for i in foreign[:_SHOWN_TEXTS]:
        row = rows[i]
        _show_row("test", row, _tokens(made.parts, [row])[0], console)
        said = ", ".join(f"{name} {answer[i]}" for name, answer in answers.items())
        console.print(f"            after one step: {said}")


def _tokens(parts: stacking.Parts, rows: Sequence[Row]) -> list[np.ndarray]:
    """As the encoder reads them, whole."""
    return stacking.source_tokens(parts.source, rows, _NO_LIMIT)[0]


def _show_row(kind: str, row: Row, ids: np.ndarray, console: Console) -> None:
    texts = " | ".join(texts_in(row))
    console.print(f"  {kind:<8}  {row['language']}  {texts!r} → {row['label']}")
    console.print(f"    ids       {_listed(ids)}")


def _show_vocabularies(config: MTLLM, made: Made, console: Console) -> None:
    """What the tokenizers make of each language: long, unknown or cut texts show here."""
    limit, source = config.evaluation.max_length, made.parts.source
    by_language = collections.defaultdict(list)
    for row in _test_rows(made):
        by_language[row["language"]].append(row)
    table = []
    for code, rows in by_language.items():
        sample = rows[:_ROWS_PER_LANGUAGE]
        read = _tokens(made.parts, sample)
        read_by_llm, _ = stacking.target_tokens(made.parts.target, sample, _NO_LIMIT)
        tokens = np.concatenate(read)
        table.append(
            (
                code,
                len(rows),
                f"{len(tokens) / len(sample):.1f}",
                f"{np.mean(tokens == source.unk_id):.1%}",
                f"{np.mean([len(ids) > limit for ids in read]):.1%}",
                f"{np.mean([len(ids) for ids in read_by_llm]):.1f}",
            )
        )
    columns = ("test rows", "rows", "tokens a text", "unknown", "cut", "LLM tokens a text")
    console.table(columns, table, title="Languages as the tokenizers read them")


def _show_cost(job: Job[MTLLM], console: Console) -> None:
    rows = []
    for name, done in job.stages.items():
        held = done.get("bytes", {})
        sizes = [_megabytes(held[part]) if held else "" for part in _HELD]
        rows.append((name, f"{done['seconds']:.1f}", *sizes, f"{done['peak_memory_gb']:.2f}"))
    console.table(
        ("stage", "seconds", *(f"{part}, MB" for part in _HELD), "peak so far, GB"),
        rows,
        title="One step of each stage, compilation included; bytes over all devices",
    )


_HELD = ("frozen", "trained", "optimizer")


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f}"


def _listed(numbers: np.ndarray) -> str:
    shown = " ".join(str(number) for number in numbers[:_SHOWN_TOKENS])
    return shown + (" …" if len(numbers) > _SHOWN_TOKENS else "")
