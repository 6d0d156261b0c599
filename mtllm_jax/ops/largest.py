"""The largest of many numbers, as over vocabularies: XLA's own are slow there on CPUs.

B rows, K hypotheses of a row, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jax import Array

_CHUNK = 128


def top_k(x_BKV: Array, count: int) -> tuple[Array, Array]:
    """`lax.top_k`, which is slow over large vocabularies: the `count` largest lie in the `count`
    chunks whose maxima are largest, and maxima are fast."""
    B, K, V = x_BKV.shape
    if V < 2 * count * _CHUNK:
        return jax.lax.top_k(x_BKV, count)
    padded_BKV = jnp.pad(x_BKV, ((0, 0), (0, 0), (0, -V % _CHUNK)), constant_values=-jnp.inf)
    chunks_BKMC = padded_BKV.reshape(B, K, -1, _CHUNK)
    chunk_BKc = jax.lax.top_k(jnp.max(chunks_BKMC, axis=-1), count)[1]
    chosen_BKcC = jnp.take_along_axis(chunks_BKMC, chunk_BKc[..., None], axis=2)
    x_BKc, place_BKc = jax.lax.top_k(chosen_BKcC.reshape(B, K, -1), count)
    chunk_BKc = jnp.take_along_axis(chunk_BKc, place_BKc // _CHUNK, axis=2)
    return x_BKc, chunk_BKc * _CHUNK + place_BKc % _CHUNK


def argmax(logits_BV: Array) -> Array:
    """The first index of each row's maximum, by two plain maxima: XLA's argmax is slow on CPUs."""
    best_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    index_V = jnp.arange(logits_BV.shape[-1], dtype=jnp.float32)[None]  # exact below 2^24
    return -jnp.max(jnp.where(logits_BV == best_B1, -index_V, -jnp.inf), axis=-1).astype(jnp.int32)
