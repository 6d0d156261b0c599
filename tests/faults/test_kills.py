"""Killed, or asked to stop, and started again: bit for bit the run that was never stopped."""

import itertools
import json
import shutil
import signal
import time

import jax.numpy as jnp
import numpy as np
import pytest
import reduced
import stopped
from processes import Processes
from saved import make_iterator, run_python

from mtllm_jax.checkpoint import Checkpointer

pytestmark = pytest.mark.slow
TRAIN = reduced.ROOT / "launch" / "train.py"
STAGES = ("mini_nllb", "mini_llama", "adaptation", "teacher", "distillation", "mt_encoder")


def test_kill_9_at_step_17_of_40(killed, uninterrupted, tmp_path):
    """After steps that no checkpoint holds: those are done again, to the same numbers."""
    folder = tmp_path / "stage"
    shutil.copytree(killed, folder)
    assert not (folder / "params").exists()
    assert "going on from step 14 of 40" in stopped.finish(folder)
    stopped.assert_same(folder, uninterrupted)


def test_sigterm_saves_where_it_stands(uninterrupted, tmp_path):
    folder = tmp_path / "stage"
    with stopped.start(folder, "--hold=10") as processes:
        stopped.hold(processes, folder)
        processes.processes[0].send_signal(signal.SIGTERM)
        codes, _, (err,) = processes.ended(200)
    assert codes == [0], err
    first, last = err.splitlines()
    assert first == "stopped: a stage, step 11 of 40; saved."
    assert last == f"Go on with: python {stopped.SCRIPT} --folder={folder} --hold=10"
    assert "going on from step 11 of 40" in stopped.finish(folder)
    stopped.assert_same(folder, uninterrupted)


def test_killed_while_saving(tmp_path):
    """kill -9 at any moment of a save: what is restored is whole, and no older than announced."""
    code = f"""
    import grain, jax
    from mtllm_jax.checkpoint import Checkpointer
    state = {{"w": jax.numpy.arange(400_000.0), "n": jax.numpy.int32(0)}}
    iterator = iter(grain.MapDataset.range(50).repeat().batch(8).to_iter_dataset())
    checkpointer = Checkpointer({str(tmp_path)!r}, warn=lambda _: None)
    restored = checkpointer.restore(state, iterator)
    step = 0
    if restored:
        state, step = restored
    print(step, flush=True)
    while True:
        next(iterator)
        state = jax.tree.map(lambda x: x + 1, state)
        step += 1
        checkpointer.save(step, state, iterator)
        checkpointer.wait()
        print(step, flush=True)
    """
    announced = 0
    for delay in (0.004, 0.015, 0.03):
        process = run_python(code)
        assert process.stdout is not None
        first = int(process.stdout.readline())
        assert first >= announced
        for line in itertools.islice(process.stdout, 3):
            announced = int(line)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        rest, _ = process.communicate(timeout=200)
        announced = max([announced, *map(int, rest.split())])
        iterator = make_iterator()
        like = {"w": jnp.zeros(400_000), "n": jnp.int32(0)}
        with Checkpointer(tmp_path, warn=lambda _: None) as checkpointer:
            state, step = checkpointer.restore(like, iterator)
        assert step in (announced, announced + 1)
        assert int(state["n"]) == step
        np.testing.assert_array_equal(state["w"], np.arange(400_000.0) + step)
        assert iterator.get_state() == {"next_index": step}


def test_a_whole_run_stopped_again_and_again(tmp_path, mini_run):
    """By the config.json of another run: the same models, metrics, answers and results."""
    folder = tmp_path / "run"
    train = (TRAIN, f"--config={mini_run}/config.json", f"--workdir={folder}")
    for stage, step, signum in (
        ("mini_nllb", 13, signal.SIGKILL),
        ("distillation", 12, signal.SIGTERM),
    ):
        with Processes(1, *train, cwd=tmp_path, devices=1) as processes:
            processes.signal_at(folder / stage / "metrics.jsonl", step, 0, signum)
            codes, _, (err,) = processes.ended(200)
        assert not (folder / "results.json").exists()
        assert codes == [-signum if signum == signal.SIGKILL else 0], err
        if signum == signal.SIGTERM:
            assert "Traceback" not in err and "train.py --config=" in err.splitlines()[-1]
    with Processes(1, *train, cwd=tmp_path, devices=1) as processes:
        codes, _, err = processes.ended()
    assert codes == [0] and err == [""]

    assert (folder / "config.json").read_bytes() == (mini_run / "config.json").read_bytes()
    for stage in STAGES:
        assert stopped.metrics(folder / stage) == stopped.metrics(mini_run / stage), stage
    for kind in ("*/model/*", "*/tokenizer/*", "predictions/*", "distillation/*.npy"):
        names = sorted(path.relative_to(mini_run) for path in mini_run.glob(kind))
        assert names == sorted(path.relative_to(folder) for path in folder.glob(kind)) != []
        for name in names:
            assert (folder / name).read_bytes() == (mini_run / name).read_bytes(), name
    results, wanted = (json.loads((run / "results.json").read_text()) for run in (folder, mini_run))
    assert results.keys() == wanted.keys() and results["seconds"].keys() == wanted["seconds"].keys()
    measured = ("seconds", "time", "cost", "peak_memory_gb")
    for name in wanted.keys() - set(measured):
        assert results[name] == wanted[name], name
