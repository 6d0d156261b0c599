"""The default run over several seeds, as a dated Markdown file beside this one.

    python benchmarks/default_run.py --seeds 0 1 2

Each seed has its run folder, runs/seed0 …; one that is finished is read, not run again.
"""

import argparse
import json
import subprocess
import sys

import pandas as pd
from dated import ROOT, page, table, write

TRAIN = "python launch/train.py --config=configs/mtllm.py"
TESTS = {"A": "systems", "B": "systems_unseen"}
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "babel")


def run(seed: int) -> dict:
    """results.json of one seed."""
    workdir = f"runs/seed{seed}"
    command = f"{TRAIN} --workdir={workdir} --config.seed={seed}".split()
    subprocess.run([sys.executable, *command[1:]], cwd=ROOT, check=True)
    return json.loads((ROOT / workdir / "results.json").read_text(encoding="utf-8"))


def scores(runs: dict[int, dict]) -> pd.DataFrame:
    """Accuracy in per cent: a row per system and test, columns English, languages, and by seed."""
    rows = []
    for test, key in TESTS.items():
        for system in next(iter(runs.values()))[key]:
            entries = [100 * pd.Series(_flat(results[key][system])) for results in runs.values()]
            mean = sum(entries) / len(entries)
            by_seed = [entry["mean"] for entry in entries]
            rows.append(
                {
                    "test": test,
                    "system": system,
                    "English": mean["english"],
                    "24 languages": mean["mean"],
                    "std over seeds": pd.Series(by_seed).std(),
                    "Latin": mean["Latin"],
                    "other scripts": mean["other"],
                    "mean by seed": ", ".join(f"{value:.1f}" for value in by_seed),
                }
            )
    return pd.DataFrame(rows).round(1)


def _flat(entry: dict) -> dict[str, float]:
    languages = pd.Series(entry["languages"])
    latin = languages.index.str.endswith("_Latn")
    return {
        "english": entry["english"],
        "mean": entry["mean"],
        "Latin": languages[latin].mean(),
        "other": languages[~latin].mean(),
    }


def main() -> None:
    """Run what is missing, then write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    runs = {seed: run(seed) for seed in seeds}
    seconds = pd.DataFrame({f"seed {seed}": results["seconds"] for seed, results in runs.items()})
    seconds.loc["all"] = seconds.sum()
    seconds.loc["peak memory, GB"] = [results["peak_memory_gb"] for results in runs.values()]
    cost = pd.DataFrame(
        {
            f"seed {seed}": {name: x["sequences_per_second"] for name, x in results["cost"].items()}
            for seed, results in runs.items()
        }
    )
    first = next(iter(runs.values()))
    body = f"""
Accuracy in %, mean over the seeds. Always the most frequent class:
{100 * first["majority"]:.1f} (A), {100 * first["majority_unseen"]:.1f} (B).

{table(scores(runs))}

Seconds by stage, and the most memory the process held:

{table(seconds.round(2).rename_axis("stage").reset_index())}

Inference, sequences per second, tokenisation (and translation) included:

{table(cost.rename_axis("system").reset_index())}
"""
    title = f"The default run, seeds {', '.join(map(str, seeds))}"
    command = f"{TRAIN} --workdir=runs/seedN --config.seed=N"
    write("default-run", page(title, command, PACKAGES, body))


if __name__ == "__main__":
    main()
