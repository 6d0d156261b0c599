"""Where the time of a row of the speed table goes, on one of its sides.

    MTLLM_DATA=DATA MTLLM_MODELS=MODELS \\
        python benchmarks/profile_row.py --side=ours --row=ROW --shape=cpu --folder=FOLDER

FOLDER is that of `run.py`, with its models. Prints a line: seconds of a round, then the share of
the seconds that operations took, by kind. Operations run beside each other, so these are shares of
their sum. Ours are named by the program that XLA made, the peer's by torch's profiler.
"""

import argparse
import collections
import importlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sides import Work

WEIGHTS, ATTENTION = "products with weights", "attention"
COPIES, OTHERS = "copies", "all else"
_HLO = re.compile(r'%(\S+) = \w+\[([\d,]*)\]\S* (?:fusion|dot|copy)\(.*op_name="([^"]*)"')
_MOVED = ("copy", "transpose", "slice", "pad", "concatenate", "gather")


def ours(row: str, options: argparse.Namespace, folder: Path) -> tuple[float, dict[str, float]]:
    """Seconds of a round, and those of operations by kind."""
    os.environ["XLA_FLAGS"] = f"--xla_dump_to={folder} --xla_dump_hlo_as_text"
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # what it holds is not made anew
    side = importlib.import_module("ours")
    import jax

    from mtllm_jax.allocator import keep_freed_memory

    keep_freed_memory()
    work = ready(side.WORK[row](options))
    with jax.profiler.trace(os.fspath(folder / "trace")):
        seconds = work.measure()["seconds"]
    programs = [file.read_text() for file in folder.glob("*.cpu_after_optimizations.txt")]
    kinds = {
        name: kind_of(name, shape.count(",") + 1, op)
        for program in programs
        for name, shape, op in _HLO.findall(program)
    }
    spent: dict[str, float] = collections.Counter()
    for name, took in events(next(folder.glob("trace/**/*.xplane.pb"))):
        spent[kinds.get(name, kind_of(name, 0, ""))] += took
    return seconds, spent


def events(file: Path) -> Iterator[tuple[str, float]]:
    """Of XLA's threads: an operation's name, and its seconds."""
    import jax

    for plane in jax.profiler.ProfileData.from_file(os.fspath(file)).planes:
        for line in plane.lines:
            for event in line.events if "XLAEigen" in line.name else ():
                # Those of executors and of whole loops hold others.
                if re.match(r"(?!while|end)[a-z]", event.name):
                    yield event.name, event.duration_ns / 1e9


def kind_of(name: str, rank: int, op: str) -> str:
    """Of an operation of XLA's: its name, the dims of its result, and what it was written as."""
    last = op.split("/")[-1]
    if last == "dot_general" or name.startswith(("ynn", "dot")):
        return ATTENTION if rank > 3 else WEIGHTS
    if rank > 3 and not any(word in last for word in _MOVED):
        return ATTENTION
    return COPIES if any(word in f"{name} {last}" for word in _MOVED) else OTHERS


def peer(row: str, options: argparse.Namespace, folder: Path) -> tuple[float, dict[str, float]]:
    """The same of torch."""
    side = importlib.import_module("peer_torch")
    import torch

    work = ready(side.WORK[row](options))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        seconds = work.measure()["seconds"]
    spent: dict[str, float] = collections.Counter()
    for event in profile.key_averages():
        name = event.key.removeprefix("aten::")
        kind = OTHERS
        if name in ("addmm", "mm", "linear"):
            kind = WEIGHTS
        elif name in ("bmm", "_softmax") or "attention" in name:
            kind = ATTENTION
        elif name in ("copy_", "cat", "index_select", "clone", "index"):
            kind = COPIES
        spent[kind] += event.self_cpu_time_total / 1e6
    return seconds, spent


def ready(work: Work) -> Work:
    """All compiled and warm."""
    work.facts()
    work.first()
    work.measure()
    return work


def main() -> None:
    """Print the line."""
    sides: dict[str, Callable[..., Any]] = {"ours": ours, "peer": peer}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", choices=tuple(sides), required=True)
    parser.add_argument("--row", required=True)
    parser.add_argument("--shape", default="cpu")
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    options.data = Path(os.environ.get("MTLLM_DATA", ""))
    options.models = Path(os.environ.get("MTLLM_MODELS", ""))
    options.compiled = False
    with tempfile.TemporaryDirectory() as folder:
        seconds, spent = sides[options.side](options.row, options, Path(folder))
    whole = sum(spent.values())
    kinds = (WEIGHTS, ATTENTION, COPIES, OTHERS)
    shares = ", ".join(f"{kind} {100 * spent[kind] / whole:.0f} %" for kind in kinds)
    print(f"{options.row}, {options.side}: {seconds:.1f} s a round; {shares}", file=sys.stdout)


if __name__ == "__main__":
    main()
