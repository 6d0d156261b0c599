"""Systems on held-out rows of every language, and what each costs."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mtllm_jax.metrics import Console
from mtllm_jax.runfolder import RunFolder
from mtllm_jax.tasks.classification import Classification, Row, accuracy_by_language, majority

Predict = Callable[[Sequence[Row]], list[str]]

_TIMED_ROWS = 2048  # sequences per second are measured on about this many, after a first pass


def evaluate(
    task: Classification,
    systems: Mapping[str, Predict],
    *,
    english: str,
    run: RunFolder,
    console: Console,
) -> dict[str, Any]:
    """Scores of every system on every test, and sequences/s; predictions go to the run folder.

    Test labels are read here and nowhere else. Returns the part of results.json that is about
    systems: "metric", "majority", "systems", "cost", and with a second test "majority_unseen" and
    "systems_unseen".
    """
    results: dict[str, Any] = {"metric": "accuracy"}
    cost: dict[str, dict[str, float]] = {}
    total = len(systems) * sum(len(rows) for rows in task.tests.values())
    progress = console.progress(total, "evaluation", unit="rows")
    done = 0
    suffixes = dict(zip(task.tests, ("", "_unseen"), strict=False))
    for test, suffix in suffixes.items():
        results[f"majority{suffix}"] = majority(task.tests[test])
        results[f"systems{suffix}"] = {}
    for name, predict in systems.items():
        written = []
        for test, suffix in suffixes.items():
            rows = task.tests[test]
            predictions = predict(rows)
            done += len(rows)
            progress.update(done)
            results[f"systems{suffix}"][name] = accuracy_by_language(rows, predictions, english)
            written += [
                {
                    "id": row["id"],
                    "language": row["language"],
                    "text": row["text"],
                    "label": row["label"],
                    "prediction": prediction,
                    "test": test,
                }
                for row, prediction in zip(rows, predictions, strict=True)
            ]
        run.write_jsonl(f"predictions/{name}.jsonl", written)
        timed = _timed_rows(task, english)
        predict(timed)
        started = time.perf_counter()
        predict(timed)
        seconds = time.perf_counter() - started
        cost[name] = {"sequences_per_second": round(len(timed) / seconds, 1)}
    progress.close()
    return results | {"cost": cost}


def _timed_rows(task: Classification, english: str) -> list[Row]:
    """A stride through the headline test in all languages but English."""
    rows = [row for row in next(iter(task.tests.values())) if row["language"] != english]
    return rows[:: max(1, len(rows) // _TIMED_ROWS)]
