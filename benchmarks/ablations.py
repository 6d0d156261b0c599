"""Objectives and ablations of the paper on the tiny default, as a dated Markdown file beside this.

    python benchmarks/ablations.py

One run makes the models and is what the others are compared with: the default with fewer steps.
Each other run changes what its line says. All are evaluated on the development split. Runs lie in
runs/ablations; one that is finished is read, not run again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
from dated import ROOT, page, table, write

TRAIN = "python launch/train.py --config=configs/mtllm.py"
SHORT = (
    "--config.evaluation.split=dev --config.evaluation.systems=mt_llm --config.text.dev_pairs=100"
    " --config.adaptation.training.steps=400 --config.distillation.training.steps=150"
)
# What is changed, and the flags that do it, behind `--config.`.
RUNS = {
    "the default": "",
    "stage 1: 0 steps": "adaptation.training.steps=0",
    "stage 1: 100 steps": "adaptation.training.steps=100",
    "stage 1: 1600 steps": "adaptation.training.steps=1600",
    "LoRA": "trained=lora",
    "no LoRA: the bridge alone": "trained=bridge",
    "last encoder layer learns": "encoder_layers=1",
    "bridge: MLP": "bridge.hidden=256",
    "bridge: 2 positions in 1": "bridge.stride=2",
    "causal": "bidirectional=False",
    "cosine instead": "OBJECTIVE.mse=0 OBJECTIVE.cosine=1",
    "contrastive instead": "OBJECTIVE.mse=0 OBJECTIVE.contrastive=1",
    "contrastive too, 0.1": "OBJECTIVE.contrastive=0.1",
    "per token too, 1": "adaptation.objective.per_token=1",
    "logits too, 1": "distillation.objective.logits_kl=1",
}
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "babel")
LAST = 20  # steps of stage 1 that FVU is a mean over


def flags(changes: str) -> str:
    """As launch/train.py takes them; OBJECTIVE: those of both stages."""
    fields = []
    for change in changes.split():
        stages = ("adaptation", "distillation") if change.startswith("OBJECTIVE") else ("",)
        fields += [change.replace("OBJECTIVE", f"{stage}.objective") for stage in stages]
    return " ".join(f"--config.{field}" for field in fields)


def run(name: str, folder: Path, models: str) -> dict[str, object]:
    """A line of the table. models: flags that name those of the first run."""
    command = f"{TRAIN} --workdir={folder} {SHORT} {models} {flags(RUNS[name])}".split()
    command += [f"--compile_cache={folder.parent / 'compiled'}"]
    subprocess.run([sys.executable, *command[1:]], cwd=ROOT, check=True)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    line: dict[str, object] = {
        "changed": name,
        "flags": f"`{flags(RUNS[name])}`" * bool(RUNS[name]),
    }
    for test, key in {"A": "systems", "B": "systems_unseen"}.items():
        entry = results[key]["mt_llm"]
        line[f"{test}: English"] = round(100 * entry["english"], 1)
        line[f"{test}: 24 languages"] = round(100 * entry["mean"], 1)
    for stage in ("adaptation", "distillation"):
        path = folder / stage / "metrics.jsonl"
        known = path.exists()
        frame = pd.read_json(path, lines=True) if known else None
        line[f"FVU, {stage}"] = "–" if frame is None else round(frame["fvu"][-LAST:].mean(), 3)
        line[f"{stage}, s"] = round(results["seconds"][stage], 1)
    return line


def main() -> None:
    """Run what is missing, then write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "ablations")
    folder = parser.parse_args().folder.absolute()
    lines, models = [], ""
    for i, name in enumerate(RUNS):
        lines.append(run(name, folder / f"run{i}", models))
        made = folder / "run0"
        models = f"--config.encoder={made}/mini_nllb/model --config.llm={made}/mini_llama/model"
    body = f"""
`mt_llm` on the development split, at most 100 rows of each language and test, seed 0; accuracy
in %. A: seen names, B: unseen names. FVU: of the last {LAST} steps. Every run has the flags above
and those of its line; the learning rates are those chosen for the default. One seed and few steps:
from differences of a point or two nothing follows.

{table(pd.DataFrame(lines))}
"""
    write("ablations", page("Objectives and ablations", f"{TRAIN} {SHORT}", PACKAGES, body))


if __name__ == "__main__":
    main()
