"""Memory that was freed is used again, in any thread, without new pages; large pieces where the
model is small."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")

_PROGRAM = """
import resource, sys, threading
import numpy as np
from mtllm_jax.allocator import keep_for, keep_freed_memory

keep_freed_memory()
num_floats, model_bytes = map(int, sys.argv[1:])
keep_for(model_bytes)

def work():
    for _ in range(10):
        np.ones(num_floats).sum()

thread = threading.Thread(target=work)
thread.start()
thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


LARGE = 20_000_000  # floats: 160 MB, 39,063 pages of 4 KB
MIDDLE = 3_000_000  # 24 MB, 5,860 pages
SMALL_MODEL, LARGE_MODEL = 10**7, 10**9  # bytes


def faults(num_floats, model_bytes, **environment):
    own = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    clean["NUMPY_MADVISE_HUGEPAGE"] = "0"  # numpy would ask for pages of 2 MB
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(num_floats), str(model_bytes)],
        env=clean | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_freed_memory_is_kept_unless_the_user_has_chosen():
    assert faults(LARGE, SMALL_MODEL) < 3 * 39_063
    assert faults(LARGE, SMALL_MODEL, MALLOC_ARENA_MAX="8") > 9 * 39_063


def test_of_a_large_model_what_is_not_large_is_kept():
    assert faults(LARGE, LARGE_MODEL) > 9 * 39_063
    # numpy and Python have some thousands of pages themselves.
    assert faults(MIDDLE, LARGE_MODEL) < faults(0, LARGE_MODEL) + 3 * 5_860
