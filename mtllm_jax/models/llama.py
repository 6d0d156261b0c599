"""Llama and its kin (Llama 2/3, Mistral, Qwen2, Qwen3): decoder-only LLMs, causal or bidirectional.

B rows, T positions, D width, V vocabulary, L layers, N query heads, K key/value heads, H head
width, F feed-forward width.

Pre-norm layers of grouped-query attention with rotary positions and a SwiGLU feed-forward; the
bidirectional reading of causal weights is LLM2Vec's (arXiv 2404.05961).
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from mtllm_jax.models.layers import (
    REMAT_POLICIES,
    Linear,
    RMSNorm,
    look_up,
    param,
    positions_in_segment,
    scan_layers,
)
from mtllm_jax.ops.attention import attention, check_attention
from mtllm_jax.ops.rope import RopeScaling, apply_rope, rope_frequencies, rope_gain

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes of the model, then how it runs. Widths and counts are numbers of features or of things.

    family: the published architecture whose checkpoints it is read from and written as ("llama",
    "mistral", "qwen2", "qwen3"). max_positions: the context it was trained for, in tokens; the
    forward pass does not need it. qkv_bias: Qwen2's; qk_norm: Qwen3's. sliding_window: tokens a
    causal query looks back on, itself included (Mistral 0.1); None = all.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    ffn_width: int
    rms_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    family: str = "llama"
    max_positions: int = 2048
    bos_id: int | None = 1
    eos_ids: tuple[int, ...] = (2,)
    pad_id: int | None = None
    unroll_layers: bool = False
    remat: str = "none"
    attention: str = "auto"

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family is {self.family!r}; allowed: {', '.join(FAMILIES)}")
        for field, is_set, owner in (
            ("qkv_bias", self.qkv_bias, "qwen2"),
            ("qk_norm", self.qk_norm, "qwen3"),
        ):
            if is_set != (self.family == owner):
                raise ValueError(
                    f"{field} is {is_set} for family {self.family!r}; {owner!r} alone has it"
                )
        if self.sliding_window is not None and self.family != "mistral":
            raise ValueError(
                f"sliding_window is {self.sliding_window} for family {self.family!r}; "
                "only 'mistral' may have one"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads is {self.num_heads}; it must be a multiple of num_kv_heads, "
                f"{self.num_kv_heads}"
            )
        if self.head_width % 2:
            raise ValueError(f"head_width is {self.head_width}; rotary positions need an even one")
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat is {self.remat!r}; allowed: {', '.join(REMAT_POLICIES)}")
        check_attention(self.attention, window=self.sliding_window, head_width=self.head_width)


class LlamaLayers(nnx.Module):
    """All layers, stacked under a leading L. `scan_layers` makes one of them the module to call."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        L, D, F = config.num_layers, config.width, config.ffn_width
        query_width = config.num_heads * config.head_width
        kv_width = config.num_kv_heads * config.head_width
        self.config = config

        def linear(
            size_in: int,
            size_out: int,
            dims: tuple[str, str],
            bias: bool = False,
            gain: float = 1.0,
        ) -> Linear:
            init = _fan_in_normal(gain)
            return Linear(
                size_in, size_out, dims, init=init, rngs=rngs, num_layers=L, use_bias=bias
            )

        def head_norm() -> RMSNorm | None:
            width, eps = config.head_width, config.rms_eps
            return nnx.data(RMSNorm(width, eps, rngs, L) if config.qk_norm else None)

        # What a layer adds to the residual stream is damped, so that depth leaves its size alone.
        damped = (2 * L) ** -0.5
        self.attention_norm = RMSNorm(D, config.rms_eps, rngs, L)
        self.q = linear(D, query_width, ("embed", "heads"), config.qkv_bias)
        self.k = linear(D, kv_width, ("embed", "heads"), config.qkv_bias)
        self.v = linear(D, kv_width, ("embed", "heads"), config.qkv_bias)
        self.o = linear(query_width, D, ("heads", "embed"), gain=damped)
        self.q_norm = head_norm()
        self.k_norm = head_norm()
        self.ffn_norm = RMSNorm(D, config.rms_eps, rngs, L)
        self.gate = linear(D, F, ("embed", "ffn"))
        self.up = linear(D, F, ("embed", "ffn"))
        self.down = linear(F, D, ("ffn", "embed"), gain=damped)

    def __call__(
        self,
        h_BTD: Array,
        segments_BT: Array,
        positions_BT: Array,
        *,
        causal: bool,
        packed: bool = True,
        branches: bool = False,
        dropout_key: Array | None = None,
        attention_dropout: float = 0.0,
    ) -> Array:
        """One layer: attention, then feed-forward, each added to the residual stream."""
        keys = [None] * 7 if dropout_key is None else list(jax.random.split(dropout_key, 7))
        x_BTD = self.attention_norm(h_BTD)
        h_BTD = h_BTD + self.attend(
            x_BTD,
            segments_BT,
            positions_BT,
            keys[:4],
            causal=causal,
            packed=packed,
            branches=branches,
            dropout=attention_dropout,
            dropout_key=None if dropout_key is None else jax.random.fold_in(dropout_key, 7),
        )
        return h_BTD + self.feed_forward(self.ffn_norm(h_BTD), keys[4:])

    def attend(
        self,
        x_BTD: Array,
        segments_BT: Array,
        positions_BT: Array,
        keys: Sequence[Array | None] = (None,) * 4,
        *,
        causal: bool,
        packed: bool = True,
        branches: bool = False,
        dropout: float = 0.0,
        dropout_key: Array | None = None,
    ) -> Array:
        """Grouped-query attention with rotary positions, [B, T, D]. keys: dropout of q, k, v, o's
        adapters; the other is of the attention's own."""
        q_BTNH, k_BTKH, v_BTKH = self.heads(x_BTD, positions_BT, keys[:3])
        read_BTNH = self.read(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            segments_BT,
            causal=causal,
            packed=packed,
            branches=branches,
            dropout=dropout,
            dropout_key=dropout_key,
        )
        return self.o(read_BTNH.reshape(*x_BTD.shape[:2], -1), keys[3])

    def heads(
        self, x_BTD: Array, positions_BT: Array, keys: Sequence[Array | None] = (None,) * 3
    ) -> tuple[Array, Array, Array]:
        """Queries [B, T, N, H], keys and values [B, T, K, H]; the first two turned by position."""
        config = self.config
        q_BTNH = _heads(self.q(x_BTD, keys[0]), config.num_heads)
        k_BTKH = _heads(self.k(x_BTD, keys[1]), config.num_kv_heads)
        v_BTKH = _heads(self.v(x_BTD, keys[2]), config.num_kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        frequencies = rope_frequencies(config.head_width, config.rope_theta, config.rope_scaling)
        gain = rope_gain(config.rope_scaling)
        return (
            apply_rope(q_BTNH, positions_BT, frequencies, gain),
            apply_rope(k_BTKH, positions_BT, frequencies, gain),
            v_BTKH,
        )

    def read(
        self,
        q_BTNH: Array,
        k_BTKH: Array,
        v_BTKH: Array,
        segments_BT: Array,
        *,
        causal: bool,
        packed: bool = True,
        branches: bool = False,
        dropout: float = 0.0,
        dropout_key: Array | None = None,
    ) -> Array:
        """What the positions of a text read from each other, [B, T, N, H]."""
        return attention(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            query_segments_BT=segments_BT,
            key_segments_BS=segments_BT,
            causal=causal,
            window=self.config.sliding_window if causal else None,
            packed=packed,
            branches=branches,
            backend=self.config.attention,
            dropout=dropout,
            dropout_key=dropout_key,
        )

    def feed_forward(self, x_BTD: Array, keys: Sequence[Array | None] = (None,) * 3) -> Array:
        """SwiGLU, [B, T, D]. keys: dropout of gate, up, down."""
        gated_BTF = jax.nn.silu(self.gate(x_BTD, keys[0])) * self.up(x_BTD, keys[1])
        return self.down(gated_BTF, keys[2])


class Llama(nnx.Module):
    """Token embedding, layers, final norm and output kernel. All methods are pure.

    A fresh model is initialised for training from scratch (ours): linear maps normal with standard
    deviation fan_in^-1/2, those that write to the residual stream divided by sqrt(2L), embeddings
    normal with D^-1/2, so that tied logits start with variance 1 at any width.
    """

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.config = config
        shape, dims = (config.vocab_size, config.width), ("vocab", "embed")
        init = nnx.initializers.normal(config.width**-0.5)
        self.embedding = param(rngs, shape, dims, init)
        self.layers = LlamaLayers(config, rngs)
        self.norm = RMSNorm(config.width, config.rms_eps, rngs)
        self.output = nnx.data(None if config.tie_embeddings else param(rngs, shape, dims, init))

    def embed(self, ids_BT: Array, dtype: DTypeLike = jnp.float32) -> Array:
        """Token ids int32 [B, T] → h_BTD in `dtype`, which the layers then compute in."""
        return look_up(self.embedding[...], ids_BT).astype(dtype)

    def hidden(
        self,
        h_BTD: Array,
        segments_BT: Array,
        *,
        causal: bool,
        packed: bool = True,
        branches: bool = False,
        dropout_key: Array | None = None,
        attention_dropout: float = 0.0,
    ) -> Array:
        """Input states → states after the final norm, [B, T, D] in the dtype of `h_BTD`.

        segments_BT: int32, 0 = padding, 1..N = the packed text of a position, ascending in a row;
        positions restart in each. What comes out at padding has no meaning. causal=False lets
        every token see its whole text and drops the sliding window. packed=False promises one text
        a row, from its first position on. branches: texts 2..N of a row are read as if each stood
        alone behind text 1, which is read once. dropout_key: LoRA's dropout, and that of the
        attention's weights, of which `attention_dropout` is the share.
        ValueError for branches in rows longer than the sliding window.
        """
        positions_BT = positions_in_segment(segments_BT)
        if branches:
            window, length = self.config.sliding_window, segments_BT.shape[1]
            if causal and window is not None and length > window:
                raise ValueError(
                    f"a row of a text and its branches has {length} positions; it must have no more"
                    f" than the sliding window, {window}"
                )
            before_B1 = jnp.sum(segments_BT == 1, axis=1, dtype=jnp.int32, keepdims=True)
            positions_BT += jnp.where(segments_BT > 1, before_B1, 0)

        def layer(layers: LlamaLayers, h_BTD: Array, key: Array | None) -> Array:
            return layers(
                h_BTD,
                segments_BT,
                positions_BT,
                causal=causal,
                packed=packed,
                branches=branches,
                dropout_key=key,
                attention_dropout=attention_dropout,
            )

        h_BTD = scan_layers(
            self.layers,
            layer,
            h_BTD,
            num_layers=self.config.num_layers,
            dropout_key=dropout_key,
            remat=self.config.remat,
            unroll=self.config.unroll_layers,
        )
        return self.norm(h_BTD)

    def output_kernel(self) -> Array:
        """[V, D]: the embedding itself when tied, else the output's own."""
        return self.embedding[...] if self.output is None else self.output[...]

    def logits(self, h_BTD: Array) -> Array:
        """States after `hidden` → float32 logits [B, T, V]."""
        kernel_VD = self.output_kernel().astype(h_BTD.dtype)
        return jnp.einsum("btd,vd->btv", h_BTD, kernel_VD, preferred_element_type=jnp.float32)


def _heads(x_BTI: Array, num_heads: int) -> Array:
    """[B, T, N · H] → [B, T, N, H]."""
    return x_BTI.reshape(*x_BTI.shape[:2], num_heads, -1)


def _fan_in_normal(gain: float) -> nnx.Initializer:
    """Normal with standard deviation gain · I^-1/2 for kernels [L, I, O]."""
    return nnx.initializers.variance_scaling(
        gain**2, "fan_in", "normal", in_axis=-2, out_axis=-1, batch_axis=0
    )
