"""glibc's allocator, told to keep what a training step frees.

XLA on CPUs asks for a step's buffers anew each time. glibc takes large ones from the system and
gives them back, so that every page is mapped and cleared again in every step. Where no accelerator
is, it is told to keep buffers of up to 32 MiB, and where the model is small all of them: of large
ones, which are of many sizes, what is kept is soon twice what is needed, and mapping pages takes
little beside computing on them. The options are those of mallopt(3).
"""

import ctypes
import os
from pathlib import Path

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -3, -4, -8
_MOST_MAPPED = 65_536  # buffers taken from the system at a time, glibc's own number
_SMALL = 256 << 20  # bytes of a model and its optimizer
_ACCELERATORS = ("nvidia[0-9]*", "kfd", "accel*", "vfio/[0-9]*")  # of GPUs and TPUs, under /dev
_OWN = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")  # with these a user has chosen


def keep_freed_memory() -> None:
    """To be called before threads begin; elsewhere than under glibc it does nothing."""
    _set(
        (_M_ARENA_MAX, 1),  # those of other threads cannot hold a large buffer
        (_M_MMAP_THRESHOLD, 32 << 20),  # the most that it may be
        (_M_TRIM_THRESHOLD, -1),  # none
        (_M_TOP_PAD, 64 << 20),
    )


def keep_for(num_bytes: int) -> None:
    """The same for what follows, of a model that has so many bytes with its optimizer."""
    _set((_M_MMAP_MAX, 0 if num_bytes <= _SMALL else _MOST_MAPPED))


def _set(*options: tuple[int, int]) -> None:
    if any(name.startswith(_OWN) for name in os.environ):
        return
    if any(any(Path("/dev").glob(pattern)) for pattern in _ACCELERATORS):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for option, value in options:
        mallopt(option, value)
