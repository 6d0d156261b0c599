"""The tuning of SDRRL, the step that a plan of that recipe is of.

B rows, N texts per row, T positions, D width, V vocabulary.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mtllm_jax import sharding
from mtllm_jax.chips import Machine
from mtllm_jax.config import SDRRL
from mtllm_jax.flops import Flops
from mtllm_jax.metrics import number
from mtllm_jax.models.llama import Llama, LlamaConfig
from mtllm_jax.models.quantised import in_dtype
from mtllm_jax.ops.layout import ways
from mtllm_jax.ops.vocab_loss import logits_of_position
from mtllm_jax.plan import sizes
from mtllm_jax.plan.abstract import (
    AnyMesh,
    Pass,
    Step,
    batch_of,
    matrices,
    trained_by,
    with_options,
)
from mtllm_jax.recipes import stacking, tuning

# Of a logit: two in float32 and, of its gradient, one in bfloat16.
_LOGIT_BYTES = 10.0


@dataclasses.dataclass(frozen=True)
class Tuning(Step[SDRRL]):
    """A step in which an LLM learns answers. `frozen` is its own part."""

    WHERE = "training"
    TITLE = "Tuning"
    TOKENS = "tokens"

    @classmethod
    def check(cls, config: SDRRL) -> None:
        """Every config of the recipe has one."""

    @classmethod
    def of_names(cls, config: SDRRL, encoder: str, llm: str, texts: int) -> "Tuning":
        """ValueError for the name of no LLM, or of any encoder."""
        if encoder:
            raise ValueError(f"--encoder is {encoder!r}; SDRRL tunes an LLM alone, leave it out.")
        return tuning_step(config, sizes.llm_sizes(config, llm), texts)

    def made_with(self, config: SDRRL) -> "Tuning":
        """The step of the same LLM under another config."""
        return tuning_step(config, self.llm, self.texts)

    def passes(self) -> tuple[Pass, ...]:
        """Of the layers, and of what gives tokens their scores."""
        llm, length = self.llm, self.training.target_length
        layers = Pass(
            matrices=matrices(self.frozen, self.state.trainable),
            length=length,
            num_layers=llm.num_layers,
            width=llm.width,
            keys=2 * llm.num_layers * llm.num_kv_heads * llm.head_width,
            embedding=(1 + self._learns_vocabulary()) * llm.width,
            backward=True,
        )
        return layers, Pass((self._output(),), length, backward=True, kept=True)

    def _output(self) -> jax.ShapeDtypeStruct:
        """[V, D]; the embedding, where they are tied."""
        name = "embedding" if self.llm.tie_embeddings else "output"
        state: Any = self.state.trainable if self._learns_vocabulary() else self.frozen
        return jax.tree.leaves(state[name])[0]

    def _learns_vocabulary(self) -> bool:
        return "embedding" in self.state.trainable

    def flops(self, mesh: AnyMesh) -> Flops:
        """Of a step. Where logits are computed in pieces, it is twice, and the mesh decides."""
        state, texts = self.state.trainable, self.texts
        return tuning.step_flops(self.training, state, self.frozen, self.llm, mesh, texts=texts)

    def loss_bytes(self, mesh: AnyMesh) -> float:
        """Logits; the matrix that they come from, gathered and in the dtype that is computed in;
        where it learns, its gradient."""
        V, D = self.llm.vocab_size, self.llm.width
        rows = self.training.batch_rows // self.training.accumulation
        of_position = sharding.on(mesh, logits_of_position)(rows, V)
        width = jnp.dtype(self.config.compute_dtype).itemsize
        of_matrix = width * V * D / sharding.on(mesh, ways)(V, "vocab")
        logits = tuning.logits_at_once(self.training, self.llm, mesh) * of_position
        return logits * _LOGIT_BYTES + (1 + self._learns_vocabulary()) * of_matrix

    def num_reduced(self) -> int:
        """All but what is looked up alone: that table's gradient is cut as the table is."""
        table = self._learns_vocabulary() and not self.llm.tie_embeddings
        return super().num_reduced() - table * self.llm.vocab_size * self.llm.width

    def told_rows(self) -> str:
        """How long a row is."""
        return f"{self.training.target_length} tokens"

    def beside(self, machine: Machine) -> dict[str, Any]:
        """What the LLM's own answers cost at least: each chip, which has all weights, reads them
        and the keys and values of `batch_rows` answers for each token of these.

        Prompts are taken to be empty, and answers as long as they may be.
        """
        llm, how, chip = self.llm, self.config.answering, machine.chip
        width = jnp.dtype(self.config.compute_dtype).itemsize
        weights = nnx.eval_shape(lambda: Llama(llm, nnx.Rngs(0)))
        held = width * sum(x.size for x in jax.tree.leaves(nnx.state(weights)))
        read = held - (0 if llm.tie_embeddings else width * llm.vocab_size * llm.width)
        of_position = 2 * width * llm.num_layers * llm.num_kv_heads * llm.head_width
        cached = how.batch_rows * how.max_new_tokens * of_position
        # An answer is half as long on average as it is in the end.
        of_token = (read + cached / 2) / (chip.memory_bandwidth * 1e9)
        peak = held + cached
        answers = {
            "batch_rows": how.batch_rows,
            "max_new_tokens": how.max_new_tokens,
            "hbm_gb_per_chip": round(peak / 1e9, 4),
            "fits": peak <= chip.memory_gb * 1e9,
            "chip_hours_per_1000": 1000 / how.batch_rows * how.max_new_tokens * of_token / 3600,
        }
        return {"answers": answers, "systems": len(self.config.sets)}

    def told_beside(self, machine: Machine) -> str:
        """The same in a sentence."""
        found = self.beside(machine)
        answers = found["answers"]
        rounds = ", on_policy" if "on_policy" in self.config.systems else ""
        fits = "" if answers["fits"] else ", more than it has: lower config.answering.batch_rows"
        return (
            f"Systems that are tuned so: {found['systems']}. Apart from that, by bytes read, at "
            f"least {number(answers['chip_hours_per_1000'])} chip-hours for each 1000 answers of "
            f"{answers['max_new_tokens']} tokens, of which a chip holds {answers['batch_rows']} "
            f"at a time in {answers['hbm_gb_per_chip']:.2f} GB{fits}. Not planned: "
            f"translation{rounds} and evaluation."
        )


def tuning_step(config: SDRRL, llm: LlamaConfig, texts: int = 1) -> Tuning:
    """The step of an LLM of these sizes. texts: N, packed in a row."""
    training = config.training
    llm = with_options(config, llm)
    module = in_dtype(
        nnx.eval_shape(lambda: Llama(llm, nnx.Rngs(0))), jnp.dtype(config.frozen_dtype)
    )
    model = nnx.eval_shape(lambda llm: stacking.with_adapters(config, llm, 0), module)
    graph, trainable, frozen = tuning.split_for(config, model)
    run, state = trained_by(training, tuning.answer_likelihood(config, graph), trainable)
    T = training.target_length
    batch = batch_of(
        training.batch_rows,
        {"target_ids": T, "target_segments": T, "example": texts, "prompt_tokens": texts},
    )
    return Tuning(config, llm, run, state, frozen, batch, texts)
