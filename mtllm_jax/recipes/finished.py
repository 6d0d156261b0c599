"""A run that has finished its training, opened from its folder."""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import jax
from etils import epath

from mtllm_jax.config import MTLLM
from mtllm_jax.recipes import stacking
from mtllm_jax.runfolder import read_json
from mtllm_jax.schema import resolve


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """What a run's folder holds, read when asked for.

    encoder, llm: the model folders that it started from. labels: the task's, in the order of ids.
    """

    path: epath.Path
    config: MTLLM
    task: str
    labels: tuple[str, ...]
    encoder: Path
    llm: Path

    @functools.cached_property
    def results(self) -> dict[str, Any] | None:
        """results.json; None where the run has not been evaluated yet."""
        path = self.path / "results.json"
        return read_json(path) if path.exists() else None

    def load(
        self, mesh: jax.sharding.Mesh | None = None
    ) -> tuple[stacking.Parts, stacking.LLMClassifier, stacking.StackClassifier]:
        """The checkpoints as read, the task's teacher and the student.

        ValueError for weights or model folders that are missing or damaged.
        """
        parts = stacking.load_parts(self.config, self.encoder, self.llm, mesh)
        return parts, *stacking.load_trained(self.path, self.config, parts, len(self.labels))


def open_run(folder: str | os.PathLike[str]) -> FinishedRun:
    """Open a run by its --workdir. ValueError for what is not the folder of a finished one."""
    path = epath.Path(folder)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; it must be the folder of a finished run.")
    if not (path / "config.json").exists():
        raise ValueError(f"{path} holds no config.json, so it is not the folder of a run.")
    values = read_json(path / "config.json")
    if not isinstance(values, dict) or values.get("recipe") != "mtllm":
        raise ValueError(f"{path / 'config.json'} is not the config of a run of MT-LLM.")
    if not (path / "distillation" / "done.json").exists():
        raise ValueError(
            f"{path} is a run that has not finished its training; go on with it by python"
            f" launch/train.py --config={path / 'config.json'} --workdir={path}."
        )
    about = read_json(path / "model.json")
    # A folder inside the run is named relative to it, so that the run can be moved.
    return FinishedRun(
        path=path,
        config=resolve(MTLLM, values),
        task=about["task"],
        labels=tuple(about["labels"]),
        encoder=Path(path / about["encoder"]),
        llm=Path(path / about["llm"]),
    )
