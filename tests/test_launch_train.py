"""launch/train.py with the configs that are shipped: what it answers before any training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import fake_results

ROOT = Path(__file__).parents[1]
CONFIG = f"--config={ROOT}/configs/mtllm.py"


def train(folder: Path, *arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, ROOT / "launch" / "train.py", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


def finished_run(folder: Path) -> Path:
    """The default workdir below `folder`, as a run of the default config leaves it."""
    from mtllm_jax.cli import load_config

    run = folder / "runs" / "mtllm-mini"
    run.mkdir(parents=True)
    config = load_config(f"{ROOT}/configs/mtllm.py")
    (run / "config.json").write_text(json.dumps(config))
    (run / "results.json").write_text(json.dumps(fake_results.results()))
    (run / "report.html").write_text("<p>")
    return run


def test_a_finished_run_shows_its_table_at_once_from_any_folder(tmp_path):
    run = finished_run(tmp_path)
    code, out, err = train(tmp_path, CONFIG)
    assert (code, err) == (0, "")
    assert "What next" in out and "runs/mtllm-mini/report.html" in out
    code, again, err = train(tmp_path, f"--config={run}/config.json", f"--workdir={run}")
    assert (code, err) == (0, "") and "What next" in again


def test_the_folder_of_another_run_is_refused_and_not_touched(tmp_path):
    run = finished_run(tmp_path)
    before = {path: path.read_bytes() for path in run.iterdir()}
    code, out, err = train(tmp_path, CONFIG, "--config.seed=1", "--config.lora.rank=4")
    assert (code, out) == (2, "")
    assert "seed 0 → 1" in err and "lora.rank" in err and err.count("\n") == 1
    assert {path: path.read_bytes() for path in run.iterdir()} == before


def test_an_unknown_recipe_name_is_answered_with_the_known_ones(tmp_path):
    code, out, err = train(tmp_path, f"{CONFIG}:llama")
    assert (code, out) == (2, "")
    assert "mini, mini-all, llama3-8b" in err and err.count("\n") == 1
    code, out, err = train(tmp_path, CONFIG, "--config.recipe=sdrl")
    assert (code, out) == (2, "") and "config.recipe" in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "config.json").write_text('{"recipe": ["mtllm"]}')
    code, out, err = train(tmp_path, "--config=config.json")
    assert (code, out) == (2, "") and "config.recipe" in err and err.count("\n") == 1
