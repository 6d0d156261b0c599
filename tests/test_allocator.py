"""Memory that was freed is used again, in any thread, without new pages."""

import os
import subprocess
import sys

import pytest

_PROGRAM = """
import resource, sys, threading
import numpy as np
from mtllm_jax.allocator import keep_freed_memory

keep_freed_memory()

def work():
    for _ in range(10):
        np.ones(20_000_000).sum()  # 160 MB, 39,063 pages of 4 KB

thread = threading.Thread(target=work)
thread.start()
thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def faults(**environment):
    own = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    clean["NUMPY_MADVISE_HUGEPAGE"] = "0"  # numpy would ask for pages of 2 MB
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], env=clean | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")
def test_freed_memory_is_kept_unless_the_user_has_chosen():
    assert faults() < 3 * 39_063
    assert faults(MALLOC_ARENA_MAX="8") > 9 * 39_063
