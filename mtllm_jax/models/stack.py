"""The stack: a frozen text encoder, the bridge, the LLM reading through it, a head.

B rows, N texts packed in a row, S encoder positions, T decoder positions, P those of the LLM in the
stack (S, or fewer by the bridge), E encoder width, D decoder width, C classes.
"""

from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from mtllm_jax.models.bridge import Bridge
from mtllm_jax.models.layers import Linear
from mtllm_jax.models.llama import Llama

# Of rows of multiple choice: at each position the number of its choice, from 1 (else 0 or less),
# and how many choices there are.
Choices = tuple[Array, int]


class Encoder(Protocol):
    """What the stack asks of a text encoder."""

    def encode(
        self,
        ids_BS: Array,
        segments_BS: Array,
        dtype: DTypeLike = jnp.float32,
        *,
        packed: bool = True,
    ) -> Array:
        """States [B, S, E]. packed=False promises one text a row, from its first position on."""


class Stack(nnx.Module):
    """encoder → bridge → LLM. Stage 1 trains the bridge and the LLM's adapters or weights."""

    def __init__(self, encoder: Encoder, bridge: Bridge, llm: Llama):
        self.encoder = encoder
        self.bridge = bridge
        self.llm = llm

    def pooled(
        self,
        ids_BS: Array,
        segments_BS: Array,
        num_texts: int,
        *,
        causal: bool,
        dtype: DTypeLike = jnp.float32,
        noise: tuple[float, float] = (0.0, 0.0),
        key: Array | None = None,
        choices: Choices | None = None,
    ) -> Array:
        """Mean of the LLM's last states over each text's positions. float32 [B, N, D].

        With choices, over those of each choice instead; then the bridge must not shorten texts. The
        other arguments are those of `hidden`.
        """
        h_BPD, segments_BP = self.hidden(
            ids_BS, segments_BS, num_texts, causal=causal, dtype=dtype, noise=noise, key=key
        )
        return segment_mean(h_BPD, *(choices or (segments_BP, num_texts)))

    def hidden(
        self,
        ids_BS: Array,
        segments_BS: Array,
        num_texts: int,
        *,
        causal: bool,
        dtype: DTypeLike = jnp.float32,
        noise: tuple[float, float] = (0.0, 0.0),
        key: Array | None = None,
    ) -> tuple[Array, Array]:
        """The LLM's last states, [B, P, D] in `dtype`, and the text of each position, [B, P].

        num_texts: the most in a row. noise: (per position, per text) std added to the encoder's
        states when `key` is given; the same key drops LoRA inputs.
        """
        noise_key, dropout_key = (None, None) if key is None else jax.random.split(key)
        packed = num_texts > 1
        h_BSE = self.encoder.encode(ids_BS, segments_BS, dtype, packed=packed)
        h_BSE = add_noise(h_BSE, segments_BS, num_texts, *noise, noise_key)
        h_BPD, segments_BP = self.bridge(h_BSE, segments_BS, num_texts)
        h_BPD = self.llm.hidden(
            h_BPD, segments_BP, causal=causal, packed=packed, dropout_key=dropout_key
        )
        return h_BPD, segments_BP


def llm_pooled(
    llm: Llama,
    ids_BT: Array,
    segments_BT: Array,
    num_texts: int,
    *,
    causal: bool,
    dtype: DTypeLike = jnp.float32,
    key: Array | None = None,
    choices: Choices | None = None,
    attention_dropout: float = 0.0,
) -> Array:
    """The LLM's own pooled state of its own tokens, BOS included [code]; with choices, of each of
    them. float32 [B, N, D]."""
    h_BTD = llm_hidden(
        llm,
        ids_BT,
        segments_BT,
        num_texts,
        causal=causal,
        dtype=dtype,
        key=key,
        attention_dropout=attention_dropout,
    )
    return segment_mean(h_BTD, *(choices or (segments_BT, num_texts)))


def llm_hidden(
    llm: Llama,
    ids_BT: Array,
    segments_BT: Array,
    num_texts: int,
    *,
    causal: bool,
    dtype: DTypeLike = jnp.float32,
    key: Array | None = None,
    attention_dropout: float = 0.0,
) -> Array:
    """The LLM's last states of its own tokens, [B, T, D] in `dtype`."""
    return llm.hidden(
        llm.embed(ids_BT, dtype),
        segments_BT,
        causal=causal,
        packed=num_texts > 1,
        dropout_key=key,
        attention_dropout=attention_dropout,
    )


def segment_mean(h_BTD: Array, segments_BT: Array, num_texts: int) -> Array:
    """Mean over the positions of each segment 1..N. float32 [B, N, D]; 0 for an empty segment."""
    member_BTN = segments_BT[:, :, None] == jnp.arange(1, num_texts + 1)[None, None]
    sums = jnp.einsum(
        "btn,btd->bnd", member_BTN.astype(h_BTD.dtype), h_BTD, preferred_element_type=jnp.float32
    )
    return sums / jnp.maximum(jnp.sum(member_BTN, axis=1), 1)[:, :, None]


def add_noise(
    h_BSE: Array,
    segments_BS: Array,
    num_texts: int,
    per_position: float,
    per_text: float,
    key: Array | None,
) -> Array:
    """Gaussian noise on encoder states: one draw per position, and one shared by a whole text."""
    if key is None or (per_position == 0.0 and per_text == 0.0):
        return h_BSE
    position_key, text_key = jax.random.split(key)
    B, _, E = h_BSE.shape
    shared_BNE = jax.random.normal(text_key, (B, num_texts + 1, E), h_BSE.dtype)
    shared_BSE = jnp.take_along_axis(shared_BNE, segments_BS[:, :, None], axis=1)
    own_BSE = jax.random.normal(position_key, h_BSE.shape, h_BSE.dtype)
    return h_BSE + per_position * own_BSE + per_text * shared_BSE


def classification_head(width: int, num_classes: int, rngs: nnx.Rngs) -> Linear:
    """A linear map without bias on the pooled state [code]."""
    return Linear(
        width,
        num_classes,
        ("embed", "classes"),
        init=nnx.initializers.normal(width**-0.5),
        rngs=rngs,
    )
