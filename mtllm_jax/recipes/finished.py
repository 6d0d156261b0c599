"""A run that has finished its training, opened from its folder."""

import dataclasses
import functools
import itertools
import os
from typing import Any

import jax
from etils import epath

from mtllm_jax.config import MTLLM, naming, require
from mtllm_jax.hf.stack import StackConfig, check_stack, is_stack
from mtllm_jax.metrics import Console
from mtllm_jax.recipes import stacking
from mtllm_jax.recipes.inputs import adapter_key, locate_models, lora_targets, revisions_of
from mtllm_jax.runfolder import differing_fields, is_remote, read_json, run_path
from mtllm_jax.schema import resolve, to_dict

_CALLED = {"adaptation": "stage 1", "distillation": "training"}
# What a stage 1 was trained with, and the task goes on with.
_BOUND = (
    "english",
    "bidirectional",
    "trained",
    "lora",
    "frozen_dtype",
    "legacy_source_order",
    "bridge",
    "encoder_layers",
)


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """What a run's folder holds, read when asked for.

    given: the config as it was given. config: the same with the folders of the two models and the
    LLM's adapters that the run started from, its own ones too. labels: the task's, in the order of
    ids. num_choices: of a row, where the task is multiple choice, else 0.
    """

    path: epath.Path
    given: MTLLM
    config: MTLLM
    task: str
    labels: tuple[str, ...]
    num_choices: int

    @functools.cached_property
    def first(self) -> MTLLM:
        """The config that names the models and the text of stage 1: the run's, or that of the run
        whose stage 1 it has begun with; where that is gone, or was exported, `stage1` says so."""
        if not self.given.stage1:
            return self.given
        try:
            return open_run(self.given.stage1, "adaptation").given
        except ValueError:
            models = ("encoder", "llm", "llm_adapters")
            named = {x: getattr(self.given, x) or getattr(self.config, x) for x in models}
            return dataclasses.replace(self.given, **named)

    @property
    def adapters(self) -> list[str]:
        """What is merged into the LLM in turn: as it was given, then what the run or that of its
        stage 1 has trained for it."""
        named = self.first.llm_adapters
        own = self.config.llm_adapters[len(named) :]
        return [*named, *(os.path.relpath(path, self.path) for path in own)]

    @functools.cached_property
    def results(self) -> dict[str, Any] | None:
        """results.json; None where the run has not been evaluated yet."""
        path = self.path / "results.json"
        return read_json(path) if path.exists() else None

    def load_parts(
        self, mesh: jax.sharding.Mesh | None = None, console: Console | None = None
    ) -> stacking.Parts:
        """The models that the run has begun with. ValueError where they are gone or changed."""
        encoder, llm = self.config.encoder, self.config.llm
        parts = stacking.load_parts(self.config, encoder, llm, mesh, console)
        if self.config.frozen_dtype == self.given.frozen_dtype:  # else other bits stand for them
            stacking.check_weights(self.path, stacking.weights_of(parts))
        return parts

    def load_trained(
        self, parts: stacking.Parts
    ) -> tuple[stacking.LLMClassifier, stacking.StackClassifier]:
        """The task's teacher and the student. ValueError for weights missing or damaged."""
        outputs = 1 if self.num_choices else len(self.labels)
        return stacking.load_trained(self.path, self.config, parts, outputs)


def open_run(folder: str | os.PathLike[str], stage: str = "distillation") -> FinishedRun:
    """Open a run by its --workdir. ValueError for what is not the folder of one, or of one that has
    not finished a stage of its training."""
    path = run_path(folder)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; it must be the folder of a finished run.")
    if not (path / "config.json").exists():
        raise ValueError(f"{path} holds no config.json, so it is not the folder of a run.")
    values = read_json(path / "config.json")
    if not isinstance(values, dict) or values.get("recipe") != "mtllm":
        raise ValueError(f"{path / 'config.json'} is not the config of a run of MT-LLM.")
    if stage == "adaptation" and (other := values.get("stage1")):
        raise ValueError(f"{path} has begun with the stage 1 of {other}; name that one.")
    if not (path / stage / "done.json").exists():
        raise ValueError(
            f"{path} is a run that has not finished its {_CALLED[stage]}; go on with it by python"
            f" launch/train.py --config={path / 'config.json'} --workdir={path}."
        )
    given = resolve(MTLLM, values)
    about, revisions = read_json(path / "model.json"), revisions_of(path)

    def told(field: str, name: str, folder: str) -> str:
        """A folder inside the run is named relative to it, so that the run can be moved."""
        if field in revisions:
            return name
        return folder if is_remote(folder) else os.fspath(path / folder)

    # Behind those that were given are those that it has trained, or its stage 1's run has.
    adapters = itertools.zip_longest(given.llm_adapters, about["llm_adapters"], fillvalue="")
    models = dataclasses.replace(
        given,
        encoder=told("encoder", given.encoder, about["encoder"]),
        llm=told("llm", given.llm, about["llm"]),
        llm_adapters=tuple(told(adapter_key(i), *pair) for i, pair in enumerate(adapters)),
        lora=dataclasses.replace(given.lora, start=""),  # it has been trained since
        translator="",
    )
    return FinishedRun(
        path=path,
        given=given,
        config=locate_models(models, revisions)[0],
        task=about["task"],
        labels=tuple(about["labels"]),
        num_choices=about["choices"],
    )


def begun(config: MTLLM) -> MTLLM:
    """The config with the models of the run that config.stage1 names; as it is if it names none.

    Of an exported stage 1 the models are the config's own. ValueError for what is neither, and for
    settings that differ from those of that stage 1.
    """
    if not config.stage1:
        return config
    if is_stack(config.stage1):
        _check_exported(config)
        return config
    with naming("stage1"):
        run = open_run(config.stage1, "adaptation")
        if different := differing_fields(_bound(run.given), _bound(config)):
            raise ValueError(
                f"the stage 1 of {config.stage1} was trained with other settings"
                f" ({', '.join(different)}); they must be the same"
            )
    for field in ("encoder", "llm", "llm_adapters", "adaptation_text"):
        value = getattr(config, field)
        require(not value, field, value, "empty: config.stage1 brings its own")
    return dataclasses.replace(
        config,
        encoder=run.config.encoder,
        llm=run.config.llm,
        llm_adapters=run.config.llm_adapters,
    )


def _check_exported(config: MTLLM) -> None:
    """Raise ValueError unless the stack that config.stage1 names is what the task can begin with,
    as far as it shows without its weights."""
    with naming("stage1"):
        folder, stack = config.stage1, check_stack(config.stage1)
        if stack.kind != "none":
            raise ValueError(
                f"{folder} has a head and so has learnt a task; a stage 1 is exported by"
                " --stage=adaptation"
            )
        if config.trained != "all" and _adapters(stack) != _wanted_adapters(config):
            raise ValueError(
                f"{folder} keeps the adapters {_adapters(stack) or 'none'} (by map: rank, alpha),"
                f" and with config.trained {config.trained!r} and config.lora they are"
                f" {_wanted_adapters(config) or 'none'}; they must be the same"
            )
        if config.trained == "all" and stack.lora:
            raise ValueError(
                f"{folder} keeps adapters, and config.trained is 'all'; export it by"
                " --adapters=merged"
            )
        bridge = {"hidden": stack.bridge_hidden, "stride": stack.bridge_stride}
        theirs = {"bidirectional": stack.bidirectional, "bridge": bridge}
        ours = {"bidirectional": config.bidirectional, "bridge": dataclasses.asdict(config.bridge)}
        theirs["legacy_source_order"] = stack.legacy_source_order
        ours["legacy_source_order"] = config.legacy_source_order
        if different := differing_fields(theirs, ours):
            raise ValueError(
                f"{folder} was trained with other settings ({', '.join(different)}); they must be"
                " the same"
            )
    for field in ("encoder", "llm"):
        value = getattr(config, field)
        what = "the model that the exported stage 1 began with"
        require(bool(value), field, value, f"{what}, as config.stage1 is no run")
    text = config.adaptation_text
    require(not text, "adaptation_text", text, "empty: config.stage1 brings its own")
    exact = "'float32' or 'bfloat16' where config.stage1 is no run"
    require(config.frozen_dtype != "int8", "frozen_dtype", config.frozen_dtype, exact)


def _adapters(stack: StackConfig) -> dict[str, list[float]]:
    return {name: [float(x) for x in sizes] for name, sizes in sorted(stack.lora.items())}


def _wanted_adapters(config: MTLLM) -> dict[str, list[float]]:
    if config.trained != "lora":
        return {}
    sizes = [float(config.lora.rank), float(config.lora.alpha)]
    return dict.fromkeys(sorted(lora_targets(config)), sizes)


def _bound(config: MTLLM) -> dict[str, Any]:
    """The fields that a stage 1 and what follows it have in common."""
    fresh = dataclasses.replace(config, lora=dataclasses.replace(config.lora, start=""))
    return {name: value for name, value in to_dict(fresh).items() if name in _BOUND}
