"""FLOPs of a training step, in which a frozen weight costs what it costs and no more.

S encoder positions, T decoder positions, N weights of the matrix products that a position goes
through, A = layers × heads × head width.

A position times a matrix is 2N forward, 2N more for the gradient of what was read, and 2N for that
of the matrix. So a teacher, and an encoder below which nothing is trained, cost 2N a position;
frozen matrices that gradients pass through 4N; trained ones 6N; the bridge, where nothing below it
asks for a gradient, 4N. Attention has no weights: scores and the mean of the values are 4·A·S a
position, and twice that backward, whatever is frozen. Causal attention counts as full, as is the
custom (arXiv 2204.02311, appendix B). Embedding lookups are 0. Norms, softmax, pooling and
other work by element are left out. Logits are a product with the vocabulary's matrix.

A bridge that shortens texts gives the LLM S / stride positions; the parts of windows that end texts
are left out, and so is what remat computes again of encoder layers that learn.

Packed rows: the texts of a row are taken to be equally long. A token then reads S / texts others as
far as the model goes; hardware computes paddings too, and attention to all S, which it masks.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from mtllm_jax.models.bert import BertConfig
from mtllm_jax.models.llama import LlamaConfig
from mtllm_jax.models.nllb import NLLBConfig

_MATRICES = ("kernel", "lora_a", "lora_b")  # of a Linear; an embedding is no product


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of one step over all devices, their lengths in tokens, and texts packed in each."""

    rows: int
    source_length: int = 0
    target_length: int = 0
    texts: float = 1.0
    source_fill: float = 1.0  # the share of positions that are tokens and no padding
    target_fill: float = 1.0


@dataclasses.dataclass(frozen=True)
class Flops:
    """Of one step over all devices, by part of the step.

    model: what the mathematics asks for, and so what MFU is a share of. hardware: what is run, with
    the layers that the backward pass computes again (remat) and what attention masks.
    """

    model: Mapping[str, float]
    hardware: Mapping[str, float]

    @property
    def model_total(self) -> float:
        return sum(self.model.values())

    @property
    def hardware_total(self) -> float:
        return sum(self.hardware.values())


def adaptation_flops(
    trainable: Any,
    frozen: Any,
    encoder: NLLBConfig | BertConfig,
    llm: LlamaConfig,
    batch: Batch,
    stride: int = 1,
) -> Flops:
    """Of a step of stage 1: the stack is trained to say what the LLM says, the teacher.

    trainable, frozen: the two states of the `Stack`, arrays or shapes. stride: of its bridge.
    """
    reader = _reader(trainable, frozen, "encoder", encoder, "ffn_out")
    student = _reader(trainable, frozen, "llm", llm, "down")
    adapters = _weights(trainable, "llm", ("lora_a", "lora_b"))
    teacher = dataclasses.replace(student, trained=student.trained - adapters)
    bridge = _weights(trainable, "bridge")
    # Its first map asks for no gradient of what it reads, unless something below it learns.
    first = _weights(trainable, "bridge", linear="inner") or bridge
    read = 6.0 * bridge - (0.0 if reader.trained else 2.0 * first)
    free = reader.trained / (reader.trained + reader.frozen)  # of the encoder's layers

    def parts(source: float, target: float, texts: float) -> dict[str, float]:
        """Of rows of so many positions, in each of which so many texts see only themselves."""
        sources, targets = batch.rows * source, batch.rows * target
        inputs = sources / stride
        return {
            "encoder": reader.forward(sources) + 4.0 * reader.trained * sources,
            "bridge": read * inputs,
            "student": student.forward(inputs) + student.backward(inputs),
            "teacher": teacher.forward(targets),
            "encoder's attention": (1 + 2 * free) * reader.attend(sources, source / texts),
            "student's attention": 3.0 * student.attend(inputs, source / stride / texts),
            "teacher's attention": teacher.attend(targets, target / texts),
        }

    S, T = batch.source_length, batch.target_length
    again = {"student, again": student.again(batch.rows * S / stride, S / stride)}
    return Flops(
        model=parts(S * batch.source_fill, T * batch.target_fill, batch.texts),
        hardware=parts(S, T, 1.0) | again,
    )


def tuning_flops(
    trainable: Any, frozen: Any, llm: LlamaConfig, batch: Batch, *, in_pieces: bool
) -> Flops:
    """Of a step in which an LLM learns tokens from those before them.

    trainable, frozen: the two states of the `Llama`, arrays or shapes; all of it learns, or
    adapters alone. in_pieces: whether logits are computed piece by piece, and so twice. The first
    layer's maps count as if something below them learnt, adapters or not.
    """
    reader = _reader(trainable, frozen, "layers", llm, "down")
    vocabulary = llm.vocab_size * llm.width
    of_position = (6.0 if "embedding" in trainable else 4.0) * vocabulary

    def parts(positions: float, others: float) -> dict[str, float]:
        return {
            "LLM": reader.forward(positions) + reader.backward(positions),
            "LLM's attention": 3.0 * reader.attend(positions, others),
            "vocabulary": of_position * positions,
        }

    T = batch.target_length
    positions = float(batch.rows * T)
    again = {"LLM, again": reader.again(positions, T)}
    if in_pieces:
        again["vocabulary, again"] = 2.0 * vocabulary * positions
    tokens = T * batch.target_fill
    return Flops(
        model=parts(batch.rows * tokens, tokens / batch.texts),
        hardware=parts(positions, T) | again,
    )


@dataclasses.dataclass(frozen=True)
class _Reader:
    """A model that reads positions. Numbers of weights in matrix products, and A of its attention.

    last: weights among them whose product ends a layer; the backward pass never wants it again.
    """

    frozen: int
    trained: int
    last: int
    attention: int
    remat: str

    def forward(self, positions: float) -> float:
        return 2.0 * positions * (self.frozen + self.trained)

    def backward(self, positions: float) -> float:
        return positions * (2.0 * self.frozen + 4.0 * self.trained)

    def attend(self, positions: float, others: float) -> float:
        """Forward, each position reading `others`."""
        return 4.0 * positions * self.attention * others

    def again(self, positions: float, others: float) -> float:
        """What remat computes a second time."""
        if self.remat == "none":
            return 0.0
        attention = self.attend(positions, others)
        if self.remat == "dots":  # the products with weights are kept, attention's are not
            return attention
        return attention + 2.0 * positions * (self.frozen + self.trained - self.last)


def _reader(
    trainable: Any,
    frozen: Any,
    part: str,
    config: NLLBConfig | BertConfig | LlamaConfig,
    last: str,
) -> _Reader:
    """The model at `part` of the two states, of whose linear maps `last` ends a layer."""
    ends = ("kernel", "lora_b")
    return _Reader(
        frozen=_weights(frozen, part),
        trained=_weights(trainable, part),
        last=_weights(frozen, part, ends, last) + _weights(trainable, part, ends, last),
        attention=attention_width(config),
        remat=config.remat,
    )


def attention_width(config: NLLBConfig | BertConfig | LlamaConfig) -> int:
    """A of an encoder or an LLM: layers × heads × head width."""
    if isinstance(config, LlamaConfig):
        return config.num_layers * config.num_heads * config.head_width
    if isinstance(config, NLLBConfig):
        return config.encoder_layers * config.width
    return config.num_layers * config.width


def _weights(
    state: Any, part: str, names: tuple[str, ...] = _MATRICES, linear: str | None = None
) -> int:
    """Elements of the matrices below `state[part]`, or of those of the linear maps of one name."""
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        keys = _keys(path)
        if keys[0] == part and keys[-1] in names and linear in (None, keys[-2]):
            total += leaf.size
    return total


def is_matrix(path: jax.tree_util.KeyPath) -> bool:
    """Whether a leaf of a state is a matrix that positions are multiplied with."""
    return _keys(path)[-1] in _MATRICES


def _keys(path: jax.tree_util.KeyPath) -> list[str]:
    return [str(entry.key) for entry in path if hasattr(entry, "key")]
