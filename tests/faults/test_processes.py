"""One of several processes is killed, or asked to stop; others, more or fewer, go on."""

import signal
import time

import numpy as np
import pytest
import stopped

pytestmark = pytest.mark.slow
# The same sums in another order: the last places of float32 (1.2e-7 of a number) differ, and Adam's
# division by small second moments widens that from step to step.
TOLERANCE = 1e-5  # of a loss, and of each array's largest number


def test_killed_and_started_again_by_other_counts(uninterrupted, tmp_path):
    """2 processes, one of them killed; 1; 4, one of them asked to stop; 1: as if by one alone."""
    folder = tmp_path / "stage"
    with stopped.start(folder, "--hold=17", count=2) as processes:
        stopped.hold(processes, folder, 14)
        processes.processes[1].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        stopped.release(processes, folder)
        codes, _, err = processes.ended(60)  # the README promises a minute
        print(f"the other process ended {time.monotonic() - killed:.1f} s after the kill")
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, 2), err
    assert len(stopped.metrics(folder)) < stopped.STEPS and not (folder / "params").exists()

    step = 14
    # Of several processes all know at the step after that in which one is asked.
    for count, given, stops_at in ((1, 20, 35), (4, 2, 39)):
        with stopped.start(folder, f"--hold={given}", count=count) as processes:
            stopped.hold(processes, folder)
            processes.processes[-1].send_signal(signal.SIGTERM)
            stopped.release(processes, folder)
            codes, out, err = processes.ended(120)
        assert codes == [0] * count, err
        assert f"going on from step {step} of 40" in out[0]
        step = stops_at
        first, last = err[0].splitlines()
        assert first == f"stopped: a stage, step {step} of 40; saved."
        assert last.startswith("Go on with: ") and err[1:] == [""] * (count - 1)

    assert f"going on from step {step} of 40" in stopped.finish(folder)
    same = (stopped.metrics(folder), stopped.metrics(uninterrupted))
    assert [line["step"] for line in same[0]] == [line["step"] for line in same[1]]
    for name in ("source_fill", "target_fill"):  # of a batch: these are the same rows
        assert [line[name] for line in same[0]] == [line[name] for line in same[1]]
    for name in ("loss", "grad_norm"):
        numbers = [[line[name] for line in lines] for lines in same]
        np.testing.assert_allclose(*numbers, rtol=TOLERANCE, err_msg=name)
    for one, other in zip(stopped.weights(folder), stopped.weights(uninterrupted), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE * np.max(np.abs(other)))
