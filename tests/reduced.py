"""The whole default run made small: two languages, few rows, few steps; under a minute on one core.

`ARGUMENTS` is its command line, for tests that start it themselves; the fixture `mini_run` is a
finished one.
"""

import os
import subprocess
import sys
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

ARGUMENTS = (
    f"--config={ROOT}/configs/mtllm.py",
    *(f"--config.{name}={value}" for name, value in _FIELDS.items()),
)


def environment() -> dict[str, str]:
    """That of a process of its own: one device, and a compiler that hurries."""
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    hurry = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return kept | hurry | {"PYTHONPATH": str(ROOT)}


def train(*arguments: str, cwd: Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """launch/train.py with these arguments, run to its end."""
    return subprocess.run(
        [sys.executable, ROOT / "launch" / "train.py", *arguments],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
