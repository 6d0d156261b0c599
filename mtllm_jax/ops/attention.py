"""Attention over packed rows.

B rows, T query positions, S key positions, N query heads, K key/value heads, G = N / K, H head
width.

| backend | where | segments | causal | window | dense mask |
|---------|-------|----------|--------|--------|------------|
| xla     | any   | yes      | yes    | yes    | [B, T, S] booleans, fused by XLA |
"""

import jax
import jax.numpy as jnp
from jax import Array

_MASKED = -1e30  # finite: a row of padding alone then gets a uniform, unused average, not NaN


def attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    *,
    query_segments_BT: Array,
    key_segments_BS: Array,
    causal: bool = False,
    window: int | None = None,
) -> Array:
    """Softmax attention among the positions of one packed text. Returns [B, T, N, H].

    Segments are int32, 0 = padding; a query sees the keys of its own segment alone. causal: only
    keys at or before its own place in the row; window: only the last `window` of those (Mistral's
    sliding window), ValueError without causal. Scores are scaled by H^-1/2 and normalised in
    float32. What a query without a key to see reads is finite, and has no meaning.
    """
    if window is not None and not causal:
        raise ValueError(f"window is {window}, which only causal attention has.")
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    seen_BTS = query_segments_BT[:, :, None] == key_segments_BS[:, None, :]
    seen_BTS &= key_segments_BS[:, None, :] > 0
    if causal:
        distance_TS = jnp.arange(T)[:, None] - jnp.arange(k_BSKH.shape[1])[None, :]
        near_TS = distance_TS >= 0
        if window is not None:
            near_TS &= distance_TS < window
        seen_BTS &= near_TS[None]
    # Heads in front and a key head's queries in one dim: plain batched matrix products.
    S = k_BSKH.shape[1]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H) * jnp.asarray(H**-0.5, q_BTNH.dtype)
    q_BKQH = q_BTKGH.transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    k_BKHS, v_BKSH = k_BSKH.transpose(0, 2, 3, 1), v_BSKH.transpose(0, 2, 1, 3)
    scores_BKQS = jnp.matmul(q_BKQH, k_BKHS, preferred_element_type=jnp.float32)
    scores = scores_BKQS.reshape(B, K, -1, T, S)
    scores = jnp.where(seen_BTS[:, None, None], scores, _MASKED)
    weights_BKQS = jax.nn.softmax(scores, axis=-1).astype(v_BSKH.dtype).reshape(B, K, -1, S)
    mixed = jnp.matmul(weights_BKQS, v_BKSH).reshape(B, K, N // K, T, H)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
