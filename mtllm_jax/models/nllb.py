"""NLLB, a translation encoder-decoder in the form of M2M100 (arXiv 2207.04672, 2010.11125).

B rows, S encoder positions, T decoder positions, E width, N heads, H head width, F feed-forward
width, V vocabulary, L layers.

Layer norms stand before each block and after each stack; feed-forwards are ReLU; positions are
sinusoidal; encoder, decoder and output share one embedding.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

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
    look_up,
    param,
    positions_in_segment,
    scan_layers,
    split_key,
)
from mtllm_jax.ops.attention import attention, check_attention

_EPS = 1e-5
_LONGEST_WAVE = 10_000.0


@dataclass(frozen=True)
class NLLBConfig:
    """Sizes of a model, and how its layers are run (`remat`, `unroll_layers`, `attention`)."""

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
    """Keys and values of every decoder layer: of the tokens so far, and of the encoder's states."""

    k_LBTNH: Array
    v_LBTNH: Array
    memory_k_LBSNH: Array
    memory_v_LBSNH: Array
    memory_segments_BS: Array


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

    def step(self, h_B1E: Array, index: Array, cache: Cache) -> tuple[Array, tuple[Array, Array]]:
        """One layer (a cache without L) at the token `index`; also the token's key and value."""
        block = self.self_attention
        x_B1E = self.self_attention_norm(h_B1E)
        k_B1NH, v_B1NH = block.heads(block.key, x_B1E), block.heads(block.value, x_B1E)
        segments_B1 = jnp.ones(h_B1E.shape[:2], jnp.int32)
        length = cache.k_LBTNH.shape[1]
        past_BT = jnp.broadcast_to(jnp.arange(length) <= index, (h_B1E.shape[0], length))
        read_B1NH = attention(
            block.heads(block.query, x_B1E),
            jax.lax.dynamic_update_slice_in_dim(cache.k_LBTNH, k_B1NH, index, axis=1),
            jax.lax.dynamic_update_slice_in_dim(cache.v_LBTNH, v_B1NH, index, axis=1),
            query_segments_BT=segments_B1,
            key_segments_BS=past_BT.astype(jnp.int32),
        )
        h_B1E = h_B1E + block.out(read_B1NH.reshape(h_B1E.shape))

        block = self.cross_attention
        read_B1NH = attention(
            block.heads(block.query, self.cross_attention_norm(h_B1E)),
            cache.memory_k_LBSNH,
            cache.memory_v_LBSNH,
            query_segments_BT=segments_B1,
            key_segments_BS=cache.memory_segments_BS,
        )
        h_B1E = h_B1E + block.out(read_B1NH.reshape(h_B1E.shape))
        return self.feed_forward(h_B1E), (k_B1NH, v_B1NH)


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
        h_BSE = scan_layers(
            self.encoder,
            lambda layer, h, key: layer(h, segments_BS, key, packed),
            h_BSE,
            num_layers=self.config.encoder_layers,
            dropout_key=dropout_key,
            remat=self.config.remat,
            unroll=self.config.unroll_layers,
        )
        return self.encoder_norm(h_BSE)

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

    def start_cache(self, memory_BSE: Array, memory_segments_BS: Array, num_tokens: int) -> Cache:
        """A cache with room for `num_tokens` decoder inputs of one text a row."""
        decoder, _ = self._decoder()
        graph, state = nnx.split(decoder.cross_attention)

        def keys_and_values(layer_state: nnx.State) -> tuple[Array, Array]:
            block = nnx.merge(graph, layer_state)
            return block.heads(block.key, memory_BSE), block.heads(block.value, memory_BSE)

        memory_k_LBSNH, memory_v_LBSNH = jax.lax.map(keys_and_values, state)
        L, B, _, N, H = memory_k_LBSNH.shape
        empty_LBTNH = jnp.zeros((L, B, num_tokens, N, H), memory_BSE.dtype)
        return Cache(empty_LBTNH, empty_LBTNH, memory_k_LBSNH, memory_v_LBSNH, memory_segments_BS)

    def step(self, ids_B: Array, index: Array, cache: Cache) -> tuple[Array, Cache]:
        """The normalised states [B, E] at decoder input number `index` (from 0), and the cache."""
        decoder, norm = self._decoder()
        graph, state = nnx.split(decoder)
        position_B1 = jnp.full((ids_B.shape[0], 1), index, jnp.int32)
        h_B1E = self.embed(ids_B[:, None], position_B1, cache.k_LBTNH.dtype)

        def one_layer(h_B1E: Array, layer: tuple[Any, ...]) -> tuple[Array, tuple[Array, Array]]:
            layer_state, k_BTNH, v_BTNH, memory_k_BSNH, memory_v_BSNH = layer
            layer_cache = Cache(
                k_BTNH, v_BTNH, memory_k_BSNH, memory_v_BSNH, cache.memory_segments_BS
            )
            return nnx.merge(graph, layer_state).step(h_B1E, index, layer_cache)

        # Layers read the cache and give back one token's keys and values, written once for all:
        # handing whole caches through the scan would copy them at every token.
        h_B1E, (k_LB1NH, v_LB1NH) = jax.lax.scan(
            one_layer,
            h_B1E,
            (state, *cache[:4]),
            unroll=self.config.decoder_layers if self.config.unroll_layers else 1,
        )
        cache = cache._replace(
            k_LBTNH=jax.lax.dynamic_update_slice_in_dim(cache.k_LBTNH, k_LB1NH, index, axis=2),
            v_LBTNH=jax.lax.dynamic_update_slice_in_dim(cache.v_LBTNH, v_LB1NH, index, axis=2),
        )
        return norm(h_B1E)[:, 0], cache

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
