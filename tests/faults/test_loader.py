"""A worker that reads rows is killed: the run stops, and no epoch is a row shorter."""

import itertools
import os
import re
import signal
import time
from pathlib import Path

import pytest
import stopped
from saved import run_python
from test_pipeline import NUM_ROWS, Source, order

from mtllm_jax.data.pipeline import batches

pytestmark = pytest.mark.slow


class Deadly(Source):
    """A source that ends the process which reads its last row."""

    def __getitem__(self, row):
        if row == NUM_ROWS - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(row)


def test_a_worker_that_dies_is_an_error_and_no_shorter_epoch():
    read = batches(Deadly(), batch_rows=1, seed=0, workers=1)
    whole = order(seed=0, count=NUM_ROWS, batch_rows=1).tolist()
    taken = []
    with pytest.raises(RuntimeError, match="one of the workers that read rows was killed"):
        taken.extend(int(batch["row"][0]) for batch in itertools.islice(read, NUM_ROWS))
    assert len(taken) <= whole.index(NUM_ROWS - 1)
    read.close()


def workers_of(process):
    """The processes that it began, but for Python's tracker of what they share."""
    files = Path(f"/proc/{process.pid}/task").glob("*/children")
    children = [child for file in files for child in file.read_text().split()]
    return [int(c) for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]


def test_a_stage_stops_and_goes_on_from_its_checkpoint(uninterrupted, tmp_path):
    """Exit code 1: a scheduler may try again. The rows are those that a thread would have read."""
    folder = tmp_path / "stage"
    with stopped.start(folder, "--workers=1", "--hold=9") as processes:
        stopped.hold(processes, folder, 7)
        (worker,) = workers_of(processes.processes[0])
        os.kill(worker, signal.SIGKILL)
        stopped.release(processes, folder)
        codes, _, (err,) = processes.ended(200)
    assert codes == [1], err
    assert "\nRuntimeError: one of the workers that read rows was killed, as happens where" in err
    assert len(stopped.metrics(folder)) < stopped.STEPS and not (folder / "params").exists()
    # 14, where what the worker had read ahead went that far.
    assert re.search(r"going on from step (7|14) of 40", stopped.finish(folder, "--workers=1"))
    stopped.assert_same(folder, uninterrupted)


def test_workers_end_with_their_process():
    process = run_python("""
    from test_pipeline import Source, batches
    read = batches(Source(), batch_rows=2, seed=0, workers=1)
    next(read)
    print("reading", flush=True)
    while True:
        next(read)
    """)
    assert process.stdout.readline() == "reading\n"
    workers = workers_of(process)
    assert workers
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "a worker outlived its process"
        time.sleep(0.05)
