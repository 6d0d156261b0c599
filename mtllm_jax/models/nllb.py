"""NLLB, a translation encoder-decoder in the form of M2M100 (arXiv 2207.04672, 2010.11125).

B rows, S encoder positions, T decoder positions, K hypotheses of a row's translation, E width,
N heads, H head width, F feed-forward width, V vocabulary, L layers.

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
    cut_off_last,
    look_up,
    param,
    positions_in_segment,
    put_together,
    scan_encoder,
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
    """Keys and values of every decoder layer: of the tokens so far, and of the encoder's states.

    Those of a token stay in the slot, one of K, that its hypothesis had when it was read: where the
    tokens before it lie is for `NLLB.step`'s `history_BKT` to say.
    """

    k_LBNTKH: Array
    v_LBNTKH: Array
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

    def step(
        self, h_BKE: Array, past_BKTK: Array, cache: Cache
    ) -> tuple[Array, tuple[Array, Array]]:
        """One layer (a cache without L) at one token of each hypothesis; also its key and value.

        past_BKTK: the tokens in the cache that each hypothesis is to read, bool.
        """
        block, x_BKE = self.self_attention, self.self_attention_norm(h_BKE)
        # As the cache has them, so that what is many times their size need not be turned.
        q_BNKH, k_BNKH, v_BNKH = (
            block.heads(linear, x_BKE).swapaxes(1, 2)
            for linear in (block.query, block.key, block.value)
        )
        read_BNKH = _read_past(q_BNKH, k_BNKH, v_BNKH, past_BKTK, cache)
        h_BKE = h_BKE + block.out(read_BNKH.swapaxes(1, 2).reshape(h_BKE.shape))

        block = self.cross_attention
        # All hypotheses read the same text: to the encoder's states they are K positions.
        read_BKNH = attention(
            block.heads(block.query, self.cross_attention_norm(h_BKE)),
            cache.memory_k_LBSNH,
            cache.memory_v_LBSNH,
            query_segments_BT=jnp.ones(h_BKE.shape[:2], jnp.int32),
            key_segments_BS=cache.memory_segments_BS,
        )
        h_BKE = h_BKE + block.out(read_BKNH.reshape(h_BKE.shape))
        return self.feed_forward(h_BKE), (k_BNKH, v_BNKH)


def _read_past(
    q_BNKH: Array, k_BNKH: Array, v_BNKH: Array, past_BKTK: Array, cache: Cache
) -> Array:
    """What each hypothesis reads from its own past and from the token it is at. [B, N, K, H]."""
    B, N, K, H = q_BNKH.shape
    q_BNKH = q_BNKH * jnp.asarray(H**-0.5, q_BNKH.dtype)
    keys_BNPH, values_BNPH = (x.reshape(B, N, -1, H) for x in cache[:2])  # P: T × K
    is_read_B1KP = past_BKTK.reshape(B, 1, K, -1)
    past_BNKP = jnp.einsum("bnkh,bnph->bnkp", q_BNKH, keys_BNPH, preferred_element_type=jnp.float32)
    past_BNKP = jnp.where(is_read_B1KP, past_BNKP, -jnp.inf)
    own_BNK1 = jnp.sum(q_BNKH * k_BNKH, axis=-1, dtype=jnp.float32, keepdims=True)
    weights_BNKP = jax.nn.softmax(jnp.concatenate([past_BNKP, own_BNK1], axis=-1))
    weights_BNKP = weights_BNKP.astype(v_BNKH.dtype)
    return (
        jnp.einsum("bnkp,bnph->bnkh", weights_BNKP[..., :-1], values_BNPH)
        + weights_BNKP[..., -1:] * v_BNKH
    )


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

    def start_cache(
        self,
        memory_BSE: Array,
        memory_segments_BS: Array,
        num_tokens: int,
        num_hypotheses: int = 1,
    ) -> Cache:
        """A cache with room for `num_tokens` decoder inputs of each hypothesis; one text a row."""
        decoder, _ = self._decoder()
        graph, state = nnx.split(decoder.cross_attention)

        def keys_and_values(layer_state: nnx.State) -> tuple[Array, Array]:
            block = nnx.merge(graph, layer_state)
            return block.heads(block.key, memory_BSE), block.heads(block.value, memory_BSE)

        memory_k_LBSNH, memory_v_LBSNH = jax.lax.map(keys_and_values, state)
        L, B, _, N, H = memory_k_LBSNH.shape
        empty_LBNTKH = jnp.zeros((L, B, N, num_tokens, num_hypotheses, H), memory_BSE.dtype)
        return Cache(empty_LBNTKH, empty_LBNTKH, memory_k_LBSNH, memory_v_LBSNH, memory_segments_BS)

    def step(
        self, ids_BK: Array, index: Array, cache: Cache, history_BKT: Array | None = None
    ) -> tuple[Array, Cache]:
        """The normalised states [B, K, E] at decoder input number `index` (from 0), and the cache.

        history_BKT: the slot in the cache of each hypothesis' token at each input before `index`,
        int32; None: its own slot, as where nothing is ever dropped or doubled.
        """
        decoder, norm = self._decoder()
        graph, state = nnx.split(decoder)
        B, K = ids_BK.shape
        T = cache.k_LBNTKH.shape[3]
        slots_K = jnp.arange(K, dtype=jnp.int32)
        if history_BKT is None:
            history_BKT = jnp.broadcast_to(slots_K[None, :, None], (B, K, T))
        is_past_T = (jnp.arange(T) < index)[None, None, :, None]
        past_BKTK = is_past_T & (history_BKT[..., None] == slots_K[None, None, None])
        h_BKE = self.embed(ids_BK, jnp.full((B, K), index, jnp.int32), cache.k_LBNTKH.dtype)

        def one_layer(h_BKE: Array, layer: tuple[Any, ...]) -> tuple[Array, tuple[Array, Array]]:
            layer_state, k_BNTKH, v_BNTKH, memory_k_BSNH, memory_v_BSNH = layer
            layer_cache = Cache(
                k_BNTKH, v_BNTKH, memory_k_BSNH, memory_v_BSNH, cache.memory_segments_BS
            )
            return nnx.merge(graph, layer_state).step(h_BKE, past_BKTK, layer_cache)

        # Layers read the cache and give back one token's keys and values, written once for all:
        # handing whole caches through the scan would copy them at every token.
        h_BKE, of_token = jax.lax.scan(
            one_layer,
            h_BKE,
            (state, *cache[:4]),
            unroll=self.config.decoder_layers if self.config.unroll_layers else 1,
        )
        k_LBNTKH, v_LBNTKH = (
            jax.lax.dynamic_update_slice_in_dim(whole, new[:, :, :, None], index, axis=3)
            for whole, new in zip(cache[:2], of_token, strict=True)
        )
        return norm(h_BKE), cache._replace(k_LBNTKH=k_LBNTKH, v_LBNTKH=v_LBNTKH)

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
