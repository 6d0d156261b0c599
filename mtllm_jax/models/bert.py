"""BERT, a text encoder, and XLM-R and RoBERTa of the same form (arXiv 1810.04805, 1907.11692).

B rows, S positions, E width, V vocabulary, P rows of the position table, Y token types.

Layer norms stand after each block and after the embeddings; positions are learnt. Texts are of
token type 0.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from mtllm_jax.models.layers import (
    REMAT_POLICIES,
    Attention,
    LayerNorm,
    biased_linear,
    cut_off_last,
    look_up,
    param,
    positions_in_segment,
    put_together,
    scan_encoder,
    split_key,
)
from mtllm_jax.ops.attention import check_attention

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}
FAMILIES = ("bert", "xlm-roberta", "roberta")


@dataclass(frozen=True)
class BertConfig:
    """Sizes of a model, and how its layers are run (`remat`, `unroll_layers`, `attention`)."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    ffn: int
    num_positions: int  # rows of the position table
    token_types: int = 2
    eps: float = 1e-12  # of the layer norms
    activation: str = "gelu"  # a name in ACTIVATIONS
    pad_id: int = 0
    family: str = "bert"  # one of FAMILIES: where positions begin
    remat: str = "none"  # a name in layers.REMAT_POLICIES
    unroll_layers: bool = False
    attention: str = "auto"  # a name in ops.attention.NAMES

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "num_layers", "num_heads", "ffn", "token_types"):
            if (size := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {size}; it must be at least 1")
        if self.width % self.num_heads:
            raise ValueError(f"num_heads is {self.num_heads}; it must divide width, {self.width}")
        if self.max_positions < 1:
            least = self.first_position + 1
            raise ValueError(f"num_positions is {self.num_positions}; it must be at least {least}")
        for name, allowed in (
            ("activation", ACTIVATIONS),
            ("family", FAMILIES),
            ("remat", REMAT_POLICIES),
        ):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} is {value!r}; it may be one of {list(allowed)}")
        check_attention(self.attention, head_width=self.width // self.num_heads)

    @property
    def first_position(self) -> int:
        """The table's row for a text's first token; RoBERTa's stands after the padding's id."""
        return 0 if self.family == "bert" else self.pad_id + 1

    @property
    def max_positions(self) -> int:
        """Tokens of the longest text."""
        return self.num_positions - self.first_position


class EncoderLayers(nnx.Module):
    """Stacked layers of self-attention and feed-forward, each with its norm after the sum."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs):
        c = config
        self.attention = Attention(c.width, c.num_heads, c.num_layers, rngs, c.attention)
        self.attention_norm = LayerNorm(c.width, c.eps, rngs, c.num_layers)
        self.ffn_in = biased_linear(c.width, c.ffn, ("embed", "ffn"), c.num_layers, rngs)
        self.ffn_out = biased_linear(c.ffn, c.width, ("ffn", "embed"), c.num_layers, rngs)
        self.ffn_norm = LayerNorm(c.width, c.eps, rngs, c.num_layers)
        self.activation = c.activation

    def __call__(
        self,
        h_BSE: Array,
        segments_BS: Array,
        dropout_key: Array | None,
        packed: bool = True,
    ) -> Array:
        attention_key, in_key, out_key = split_key(dropout_key, 3)
        read_BSE = self.attention(
            h_BSE, h_BSE, segments_BS, segments_BS, packed=packed, dropout_key=attention_key
        )
        h_BSE = self.attention_norm(h_BSE + read_BSE)
        inner_BSF = ACTIVATIONS[self.activation](self.ffn_in(h_BSE, in_key))
        return self.ffn_norm(h_BSE + self.ffn_out(inner_BSF, out_key))


class Bert(nnx.Module):
    """The encoder.

    Text is ids with segments, both int32: 0 = padding, 1 … = the text of this row that a position
    belongs to. Texts packed into one row do not see each other, and each counts its own positions;
    none may be longer than `config.max_positions`.
    """

    def __init__(self, config: BertConfig, rngs: nnx.Rngs):
        c = self.config = config
        init = nnx.initializers.normal(0.02)
        self.embedding_VE = param(rngs, (c.vocab_size, c.width), ("vocab", "embed"), init)
        positions = (c.num_positions, c.width), ("positions", "embed")
        self.position_PE = param(rngs, *positions, init)
        self.type_YE = param(rngs, (c.token_types, c.width), ("types", "embed"), init)
        self.embedding_norm = LayerNorm(c.width, c.eps, rngs)
        self.layers = EncoderLayers(c, rngs)
        self.top: EncoderLayers | None = nnx.data(None)

    def encode(
        self,
        ids_BS: Array,
        segments_BS: Array,
        dtype: DTypeLike = jnp.float32,
        dropout_key: Array | None = None,
        packed: bool = True,
    ) -> Array:
        """The last layer's states [B, S, E], computed in `dtype`. packed=False promises one text a
        row, from its first position on."""
        h_BSE = self.embed(ids_BS, positions_in_segment(segments_BS), dtype)
        h_BSE = scan_encoder(
            (self.layers, self.top),
            h_BSE,
            segments_BS,
            packed=packed,
            dropout_key=dropout_key,
            remat=self.config.remat,
            unroll=self.config.unroll_layers,
        )
        return h_BSE

    def free(self, num: int) -> None:
        """Take the last `num` layers off, in place, as `top`, float32, so that they can learn
        without the others."""
        self.layers, self.top = cut_off_last(self.layers, num)

    def whole(self) -> None:
        """Put them back, in place, if they are off."""
        if self.top is not None:
            self.layers, self.top = put_together(self.layers, self.top), nnx.data(None)

    def embed(self, ids_BS: Array, positions_BS: Array, dtype: DTypeLike) -> Array:
        """[B, S, E]: token plus position, counted from 0 in each text, plus type 0; normalised."""
        token_BSE = look_up(self.embedding_VE[...], ids_BS).astype(jnp.float32)
        position_BSE = self.position_PE[...][positions_BS + self.config.first_position]
        type_11E = self.type_YE[...][:1, None].astype(jnp.float32)
        h_BSE = token_BSE + position_BSE.astype(jnp.float32) + type_11E
        return self.embedding_norm(h_BSE).astype(dtype)
