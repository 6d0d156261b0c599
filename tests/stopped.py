"""`stoppable_stage.py` as tests see it: started anew, held where they want it, and compared."""

import atexit
import json
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np
import stoppable_stage
from processes import Processes

from mtllm_jax.checkpoint import load_params

SCRIPT = Path(stoppable_stage.__file__)
STEPS = stoppable_stage.STEPS
# Compiling is most of a start: all of them share what the first has compiled.
COMPILED = tempfile.mkdtemp(prefix="compiled-")
atexit.register(shutil.rmtree, COMPILED, ignore_errors=True)


def start(folder, *arguments, count=1, cwd=None):
    """So many processes of a device each at the stage in `folder`; what they say goes to `cwd`."""
    command = (SCRIPT, f"--folder={folder}", *arguments)
    kept = {
        "JAX_COMPILATION_CACHE_DIR": COMPILED,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return Processes(count, *command, cwd=cwd or folder.parent, devices=count, **kept)


def hold(processes, folder, step=None):
    """Wait until all of them wait for a batch, and the checkpoint of `step` is finished."""
    marks = [folder / f"held-{i}" for i in range(processes.count)]
    processes.wait_until(lambda: all(mark.exists() for mark in marks), "hold")
    if step is not None:
        sealed = folder / "checkpoints" / str(step) / "checksums.json"
        processes.wait_until(sealed.exists, f"checkpoint {step}")


def release(processes, folder):
    """Give them the batch; one that was sent a signal has taken it."""
    for i in range(processes.count):
        (folder / f"held-{i}").unlink(missing_ok=True)


def finish(folder, *arguments, count=1):
    """Let so many processes bring the stage to its end; what the first printed."""
    with start(folder, *arguments, count=count) as processes:
        codes, out, err = processes.ended()
    assert codes == [0] * count and err == [""] * count, (codes, out, err)
    return out[0]


TIMED = (
    *("time", "seconds", "source_tokens_per_second", "target_tokens_per_second"),
    *("goodput", "seconds_p50", "seconds_p90", "seconds_p99"),
)


def metrics(folder):
    """The lines of metrics.jsonl, without what a clock has part in."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: x for name, x in line.items() if name not in TIMED} for line in lines]


def weights(folder):
    trained = load_params(folder / "params", stoppable_stage.stage().trainable)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(trained)]


def assert_same(folder, uninterrupted):
    """Bit for bit, in each step and at the end."""
    assert metrics(folder) == metrics(uninterrupted)
    for one, other in zip(weights(folder), weights(uninterrupted), strict=True):
        assert one.tobytes() == other.tobytes()
