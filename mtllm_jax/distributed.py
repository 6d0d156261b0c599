"""Several processes as one run: how they find each other, decide as one, and end together.

jax.distributed is the runtime; arrays and what is computed from them are its business. Here is what
a run needs beside arrays. Whatever lies in files, or is printed, is process 0's: it decides and
writes, the others follow (`by_first`, `after_first`). When one process leaves early, whatever the
reason, it takes the others with it. In a process on its own none of this touches jax.distributed.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

from mtllm_jax.interrupt import quit_on_signal

Value = TypeVar("Value")

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"

_GATHER_SECONDS = 300  # for all processes to come; machines of one job do not start at once
_HEARTBEAT_SECONDS = 30  # without a sign of life a process counts as dead; jax's own default is 100
_LOOK_SECONDS = 1.0  # between two looks at signals, others' decisions, and whether one has left
_LEAVE_SECONDS = 10  # for all processes to leave together

_DECISION, _MET, _LEFT = "mtllm/decision", "mtllm/met", "mtllm/left"
_LOST = re.compile(r"gloo|nccl|connection|socket|heartbeat|unavailable|unhealthy", re.IGNORECASE)


@dataclasses.dataclass
class _Job:
    """The job that this process has joined."""

    client: Any  # of jax's coordination service, which process 0 runs
    index: int
    count: int
    decisions: int = 0
    over: threading.Event = dataclasses.field(default_factory=threading.Event)
    leaving: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    watch: threading.Thread | None = None


_JOB: _Job | None = None


def start() -> None:
    """Join the other processes of this run, where there are any; before jax touches a device.

    There are where the environment names them (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID), or where jax finds them by itself: on a Cloud TPU (a queued resource, GKE), in
    a Slurm or an Open MPI job of several tasks. JAX_NUM_PROCESSES=1 keeps a process on its own.

    Call it from the main thread. While the processes gather, Ctrl-C or SIGTERM ends this one at
    once, with the exit code that either has everywhere.

    Raises ValueError for variables that are half set or no numbers, or for a job that jax does not
    find or cannot begin. Ends the process with exit code 1 and one sentence if process 0 cannot
    listen on the port that is named, or if the others have not come within five minutes.
    """
    global _JOB
    given, tasks = named_in(os.environ), several_tasks(os.environ)
    if given is None and tasks is None and importlib.util.find_spec("libtpu") is None:
        return
    if given is not None:
        if given["num_processes"] == 1:
            return
        if given["process_id"] == 0:
            _check_port(given)
    import jax
    from jax._src import distributed  # the coordination service's client has no public name

    # Its handler would take SIGTERM from interrupt.py, and knows of no Ctrl-C.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        _gather(given)
    except ValueError as error:
        if given is None and tasks is None:
            return  # libtpu is installed, but this machine belongs to no cluster
        raise ValueError(
            f"{tasks} says that there are several processes, but jax finds no job of theirs"
            f" ({_first_line(error)}); set {ADDRESS}, {COUNT} and {INDEX}."
        ) from None
    except RuntimeError as error:
        raise ValueError(
            f"{_where(given)} cannot be used ({_first_line(error)}); is that port taken?"
        ) from None
    state = distributed.global_state
    if state.num_processes > 1:
        _JOB = _Job(state.client, state.process_id, state.num_processes)
        _JOB.watch = threading.Thread(target=_watch, args=[_JOB], daemon=True)
        _JOB.watch.start()


def _check_port(given: Mapping[str, Any]) -> None:
    """End the process if its service could not listen: jax would do so by a segmentation fault."""
    if os.environ.get("JAX_COORDINATOR_BIND_ADDRESS"):
        return  # jax listens there, and the port that others call may be another machine's
    port = int(given["coordinator_address"].rpartition(":")[2])
    with socket.socket() as probe:
        # As the service does: connections of an earlier process that fade away are no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            # Exit code 1, not 2: what holds the port may be gone when a scheduler tries again.
            raise SystemExit(
                f"error: {ADDRESS} is {given['coordinator_address']!r}, but process 0 cannot listen"
                f" on port {port} ({error.strerror}); end what holds it, or name a free port."
            ) from None


def _gather(given: Mapping[str, Any] | None) -> None:
    """jax.distributed.initialize, in a thread: it blocks, and signals are heeded in the main one.

    They end the process at once, as unwinding would wait for jax's service.
    """
    import jax

    failed: list[Exception] = []

    def initialize() -> None:
        try:
            jax.distributed.initialize(
                **(given or {}),
                initialization_timeout=_GATHER_SECONDS,
                heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            )
        except Exception as error:
            failed.append(error)

    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    quit_on_signal()
    try:
        gathering = threading.Thread(target=initialize, daemon=True)
        gathering.start()
        # One second earlier than the service, which aborts with a stack trace.
        deadline = time.monotonic() + _GATHER_SECONDS - 1
        while gathering.is_alive():
            if time.monotonic() > deadline:
                _nobody_came(given)
            # Not the whole time in one wait: the system may hand a signal to any thread, and
            # Python runs its handler when the main one next wakes.
            gathering.join(_LOOK_SECONDS)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    if failed:
        raise failed[0]


def named_in(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """The arguments of jax.distributed.initialize that the environment names; None if it names
    none. ValueError for variables that are half set, or say what cannot be."""
    found = {name: environment[name] for name in (ADDRESS, COUNT, INDEX) if environment.get(name)}
    if not found or found == {COUNT: "1"}:
        return {"num_processes": 1} if found else None
    if missing := [name for name in (ADDRESS, COUNT, INDEX) if name not in found]:
        verb = "is" if len(found) == 1 else "are"
        raise ValueError(
            f"{' and '.join(found)} {verb} set, but not {' and '.join(missing)}: several processes"
            f" need {ADDRESS} (host:port of process 0), {COUNT} and {INDEX}."
        )
    for name in (COUNT, INDEX):
        if not found[name].isdecimal():
            raise ValueError(f"{name} is {found[name]!r}; it must be a whole number.")
    count, index = int(found[COUNT]), int(found[INDEX])
    if count < 1:
        raise ValueError(f"{COUNT} is {count}; it must be at least 1.")
    if not index < count:
        raise ValueError(f"{INDEX} is {index}; with {COUNT}={count} it must be below {count}.")
    host, _, port = found[ADDRESS].rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(
            f"{ADDRESS} is {found[ADDRESS]!r}; it must be host:port, where process 0 runs."
        )
    return {"coordinator_address": found[ADDRESS], "num_processes": count, "process_id": index}


def several_tasks(environment: Mapping[str, str]) -> str | None:
    """The variable by which Slurm or Open MPI says that this is one of several tasks.

    A job of one task is left alone: jax would show it one GPU of those that the task has.
    """
    names = ["OMPI_COMM_WORLD_SIZE"]
    if "SLURM_STEP_NODELIST" in environment:  # which a batch script without srun has not
        names.append("SLURM_NTASKS")
    return next((name for name in names if environment.get(name, "1") != "1"), None)


def in_job() -> bool:
    """Whether this process is one of several."""
    return _JOB is not None


def is_first() -> bool:
    """Whether this is process 0, which prints and writes; so is a process on its own."""
    return _JOB is None or _JOB.index == 0


def by_first(function: Callable[[], Value]) -> Value:
    """What process 0 gets from `function`, in every process; the others do not call it, but wait.

    For what one must decide for all, and as the point from which all see what process 0 wrote. All
    processes come here in the same order. The value is one that JSON can hold.
    """
    if _JOB is None:
        return function()
    _JOB.decisions += 1
    key = f"{_DECISION}/{_JOB.decisions}"
    if is_first():
        _JOB.client.key_value_set(key, json.dumps(function()))
    return json.loads(_awaited(_JOB, key))


def _awaited(job: _Job, key: str) -> str:
    """The value of a key, once there is one; signals are heeded between the looks."""
    import jax

    while True:
        try:
            return job.client.blocking_key_value_get(key, round(_LOOK_SECONDS * 1000))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def after_first(function: Callable[[], Value]) -> Value:
    """`function`, called by process 0 and then by the others, which find what it made."""
    if _JOB is None:
        return function()
    if not is_first():
        by_first(lambda: None)
        return function()
    value = function()
    by_first(lambda: None)
    return value


def meet() -> None:
    """Wait until all processes have come here; they do so in the same order as to `by_first`."""
    if _JOB is None:
        return
    _JOB.decisions += 1
    met = f"{_MET}/{_JOB.decisions}"
    _JOB.client.key_value_set(f"{met}/{_JOB.index}", "here")
    for index in range(_JOB.count):
        _awaited(_JOB, f"{met}/{index}")


class Ballot:
    """What any process was asked to do, known to all of them at the same step.

    Each step all processes say what they were asked (a number, 0 for nothing); the largest is known
    a step later, when the device is at work on the next one. A process on its own knows at once.
    """

    def __init__(self) -> None:
        self._pending: Any = None
        if _JOB is not None:
            import jax
            import jax.numpy as jnp

            axes = jax.sharding.AxisType.Auto
            mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(axes,))
            self._each = jax.NamedSharding(mesh, jax.P("all"))
            self._largest = jax.jit(jnp.max, out_shardings=jax.NamedSharding(mesh, jax.P()))

    def __call__(self, asked: int) -> int:
        if _JOB is None:
            return asked
        import jax
        import numpy as np

        shape = (jax.device_count(),)
        said = jax.make_array_from_callback(
            shape, self._each, lambda _: np.full(1, asked, np.int32)
        )
        before, self._pending = self._pending, self._largest(said)
        return 0 if before is None else int(before)


def lost(error: BaseException) -> str | None:
    """One sentence, if an error says that this process can no longer reach the others."""
    if _JOB is None:
        return None
    import jax

    if not isinstance(error, jax.errors.JaxRuntimeError) or not _LOST.search(str(error)):
        return None
    return (
        f"process {_JOB.index} has lost the others, one of them has died or cannot be reached"
        f" ({_first_line(error)}); started again, all go on from the last checkpoint."
    )


def finish() -> None:
    """End as one of several, all having done their work: waits for process 0."""
    global _JOB
    if _JOB is None:
        return
    import jax

    by_first(lambda: None)
    _JOB.over.set()
    assert _JOB.watch is not None
    _JOB.watch.join()
    jax.distributed.shutdown()
    _JOB = None


def leave(code: int) -> None:
    """End this process with an exit code before its work is done, and the others with it.

    A process on its own just goes on, to end as it likes.
    """
    if _JOB is None:
        return
    with contextlib.suppress(Exception):  # another has left before, or process 0 is gone
        _JOB.client.key_value_set(_LEFT, f"{_JOB.index} {code}")
    _leave(_JOB, code)


def _leave(job: _Job, code: int) -> NoReturn:
    """Without atexit: jax would wait there for processes that may hang in a collective."""
    with job.leaving:  # for good: the watch and the main thread may both come here
        sys.stdout.flush()
        sys.stderr.flush()
        with contextlib.suppress(Exception):  # a dead process does not come
            job.client.wait_at_barrier(f"{_LEFT}/all", _LEAVE_SECONDS * 1000)
        if job.index == 0:
            time.sleep(0.5)  # the service goes with process 0, and must have answered the others
        os._exit(code)


def _watch(job: _Job) -> None:
    """Leave when another process has; what the main thread waits for would never come."""
    import jax

    while not job.over.wait(_LOOK_SECONDS):
        try:
            who, code = job.client.key_value_try_get(_LEFT).split()
        except jax.errors.JaxRuntimeError:
            continue  # nobody has left
        if int(who) != job.index:
            show_cursor = "\x1b[?25h" if os.isatty(2) else ""
            line = (
                f"{show_cursor}process {job.index} ends, as process {who} has ended with {code}\n"
            )
            os.write(2, line.encode())
            _leave(job, int(code))


def _nobody_came(given: Mapping[str, Any] | None) -> NoReturn:
    line = f"error: {_where(given)}: not all processes came within {_GATHER_SECONDS} seconds; "
    line += "start them all, with an address that each can reach.\n"
    os.write(2, line.encode())
    os._exit(1)  # not 2: machines that are late are no mistake, and a scheduler may try again


def _where(given: Mapping[str, Any] | None) -> str:
    if given is None:
        return "the cluster that jax has found"
    return f"{ADDRESS}={given['coordinator_address']} with {COUNT}={given['num_processes']}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
