"""Where the time of a stage and of a run goes, and how long steps take."""

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from etils import epath

from mtllm_jax.runfolder import read_json, write_json

# What a stage's time is spent on; all but the last is what steps wait for.
KINDS = ("setup", "packing", "restore", "compile", "input", "save", "evaluation", "steps")
FILE = "goodput.json"  # in the folder of a stage


class Goodput:
    """Wall seconds of a stage by kind, over all its starts: a lap clock whose sums lie in a file.

    Goodput is the share of steps in all of them (the term: Google's ML Productivity Goodput). What
    a killed start spent since its last `write` is lost to the sums.
    """

    def __init__(self, path: epath.Path, now: Callable[[], float] = time.monotonic):
        """Begin with the sums that `path` holds, if there are any, and in "setup"."""
        self._path, self._now = path, now
        before = read_json(path) if path.exists() else {}
        self.seconds = {kind: float(before.get(kind, 0.0)) for kind in KINDS}
        self._kind, self._since = "setup", now()

    def to(self, kind: str) -> None:
        """From now on time is spent on `kind`."""
        now = self._now()
        self.seconds[self._kind] += now - self._since
        self._kind, self._since = kind, now

    def count_as(self, kind: str) -> None:
        """What has gone on since the last `to` was `kind` after all."""
        self._kind = kind

    @property
    def share(self) -> float:
        """Of steps in the time so far, 0 to 1."""
        return self.seconds["steps"] / max(sum(self.seconds.values()), 1e-9)

    def write(self) -> None:
        """Leave the sums so far in the file."""
        self.to(self._kind)
        sums = {kind: round(seconds, 3) for kind, seconds in self.seconds.items()}
        write_json(self._path, sums | {"goodput": round(self.share, 4)})


def of_run(
    seconds: Mapping[str, float], trained: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """Where the time of all stages went: seconds by kind, and "goodput", the share of steps.

    seconds: of each stage; trained: of those with steps, what lies in their files. Evaluation is
    a stage of its own, whose time counts with the evaluations of the others. What a stage does
    beside its training is "setup".
    """
    sums = dict.fromkeys(KINDS, 0.0)
    for stage, whole in seconds.items():
        told = {kind: trained.get(stage, {}).get(kind, 0.0) for kind in KINDS}
        for kind, spent in told.items():
            sums[kind] += spent
        # A stage's seconds know nothing of starts that it was killed in, its file most of them.
        sums["evaluation" if stage == "evaluation" else "setup"] += max(
            0.0, whole - sum(told.values())
        )
    share = sums["steps"] / max(sum(sums.values()), 1e-9)
    return {kind: round(spent, 2) for kind, spent in sums.items()} | {"goodput": round(share, 4)}


def told(time: Mapping[str, float]) -> str:
    """What `of_run` found, in a line: shares, the largest first."""
    kinds = sorted((kind for kind in time if kind != "goodput"), key=lambda kind: -time[kind])
    whole = max(sum(time[kind] for kind in kinds), 1e-9)
    shares = ((kind, time[kind] / whole) for kind in kinds)
    return ", ".join(f"{kind} {share:.1%}" for kind, share in shares if share >= 0.0005)


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """The 50th, 90th and 99th percentile of step times, in seconds; nothing of no steps."""
    if not seconds:
        return {}
    return {f"p{share}": round(float(np.percentile(seconds, share)), 5) for share in (50, 90, 99)}
