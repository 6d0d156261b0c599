"""What each stage minimises. Every loss is a (sum, count): they are divided once, at the very end.

B rows, N texts packed in a row, M = B · N, S positions of the student, T of the teacher, D width,
C classes.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

Terms = dict[str, tuple[Array, Array]]  # name → (sum, count); "loss" is what is differentiated


def likeness(
    student_BND: Array,
    teacher_BND: Array,
    valid_BN: Array,
    weights: Mapping[str, float],
    temperature: float,
    others: Mapping[str, tuple[Array, Array]] = {},
) -> Terms:
    """How far a student's vectors are from its teacher's (MT-LLM stages 1 and 2b).

    loss: the sum of the terms of a weight above 0, each times its weight; all count the texts, so
    that what is divided in the end is the weighted mean. Those terms stand beside it by their names
    where they are several. fvu: always. others: terms made elsewhere, by names in `weights`.
    temperature: of the contrastive term.
    """
    made = {
        "mse": lambda: mse(student_BND, teacher_BND, valid_BN),
        "cosine": lambda: cosine(student_BND, teacher_BND, valid_BN),
        "contrastive": lambda: contrastive(student_BND, teacher_BND, valid_BN, temperature),
    } | {name: lambda term=term: term for name, term in others.items()}
    terms = {name: made[name]() for name, weight in weights.items() if weight}
    total = sum((weights[name] * term for name, (term, _) in terms.items()), jnp.zeros(()))
    count = jnp.sum(valid_BN.astype(jnp.float32))
    result = {"loss": (total, count), "fvu": fvu(student_BND, teacher_BND, valid_BN)}
    return result | (terms if len(terms) > 1 else {})


def mse(student_BND: Array, teacher_BND: Array, valid_BN: Array) -> tuple[Array, Array]:
    """Mean squared error over D, summed over texts."""
    valid_BN1 = valid_BN.astype(jnp.float32)[:, :, None]
    error = jnp.sum(jnp.square(student_BND - teacher_BND) * valid_BN1)
    return error / student_BND.shape[-1], jnp.sum(valid_BN1)


def fvu(student_BND: Array, teacher_BND: Array, valid_BN: Array) -> tuple[Array, Array]:
    """Fraction of variance unexplained: (Σ|s − t|², Σ|t − mean t|²), the mean being the batch's."""
    valid_BN1 = valid_BN.astype(jnp.float32)[:, :, None]
    error = jnp.sum(jnp.square(student_BND - teacher_BND) * valid_BN1)
    mean_D = jnp.sum(teacher_BND * valid_BN1, axis=(0, 1)) / jnp.maximum(jnp.sum(valid_BN1), 1)
    variance = jnp.sum(jnp.square(teacher_BND - mean_D[None, None]) * valid_BN1)
    return error, variance


def cosine(student_BND: Array, teacher_BND: Array, valid_BN: Array) -> tuple[Array, Array]:
    """1 − cos(s, t), summed over texts."""
    valid_BN = valid_BN.astype(jnp.float32)
    cosine_BN = jnp.sum(_unit(student_BND) * _unit(teacher_BND), axis=-1)
    return jnp.sum((1 - cosine_BN) * valid_BN), jnp.sum(valid_BN)


def contrastive(
    student_BND: Array, teacher_BND: Array, valid_BN: Array, temperature: float
) -> tuple[Array, Array]:
    """InfoNCE (arXiv 1807.03748), student → teacher: −log softmax_j(cos(s_i, t_j) / τ)[i], summed
    over texts i.

    j runs over all texts of the batch, over all devices and whatever rows they are packed in. Under
    accumulation it is a micro-batch's: with other negatives, the only term for which several
    micro-batches are not the same as their whole.
    """
    student_MD, teacher_MD = (_unit(x).reshape(-1, x.shape[-1]) for x in (student_BND, teacher_BND))
    valid_M = valid_BN.reshape(-1).astype(bool)
    # Rounded as accelerators round products, cosines / τ would be as far off as they are apart.
    exact = jax.lax.Precision.HIGHEST
    scores_MM = jnp.einsum("md,nd->mn", student_MD, teacher_MD, precision=exact) / temperature
    scores_MM = jnp.where(valid_M[None], scores_MM, jnp.finfo(jnp.float32).min)
    loss_M = -jnp.diagonal(jax.nn.log_softmax(scores_MM, axis=1))
    return jnp.sum(jnp.where(valid_M, loss_M, 0.0)), jnp.sum(valid_M.astype(jnp.float32))


def per_token(
    student_BSD: Array,
    teacher_BTD: Array,
    aligned_BS: Array,
    source_segments_BS: Array,
    target_segments_BT: Array,
    valid_BN: Array,
) -> tuple[Array, Array]:
    """Mean squared error over D of the states of aligned tokens, their mean in each text, summed
    over texts; one without any counts as 0.

    aligned_BS: at each source position the number, from 1, of the token of its text's target that
    it is compared with, or 0.
    """
    N = valid_BN.shape[1]
    is_aligned_BS, place_BS = aligned_places(aligned_BS, source_segments_BS, target_segments_BT, N)
    wanted_BSD = jnp.take_along_axis(teacher_BTD, place_BS[:, :, None], axis=1)
    difference_BSD = student_BSD.astype(jnp.float32) - wanted_BSD.astype(jnp.float32)
    error_BS = jnp.mean(jnp.square(difference_BSD), axis=-1)
    texts_N = jnp.arange(1, N + 1)[None, :, None]
    member_BNS = (source_segments_BS[:, None] == texts_N) & is_aligned_BS[:, None]
    sums_BN = jnp.einsum("bns,bs->bn", member_BNS.astype(jnp.float32), error_BS)
    error_BN = sums_BN / jnp.maximum(jnp.sum(member_BNS, axis=2), 1)
    valid_BN = valid_BN.astype(jnp.float32)
    return jnp.sum(error_BN * valid_BN), jnp.sum(valid_BN)


def aligned_places(
    aligned_BS: Array, source_segments_BS: Array, target_segments_BT: Array, num_texts: int
) -> tuple[Array, Array]:
    """Which source positions have an aligned token, bool [B, S], and its place among the row's
    target positions, int32 [B, S]; 0 without one. aligned_BS: as in `per_token`."""
    texts_N = jnp.arange(1, num_texts + 1)[None, :, None]
    start_BN = jnp.argmax(target_segments_BT[:, None] == texts_N, axis=2)
    start_BS = jnp.take_along_axis(start_BN, jnp.maximum(source_segments_BS - 1, 0), axis=1)
    is_aligned_BS = (aligned_BS > 0) & (source_segments_BS > 0)
    return is_aligned_BS, jnp.where(is_aligned_BS, start_BS + aligned_BS - 1, 0)


def logits_kl(
    student_BNC: Array,
    teacher_BNC: Array,
    valid_BN: Array,
    temperature: float,
    *,
    across: bool = False,
) -> tuple[Array, Array]:
    """τ² · KL(softmax(t / τ) ‖ softmax(s / τ)) of a head's logits (arXiv 1503.02531), over texts.

    across: N are the choices of a row, of one logit each, and the softmax is over them; each choice
    then counts with the divergence of its row, as other terms count choices too.
    """
    student_BNC, teacher_BNC = (
        jnp.swapaxes(x, 1, 2) if across else x for x in (student_BNC, teacher_BNC)
    )
    log_s_BNC = jax.nn.log_softmax(student_BNC.astype(jnp.float32) / temperature)
    log_t_BNC = jax.nn.log_softmax(teacher_BNC.astype(jnp.float32) / temperature)
    kl_BN = temperature**2 * jnp.sum(jnp.exp(log_t_BNC) * (log_t_BNC - log_s_BNC), axis=-1)
    valid_BN = valid_BN.astype(jnp.float32)
    kl_BN = jnp.broadcast_to(kl_BN, valid_BN.shape)
    return jnp.sum(kl_BN * valid_BN), jnp.sum(valid_BN)


def _unit(x_BND: Array) -> Array:
    """Of length 1, but a vector of zeros, whose gradient is finite so."""
    square_BN1 = jnp.sum(jnp.square(x_BND), axis=-1, keepdims=True)
    return x_BND * jax.lax.rsqrt(jnp.maximum(square_BN1, 1e-12))


def classification(logits_BNC: Array, labels_BN: Array, valid_BN: Array) -> Terms:
    """Cross-entropy of class labels, and accuracy."""
    valid_BN = valid_BN.astype(jnp.float32)
    log_p_BNC = jax.nn.log_softmax(logits_BNC.astype(jnp.float32))
    picked_BN = jnp.take_along_axis(log_p_BNC, labels_BN[:, :, None], axis=2)[:, :, 0]
    right_BN = jnp.argmax(logits_BNC, axis=2) == labels_BN
    count = jnp.sum(valid_BN)
    return {
        "loss": (-jnp.sum(picked_BN * valid_BN), count),
        "accuracy": (jnp.sum(right_BN * valid_BN), count),
    }


def next_tokens(ids_BT: Array, segments_BT: Array) -> tuple[Array, Array]:
    """Labels of causal language modelling and where they hold: the next token of the same text."""
    next_ids = jnp.pad(ids_BT[:, 1:], ((0, 0), (0, 1)))
    next_segments = jnp.pad(segments_BT[:, 1:], ((0, 0), (0, 1)))
    return next_ids, (segments_BT > 0) & (next_segments == segments_BT)
