"""What a finished run of configs/mtllm.py found, as a dated Markdown file beside this.

    python benchmarks/study.py RUN NAME --title="…" --command="…"

RUN is its folder, NAME goes into the file's; the command is the one that made it, for the file's
head. Figures are those of results.json; systems are compared, row by row, by their predictions.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd
from dated import page, table, write

from mtllm_jax import results as shown
from mtllm_jax import scores
from mtllm_jax.languages import LANGUAGES
from mtllm_jax.metrics import read_metrics

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "transformers")
OURS = "mt_llm"
LAST = 20  # steps of a stage that FVU is a mean over


def percent(value: float | None, digits: int = 1) -> str:
    """Of a share; "–" of none."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def summary(entries: dict[str, dict[str, Any]], cost: dict[str, Any]) -> pd.DataFrame:
    """A line a system."""
    common = shown.common_languages(list(entries.values()))
    latin = [code for code in common if shown.is_latin(code)]
    others = [code for code in common if not shown.is_latin(code)]
    lines = []
    for system, entry in entries.items():
        half, spent = shown.half_interval(entry), cost.get(system, {})
        rate, flops = spent.get("sequences_per_second"), spent.get("flops_per_example")
        lines.append(
            {
                "system": shown.system_name(system),
                "English": percent(entry["english"]),
                "languages": sum(value is not None for value in entry["languages"].values()),
                "their mean": percent(entry["mean"]),
                "± 95 %": percent(half),
                f"mean of the {len(common)} in common": percent(shown.mean_over(entry, common)),
                f"of these Latin ({len(latin)})": percent(shown.mean_over(entry, latin)),
                f"other scripts ({len(others)})": percent(shown.mean_over(entry, others)),
                "sequences/s": "–" if rate is None else f"{rate:.4g}",
                "GFLOP a row": "–" if flops is None else f"{flops / 1e9:.2g}",
            }
        )
    return pd.DataFrame(lines)


def compared(run: Path, place: int, systems: list[str]) -> pd.DataFrame:
    """The stack against each other system on the rows that both answered, all languages. place: of
    the test among those there are."""

    def answers(system: str) -> pd.DataFrame:
        frame = pd.read_json(run / "predictions" / f"{system}.jsonl", lines=True, dtype=False)
        frame = frame.astype({"id": str})
        return frame[frame["test"] == frame["test"].unique()[place]]

    ours, lines = answers(OURS), []
    for system in systems:
        if system != OURS:
            found = scores.compare(ours, answers(system))
            low, high = found["interval"]
            lines.append(
                {
                    "against": shown.system_name(system),
                    "rows": found["rows"],
                    "stack's accuracy less theirs": f"{100 * found['difference']:+.1f}",
                    "95 %": f"{100 * low:+.1f} to {100 * high:+.1f}",
                    "p": f"{found['p']:.2g}",
                }
            )
    return pd.DataFrame(lines)


def by_language(entries: dict[str, dict[str, Any]], codes: list[str]) -> pd.DataFrame:
    """A line a language."""
    return pd.DataFrame(
        [
            {"": f"{shown.language_name(code)} {code}" if code in LANGUAGES else code}
            | {
                shown.system_name(system): percent(entry["languages"].get(code))
                for system, entry in entries.items()
            }
            for code in codes
        ]
    )


def stages(run: Path, seconds: dict[str, float]) -> pd.DataFrame:
    """A line a stage: what it took, and what its last steps came to."""
    lines = []
    for name, spent in seconds.items():
        line: dict[str, object] = {"stage": name, "seconds": round(spent), "steps": "–"}
        path = run / name / "metrics.jsonl"
        frame = read_metrics(path) if path.exists() else None
        if frame is not None:
            line["steps"] = int(frame["step"].max())
        for term in ("loss", "fvu", "accuracy"):
            known = frame is not None and term in frame
            line[term] = f"{frame[term][-LAST:].mean():.3g}" if known else "–"
        lines.append(line)
    return pd.DataFrame(lines)


def opened(description: str | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The flags of a script that makes a page of a run, and the run's results."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("--title", required=True)
    parser.add_argument("--command", required=True)
    options = parser.parse_args()
    return options, json.loads((options.run / "results.json").read_text(encoding="utf-8"))


def main() -> None:
    """Write the file."""
    options, results = opened(__doc__)
    run: Path = options.run
    cost, tests = results.get("cost", {}), shown.tests_of(results)
    parts = [
        f"Task: {results['task']}. Accuracy in %, {shown.seeds_text(results)}; ± and intervals are"
        " by the bootstrap over items. Peak memory"
        f" {results['peak_memory_gb']:.1f} GB. Seconds are those of all starts; loss, FVU and"
        f" accuracy are means of a stage's last {LAST} steps, of its training batches.",
        table(stages(run, results["seconds"])),
    ]
    for place, (test, entries) in enumerate(tests.items()):
        if len(tests) > 1:
            parts.append(f"## {shown.TEST_NAMES[test]}")
        parts += [
            table(summary(entries, cost)),
            table(compared(run, place, list(entries))),
        ]
    codes = shown.languages_of(results)
    for test, entries in tests.items():
        alone = f", {shown.TEST_NAMES[test]}" if len(tests) > 1 else ""
        parts += [f"## By language{alone}", table(by_language(entries, codes))]
    write(options.name, page(options.title, options.command, PACKAGES, "\n\n".join(parts)))


if __name__ == "__main__":
    main()
