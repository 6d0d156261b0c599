"""The bridge: encoder states → inputs of the LLM (MT-LLM's up-projection).

B rows, N texts packed in a row, S encoder positions, P positions of the LLM, W encoder positions in
one of the LLM, E encoder width, D decoder width.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mtllm_jax.models.layers import Linear, positions_in_segment

_GELU_OF_NORMAL = 0.652  # the root mean square of GELU(x) for x ~ N(0, 1)


class Bridge(nnx.Module):
    """One linear map with bias, E → D, one LLM position per encoder position [code].

    hidden: 0, or the width between two linear maps with GELU (MLP). stride: W; above 1, each W
    positions of a text become one, by a convolution of that stride and kernel. scale: standard
    deviation of an output element at the start, for encoder states of rms 1; that of the LLM's own
    input embeddings lets the stack begin where the LLM feels at home [ours].
    """

    def __init__(
        self,
        encoder_width: int,
        decoder_width: int,
        scale: float,
        rngs: nnx.Rngs,
        *,
        hidden: int = 0,
        stride: int = 1,
    ):
        self.stride = stride
        width, dim = stride * encoder_width, "embed"
        self.inner: Linear | None = nnx.data(None)
        if hidden:
            init = nnx.initializers.normal(width**-0.5)
            dims = (dim, "ffn")
            self.inner = Linear(width, hidden, dims, init=init, rngs=rngs, use_bias=True)
            width, dim, scale = hidden, "ffn", scale / _GELU_OF_NORMAL
        self.up = Linear(
            width,
            decoder_width,
            # An axis of the mesh cuts one side of a matrix.
            (dim, "embed" if hidden else "bridge"),
            init=nnx.initializers.normal(scale * width**-0.5),
            rngs=rngs,
            use_bias=True,
        )

    def __call__(self, h_BSE: Array, segments_BS: Array, num_texts: int) -> tuple[Array, Array]:
        """[B, S, E] → the LLM's inputs [B, P, D], in the dtype of the input, and their segments.

        num_texts: the most in a row. P is S, or `shortened` where the stride is above 1.
        """
        if self.stride > 1:
            h_BSE, segments_BS = windows(h_BSE, segments_BS, num_texts, self.stride)
        if self.inner is not None:
            h_BSE = jax.nn.gelu(self.inner(h_BSE), approximate=False)
        return self.up(h_BSE), segments_BS


def shortened(length: int, num_texts: int, stride: int) -> int:
    """P: what always holds the windows of so many texts, each of which may end in a part of one."""
    return (length + num_texts * (stride - 1)) // stride


def windows(h_BSE: Array, segments_BS: Array, num_texts: int, stride: int) -> tuple[Array, Array]:
    """Each W = `stride` positions of a text side by side, [B, P, W · E], and their segments [B, P].

    Windows are counted from a text's own first position, wherever it lies in its row, and hold
    nothing of its neighbours: the last of a text is filled up with zeros. They follow each other
    without a gap; padding is behind them.
    """
    length = segments_BS.shape[1]
    slots = stride * shortened(length, num_texts, stride)
    positions_BS = positions_in_segment(segments_BS)
    is_token_BS = segments_BS > 0
    window_BS = jnp.cumsum(is_token_BS & (positions_BS % stride == 0), axis=1, dtype=jnp.int32) - 1
    # Where each position goes; beyond the last slot it goes nowhere.
    slot_BS = jnp.where(is_token_BS, window_BS * stride + positions_BS % stride, slots)

    def source(slot_S: Array) -> Array:
        """The position that fills each slot; S where none does."""
        places_S = jnp.arange(length, dtype=jnp.int32)
        return jnp.full(slots, length, jnp.int32).at[slot_S].set(places_S, mode="drop")

    source_BQ = jax.vmap(source)(slot_BS)
    padded_BSE = jnp.pad(h_BSE, ((0, 0), (0, 1), (0, 0)))
    h_BQE = jnp.take_along_axis(padded_BSE, source_BQ[:, :, None], axis=1)
    firsts_BP = source_BQ[:, ::stride]
    segments_BP = jnp.take_along_axis(jnp.pad(segments_BS, ((0, 0), (0, 1))), firsts_BP, axis=1)
    return h_BQE.reshape(len(h_BQE), -1, stride * h_BSE.shape[2]), segments_BP
