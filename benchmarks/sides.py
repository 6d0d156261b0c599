"""How `run.py` and the two sides that it measures talk: a line of JSON each way.

A side is a process. It says its facts (losses, tokens: what must be the same on both), then that it
is ready, and for each line "go" on its standard input does one round and says what it took. At the
end of its input it says the most memory that it held.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class Work:
    """What one row of the table does on one side. Made from the options, with models and texts."""

    def facts(self) -> dict[str, Any]:
        """What must agree with the other side, before anything has changed."""
        return {}

    def first(self) -> None:
        """The first step, or round, with all that is compiled for it; nothing where `facts` has
        been one."""

    def measure(self) -> dict[str, float]:
        """One round: {"seconds", "useful"}, the latter in tokens that are no padding."""
        raise NotImplementedError

    def load(self) -> int:
        """For rows about memory: read, keep what was read, and return its bytes."""
        raise NotImplementedError


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (the most since this program began), in bytes."""
    # Not getrusage: its peak goes on from that of the process that started this one.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def parse() -> argparse.Namespace:
    """The flags that `run.py` gives a side."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--row", required=True)
    parser.add_argument("--shape", required=True)
    for name in ("folder", "data", "models"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--only", choices=("all", "facts", "first", "load"), default="all")
    return parser.parse_args()


def serve(work: Mapping[str, Callable[[Any], Work]]) -> None:
    """The life of a side. Its libraries' own words go to standard error."""
    out, sys.stdout = sys.stdout, sys.stderr

    def say(**what: Any) -> None:
        print(json.dumps(what), file=out, flush=True)

    options = parse()
    done = work[options.row](options)
    if options.only == "load":
        arrays = done.load()
        say(arrays=arrays, peak=resident("VmHWM"))
        return
    if options.only == "first":
        done.first()
        say(first=True)
        return
    start = time.perf_counter()
    say(facts=done.facts())
    if options.only == "facts":
        return
    done.first()
    say(first=time.perf_counter() - start)
    for _ in sys.stdin:
        say(**done.measure())
    say(peak=resident("VmHWM"))
