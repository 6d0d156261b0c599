"""What a finished run of configs/sdrrl.py on own text found, as a dated Markdown file beside this.

    python benchmarks/held_out_sentences.py RUN NAME --title="…" --command="…"

RUN is its folder, NAME goes into the file's; the command is the one that made it, for the file's
head. Figures are those of results.json: how likely held-out sentences are to each system.
"""

import argparse
import json
from pathlib import Path

import pandas as pd
from dated import page, table, write
from study import PACKAGES, stages

from mtllm_jax import results as shown


def trained_on(run: Path) -> pd.DataFrame:
    """A line a system: examples of each kind, and rows that were dropped."""
    lines = []
    for manifest in sorted((run / "transfer").glob("*/manifest.json")):
        found = json.loads(manifest.read_text(encoding="utf-8"))
        dropped = sum(sum(kinds.values()) for kinds in found["dropped"].values())
        system = shown.system_name(manifest.parent.name)
        lines.append({"system": system} | found["counts"] | {"dropped": dropped})
    return pd.DataFrame(lines).fillna(0)


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("--title", required=True)
    parser.add_argument("--command", required=True)
    options = parser.parse_args()
    run: Path = options.run
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    ((title, columns, rows),) = shown.bits_tables(results)
    parts = [
        *results["gains"],
        f"Task: {results['task']}, {shown.seeds_text(results)}. Bits of all sentences of a language"
        " by all their characters; a change is paired, sentence by sentence, its interval 95 % by"
        f" the bootstrap over sentences. Peak memory {results['peak_memory_gb']:.1f} GB.",
        f"## {title}",
        table(pd.DataFrame(rows, columns=columns)),
        "## What was trained on, and for how long",
        table(trained_on(run)),
        table(stages(run, results["seconds"])[["stage", "seconds", "steps", "loss"]]),
    ]
    write(options.name, page(options.title, options.command, PACKAGES, "\n\n".join(parts)))


if __name__ == "__main__":
    main()
