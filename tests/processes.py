"""One run by real processes over loopback: started, met at a known place, and seen to end."""

import contextlib
import re
import socket
import subprocess
import sys
import time

import reduced

from mtllm_jax import distributed


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


class Processes:
    """So many processes of one job; killed if they outlive the test.

    devices: of all together. variables: of their environment.
    """

    def __init__(self, count, *command, cwd, devices=4, **variables):
        self.count = count
        port = free_port()
        devices = f"--xla_force_host_platform_device_count={devices // count}"
        each = reduced.environment() | {"XLA_FLAGS": devices, "HF_HUB_OFFLINE": "1"} | variables
        job = {distributed.ADDRESS: f"localhost:{port}", distributed.COUNT: str(count)}
        self.logs = [(cwd / f"{port}-{i}.out", cwd / f"{port}-{i}.err") for i in range(count)]
        self.processes = []
        for i, (out, err) in enumerate(self.logs):
            own = job | {distributed.INDEX: str(i)} if count > 1 else {}
            with out.open("wb") as stdout, err.open("wb") as stderr:
                command_line = [sys.executable, *map(str, command)]
                self.processes.append(
                    subprocess.Popen(
                        command_line, cwd=cwd, env=each | own, stdout=stdout, stderr=stderr
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()

    def ended(self, timeout=400):
        """Their exit codes, what each printed, and what each said is wrong."""
        deadline = time.monotonic() + timeout
        codes = [p.wait(max(0.1, deadline - time.monotonic())) for p in self.processes]
        return codes, self.said(0), self.said(1)

    def said(self, stream):
        """By each on standard output (0) or standard error (1), so far."""
        # Gloo, the CPU's collectives, greets on standard output.
        return [re.sub(r".*peer ranks.*\n", "", log[stream].read_text()) for log in self.logs]

    def wait_until(self, condition, what):
        """Until `condition()` holds, all processes living."""
        deadline = time.monotonic() + 200
        while not condition():
            codes = [process.poll() for process in self.processes]
            assert codes == [None] * self.count, (codes, self.said(0), self.said(1))
            assert time.monotonic() < deadline, (f"no {what} in time", self.said(1))
            time.sleep(0.01)

    def signal_at(self, metrics, step, which, signum):
        """Send a signal to one of them once that many steps are written down."""
        self.wait_until(
            lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= step, f"step {step}"
        )
        self.processes[which].send_signal(signum)
