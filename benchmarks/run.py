"""Our speed against what a user would run instead, as ratios within one run.

    MTLLM_DATA=DATA MTLLM_MODELS=MODELS python benchmarks/run.py --shape=cpu --json=FILE

Both sides of a row are processes that live at the same time, one working while the other waits;
rounds alternate. Larger ratios are better: speed is ours ÷ the peer's, time and memory the peer's ÷
ours, a row without a peer what was achieved ÷ what is required. --only=ROW measures one row. FILE
gets each row as it is done, and keeps those that it holds: the same command again goes on, and
--only=ROW measures that row anew. When it holds all rows, a dated Markdown file is left beside this
one. What a row needs and is not there is said, and the row left out.

MTLLM_DATA names the folder of the data sets (ntrex128, nllb_seed, sib200), MTLLM_MODELS that of
smollm2-135m-instruct and multilingual-e5-small. --shape=h200 is for a machine with that GPU.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd
from dated import ROOT, page, table, write
from shapes import ENGLISH_FILES, SHAPES

HERE = Path(__file__).parent
SIDES = {"ours": "ours.py", "peer": "peer_torch.py"}
PACKAGES = ("jax", "flax", "torch", "transformers", "peft")

# Losses of the two sides on the same sentences: bfloat16 has 8 bits.
AGREE = {"float32": 1e-3, "bfloat16": 1e-2}
SAME_TOKENS = 0.99  # of all that both translate: near-ties fall either way
INPUT_SPARE = 20  # times what the step consumes
H200_TFLOPS, CONTROL_MFU, OF_CONTROL = 989, 0.45, 0.85
STEPS, HOURS = 10_000, 30  # of the study's general adaptation, and what it may take

# Row → what ratio is asked for. `tiny` has the CPU's.
CPU_BARS = {
    "train_grouped": 1.1,
    "train_random": 2.0,
    "train_memory": 1.0,
    "distil_grouped": 1.1,
    "embed": 1.2,
    "translate": 2.0,
    "sample": 2.0,
    "start": 1.0,
    "load_memory": 1.0,
    "input": 1.0,
    "plan": 0.95,
}
BARS = {
    "cpu": CPU_BARS,
    "tiny": CPU_BARS,
    "h200": {"control": 1.0, "train_grouped": 2.0, "stack": 1.0, "hours": 1.0},
}
NEEDS = {  # rows that are made of others' figures
    "train_memory": ("train_grouped",),
    "input": ("train_grouped",),
    "stack": ("control", "train_grouped"),
    "hours": ("train_grouped",),
}
REAL = {  # what rows need beside English sentences
    "embed": ("sib200", "multilingual-e5-small"),
    "sample": ("smollm2-135m-instruct",),
    "load_memory": ("smollm2-135m-instruct",),
}
INTRO = """
Each ratio is of one run in which both sides take turns: the median over rounds, the smallest and
the largest. Larger is better: speed is ours ÷ the peer's, time and memory the peer's ÷ ours; a row
without a peer is what was achieved ÷ what is required. Tokens are useful ones: padding does not
count. "first" is the first step, or round, with all that is compiled for it, "ready" the time to
its end from the command, GB the most that a process held.
"""
NO_PEER = ("input", "plan", "control", "stack", "hours")


@dataclasses.dataclass(frozen=True)
class Result:
    """Of one row. spread: the smallest and the largest ratio of a round. ours, peer: what each side
    took, by name and unit. commit: that it was measured at."""

    ratio: float
    spread: tuple[float, float]
    ours: Mapping[str, float]
    peer: Mapping[str, float] = dataclasses.field(default_factory=dict)
    commit: str = ""


@dataclasses.dataclass(frozen=True)
class Options:
    """What all rows share. folder: of models and caches. log: where the sides' own words go.
    peer: the command before its script. compiled: the peer goes through torch.compile."""

    shape: str
    folder: Path
    data: Path
    models: Path
    rounds: int
    log: IO[str]
    peer: Sequence[str]
    compiled: bool


class Side:
    """One side's process. facts: what it said before its first step; first: seconds until that was
    done, once models and texts were read; ready: seconds from the command."""

    def __init__(self, side: str, row: str, options: Options):
        self.side, self.row = side, row
        start = time.perf_counter()
        self._process = subprocess.Popen(
            command(side, row, options),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=options.log,
            text=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout
        self.facts = self._said()["facts"]
        self.first = float(self._said()["first"])
        self.ready = time.perf_counter() - start

    def round(self) -> dict[str, float]:
        """What one round took."""
        self._to.write("go\n")
        self._to.flush()
        return self._said()

    def end(self) -> float:
        """The GB that it held at most."""
        self._to.close()
        peak = self._said()["peak"]
        self._process.wait()
        return peak / 1e9

    def _said(self) -> dict[str, Any]:
        line = self._from.readline()
        if not line:
            raise RuntimeError(f"{self.side}, {self.row}: the process has ended; see --log")
        return json.loads(line)


def command(side: str, row: str, options: Options, only: str = "all") -> list[str]:
    """That of one side."""
    given = {
        "row": row,
        "shape": options.shape,
        "folder": options.folder,
        "data": options.data,
        "models": options.models,
        "only": only,
    }
    python = [sys.executable] if side == "ours" else list(options.peer)
    flags = [f"--{name}={value}" for name, value in given.items()]
    flags += ["--compiled"] if side == "peer" and options.compiled else []
    return [*python, str(HERE / SIDES[side]), *flags]


def said_once(side: str, row: str, options: Options, only: str, **environment: str) -> Any:
    """What a side says that is asked for one thing alone."""
    answer = subprocess.check_output(
        command(side, row, options, only),
        stderr=options.log,
        text=True,
        env=os.environ | environment,
    )
    return json.loads(answer.splitlines()[-1])


# ---------------------------------------------------------------- rows


def alternate(row: str, options: Options) -> Result:
    """Rounds of both sides in turn: the ratio of useful tokens per second."""
    names = tuple(SIDES) if row not in NO_PEER else ("ours",)
    sides = {name: Side(name, row, options) for name in names}
    if "peer" in sides:
        check_alike(row, sides["ours"].facts, sides["peer"].facts, SHAPES[options.shape].dtype)
    rounds = [{name: side.round() for name, side in sides.items()} for _ in range(options.rounds)]
    told = {}
    for name, side in sides.items():
        told[name] = figures([one[name] for one in rounds])
        told[name] |= {"GB": side.end(), "first, s": side.first, "ready, s": side.ready}
    if "peer" not in sides:
        return Result(1.0, (1.0, 1.0), told["ours"])
    rates = [{name: x["useful"] / x["seconds"] for name, x in one.items()} for one in rounds]
    return of_rounds([rate["ours"] / rate["peer"] for rate in rates], told["ours"], told["peer"])


def figures(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Medians over rounds of what one side took."""

    def median(value: Callable[[Mapping[str, float]], float]) -> float:
        return statistics.median(map(value, rounds))

    found = {"tokens/s": median(lambda x: x["useful"] / x["seconds"])}
    if "steps" in rounds[0]:
        found["s/step"] = median(lambda x: x["seconds"] / x["steps"])
    for kind in ("model", "hardware"):
        if f"{kind}_flops" in rounds[0]:
            name = f"{kind} GFLOP/s"
            found[name] = median(lambda x, k=kind: x[f"{k}_flops"] / x["seconds"] / 1e9)
    return found


def of_rounds(ratios: Sequence[float], *told: Mapping[str, float]) -> Result:
    """The median, and how far rounds are from each other."""
    return Result(statistics.median(ratios), (min(ratios), max(ratios)), *told)


def check_alike(
    row: str, ours: Mapping[str, Any], peer: Mapping[str, Any], dtype: str = "float32"
) -> None:
    """RuntimeError where the two sides do not do the same work."""
    if "loss" in ours and not abs(ours["loss"] - peer["loss"]) <= AGREE[dtype] * abs(peer["loss"]):
        raise RuntimeError(f"{row}: our loss is {ours['loss']}, the peer's {peer['loss']}")
    for name in ("read", "made"):
        if ours.get(name) != peer.get(name):
            raise RuntimeError(f"{row}: {name} are {ours[name]} tokens, by the peer {peer[name]}")
    if "tokens" in ours:
        same = float(np.mean(np.equal(ours["tokens"], peer["tokens"])))
        if same < SAME_TOKENS:
            raise RuntimeError(f"{row}: {same:.1%} of the tokens are the same on both sides")


def train_memory(found: Mapping[str, Result], options: Options) -> Result:
    """Peaks of the two sides of train_grouped."""
    trained = found["train_grouped"]
    ours, peer = ({"GB": side["GB"]} for side in (trained.ours, trained.peer))
    return of_rounds([peer["GB"] / ours["GB"]], ours, peer)


def start(found: Mapping[str, Result], options: Options) -> Result:
    """From the command to the first step done, all caches warm."""
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(options.rounds + 1):
        for side, taken in seconds.items():
            began = time.perf_counter()
            said_once(side, "train_grouped", options, "first")
            if number:  # the first warms caches
                taken.append(time.perf_counter() - began)
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["peer"], strict=True)]
    return of_rounds(ratios, *({"s": statistics.median(taken)} for taken in seconds.values()))


def load_memory(found: Mapping[str, Result], options: Options) -> Result:
    """Peak resident memory minus the arrays that it ends with."""
    above: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(options.rounds):
        for side, most in above.items():
            said = said_once(side, "load_memory", options, "load")
            most.append((said["peak"] - said["arrays"]) / 1e9)
    ratios = [b / a for a, b in zip(above["ours"], above["peer"], strict=True)]
    told = ({"GB above the arrays": statistics.median(most)} for most in above.values())
    return of_rounds(ratios, *told)


def input_rate(found: Mapping[str, Result], options: Options) -> Result:
    """Tokens of prepared shards ÷ 20 times what the step of train_grouped consumes."""
    side = Side("ours", "input", options)
    rounds = [side.round() for _ in range(options.rounds)]
    side.end()
    required = INPUT_SPARE * found["train_grouped"].ours["tokens/s"]
    ratios = [one["useful"] / one["seconds"] / required for one in rounds]
    return of_rounds(ratios, figures(rounds) | {"required tokens/s": required})


def plan(found: Mapping[str, Result], options: Options) -> Result:
    """Bytes that collectives move on 8 simulated devices, the smaller ÷ the larger of plan and
    program; or the same of gathers alone, where the program has more of them than the plan."""
    environment = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    facts = said_once("ours", "plan", options, "facts", **environment)["facts"]
    return of_plan(facts["planned"], facts["compiled"])


def of_plan(planned: Mapping[str, float], compiled: Mapping[str, float]) -> Result:
    """The row, from bytes by kind of collective."""
    all_planned, all_compiled = sum(planned.values()), sum(compiled.values())
    gathers = [of.get("all-gather", 0.0) for of in (planned, compiled)]
    ratio = min(all_planned, all_compiled) / max(all_planned, all_compiled)
    ratio = min(ratio, gathers[0] / gathers[1]) if gathers[1] else ratio
    told = {
        "planned MB": all_planned / 1e6,
        "compiled MB": all_compiled / 1e6,
        "of them gathers, planned MB": gathers[0] / 1e6,
        "compiled gathers, MB": gathers[1] / 1e6,
    }
    return of_rounds([ratio], told)


def control(found: Mapping[str, Result], options: Options) -> Result:
    """MFU of the LLM alone on full rows ÷ 45 %."""
    told = alternate("control", options).ours
    mfu = told["model GFLOP/s"] / 1e3 / H200_TFLOPS
    return of_rounds([mfu / CONTROL_MFU], {**told, "MFU": mfu})


def stack(found: Mapping[str, Result], options: Options) -> Result:
    """What the stack's step runs a second ÷ 85 % of what the control does."""
    ours = found["train_grouped"].ours
    used = ours["hardware GFLOP/s"]
    best = found["control"].ours["model GFLOP/s"]
    told = {
        "HFU": used / 1e3 / H200_TFLOPS,
        "MFU": ours["model GFLOP/s"] / 1e3 / H200_TFLOPS,
        "of the control": used / best,
    }
    return of_rounds([used / best / OF_CONTROL], told)


def hours(found: Mapping[str, Result], options: Options) -> Result:
    """30 ÷ the hours that 10,000 steps would take."""
    taken = STEPS * found["train_grouped"].ours["s/step"] / 3600
    return of_rounds([HOURS / taken], {"hours": taken})


OTHERS: dict[str, Callable[[Mapping[str, Result], Options], Result]] = {
    "train_memory": train_memory,
    "start": start,
    "load_memory": load_memory,
    "input": input_rate,
    "plan": plan,
    "control": control,
    "stack": stack,
    "hours": hours,
}


# ---------------------------------------------------------------- the table


def order_of(rows: Sequence[str], found: Mapping[str, Result], *, again: bool) -> list[str]:
    """The rows that are to be measured, in their order, each behind those that it needs. What has
    been found is not; with `again`, `rows` themselves are."""
    result: list[str] = []
    for row in rows:
        for one in (*NEEDS.get(row, ()), row):
            if one not in result and (one not in found or (again and one == row)):
                result.append(one)
    return result


def missing(row: str, options: Options) -> str:
    """What a row needs that is not there; "" where all is."""
    if row not in NO_PEER:
        for name in ("torch", "peft"):
            if list(options.peer) == [sys.executable] and importlib.util.find_spec(name) is None:
                return f"the package {name}"
    if options.shape == "h200" and shutil.which("nvidia-smi") is None:
        return "an NVIDIA GPU"
    texts = () if row == "plan" else ENGLISH_FILES
    for name in (*texts, *REAL.get(row, ())):
        if not any((folder / name).exists() for folder in (options.data, options.models)):
            return name
    for one in NEEDS.get(row, ()):
        if lacking := missing(one, options):
            return lacking
    return ""


def measure(
    rows: Sequence[str],
    found: dict[str, Result],
    options: Options,
    keep: Callable[[dict[str, Result]], None],
) -> None:
    """Add the results of `rows`, which are in an order that they can be measured in, to `found`."""
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True)[:12]
    for row in rows:
        made = OTHERS[row](found, options) if row in OTHERS else alternate(row, options)
        found[row] = dataclasses.replace(made, commit=commit)
        low, high = made.spread
        bar = BARS[options.shape][row]
        print(f"{row:16} {made.ratio:5.2f} ({low:.2f}–{high:.2f}), bar {bar}", flush=True)
        for name, side in (("ours", made.ours), ("peer", made.peer)):
            if side:
                print(f"  {name}: {in_words(side)}", flush=True)
        keep(found)


def to_json(found: Mapping[str, Result], bars: Mapping[str, float]) -> dict[str, Any]:
    """{"ratios": {row: {"ratio", "bar", "spread"}}}, and beside them what the sides took."""
    rows = {row: dataclasses.asdict(found[row]) for row in bars if row in found}
    return {
        "ratios": {
            row: {"ratio": values["ratio"], "bar": bars[row], "spread": list(values["spread"])}
            for row, values in rows.items()
        },
        "beside": {
            row: {name: values[name] for name in ("ours", "peer", "commit")}
            for row, values in rows.items()
        },
    }


def from_json(values: Mapping[str, Any]) -> dict[str, Result]:
    """What `to_json` was given."""
    return {
        row: Result(of["ratio"], tuple(of["spread"]), **values["beside"][row])
        for row, of in values["ratios"].items()
    }


def body(
    found: Mapping[str, Result], bars: Mapping[str, float], left_out: Mapping[str, str]
) -> str:
    """What the file says. left_out: rows, and what of theirs was not there."""
    commits = {result.commit for result in found.values()}
    lines = []
    for row in (row for row in bars if row in found):
        result = found[row]
        low, high = result.spread
        line = {
            "row": row,
            "ratio": f"{result.ratio:.2f}",
            "rounds": f"{low:.2f}–{high:.2f}",
            "bar": bars[row],
            "": "met" if result.ratio >= bars[row] else "missed",
            "ours": in_words(result.ours),
            "peer": in_words(result.peer),
        }
        lines.append(line | ({"commit": result.commit} if len(commits) > 1 else {}))
    without = [
        f"{row} is left out: {lacking} is not there."
        for row, lacking in left_out.items()
        if row not in found
    ]
    return "\n\n".join((INTRO.strip(), table(pd.DataFrame(lines)), *without))


def in_words(side: Mapping[str, float]) -> str:
    """ "tokens/s 1,234; GB 2.9"."""
    numbers = {name: f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for name, x in side.items()}
    return "; ".join(f"{name} {number}" for name, number in numbers.items())


def parse() -> argparse.Namespace:
    """The flags. A mistake ends the program with 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shapes = "the models and the work; tiny only tries the program"
    parser.add_argument("--shape", choices=tuple(SHAPES), default="cpu", help=shapes)
    parser.add_argument("--only", metavar="ROW", help="one row, and those it needs")
    parser.add_argument("--rounds", type=int, default=5, help="of both sides, 3 or more")
    parser.add_argument("--json", type=Path, metavar="FILE", help="results, kept row by row")
    parser.add_argument("--folder", type=Path, help="for models and caches; else a temporary one")
    parser.add_argument("--log", type=Path, help="a file for what the sides say")
    parser.add_argument(
        "--peer_python", default=sys.executable, help="that has the peer's packages"
    )
    parser.add_argument("--compiled", action="store_true", help="the peer by torch.compile")
    given = parser.parse_args()
    if given.only and given.only not in BARS[given.shape]:
        parser.error(f"--only is {given.only!r}; it must be one of {', '.join(BARS[given.shape])}.")
    if given.rounds < 3:
        parser.error(f"--rounds is {given.rounds}; it must be 3 or more.")
    return given


def main() -> None:
    """Measure, print, file."""
    given = parse()
    bars, found = BARS[given.shape], {}
    if given.json and given.json.exists():
        found = from_json(json.loads(given.json.read_text(encoding="utf-8")))

    def keep(found: Mapping[str, Result]) -> None:
        if given.json:
            text = json.dumps(to_json(found, bars), indent=1, ensure_ascii=False)
            given.json.write_text(text + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as temporary, open(given.log or os.devnull, "a") as log:
        options = Options(
            shape=given.shape,
            folder=(given.folder or Path(temporary)).absolute(),
            data=Path(os.environ.get("MTLLM_DATA", "")).absolute(),
            models=Path(os.environ.get("MTLLM_MODELS", "")).absolute(),
            rounds=given.rounds,
            log=log,
            peer=[given.peer_python],
            compiled=given.compiled,
        )
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(options.folder / "compiled"))
        # Both sides may lie on one GPU at the same time.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        asked = [given.only] if given.only else list(bars)
        left_out = {row: lacking for row in asked if (lacking := missing(row, options))}
        for row, lacking in left_out.items():
            print(f"{row} is left out: {lacking} is not there.", flush=True)
        wanted = [row for row in asked if row not in left_out]
        rows = order_of(wanted, found, again=bool(given.only))
        options.folder.mkdir(parents=True, exist_ok=True)
        made_here(rows, options)
        measure(rows, found, options, keep)
    if given.shape != "tiny" and all(row in found or row in left_out for row in bars):
        line = f"MTLLM_DATA=DATA MTLLM_MODELS=MODELS python benchmarks/run.py --shape={given.shape}"
        line += " --compiled" if given.compiled else ""
        there = [name for name in PACKAGES if importlib.util.find_spec(name)]
        text = page("Speed", line, there, body(found, bars, left_out))
        write(f"speed-{given.shape}", text)


def made_here(rows: Sequence[str], options: Options) -> None:
    """Models and texts of these rows."""
    # In processes of their own, so that the memory is free again.
    if set(rows) - {"plan", "load_memory", "sample", "embed"}:
        said_once("ours", "models", options, "facts")
    if "embed" in rows:
        said_once("ours", "texts", options, "facts")


if __name__ == "__main__":
    main()
