"""Cross-entropy and divergence over a vocabulary, in chunks of tokens.

M tokens, B rows, T positions, D width, V vocabulary, C candidates.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mtllm_jax.ops import layout

MOST_LOGITS = 2**28  # of a device at a time; 1 GB


def cross_entropy(
    h_MD: Array,
    kernel_VD: Array,
    labels_M: Array,
    weights_M: Array,
    *,
    bias_V: Array | None = None,
    chunk: int = 0,
) -> tuple[Array, Array]:
    """−log softmax(h · kernelᵀ + bias)[label], as (weighted sum, sum of weights). float32.

    chunk: tokens per step; the logits of one chunk alone exist at a time, also in the backward
    pass, which computes them again. 0 takes all tokens at once and keeps the logits.
    """

    def summed(h_MD: Array, labels_M: Array, weights_M: Array) -> Array:
        logits_MV = jnp.einsum("md,vd->mv", h_MD, kernel_VD, preferred_element_type=jnp.float32)
        if bias_V is not None:
            logits_MV += bias_V[None]
        picked_M = jnp.take_along_axis(logits_MV, labels_M[:, None], axis=1)[:, 0]
        return jnp.sum((jax.nn.logsumexp(logits_MV, axis=1) - picked_M) * weights_M)

    weights_M = weights_M.astype(jnp.float32)
    count = jnp.sum(weights_M)
    if chunk == 0 or chunk >= h_MD.shape[0]:
        return summed(h_MD, labels_M, weights_M), count
    short = -h_MD.shape[0] % chunk
    chunked = [
        jnp.pad(x, ((0, short),) + ((0, 0),) * (x.ndim - 1)).reshape(-1, chunk, *x.shape[1:])
        for x in (h_MD, labels_M, weights_M)
    ]

    def step(total: Array, piece: list[Array]) -> tuple[Array, None]:
        return total + jax.checkpoint(summed)(*piece), None

    return jax.lax.scan(step, jnp.zeros((), jnp.float32), chunked)[0], count


def log_likelihoods(h_MD: Array, kernel_VD: Array, ids_M: Array, *, chunk: int) -> Array:
    """log softmax(h · kernelᵀ)[id] of each. float32 [M]. The logits of `chunk` tokens alone exist
    at a time."""

    def of_token(token: tuple[Array, Array]) -> Array:
        h_D, id = token
        logits_V = jnp.einsum("d,vd->v", h_D, kernel_VD, preferred_element_type=jnp.float32)
        return logits_V[id] - jax.nn.logsumexp(logits_V)

    return jax.lax.map(of_token, (h_MD, ids_M), batch_size=min(chunk, h_MD.shape[0]))


def cross_entropy_of_rows(
    h_BTD: Array,
    kernel_VD: Array,
    labels_BT: Array,
    weights_BT: Array,
    *,
    most_logits: int = MOST_LOGITS,
) -> tuple[Array, Array]:
    """`cross_entropy` of rows that lie over devices: some positions of all rows at a time.

    most_logits: of a device at a time. Where those of all positions are more, they are computed
    piece by piece, and again in the backward pass.
    """

    def summed(h_BQD: Array, labels_BQ: Array, weights_BQ: Array) -> Array:
        tokens = h_BQD.reshape(-1, h_BQD.shape[-1]), labels_BQ.reshape(-1), weights_BQ.reshape(-1)
        return cross_entropy(tokens[0], kernel_VD, *tokens[1:])[0]

    weights_BT = weights_BT.astype(jnp.float32)
    total = _over_positions(summed, (h_BTD, labels_BT, weights_BT), kernel_VD, most_logits)
    return total, jnp.sum(weights_BT)


def divergence_of_rows(
    h_BTD: Array,
    kernel_VD: Array,
    teacher_BTD: Array,
    teacher_kernel_VD: Array,
    weights_BT: Array,
    *,
    most_logits: int = MOST_LOGITS,
) -> tuple[Array, Array]:
    """KL(softmax(teacher · teacher_kernelᵀ) ‖ softmax(h · kernelᵀ)) at each position, as (weighted
    sum, sum of weights). float32. The teacher's side is a constant.

    most_logits: as of `cross_entropy_of_rows`, of both sides together.
    """

    def summed(h_BQD: Array, teacher_BQD: Array, weights_BQ: Array) -> Array:
        log_s_BQV, log_t_BQV = (
            jax.nn.log_softmax(
                jnp.einsum("bqd,vd->bqv", x_BQD, k_VD, preferred_element_type=jnp.float32)
            )
            for x_BQD, k_VD in (
                (h_BQD, kernel_VD),
                jax.lax.stop_gradient((teacher_BQD, teacher_kernel_VD)),
            )
        )
        kl_BQ = jnp.sum(jnp.exp(log_t_BQV) * (log_t_BQV - log_s_BQV), axis=-1)
        return jnp.sum(kl_BQ * weights_BQ)

    weights_BT = weights_BT.astype(jnp.float32)
    arrays = (h_BTD, teacher_BTD, weights_BT)
    total = _over_positions(summed, arrays, kernel_VD, most_logits / 2)
    return total, jnp.sum(weights_BT)


def _over_positions(
    summed: Callable[..., Array],
    arrays: Sequence[Array],
    kernel_VD: Array,
    most_logits: float,
) -> Array:
    """The sum of `summed` of pieces of the arrays, [B, T, …]: all rows, and so many positions that
    logits of theirs are no more than `most_logits` on a device. 0 must come of zeros."""
    B, T = arrays[0].shape[:2]
    V = kernel_VD.shape[0]
    size = positions_at_once(B, T, V, most_logits)
    num = -(-T // size)
    if num == 1:
        return summed(*arrays)
    pieces = [
        jnp.pad(x, ((0, 0), (0, num * size - T)) + ((0, 0),) * (x.ndim - 2))
        .reshape(B, num, size, *x.shape[2:])
        .swapaxes(0, 1)
        for x in arrays
    ]

    def step(total: Array, piece: list[Array]) -> tuple[Array, None]:
        return total + jax.checkpoint(summed)(*piece), None

    return jax.lax.scan(step, jnp.zeros((), jnp.float32), pieces)[0]


def positions_at_once(B: int, T: int, V: int, most_logits: float = MOST_LOGITS) -> int:
    """Positions of all rows whose logits `cross_entropy_of_rows` computes together."""
    return min(T, max(1, int(most_logits / logits_of_position(B, V))))


def logits_of_position(B: int, V: int) -> float:
    """Those that a device has of one position of all rows."""
    return B * V / layout.ways(B, "rows") / layout.ways(V, "vocab")


def sampled_vocabulary(is_label_V: np.ndarray, num_sampled: int, key: Array) -> tuple[Array, Array]:
    """A small vocabulary that stands for the whole one in a softmax.

    is_label_V: bool, host data: the pieces that occur as labels; all of them are kept. Of the rest
    `num_sampled` are drawn with replacement, and each counts for rest ÷ num_sampled pieces, which
    makes the sum of exponentials an unbiased estimate (importance sampling). Where that would be
    no fewer than there are, each is taken once, and the softmax is the whole vocabulary's; with
    num_sampled=0 none is.

    Returns candidates_C, piece ids, labels first and in ascending order (`label_places` finds
    them), and bias_C, float32, to add to the logits. C = number of labels + negatives taken.
    """
    kept, rest = np.flatnonzero(is_label_V), np.flatnonzero(~is_label_V)
    num_sampled = min(num_sampled, rest.size)
    bias_C = np.zeros(kept.size + num_sampled, np.float32)
    if num_sampled == 0 or num_sampled == rest.size:
        return jnp.asarray(np.append(kept, rest[:num_sampled])), jnp.asarray(bias_C)
    bias_C[kept.size :] = np.log(rest.size / num_sampled)
    sampled = jnp.asarray(rest)[jax.random.randint(key, (num_sampled,), 0, rest.size)]
    return jnp.concatenate([jnp.asarray(kept), sampled]), jnp.asarray(bias_C)


def label_places(is_label_V: np.ndarray) -> Array:
    """Piece id → its place among the candidates of `sampled_vocabulary`. int32 [V].

    Pieces that are no labels get a place without meaning.
    """
    return jnp.asarray(np.cumsum(is_label_V) - 1, jnp.int32)
