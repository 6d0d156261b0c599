"""What each stage minimises. Every loss is a (sum, count): they are divided once, at the very end.

B rows, N texts packed in a row, D width, C classes.
"""

import jax
import jax.numpy as jnp
from jax import Array

Terms = dict[str, tuple[Array, Array]]  # name → (sum, count); "loss" is what is differentiated


def pooled_mse(student_BND: Array, teacher_BND: Array, valid_BN: Array) -> Terms:
    """Mean squared error of pooled states (MT-LLM stages 1 and 2b) and the part left unexplained.

    loss: mean over D, summed over texts. fvu: fraction of variance unexplained, Σ|s − t|² over
    Σ|t − mean t|², the mean being the batch's.
    """
    valid_BN1 = valid_BN.astype(jnp.float32)[:, :, None]
    count = jnp.sum(valid_BN1)
    error = jnp.sum(jnp.square(student_BND - teacher_BND) * valid_BN1)
    mean_D = jnp.sum(teacher_BND * valid_BN1, axis=(0, 1)) / jnp.maximum(count, 1)
    variance = jnp.sum(jnp.square(teacher_BND - mean_D[None, None]) * valid_BN1)
    return {"loss": (error / student_BND.shape[-1], count), "fvu": (error, variance)}


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
