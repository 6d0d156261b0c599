"""The whole default run made small: two languages, few rows, few steps; under a minute on one core.

`ARGUMENTS` is its command line, for tests that start it themselves. Finished ones are the fixtures
`mini_run` and, with a user's own models, task and text, `own_run`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
STEPS = 20

_TRAINED = (
    "mini_nllb.training", "mini_llama.training", "adaptation.training", "teacher",
    "distillation.training", "mt_encoder",
)  # fmt: skip
_FIELDS = {
    "languages": "deu_Latn,jpn_Jpan",
    "text.train_pairs": 60,
    "text.test_pairs": 12,
    "text.dev_pairs": 6,
    "text.lists_per_language": 40,
    "text.english": 300,
    "text.adaptation": 300,
    "mini_nllb.vocab_size": 1200,
    "mini_nllb.width": 32,
    "mini_nllb.ffn_width": 64,
    "mini_nllb.encoder_layers": 1,
    "mini_llama.vocab_size": 500,
    "mini_llama.width": 32,
    "mini_llama.ffn_width": 64,
    "mini_llama.num_layers": 1,
    "evaluation.batch_rows": 64,
    "evaluation.max_new_tokens": 8,
    **{f"{stage}.steps": STEPS for stage in _TRAINED},
    **{f"{stage}.batch_rows": 8 for stage in _TRAINED},
    **{f"{stage}.checkpoint_every": 10 for stage in _TRAINED},
}

# SDRRL's default made small, for `flags`.
SDRRL = {
    "transfer.targets": "deu_Latn,jpn_Jpan",
    "train_instructions": 24,
    "test_instructions": 6,
    "mini_nllb.vocab_size": 2500,
    "mini_nllb.width": 32,
    "mini_nllb.ffn_width": 64,
    "mini_nllb.encoder_layers": 1,
    "mini_nllb.decoder_layers": 1,
    # So many that it says something.
    "mini_nllb.training.steps": 120,
    "mini_nllb.training.learning_rate": 0.01,
    "mini_llama.vocab_size": 1500,
    "mini_llama.width": 32,
    "mini_llama.ffn_width": 64,
    "mini_llama.num_layers": 1,
    "mini_llama.training.steps": 40,
    "training.steps": 10,
    "training.checkpoint_every": 5,
    "answering.max_new_tokens": 8,
    "answering.batch_rows": 16,
    "translating.max_new_tokens": 8,
    "translating.batch_rows": 16,
}

TRAIN = ["Kenya\tAfrica", "Ghana and Togo\tAfrica", "Peru\tAmerica", "Cuba and Chile\tAmerica"] * 4
TEST = [
    ("Kenya", "Africa", "eng_Latn"),
    ("Ghana und Togo", "Africa", "deu_Latn"),
    ("Peru und Chile", "America", "deu_Latn"),
    ("ケニア", "Africa", "jpn_Jpan"),
]


def flags(fields: Mapping[str, object]) -> list[str]:
    """--config.NAME=VALUE of each field."""
    texts = {name: ",".join(x) if isinstance(x, list) else x for name, x in fields.items()}
    return [f"--config.{name}={text}" for name, text in texts.items()]


def own_fields(folder: Path, run: Path) -> dict[str, object]:
    """Fields that name a user's own models (those of `run`), task and text, written to `folder`."""
    (folder / "a.tsv").write_text("\n".join(["text\tlabel", *TRAIN]) + "\n", encoding="utf-8")
    rows = [dict(zip(("text", "label", "language"), row, strict=True)) for row in TEST]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "b.jsonl").write_text(lines, encoding="utf-8")
    (folder / "t.txt").write_text("Kenya is in Africa\nPeru and Chile\n" * 20, encoding="utf-8")
    return {
        "encoder": str(run / "mini_nllb" / "model"),
        "llm": str(run / "mini_llama" / "model"),
        "task.train": str(folder / "a.tsv"),
        "task.test": str(folder / "b.jsonl"),
        "adaptation_text": [str(folder / "t.txt")],
    }


ARGUMENTS = (f"--config={ROOT}/configs/mtllm.py", *flags(_FIELDS))


def environment() -> dict[str, str]:
    """That of a process of its own: one device, and a compiler that hurries."""
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    hurry = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return kept | hurry | {"PYTHONPATH": str(ROOT)}


def launch(
    script: str, *arguments: object, cwd: Path, stdin: str | None = None
) -> tuple[int, str, str]:
    """A script of launch/, run to its end: its exit code, and what it printed to both."""
    done = subprocess.run(
        [sys.executable, ROOT / "launch" / script, *map(str, arguments)],
        cwd=cwd,
        env=environment(),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


def train(*arguments: str, cwd: Path, timeout: float = 900) -> subprocess.CompletedProcess[str]:
    """launch/train.py with these arguments, run to its end."""
    return subprocess.run(
        [sys.executable, ROOT / "launch" / "train.py", *arguments],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    """launch/plan.py with these flags."""
    return subprocess.run(
        [sys.executable, ROOT / "launch" / "plan.py", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
