"""Systems on held-out rows of every language, and what each costs."""

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
from etils import epath

from mtllm_jax import distributed, scores
from mtllm_jax.metrics import Console, Progress
from mtllm_jax.results import compared_languages, mean_over
from mtllm_jax.runfolder import RunFolder
from mtllm_jax.tasks.task import TEXTS, Row, Task

Predict = Callable[[Sequence[Row]], list[str]]

# Sequences per second are measured on this many rows or a little more, after a first pass; on few
# alone where that took long.
_TIMED_ROWS, _FEW_ROWS, _LONG_SECONDS = 2048, 256, 10.0
_KEPT = ("id", "language", *TEXTS, "label")  # of a row, beside the prediction


@dataclasses.dataclass(frozen=True)
class System:
    """One of the systems that are compared, as a function from rows to labels.

    timed: the same, with nothing kept from earlier calls (translations); None where the time would
    tell nothing. covers: whether it answers a row; by default all. seeded: whether another seed
    makes another of it. flops: of these rows, paddings left out (`example_flops`).
    """

    predict: Predict
    timed: Predict | None
    covers: Callable[[Row], bool] = lambda row: True
    seeded: bool = True
    flops: Callable[[Sequence[Row]], float] | None = None


def evaluate(
    task: Task,
    systems_of: Callable[[int], Mapping[str, System]],
    seeds: Sequence[int],
    *,
    english: str,
    run: RunFolder,
    console: Console,
    piece_rows: int = sys.maxsize,
) -> dict[str, Any]:
    """Scores of every system on every test, and sequences/s; predictions go to the run folder.

    systems_of: the systems trained with a seed, by name; asked for one seed at a time. The answers
    of the first seed are in predictions/NAME.jsonl, those of others in predictions/seed-N/. Answers
    that an earlier start has left are taken from there. Test labels are read here and nowhere else.
    piece_rows: a system is asked for so many rows at a time, and what it answered is kept.

    Returns the part of results.json that is about systems: "metric", "majority", "systems", "cost"
    (of the first seed's systems: "sequences_per_second", and "flops_per_example" without paddings),
    and with a second test "majority_unseen" and "systems_unseen"; where systems cover different
    languages "common" ("common_unseen"): those that all cover, and the systems' means over these.
    """
    answers: dict[str, list[pd.DataFrame]] = {}
    cost: dict[str, dict[str, float]] = {}
    for seed in seeds:
        systems = systems_of(seed)
        rows = sum(len(rows) for rows in task.tests.values())
        which = f", seed {seed}" if len(seeds) > 1 else ""
        progress = console.progress(len(systems) * rows, f"evaluation{which}", unit="rows")
        for number, (name, system) in enumerate(systems.items()):
            place = name if seed == seeds[0] else f"seed-{seed}/{name}"
            known = None if system.seeded or name not in answers else answers[name][0]
            answers.setdefault(name, []).append(
                _answers(task, system, place, run, progress, number * rows, known, piece_rows)
            )
            if seed == seeds[0] and system.timed is not None:
                timed_rows = _timed_rows(task, system, english)
                cost[name] = _cost(system.timed, timed_rows, name, run)
                if system.flops is not None:
                    cost[name]["flops_per_example"] = system.flops(timed_rows) / len(timed_rows)
        progress.close()
    results: dict[str, Any] = {"metric": "accuracy"}
    for test, suffix in zip(task.tests, ("", "_unseen"), strict=False):
        labels = pd.Series([row["label"] for row in task.tests[test]])
        results[f"majority{suffix}"] = scores.majority(labels)
        results[f"systems{suffix}"] = {
            name: scores.entry([one[one["test"] == test] for one in by_seed], english)
            for name, by_seed in answers.items()
        }
        entries = results[f"systems{suffix}"]
        common, differ = compared_languages(list(entries.values()))
        if differ and common:
            means = {name: mean_over(entry, common) for name, entry in entries.items()}
            results[f"common{suffix}"] = {"languages": common, "mean": means}
    return results | {"cost": cost}


def _answers(
    task: Task,
    system: System,
    place: str,
    run: RunFolder,
    progress: Progress,
    done: int,
    known: pd.DataFrame | None,
    piece_rows: int,
) -> pd.DataFrame:
    """The test rows with a system's prediction: of an earlier start, or made and written now.
    known: what they are, where another seed's are the same."""
    path = f"predictions/{place}.jsonl"
    if distributed.by_first((run.path / path).exists):
        return pd.DataFrame(run.read_jsonl(path))
    if known is not None:
        run.write_jsonl(path, known.to_dict("records"))
        return known
    written: list[dict[str, str]] = []
    pieces = epath.Path(f"evaluation/pieces/{place}")
    for test, every in task.tests.items():
        rows = [row for row in every if system.covers(row)]
        for first in range(0, len(rows), piece_rows):
            piece = rows[first : first + piece_rows]
            # Whole tests are written where they belong, when all of them are there.
            file = pieces / f"{test}-{first}.jsonl" if len(piece) < len(rows) else None
            if file is not None and distributed.by_first((run.path / file).exists):
                predictions = run.read_jsonl(str(file))
            else:
                predictions = system.predict(piece)
                if file is not None:
                    run.write_jsonl(str(file), predictions)
            written += [
                {name: row[name] for name in _KEPT if name in row}
                | {"prediction": prediction, "test": test}
                for row, prediction in zip(piece, predictions, strict=True)
            ]
            progress.update(done + len(written))
    run.write_jsonl(path, written)
    if distributed.is_first() and (run.path / pieces).exists():
        (run.path / pieces).rmtree()
    return pd.DataFrame(written)


def _cost(predict: Predict, timed: Sequence[Row], name: str, run: RunFolder) -> dict[str, float]:
    path = f"evaluation/{name}.json"
    if distributed.by_first((run.path / path).exists):
        return dict(run.read_json(path))
    few = timed[:: max(1, -(-len(timed) // _FEW_ROWS))]
    first = _seconds(predict, few)
    if distributed.by_first(lambda: first) < _LONG_SECONDS:
        few = timed
        predict(few)
    seconds = _seconds(predict, few)
    cost = distributed.by_first(lambda: {"sequences_per_second": round(len(few) / seconds, 1)})
    run.write_json(path, cost)
    return cost


def _seconds(predict: Predict, rows: Sequence[Row]) -> float:
    started = time.perf_counter()
    predict(rows)
    return time.perf_counter() - started


def _timed_rows(task: Task, system: System, english: str) -> list[Row]:
    """A stride through what a system answers of the headline test in all languages but English."""
    headline = next(iter(task.tests.values()))
    rows = [row for row in headline if row["language"] != english and system.covers(row)]
    return rows[:: max(1, len(rows) // _TIMED_ROWS)]
