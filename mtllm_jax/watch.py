"""What belongs to a start of a run and not to its config: TensorBoard, Weights & Biases, JAX's
profiler, and where compiled programs are kept. When it goes on, all of that may be otherwise.
"""

import contextlib
import dataclasses
import importlib.util
import os
import re
import uuid
from collections.abc import Mapping
from typing import Any, Protocol

import jax
from etils import epath

from mtllm_jax import distributed
from mtllm_jax.runfolder import Mirror, is_remote, made_locally, read_json, write_json

_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # flag → what it needs


class Sink(Protocol):
    """Takes the metrics of each step."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """The metrics of one step."""

    def sync(self) -> None:
        """Have all of them so far where they are kept."""

    def close(self) -> None:
        """No more will come."""


@dataclasses.dataclass(frozen=True)
class Watch:
    """How this start is watched.

    tensorboard: event files in STAGE/tensorboard. wandb: a project of Weights & Biases, "" = none.
    profile: the stage and the steps, first and last, that JAX's profiler records in STAGE/profile.
    """

    tensorboard: bool = False
    wandb: str = ""
    profile: tuple[str, int, int] | None = None

    def check(self, steps: Mapping[str, int]) -> None:
        """Raise ValueError, naming the flag, for a package that is not installed, or a profile of
        what is not trained. steps: of each stage that is."""
        if self.profile is not None:
            stage, first, last = self.profile
            if last > steps.get(stage, 0):
                stages = ", ".join(f"{name} ({count} steps)" for name, count in steps.items())
                raise ValueError(
                    f"--profile is {stage}:{first}-{last}; the stages that are trained: {stages}."
                )
        for flag, package in _PACKAGES.items():
            if getattr(self, flag) and importlib.util.find_spec(package) is None:
                raise ValueError(f"--{flag} needs {package}: pip install -e '.[watch]'")

    def sinks(self, stage: epath.Path, step: int) -> list[Sink]:
        """What takes the metrics of a stage in its folder `stage`, after `step` steps; of several
        processes the first has any."""
        if not distributed.is_first():
            return []
        found: list[Sink] = []
        if self.tensorboard:
            found.append(_TensorBoard(stage / "tensorboard", step))
        if self.wandb:
            found.append(_WeightsAndBiases(self.wandb, stage))
        return found

    def profiler(self, stage: epath.Path) -> "Profiler":
        """Records the steps asked for, of the stage asked for."""
        if self.profile is None or self.profile[0] != stage.name:
            return Profiler(stage, 0, -1)
        return Profiler(stage, *self.profile[1:])


UNWATCHED = Watch()


def keep_compiled(folder: str | None, run: str) -> None:
    """Keep compiled programs in `folder`, and take from it what was compiled before.

    None: where JAX_COMPILATION_CACHE_DIR says, or else in the folder of the run, compiled/.
    """
    if folder is not None or not jax.config.values["jax_compilation_cache_dir"]:
        path = folder or f"{run}/compiled"
        # The name is part of what a program is known by.
        path = path if "://" in path else os.path.abspath(path)
        jax.config.update("jax_compilation_cache_dir", path)


def parse_profile(text: str) -> tuple[str, int, int]:
    """ "adaptation:100-110" → ("adaptation", 100, 110). ValueError for anything else."""
    match = re.fullmatch(r"(?P<stage>\w+):(?P<first>\d+)-(?P<last>\d+)", text)
    if match is None or not 1 <= int(match["first"]) <= int(match["last"]):
        raise ValueError(
            f"--profile is {text!r}; it must be a stage and its steps, as adaptation:100-110."
        )
    return match["stage"], int(match["first"]), int(match["last"])


class Profiler:
    """Records steps `first` to `last` of a stage in its folder's profile/."""

    def __init__(self, stage: epath.Path, first: int, last: int):
        self._folder, self._first, self._last = stage / "profile", first, last
        self._recording: contextlib.ExitStack | None = None

    def before(self, step: int) -> None:
        """Step number `step` is about to be dispatched."""
        if self._first <= step <= self._last and self._recording is None:
            self._recording = contextlib.ExitStack()
            folder = self._recording.enter_context(made_locally(self._folder))
            self._recording.enter_context(jax.profiler.trace(folder))

    def after(self, step: int, result: Any) -> None:
        """It was dispatched, and will give `result`."""
        if self._recording is not None and step >= self._last:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        if self._recording is not None:
            self._recording.close()
            self._recording = None


class _TensorBoard:
    def __init__(self, folder: epath.Path, step: int):
        from tensorboardX import SummaryWriter

        # For object stores it has a writer of its own, which sends all of a file every two minutes.
        self._mirror = Mirror(folder) if is_remote(folder) else None
        made = folder if self._mirror is None else self._mirror.path
        # Steps beyond a restored checkpoint were written before, and do not count.
        self._writer = SummaryWriter(str(made), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        if self._mirror is not None:
            self._mirror.copy_if_due()  # of what it has flushed, as it does every two minutes

    def sync(self) -> None:
        self._writer.flush()
        if self._mirror is not None:
            self._mirror.copy()

    def close(self) -> None:
        self._writer.close()
        if self._mirror is not None:
            self._mirror.copy()


class _WeightsAndBiases:
    """A run for each stage; its id lies in the stage's folder, for when it goes on."""

    def __init__(self, project: str, stage: epath.Path):
        import wandb

        path = stage / "wandb.json"
        if not path.exists():
            write_json(path, {"id": uuid.uuid4().hex})
        name, known = f"{stage.parent.name}-{stage.name}", read_json(path)["id"]
        self._run = wandb.init(
            project=project, name=name, id=known, group=stage.parent.name, resume="allow"
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def sync(self) -> None:
        """It sends what it has by itself."""

    def close(self) -> None:
        self._run.finish()
