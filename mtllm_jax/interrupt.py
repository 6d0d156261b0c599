"""How a run stops on Ctrl-C or when the machine is taken away.

Signals belong to the whole process, and so does the one record of them here.
"""

import contextlib
import dataclasses
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """A loop was asked to stop and has saved its state; the message says where it stopped."""


@dataclasses.dataclass
class Stop:
    """What the process was asked to do, and by which signal; polled between training steps."""

    requested: bool = False
    signum: int = signal.SIGINT
    raised: bool = False  # as a KeyboardInterrupt; a library may have made another error of it

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, as shells expect; 0 after SIGTERM, which schedulers send and honour.

        One that starts again only what failed sets MTLLM_SIGTERM_EXIT to another code: 0 would
        say that the run is finished.
        """
        if self.signum == signal.SIGTERM:
            return int(os.environ.get("MTLLM_SIGTERM_EXIT", "0"))
        return 128 + self.signum


_STOP = Stop()
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_AGAIN_SECONDS = 0.05


def last_stop() -> Stop:
    """The process-wide record of the latest signal."""
    return _STOP


def same_command() -> str:
    """The command line of this process, as one would type it again."""
    return shlex.join(["python", *sys.argv])


def raise_on_signal() -> None:
    """Make SIGINT and SIGTERM raise KeyboardInterrupt: what holds outside training loops.

    Where Python drops exceptions, in destructors and in callbacks of the garbage collector (jax has
    one), the signal comes again a moment later. Where a library turns it into an error of its own,
    as jax's compiler does from inside a lowering, `Stop.raised` still says what it was.
    """
    for signum in _SIGNALS:
        signal.signal(signum, _raise)
    sys.unraisablehook = _dropped


def quit_on_signal() -> None:
    """Make the next SIGINT or SIGTERM end the process at once: what holds while it is leaving."""
    for signum in _SIGNALS:
        signal.signal(signum, _quit)


@contextlib.contextmanager
def graceful_stop() -> Iterator[Stop]:
    """Within it the first SIGINT or SIGTERM only sets `requested`; a second one ends the process.

    The loop inside polls `stop.requested` after each step, saves a checkpoint and raises
    `Interrupted`. Call it from the main thread.
    """
    before = {signum: signal.getsignal(signum) for signum in _SIGNALS}
    _STOP.requested = False
    for signum in _SIGNALS:
        signal.signal(signum, _request)
    try:
        yield _STOP
    finally:
        # A loop that ended before it polled again must not swallow the wish to stop.
        for signum in _SIGNALS:
            signal.signal(signum, before[signum])
    if _STOP.requested:
        raise KeyboardInterrupt


def _request(signum: int, frame: FrameType | None) -> None:
    _STOP.requested = True
    _STOP.signum = signum
    for each in _SIGNALS:
        signal.signal(each, _quit)


def _raise(signum: int, frame: FrameType | None) -> None:
    _STOP.signum, _STOP.raised = signum, True
    raise KeyboardInterrupt


def _dropped(unraisable: Any) -> None:
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
        return
    main_thread = threading.main_thread().ident
    assert main_thread is not None  # it runs
    arguments = (main_thread, _STOP.signum)
    again = threading.Timer(_AGAIN_SECONDS, signal.pthread_kill, arguments)
    again.daemon = True
    again.start()


def _quit(signum: int, frame: FrameType | None) -> None:
    # Unwinding could wait for a step, a checkpoint or a worker; who asks twice wants none of it.
    _STOP.signum = signum
    show_cursor = "\x1b[?25h" if os.isatty(2) else ""
    line = f"{show_cursor}\nstopped at once. Go on with: {same_command()}\n"
    os.write(2, line.encode())
    os._exit(_STOP.exit_code)
