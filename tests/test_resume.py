"""Killed and started again: bit for bit the run that was never stopped."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import reduced
import tiny

from mtllm_jax.checkpoint import load_params

STAGE = Path(__file__).with_name("stoppable_stage.py")
TRAINED = ("mini_nllb", "mini_llama", "adaptation", "teacher", "distillation", "mt_encoder")


def start(*command, cwd):
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=reduced.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def stop_at(process, metrics, step, signum):
    """Send the signal once that many steps are written down; returns what was said."""
    deadline = time.monotonic() + 300
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"no step {step} in time"
        time.sleep(0.005)
    process.send_signal(signum)
    return process.communicate(timeout=60)[0]


def without_time(metrics):
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    timed = ("time", "seconds", "source_tokens_per_second", "target_tokens_per_second")
    return [{name: x for name, x in line.items() if name not in timed} for line in lines]


# ---------------------------------------------------------------- one stage


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "stage"
    finish(start(STAGE, folder, 0, cwd=folder.parent))
    assert [line["step"] for line in without_time(folder / "metrics.jsonl")] == list(range(1, 31))
    return folder


def weights(folder):
    tree = load_params(folder / "params", tiny.stage("distillation").trainable)
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def assert_same_stage(folder, uninterrupted):
    assert without_time(folder / "metrics.jsonl") == without_time(uninterrupted / "metrics.jsonl")
    assert weights(folder) == weights(uninterrupted)


@pytest.mark.slow
def test_kill_9_and_again(tmp_path, uninterrupted):
    """After steps that no checkpoint holds: those are done again, to the same numbers."""
    folder = tmp_path / "stage"
    process = start(STAGE, folder, 0.05, cwd=tmp_path)
    stop_at(process, folder / "metrics.jsonl", 17, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert 17 <= len(without_time(folder / "metrics.jsonl")) < 30
    assert not (folder / "params").exists()
    assert "going on from step " in finish(start(STAGE, folder, 0, cwd=tmp_path))
    assert_same_stage(folder, uninterrupted)


@pytest.mark.slow
def test_sigterm_saves_where_it_stands(tmp_path, uninterrupted):
    folder = tmp_path / "stage"
    process = start(STAGE, folder, 0.05, cwd=tmp_path)
    said = stop_at(process, folder / "metrics.jsonl", 10, signal.SIGTERM)
    step = len(without_time(folder / "metrics.jsonl"))
    assert 10 <= step < 30 and f"interrupted: a stage, step {step} of 30; saved." in said
    again = finish(start(STAGE, folder, 0, cwd=tmp_path))
    assert f"going on from step {step} of 30" in again
    assert_same_stage(folder, uninterrupted)


# ---------------------------------------------------------------- a whole run


@pytest.mark.slow
def test_a_whole_run_stopped_again_and_again(tmp_path, mini_run):
    """By the config.json of another run: the same models, metrics, answers and results."""
    folder = tmp_path / "run"
    train = (reduced.ROOT / "launch" / "train.py", f"--config={mini_run}/config.json")
    for stage, step, signum in (
        ("mini_nllb", 13, signal.SIGKILL),
        ("mini_llama", 5, signal.SIGTERM),
        ("adaptation", 20, signal.SIGKILL),
        ("distillation", 12, signal.SIGINT),
        ("mt_encoder", 1, signal.SIGKILL),
    ):
        process = start(*train, f"--workdir={folder}", cwd=tmp_path)
        said = stop_at(process, folder / stage / "metrics.jsonl", step, signum)
        assert not (folder / "results.json").exists()
        if signum != signal.SIGKILL:
            assert process.returncode == (0 if signum == signal.SIGTERM else 130), said
            assert "Traceback" not in said and "train.py --config=" in said.splitlines()[-1]
    finish(start(*train, f"--workdir={folder}", cwd=tmp_path))

    assert (folder / "config.json").read_bytes() == (mini_run / "config.json").read_bytes()
    for stage in TRAINED:
        name = f"{stage}/metrics.jsonl"
        assert without_time(folder / name) == without_time(mini_run / name), stage
    for kind in ("*/model/*", "*/tokenizer/*", "predictions/*", "distillation/*.npy"):
        names = sorted(path.relative_to(mini_run) for path in mini_run.glob(kind))
        assert names == sorted(path.relative_to(folder) for path in folder.glob(kind)) != []
        for name in names:
            assert (folder / name).read_bytes() == (mini_run / name).read_bytes(), name
    results, wanted = (json.loads((run / "results.json").read_text()) for run in (folder, mini_run))
    assert results.keys() == wanted.keys() and results["seconds"].keys() == wanted["seconds"].keys()
    measured = ("seconds", "cost", "peak_memory_gb")
    for name in wanted.keys() - set(measured):
        assert results[name] == wanted[name], name
