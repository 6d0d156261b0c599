"""What a finished run of configs/sdrrl.py found, as a dated Markdown file beside this.

    python benchmarks/sdrrl_run.py RUN NAME --title="…" --command="…"

RUN is its folder, NAME goes into the file's; the command is the one that made it, for the file's
head. Figures are those of results.json: how many held-out instructions each system answers right,
or, on own text without any, how likely held-out sentences are to it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from dated import page, table, write
from study import PACKAGES, by_language, opened, percent, stages

from mtllm_jax import results as shown

_KINDS = ("LL", "LT", "TL", "TT", "switched", "translation", "completion", "dropped")


def trained_on(run: Path) -> pd.DataFrame:
    """A line a system: examples of each kind, and rows that were dropped."""
    lines = []
    for manifest in sorted((run / "transfer").glob("*/manifest.json")):
        found = json.loads(manifest.read_text(encoding="utf-8"))
        dropped = sum(sum(kinds.values()) for kinds in found["dropped"].values())
        system = shown.system_name(manifest.parent.name)
        lines.append({"system": system} | found["counts"] | {"dropped": dropped})
    counts = pd.DataFrame(lines).set_index("system").fillna(0)
    kinds = sorted(counts, key=_KINDS.index)
    return counts[kinds].astype(int).reset_index()


def judged(results: Mapping[str, Any]) -> list[str]:
    """Accuracy and chrF of answers; nothing where no instruction was held out."""
    tables = shown.chrf_tables(results)
    if not tables:
        return []
    ((title, columns, rows),) = tables
    systems = results["systems"]
    whole = {
        "English": [percent(entry["english"]) for entry in systems.values()],
        "mean": [percent(entry["mean"]) for entry in systems.values()],
        "± 95 %": [percent(shown.half_interval(entry)) for entry in systems.values()],
    }
    means = pd.DataFrame(whole.values(), index=whole.keys(), columns=columns[1:])
    languages = by_language(systems, shown.languages_of(results))
    return [
        f"Task: {results['task']}, {shown.seeds_text(results)}. Accuracy in %; an answer is right"
        " that is the reference but for case, blanks and punctuation. Intervals are by the"
        " bootstrap over rows.",
        "## Accuracy",
        table(pd.concat([means.reset_index(names=""), languages])),
        f"## {title}",
        table(pd.DataFrame(rows, columns=columns)),
    ]


def read(results: Mapping[str, Any]) -> list[str]:
    """Likelihoods of sentences."""
    ((title, columns, rows),) = shown.bits_tables(results)
    return [
        f"Task: {results['task']}, {shown.seeds_text(results)}. Bits of all sentences of a language"
        " by all their characters; a change is paired, sentence by sentence, its interval 95 % by"
        " the bootstrap over documents.",
        f"## {title}",
        table(pd.DataFrame(rows, columns=columns)),
    ]


def main() -> None:
    """Write the file."""
    options, results = opened(__doc__)
    run: Path = options.run
    parts = [*results["gains"], *(judged(results) or read(results))]
    parts += [
        f"Peak memory {results['peak_memory_gb']:.1f} GB.",
        "## What was trained on, and for how long",
        table(trained_on(run)),
        table(stages(run, results["seconds"])[["stage", "seconds", "steps", "loss"]]),
    ]
    write(options.name, page(options.title, options.command, PACKAGES, "\n\n".join(parts)))


if __name__ == "__main__":
    main()
