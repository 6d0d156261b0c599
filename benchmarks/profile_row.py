"""Where the time of a row of the speed table goes, on one of its sides.

    MTLLM_DATA=DATA MTLLM_MODELS=MODELS \\
        python benchmarks/profile_row.py --side=ours --row=ROW --folder=FOLDER

FOLDER is that of `run.py`, with its models. Prints a line: seconds of a round, those that profiled
operations took together, and shares of the latter by kind. Operations run beside each other, and
what one leaves to XLA's threads when it ends is not seen, so that the sum may be more or less than
the round. Ours are named by the programs that XLA made, the peer's by torch's profiler.
"""

import argparse
import collections
import importlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sides import Work

WEIGHTS, ATTENTION = "products with weights", "attention"
COPIES, OTHERS = "copies", "all else"
# A line of a program: an operation, the dims of its first result, and what it was written as.
_HLO = re.compile(r'%(\S+) = \(?\w+\[([\d,]*)\].*op_name="([^"]*)"')
_HOLD_OTHERS = ("while", "call", "conditional")
ROWS = ("train_grouped", "train_random", "distil_grouped", "embed", "translate", "sample")
_MOVED = ("copy", "transpose", "slice", "pad", "concatenate", "gather")


def ours(row: str, options: argparse.Namespace, folder: Path) -> tuple[float, dict[str, float]]:
    """Seconds of a round, and those of operations by kind."""
    os.environ["XLA_FLAGS"] = f"--xla_dump_to={folder} --xla_dump_hlo_as_text"
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # what it holds is not made anew
    side = importlib.import_module("ours")
    from mtllm_jax.allocator import keep_freed_memory

    keep_freed_memory()
    import jax

    work = ready(side.WORK[row](options))
    with jax.profiler.trace(os.fspath(folder / "trace")):
        seconds = work.measure()["seconds"]
    kinds: dict[str, dict[str, str]] = {}
    spent: dict[str, float] = collections.Counter()
    for program, name, took in events(next(folder.glob("trace/**/*.xplane.pb"))):
        if program not in kinds:
            kinds[program] = kinds_of(folder / f"{program}.cpu_after_optimizations.txt")
        spent[kinds[program].get(name, OTHERS)] += took
    return seconds, spent


def events(file: Path) -> Iterator[tuple[str, str, float]]:
    """Of XLA's operations that hold no others: program, name and seconds."""
    import jax

    for plane in jax.profiler.ProfileData.from_file(os.fspath(file)).planes:
        for line in plane.lines:
            for event in line.events:
                about = dict(event.stats)
                if "hlo_op" in about and not event.name.startswith(_HOLD_OTHERS):
                    program = f"module_{about['program_id']:04}.{about['hlo_module']}"
                    yield program, str(about["hlo_op"]), event.duration_ns / 1e9


def kinds_of(program: Path) -> dict[str, str]:
    """Operation → kind, of a program that XLA has written down."""
    return {
        name: kind_of(name, shape.count(",") + 1, written.split("/")[-1])
        for name, shape, written in _HLO.findall(program.read_text(encoding="utf-8"))
    }


def kind_of(name: str, rank: int, written: str) -> str:
    """By what it was written as, and by its name where XLA made it of several: a product of two or
    three dims is one with weights; what has more dims is attention's (heads, scores, rotary
    positions), moved or computed; what else is moved, cut out or looked up is a copy."""
    if written == "dot_general" and rank <= 3:
        return WEIGHTS
    if rank > 3:
        return ATTENTION
    return COPIES if any(word in f"{name} {written}" for word in _MOVED) else OTHERS


def peer(row: str, options: argparse.Namespace, folder: Path) -> tuple[float, dict[str, float]]:
    """The same of torch."""
    side = importlib.import_module("peer_torch")
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
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
    parser.add_argument("--row", choices=ROWS, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    options.shape, options.compiled = "cpu", False
    options.data = Path(os.environ.get("MTLLM_DATA", ""))
    options.models = Path(os.environ.get("MTLLM_MODELS", ""))
    with tempfile.TemporaryDirectory() as folder:
        seconds, spent = sides[options.side](options.row, options, Path(folder))
    whole = sum(spent.values())
    kinds = (WEIGHTS, ATTENTION, COPIES, OTHERS)
    shares = ", ".join(f"{kind} {100 * spent[kind] / whole:.0f} %" for kind in kinds)
    print(f"{options.row}, {options.side}: {seconds:.1f} s a round; in {whole:.1f} s: {shares}")


if __name__ == "__main__":
    main()
