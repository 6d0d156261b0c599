"""NLLB, a translation encoder-decoder in the form of M2M100 (arXiv 2207.04672, 2010.11125).

B rows, S encoder positions, T decoder positions, K hypotheses of a row's translation, P places of
keys and values, E width, N heads, H head width, F feed-forward width, V vocabulary, L layers.

Layer norms stand before each block and after each stack; feed-forwards are ReLU; positions are
sinusoidal; encoder, decoder and output share one embedding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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
    scan_layers,
    split_key,
)
from mtllm_jax.models.past import Past, no_past
from mtllm_jax.ops.attention import check_attention

_EPS = 1e-5
_LONGEST_WAVE = 10_000.0


@dataclass(frozen=True)
class NLLBConfig:
    """Sizes of a model, and how its layers are run (`remat`, `unroll_layers`, `attention`), but for
    `NLLB.step`, which has its own way."""

    vocab_size: int
    width: int
    encoder_layers: int
    decoder_layers: int  # 0: the encoder alone
    encoder_heads: int
    decoder_heads: int
    encoder_ffn: int
    decoder_ffn: int
    scale_embedding: bool = True  # by sqrt(width)
    pad_id: int = 1
    eos_id: int = 2  # also the decoder's first input
    remat: str = "none"  # a name in layers.REMAT_POLICIES
    unroll_layers: bool = False
    attention: str = "auto"  # a name in ops.attention.NAMES

    def __post_init__(self) -> None:
        for name in ("encoder_heads", "decoder_heads"):
            if self.width % getattr(self, name):
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must divide width {self.width}"
                )
            check_attention(self.attention, head_width=self.width // getattr(self, name))
        if self.width % 2 or self.width < 4:
            raise ValueError(f"width is {self.width}; it must be even and at least 4")
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat is {self.remat!r}; it may be one of {list(REMAT_POLICIES)}")


class Cache(NamedTuple):
    """Keys and values of each layer, of the tokens so far and of the encoder's states.

    Of decoder input t the K hypotheses have places t · K … among the tokens'. Those of a token stay
    where they were put when it was read: where the tokens before it lie is for `NLLB.step`'s
    `history_BKT` to say. is_memory_BS: the encoder's positions that hold a text, bool.
    """

    tokens: tuple[Past, ...]
    memory: tuple[Past, ...]
    is_memory_BS: Array


class EncoderLayers(nnx.Module):
    """Stacked layers of self-attention and feed-forward."""

    def __init__(
        self, width: int, num_heads: int, ffn: int, num_layers: int, rngs: nnx.Rngs, backend: str
    ):
        self.self_attention_norm = LayerNorm(width, _EPS, rngs, num_layers)
        self.self_attention = Attention(width, num_heads, num_layers, rngs, backend)
        self.ffn_norm = LayerNorm(width, _EPS, rngs, num_layers)
        self.ffn_in = biased_linear(width, ffn, ("embed", "ffn"), num_layers, rngs)
        self.ffn_out = biased_linear(ffn, width, ("ffn", "embed"), num_layers, rngs)

    def feed_forward(self, h_BTE: Array, dropout_key: Array | None = None) -> Array:
        in_key, out_key = split_key(dropout_key, 2)
        return h_BTE + self.ffn_out(jax.nn.relu(self.ffn_in(self.ffn_norm(h_BTE), in_key)), out_key)

    def __call__(
        self,
        h_BSE: Array,
        segments_BS: Array,
        dropout_key: Array | None,
        packed: bool = True,
    ) -> Array:
        attention_key, ffn_key = split_key(dropout_key, 2)
        x_BSE = self.self_attention_norm(h_BSE)
        h_BSE = h_BSE + self.self_attention(
            x_BSE, x_BSE, segments_BS, segments_BS, packed=packed, dropout_key=attention_key
        )
        return self.feed_forward(h_BSE, ffn_key)


class DecoderLayers(EncoderLayers):
    """Stacked layers of causal self-attention, attention to the encoder, and feed-forward."""

    def __init__(
        self, width: int, num_heads: int, ffn: int, num_layers: int, rngs: nnx.Rngs, backend: str
    ):
        super().__init__(width, num_heads, ffn, num_layers, rngs, backend)
        self.cross_attention_norm = LayerNorm(width, _EPS, rngs, num_layers)
        self.cross_attention = Attention(width, num_heads, num_layers, rngs, backend)

    def __call__(  # type: ignore[override]
        self,
        h_BTE: Array,
        segments_BT: Array,
        memory_BSE: Array,
        memory_segments_BS: Array,
        dropout_key: Array | None,
    ) -> Array:
        self_key, cross_key, ffn_key = split_key(dropout_key, 3)
        x_BTE = self.self_attention_norm(h_BTE)
        h_BTE = h_BTE + self.self_attention(
            x_BTE, x_BTE, segments_BT, segments_BT, causal=True, dropout_key=self_key
        )
        x_BTE = self.cross_attention_norm(h_BTE)
        h_BTE = h_BTE + self.cross_attention(
            x_BTE, memory_BSE, segments_BT, memory_segments_BS, dropout_key=cross_key
        )
        return self.feed_forward(h_BTE, ffn_key)

    def step(
        self, h_BKE: Array, index: Array, tokens: Past, memory: Past, masks: tuple[Array, Array]
    ) -> tuple[Array, Past]:
        """One layer at decoder input number `index` of each hypothesis, and `tokens` with it.

        masks: the places of both that each hypothesis is to read, this input's among them, bool
        [B, 1, K, P] and [B, 1, 1, S].
        """
        among_tokens, among_memory = masks
        block, x_BKE = self.self_attention, self.self_attention_norm(h_BKE)
        q_BKNH, k_BKNH, v_BKNH = (
            block.heads(linear, x_BKE) for linear in (block.query, block.key, block.value)
        )
        tokens = tokens.with_tokens(k_BKNH, v_BKNH, index * h_BKE.shape[1])
        read_BNKH = tokens.read(q_BKNH.swapaxes(1, 2), among_tokens)
        h_BKE = h_BKE + block.out(read_BNKH.swapaxes(1, 2).reshape(h_BKE.shape))

        block = self.cross_attention
        q_BKNH = block.heads(block.query, self.cross_attention_norm(h_BKE))
        read_BNKH = memory.read(q_BKNH.swapaxes(1, 2), among_memory)
        h_BKE = h_BKE + block.out(read_BNKH.swapaxes(1, 2).reshape(h_BKE.shape))
        return self.feed_forward(h_BKE), tokens


class NLLB(nnx.Module):
    """The encoder, and a decoder unless `config.decoder_layers` is 0.

    Text is ids with segments, both int32: 0 = padding, 1 … = the text of this row that a position
    belongs to. Texts packed into one row do not see each other; the decoder's segment n reads the
    encoder's segment n.
    """

    def __init__(self, config: NLLBConfig, rngs: nnx.Rngs):
        c = self.config = config
        init = nnx.initializers.normal(c.width**-0.5)
        self.embedding_VE = param(rngs, (c.vocab_size, c.width), ("vocab", "embed"), init)
        self.encoder = EncoderLayers(
            c.width, c.encoder_heads, c.encoder_ffn, c.encoder_layers, rngs, c.attention
        )
        self.top: EncoderLayers | None = nnx.data(None)
        self.encoder_norm = LayerNorm(c.width, _EPS, rngs)
        self.decoder: DecoderLayers | None = nnx.data(None)
        self.decoder_norm: LayerNorm | None = nnx.data(None)
        if c.decoder_layers:
            self.decoder = DecoderLayers(
                c.width, c.decoder_heads, c.decoder_ffn, c.decoder_layers, rngs, c.attention
            )
            self.decoder_norm = LayerNorm(c.width, _EPS, rngs)

    def encode(
        self,
        ids_BS: Array,
        segments_BS: Array,
        dtype: DTypeLike = jnp.float32,
        dropout_key: Array | None = None,
        packed: bool = True,
    ) -> Array:
        """The encoder's normalised states [B, S, E], computed in `dtype`. packed=False promises one
        text a row, from its first position on."""
        h_BSE = self.embed(ids_BS, positions_in_segment(segments_BS), dtype)
        h_BSE = scan_encoder(
            (self.encoder, self.top),
            h_BSE,
            segments_BS,
            packed=packed,
            dropout_key=dropout_key,
            remat=self.config.remat,
            unroll=self.config.unroll_layers,
        )
        return self.encoder_norm(h_BSE)

    def free(self, num: int) -> None:
        """Take the last `num` encoder layers off, in place, as `top`, float32, so that they can
        learn without the others; and the final norm in float32 too."""
        self.encoder, self.top = cut_off_last(self.encoder, num)
        for parameter in (self.encoder_norm.scale, self.encoder_norm.bias):
            parameter.set_value(parameter[...].astype(jnp.float32))

    def whole(self) -> None:
        """Put them back, in place, if they are off."""
        if self.top is not None:
            self.encoder, self.top = put_together(self.encoder, self.top), nnx.data(None)

    def decode(
        self,
        ids_BT: Array,
        segments_BT: Array,
        memory_BSE: Array,
        memory_segments_BS: Array,
        dropout_key: Array | None = None,
    ) -> Array:
        """The decoder's normalised states [B, T, E] for given inputs, in the dtype of `memory`."""
        decoder, norm = self._decoder()
        h_BTE = self.embed(ids_BT, positions_in_segment(segments_BT), memory_BSE.dtype)
        h_BTE = scan_layers(
            decoder,
            lambda layer, h, key: layer(h, segments_BT, memory_BSE, memory_segments_BS, key),
            h_BTE,
            num_layers=self.config.decoder_layers,
            dropout_key=dropout_key,
            remat=self.config.remat,
            unroll=self.config.unroll_layers,
        )
        return norm(h_BTE)

    def logits(self, h_BTE: Array) -> Array:
        """[..., E] → [..., V], float32."""
        embedding_VE = self.embedding_VE[...].astype(h_BTE.dtype)
        return jnp.einsum("...e,ve->...v", h_BTE, embedding_VE, preferred_element_type=jnp.float32)

    def decoder_layers(self) -> list[DecoderLayers]:
        """The decoder's layers, each a module of its own, as `start_cache` and `step` take them. To
        be called before the loop over tokens: inside it, each layer's weights would be copied at
        every token."""
        graph, state = nnx.split(self._decoder()[0])
        return [
            nnx.merge(graph, jax.tree.map(lambda x, i=i: x[i], state))
            for i in range(self.config.decoder_layers)
        ]

    def start_cache(
        self,
        layers: Sequence[DecoderLayers],
        memory_BSE: Array,
        memory_segments_BS: Array,
        num_tokens: int,
        num_hypotheses: int = 1,
    ) -> Cache:
        """A cache with room for `num_tokens` decoder inputs of each hypothesis; one text a row."""

        blocks = [layer.cross_attention for layer in layers]
        memory = tuple(
            Past.of(block.heads(block.key, memory_BSE), block.heads(block.value, memory_BSE))
            for block in blocks
        )
        B, N, _, H = memory[0].v_BNPH.shape
        empty = no_past(B, N, num_tokens * num_hypotheses, H, memory_BSE.dtype)
        return Cache((empty,) * len(layers), memory, memory_segments_BS > 0)

    def step(
        self,
        layers: Sequence[DecoderLayers],
        ids_BK: Array,
        index: Array,
        cache: Cache,
        history_BKT: Array | None = None,
    ) -> tuple[Array, Cache]:
        """The normalised states [B, K, E] at decoder input number `index` (from 0), and the cache
        with that input.

        history_BKT: the slot in the cache of each hypothesis' token at each input before `index`,
        int32; None: its own slot, as where nothing is ever dropped or doubled.
        """
        _, norm = self._decoder()
        B, K = ids_BK.shape
        values_BNPH = cache.tokens[0].v_BNPH
        T = values_BNPH.shape[2] // K
        slots_K = jnp.arange(K, dtype=jnp.int32)
        own_BKT = jnp.broadcast_to(slots_K[None, :, None], (B, K, T))
        inputs_11T = jnp.arange(T)[None, None]
        slot_BKT = own_BKT if history_BKT is None else history_BKT
        # This input goes into its hypothesis' own slot.
        slot_BKT = jnp.where(inputs_11T == index, own_BKT, slot_BKT)
        is_read_BKTK = slot_BKT[..., None] == slots_K[None, None, None]
        is_read_BKTK &= (inputs_11T <= index)[..., None]
        masks = is_read_BKTK.reshape(B, 1, K, T * K), cache.is_memory_BS[:, None, None]
        h_BKE = self.embed(ids_BK, jnp.full((B, K), index, jnp.int32), values_BNPH.dtype)
        kept = []
        for layer, before, memory in zip(layers, cache.tokens, cache.memory, strict=True):
            h_BKE, tokens = layer.step(h_BKE, index, before, memory, masks)
            kept.append(tokens)
        return norm(h_BKE), cache._replace(tokens=tuple(kept))

    def embed(self, ids_BT: Array, positions_BT: Array, dtype: DTypeLike) -> Array:
        """[B, T, E]: scaled embeddings plus positions, counted from 0 in each text."""
        scale = math.sqrt(self.config.width) if self.config.scale_embedding else 1.0
        h_BTE = look_up(self.embedding_VE[...], ids_BT).astype(jnp.float32) * scale
        # The first token of a text stands at the position after the padding's own id.
        positions_BT = positions_BT + self.config.pad_id + 1
        return (h_BTE + sinusoids(positions_BT, self.config.width)).astype(dtype)

    def _decoder(self) -> tuple[DecoderLayers, LayerNorm]:
        if self.decoder is None or self.decoder_norm is None:
            raise ValueError("this NLLB was built or loaded as an encoder alone (decoder_layers=0)")
        return self.decoder, self.decoder_norm


def sinusoids(positions_BT: Array, width: int) -> Array:
    """[B, T, E] float32: sines in the first half of the width, cosines in the second."""
    steps = np.arange(width // 2, dtype=np.float32)
    exponents = steps * np.float32(-math.log(_LONGEST_WAVE) / (width // 2 - 1))
    # By way of float64: numpy's exp of float32 is off by more than a rounding.
    frequency_E = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angle_BTE = positions_BT[..., None].astype(jnp.float32) * frequency_E[None, None]
    return jnp.concatenate([jnp.sin(angle_BTE), jnp.cos(angle_BTE)], axis=-1)
