"""glibc's allocator, told to keep what a training step frees.

XLA on CPUs asks for a step's buffers anew each time. glibc takes large ones from the system and
gives them back, so that every page is mapped and cleared again in every step. Where no accelerator
is, it is told to keep them. The options are those of mallopt(3).
"""

import ctypes
import os
from pathlib import Path

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_ACCELERATORS = ("nvidia[0-9]*", "kfd", "accel*", "vfio/[0-9]*")  # of GPUs and TPUs, under /dev
_OWN = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")  # with these a user has chosen


def keep_freed_memory() -> None:
    """To be called before threads begin; elsewhere than under glibc it does nothing."""
    if any(name.startswith(_OWN) for name in os.environ):
        return
    if any(any(Path("/dev").glob(pattern)) for pattern in _ACCELERATORS):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_ARENA_MAX, 1)  # those of other threads cannot hold a large buffer
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)  # none
    mallopt(_M_TOP_PAD, 64 << 20)
