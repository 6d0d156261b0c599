"""Stage 1 of MT-LLM, the step that a plan of that recipe is of.

B rows, N texts per row, S encoder positions, T decoder positions.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from mtllm_jax.chips import Machine
from mtllm_jax.config import MTLLM, Training, require
from mtllm_jax.flops import Batch, Flops, adaptation_flops
from mtllm_jax.metrics import number
from mtllm_jax.models.bert import Bert
from mtllm_jax.models.layers import split
from mtllm_jax.models.llama import Llama, LlamaConfig
from mtllm_jax.models.nllb import NLLB, NLLBConfig
from mtllm_jax.models.quantised import in_dtype
from mtllm_jax.models.stack import Stack
from mtllm_jax.plan import sizes
from mtllm_jax.plan.abstract import (
    AnyMesh,
    Encoder,
    Pass,
    Step,
    batch_of,
    matrices,
    trained_by,
    with_options,
)
from mtllm_jax.recipes import stacking


@dataclasses.dataclass(frozen=True)
class Adaptation(Step[MTLLM]):
    """A step of stage 1. `frozen` has the stack's part under "stack".

    Where the bridge shortens texts, or encoder layers learn, its passes are still those of a
    student that reads all positions of a frozen encoder.
    """

    WHERE = "adaptation.training"
    TITLE = "Stage 1"
    TOKENS = "source tokens"

    encoder: Encoder

    @classmethod
    def check(cls, config: MTLLM) -> None:
        """Raise ValueError for a run that has no stage 1."""
        require(not config.stage1, "stage1", config.stage1, "'', as a plan is of stage 1")
        steps = config.adaptation.training.steps
        least = "at least 1, as a plan is of stage 1"
        require(steps >= 1, "adaptation.training.steps", steps, least)

    @classmethod
    def of_names(cls, config: MTLLM, encoder: str, llm: str, texts: int) -> "Adaptation":
        """ValueError for names of no model."""
        found = sizes.encoder_sizes(config, encoder), sizes.llm_sizes(config, llm)
        return stage_1(config, *found, texts)

    def made_with(self, config: MTLLM) -> "Adaptation":
        """The step of the same models under another config."""
        return stage_1(config, self.encoder, self.llm, self.texts)

    def passes(self) -> tuple[Pass, ...]:
        """Of the student, the teacher, the encoder."""
        frozen, trainable, llm = self.frozen["stack"], self.state.trainable, self.llm
        of_llm = Pass(
            matrices=matrices(frozen.get("llm", {}), trainable.get("llm", {})),
            length=self.training.source_length,
            num_layers=llm.num_layers,
            width=llm.width,
            keys=2 * llm.num_layers * llm.num_kv_heads * llm.head_width,
        )
        of_encoder = Pass(
            matrices=matrices(frozen.get("encoder", {})),
            length=self.training.source_length,
            num_layers=_depth(self.encoder),
            width=self.encoder.width,
            embedding=self.encoder.width,
        )
        teacher = dataclasses.replace(
            of_llm, length=self.training.target_length, embedding=llm.width
        )
        return dataclasses.replace(of_llm, backward=True), teacher, of_encoder

    def flops(self, mesh: AnyMesh) -> Flops:
        """Of a step; the same on every mesh."""
        training = self.training
        lengths = training.source_length, training.target_length
        batch = Batch(training.batch_rows, *lengths, self.texts)
        return self._flops(batch, self.config.bridge.stride)

    def _flops(self, batch: Batch, stride: int) -> Flops:
        state, frozen = self.state.trainable, self.frozen["stack"]
        return adaptation_flops(state, frozen, self.encoder, self.llm, batch, stride)

    def told_rows(self) -> str:
        """How long a row is."""
        training = self.training
        return f"{training.source_length} source and {training.target_length} target tokens"

    def savings(self) -> dict[str, Any]:
        """Weights in int8 too, where they may be so."""
        config = self.config
        now = config.frozen_dtype, config.trained, config.distillation.start
        is_open = now == ("bfloat16", "lora", "stage1") and not config.encoder_layers
        return super().savings() | ({"frozen_dtype": "int8"} if is_open else {})

    def beside(self, machine: Machine) -> dict[str, Any]:
        """What the stages of the task cost at least: steps, FLOPs of one, chip-hours of all.

        As if computing were all that takes time.
        """

        def hardware(training: Training, length: int, stride: int = 1) -> Mapping[str, float]:
            batch = Batch(training.batch_rows, source_length=length)
            return self._flops(batch, stride).hardware

        config = self.config
        teacher, student = config.teacher, config.distillation.training
        # The teacher is what the student's LLM is, and reads tokens of its own.
        parts = hardware(teacher, teacher.target_length)
        of_teacher = sum(n for name, n in parts.items() if name.startswith("student"))
        of_student = sum(hardware(student, student.source_length, config.bridge.stride).values())
        by_stage = {"teacher": (teacher, of_teacher), "distillation": (student, of_student)}
        stages = {
            name: {
                "steps": training.steps,
                "flops_per_step": of_one,
                "chip_hours": training.steps * of_one / (machine.chip.tflops * 1e12) / 3600,
            }
            for name, (training, of_one) in by_stage.items()
        }
        return {"task_stages": stages}

    def told_beside(self, machine: Machine) -> str:
        """The same in a sentence."""
        stages = self.beside(machine)["task_stages"]
        told = (
            f"{number(stages[name]['chip_hours'])} chip-hours for the {stages[name]['steps']} steps"
            f" of {title}"
            for name, title in (("teacher", "stage 2a"), ("distillation", "2b"))
        )
        return f"Then, by FLOPs alone: {' and '.join(told)}."


def stage_1(config: MTLLM, encoder: Encoder, llm: LlamaConfig, texts: int = 1) -> Adaptation:
    """The step of general adaptation, of models of these sizes. texts: N, packed in a row."""
    training, dtype = config.adaptation.training, jnp.dtype(config.frozen_dtype)
    encoder, llm = with_options(config, encoder), with_options(config, llm)
    encoder_module = in_dtype(nnx.eval_shape(lambda: _new_encoder(encoder)), dtype)
    llm_module = in_dtype(nnx.eval_shape(lambda: Llama(llm, nnx.Rngs(0))), dtype)

    def build(encoder_module: Any, llm_module: Any) -> Stack:
        return stacking.new_stack(config, encoder_module, llm_module, 1.0, 0)

    stack = nnx.eval_shape(build, encoder_module, llm_module)
    graph, trainable, frozen = split(stack, stacking.is_trained(config))
    teacher_graph, teacher = nnx.split(llm_module)
    objective = stacking.adaptation_objective(config, graph, teacher_graph)
    both = stacking.adaptation_frozen(config, frozen, teacher)
    run, state = trained_by(training, objective, trainable)
    S, T = training.source_length, training.target_length
    lengths = {"source_ids": S, "source_segments": S, "target_ids": T, "target_segments": T}
    if config.adaptation.aligned_by:
        lengths["aligned_ids"] = S
    batch = batch_of(training.batch_rows, lengths | {"example": texts})
    return Adaptation(config, llm, run, state, both, batch, texts, encoder)


def _depth(config: Encoder) -> int:
    return config.encoder_layers if isinstance(config, NLLBConfig) else config.num_layers


def _new_encoder(config: Encoder) -> NLLB | Bert:
    rngs = nnx.Rngs(0)
    return NLLB(config, rngs) if isinstance(config, NLLBConfig) else Bert(config, rngs)
