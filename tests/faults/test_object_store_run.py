"""Runs at gs://, in a bucket on loopback: killed at the worst moments, they end as on a disk."""

import functools
import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import reduced
import stopped
from etils import epath

import mtllm_jax

pytestmark = pytest.mark.slow
STAGES = ("mini_nllb", "mini_llama", "adaptation", "teacher", "distillation", "mt_encoder")
RUN = epath.Path("gs://bucket/run")
# The same sums in another order: the last places of float32 (1.2e-7 of a number) differ, and Adam's
# division by small second moments widens that from step to step.
TOLERANCE = 1e-5  # of a loss
# What is being written when a start ends, the signal that ends it, and what the next one says.
ENDS = (
    ("mini_nllb/model/model.safetensors", signal.SIGKILL, "✓ text  done before"),
    (
        "adaptation/checkpoints/20/state/d/",
        signal.SIGKILL,
        "the checkpoint of step 20 was never finished: going on from step 10.",
    ),
    (
        "teacher/checkpoints/10/checksums.json",
        signal.SIGTERM,
        "does not match its checksum): going on from step 10.",
    ),
)


def start(mini_run, cwd):
    """By the config.json of another run, and with what it has compiled."""
    command = (
        f"--config={mini_run}/config.json",
        f"--workdir={RUN}",
        f"--compile_cache={mini_run}/compiled",
    )
    return subprocess.Popen(
        [sys.executable, reduced.ROOT / "launch" / "train.py", *command],
        cwd=cwd,
        env=reduced.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def test_a_whole_run_killed_again_and_again(bucket, mini_run, tmp_path):
    """The very models, losses, answers and results of the run on a disk."""
    said_next = ""
    for name, signum, next_says in ENDS:
        with start(mini_run, tmp_path) as process:
            end = functools.partial(process.send_signal, signum)
            bucket.when_written(f"^run/{name}", end)
            said, _ = process.communicate(timeout=300)
        assert process.returncode == (0 if signum == signal.SIGTERM else -signum), said
        assert said_next in said, said
        said_next = next_says
    newest = bucket.read("run/teacher/checkpoints/newest").decode()
    assert int(newest) > 10
    bucket.flip_a_byte(f"run/teacher/checkpoints/{newest}/state/d/")
    for says in (said_next, f"report      {RUN}/report.html"):
        with start(mini_run, tmp_path) as process:
            said, _ = process.communicate(timeout=300)
        assert process.returncode == 0 and says in said, said

    assert bucket.read("run/config.json") == (mini_run / "config.json").read_bytes()
    for stage in STAGES:
        assert stopped.metrics(RUN / stage) == stopped.metrics(mini_run / stage), stage
    for kind in ("*/model/*", "*/tokenizer/*", "predictions/*", "distillation/*.npy"):
        names = sorted(path.relative_to(mini_run).as_posix() for path in mini_run.glob(kind))
        assert names
        for name in names:
            assert bucket.read(f"run/{name}") == (mini_run / name).read_bytes(), name
    results, wanted = (json.loads((run / "results.json").read_text()) for run in (RUN, mini_run))
    for name in ("task", "metric", "seeds", "systems", "systems_unseen"):
        assert results[name] == wanted[name], name
    model, rows = mtllm_jax.load(RUN), read_jsonl(RUN / "predictions" / "mt_llm.jsonl")
    rows = [row for row in rows if row["language"] == "jpn_Jpan"]
    answers = model.classify([row["text"] for row in rows], "jpn_Jpan")
    assert [next(iter(answer)) for answer in answers] == [row["prediction"] for row in rows]


def test_two_processes(bucket, uninterrupted, tmp_path):
    """Killed while both write a checkpoint; one alone goes on, with the same examples."""
    stage = epath.Path("gs://bucket/stage")
    with stopped.start(stage, count=2, cwd=tmp_path) as processes:

        def kill():
            for process in processes.processes:
                process.kill()

        bucket.when_written("^stage/checkpoints/14/state/", kill)
        codes, _, err = processes.ended()
    assert codes == [-signal.SIGKILL] * 2, err
    assert bucket.names("stage/checkpoints/7/state/ocdbt.process_1/")
    with stopped.start(stage, cwd=tmp_path) as processes:
        codes, (said,), err = processes.ended()
    assert codes == [0], err
    assert "the checkpoint of step 14 was never finished: going on from step 7." in said
    got, wanted = stopped.metrics(stage), stopped.metrics(uninterrupted)
    assert [line["step"] for line in got] == [line["step"] for line in wanted]
    losses = [[line["loss"] for line in lines] for lines in (got, wanted)]
    np.testing.assert_allclose(*losses, rtol=TOLERANCE)
