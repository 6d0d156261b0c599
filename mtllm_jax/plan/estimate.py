"""A step's memory, traffic and time by arithmetic: what no compiler is needed for.

t positions of a chip in a micro-batch, D LLM width, F feed-forward width, L LLM layers, N heads,
H head width, V vocabulary.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from mtllm_jax import flops
from mtllm_jax.chips import Machine
from mtllm_jax.ops.attention import MOST_SCORES, choose_backend
from mtllm_jax.plan import abstract

# Fitted to what libtpu's compiler holds (benchmarks/ has the comparison), in bytes or elements a
# position. While a layer is gone through backward, arrays of D and of F that live at once:
_WORKING_D, _WORKING_F = 8.0, 7.0
# Without remat, arrays of D, F and the heads' widths that each layer leaves:
_SAVED_D, _SAVED_F, _SAVED_H = 6.0, 3.0, 2.0
# Of a score: two in float32 and one in bfloat16.
_SCORE_BYTES = 10.0


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one chip. activations: what a step needs beside what lies there between steps."""

    frozen: float
    trainable: float
    optimizer: float
    activations: float

    @property
    def peak(self) -> float:
        return self.frozen + self.trainable + self.optimizer + self.activations


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Lower bounds of a step's time, each as if the other two were 0."""

    compute: float
    memory: float
    network: float

    @property
    def roofline(self) -> float:
        """Of a step in which all three overlap: as fast as it can be."""
        return max(dataclasses.astuple(self))

    @property
    def bound(self) -> str:
        """Which of them the roofline is."""
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of one step. memory_traffic: bytes that a chip reads and writes; traffic: those that it
    receives, by kind of collective."""

    memory: Memory
    flops: flops.Flops
    memory_traffic: float
    traffic: dict[str, float]
    seconds: Seconds


def estimate(step: abstract.Step[Any], machine: Machine) -> Estimate:
    """ValueError where the machine's chips are not those of the config's mesh."""
    layout = _Layout(step, machine)
    counted = step.flops(layout.mesh)
    moved, traffic = layout.memory_traffic(), layout.traffic()
    return Estimate(
        memory=layout.memory(),
        flops=counted,
        memory_traffic=moved,
        traffic=traffic,
        seconds=seconds_of(machine, counted, moved, traffic),
    )


def seconds_of(
    machine: Machine, counted: flops.Flops, memory_traffic: float, traffic: dict[str, float]
) -> Seconds:
    """From FLOPs of all chips and bytes of one."""
    chip = machine.chip
    received = sum(traffic.values())
    return Seconds(
        compute=counted.hardware_total / (machine.num_chips * chip.tflops * 1e12),
        memory=memory_traffic / (chip.memory_bandwidth * 1e9),
        network=received / (machine.network * 1e9) if received else 0.0,
    )


class _Layout:
    """One step on one mesh: what a chip holds, reads, receives."""

    def __init__(self, step: abstract.Step[Any], machine: Machine):
        self.step, self.passes, self.learner = step, step.passes(), step.learner
        self.training, self.llm = step.training, step.llm
        self.mesh = step.mesh(machine)
        self.data, self.fsdp, self.context, self.tensor = (
            self.mesh.shape[axis] for axis in ("data", "fsdp", "context", "tensor")
        )
        self.dtype = jnp.dtype(step.config.compute_dtype)
        # Rows of a chip in a micro-batch.
        self.times = self.training.accumulation
        self.rows = self.training.batch_rows / (self.data * self.fsdp * self.times)
        self.platform = machine.chip.platform

    def positions(self, one: abstract.Pass) -> float:
        """Those of a pass on a chip, in a micro-batch."""
        return self.rows * one.length / self.context

    # ------------------------------------------------------------ memory

    def memory(self) -> Memory:
        state = self.step.state
        trainable = self.bytes_of(state.trainable)
        gradients = trainable * (1 if self.times == 1 else 2)
        return Memory(
            frozen=self.bytes_of(self.step.frozen),
            trainable=trainable * (1 + self.training.copies),
            optimizer=self.bytes_of(state.opt_state),
            activations=self.saved() + self.working() + gradients,
        )

    def bytes_of(self, tree: Any) -> float:
        """Of a chip's part."""
        leaves = jax.tree.leaves(abstract.laid(tree, self.mesh))
        return float(
            sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
        )

    def saved(self) -> float:
        """What each layer of the LLM that learns leaves for the backward pass."""
        D, F = self.llm.width, self.llm.ffn_width / self.tensor
        queries = self.llm.num_heads * self.llm.head_width / self.tensor
        keys = 2 * self.llm.num_kv_heads * self.llm.head_width / self.tensor
        position = float(D)
        if self.llm.remat == "dots":
            position += queries + keys + 2 * D + 2 * F
        elif self.llm.remat == "none":
            position += _SAVED_D * D + _SAVED_F * F + _SAVED_H * (queries + keys)
        positions = self.positions(self.learner)
        return self.llm.num_layers * positions * position * self.dtype.itemsize

    def working(self) -> float:
        """The most that lives at once beside that: in a layer, or where the loss is."""
        return max(self.in_layer(), self.step.loss_bytes(self.mesh))

    def in_layer(self) -> float:
        """While one layer is gone through backward."""
        D, F = self.llm.width, self.llm.ffn_width / self.tensor
        position = _WORKING_D * D + _WORKING_F * F
        # Matrices that are gathered, or widened from int8.
        weights = 2 * D * F if self.fsdp > 1 or self.step.config.frozen_dtype == "int8" else 0.0
        positions = self.positions(self.learner)
        return (positions * position + weights) * self.dtype.itemsize + self.scores()

    def scores(self) -> float:
        """Of attention by plain products, which holds them for some queries at a time."""
        if self.attention() != "xla":
            return 0.0
        heads = self.llm.num_heads / self.tensor
        at_once = self.positions(self.learner) * heads * self.learner.length
        return min(at_once, MOST_SCORES) * _SCORE_BYTES

    def attention(self) -> str:
        """The backend that the step runs on."""
        if self.llm.attention != "auto":
            return self.llm.attention
        return choose_backend(
            self.platform,
            segments=self.step.texts > 1,
            head_width=self.llm.head_width,
            dtype=self.dtype,
            context=self.context,
        )

    # ------------------------------------------------------------ traffic

    def traffic(self) -> dict[str, float]:
        """Bytes that a chip receives in a step, by kind of collective."""
        width, times = self.dtype.itemsize, self.times
        gathered = sum(_gathers(one) * self._kernels(one) for one in self.passes)
        learnt = sum(x.size for x in jax.tree.leaves(self.step.state.trainable))
        embedded = sum(self.positions(one) * one.embedding for one in self.passes)
        cut_by_fsdp = _share(self.fsdp) / self.tensor
        return {
            "all-gather": times * (gathered * cut_by_fsdp + width * self._keys()),
            "reduce-scatter": times * width * self.step.num_reduced() * cut_by_fsdp,
            "all-reduce": times * width * self._tensor_sums()
            + 2 * _share(self.data) * times * width * learnt / (self.fsdp * self.tensor),
            "all-to-all": times * width * embedded * _share(self.fsdp),
        }

    def _reads(self, one: abstract.Pass) -> int:
        """How often a pass reads its matrices: forward, again, and backward."""
        return 1 + one.backward * (2 if self.llm.remat == "full" else 1)

    def _tensor_sums(self) -> float:
        """Elements summed over the tensor axis: two a layer forward, one again, two backward."""
        sums = (
            self.positions(one) * one.num_layers * one.width * (self._reads(one) + 1 + one.backward)
            for one in self.passes
        )
        return 2 * _share(self.tensor) * sum(sums)

    def _keys(self) -> float:
        """Elements of keys and values that a chip gathers from the others of its row: forward, and
        twice more backward."""
        keys = (self.positions(one) * one.keys * (3 if one.backward else 1) for one in self.passes)
        return _share(self.context) * self.context * sum(keys) / self.tensor

    def memory_traffic(self) -> float:
        """Bytes read from and written to a chip's memory in a step, as far as products go: what
        each reads and leaves, and weights as often as they are read or gathered."""
        weights = moved = 0.0
        for one in self.passes:
            gathers = _gathers(one) if self.fsdp > 1 else 0
            weights += (self._reads(one) + gathers) * self._kernels(one) / self.tensor
            # Backward twice: for the gradients of what was read, and for those of the weights.
            moved += (self._reads(one) + one.backward) * self.positions(one) * _ends(one)
        trained = self.step.state.trainable, self.step.state.opt_state
        state = 2 * sum(map(self.bytes_of, trained))
        return self.times * (weights + self.dtype.itemsize * moved / self.tensor) + state

    def _kernels(self, one: abstract.Pass) -> int:
        """Bytes of the matrices of a pass, as products read them: in int8, or else in the dtype
        that is computed in."""
        return sum(
            x.size * (1 if x.dtype == jnp.int8 else self.dtype.itemsize) for x in one.matrices
        )


def _share(ways: int) -> float:
    """Of what is gathered from so many chips, the part that the others have."""
    return (ways - 1) / ways


def _gathers(one: abstract.Pass) -> int:
    """How often its matrices are gathered: forward, and again backward unless they were kept."""
    return 1 + (one.backward and not one.kept)


def _ends(one: abstract.Pass) -> int:
    """Inputs and outputs of all linear maps of a pass together, for one position."""
    shapes = (x.shape for x in one.matrices)
    return sum(math.prod(shape[:-2]) * (shape[-2] + shape[-1]) for shape in shapes)
