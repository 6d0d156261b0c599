"""Attention over packed rows against a loop over queries in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtllm_jax.ops.attention import attention

# Packed texts; padding at the end, at the front and in the middle; a row of padding alone.
SEGMENTS = np.array(
    [
        [1, 1, 1, 2, 2, 3, 0, 0],
        [0, 1, 1, 0, 2, 2, 2, 2],
        [1, 1, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 0, 0, 0],
    ],
    np.int32,
)
B, T = SEGMENTS.shape


def inputs(num_heads, num_kv_heads, head_width=4, keys=T, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(B, T, num_heads), (B, keys, num_kv_heads), (B, keys, num_kv_heads)]
    return [rng.normal(size=(*shape, head_width)).astype(np.float32) for shape in shapes]


def by_hand(q, k, v, query_segments, key_segments, causal, window):
    """One query and one head at a time, in float64; NaN where a query sees nothing."""
    out = np.full(q.shape, np.nan)
    group = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        seen = [
            s
            for s in range(k.shape[1])
            if key_segments[b, s] == query_segments[b, t] > 0
            and (not causal or (s <= t and (window is None or t - s < window)))
        ]
        if not seen:
            continue
        keys, values = (x[b, seen, n // group].astype(np.float64) for x in (k, v))
        scores = keys @ q[b, t, n] / np.sqrt(q.shape[3])
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ values
    return out


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (4, 2), (6, 1)])
@pytest.mark.parametrize(
    ("causal", "window"), [(False, None), (True, None), (True, 1), (True, 3), (True, 100)]
)
def test_values(num_heads, num_kv_heads, causal, window):
    q, k, v = inputs(num_heads, num_kv_heads)
    got = attention(
        q,
        k,
        v,
        query_segments_BT=SEGMENTS,
        key_segments_BS=SEGMENTS,
        causal=causal,
        window=window,
    )
    wanted = by_hand(q, k, v, SEGMENTS, SEGMENTS, causal, window)
    assert np.all(np.isfinite(got)) and got.dtype == jnp.float32
    sees = SEGMENTS > 0
    np.testing.assert_allclose(np.asarray(got)[sees], wanted[sees], rtol=1e-5, atol=1e-6)


def test_keys_of_another_length():
    """The decoder reads the encoder: segment n of the one sees segment n of the other."""
    key_segments = np.array([[1, 2, 2, 2, 3], [1, 1, 0, 2, 2], [1] * 5, [0] * 5], np.int32)
    q, k, v = inputs(2, 2, keys=5)
    got = attention(q, k, v, query_segments_BT=SEGMENTS, key_segments_BS=key_segments)
    wanted = by_hand(q, k, v, SEGMENTS, key_segments, False, None)
    sees = SEGMENTS > 0
    np.testing.assert_allclose(np.asarray(got)[sees], wanted[sees], rtol=1e-5, atol=1e-6)


def test_no_gradient_flows_across_texts_and_none_is_nan():
    q, k, v = inputs(4, 2)
    own_BT = (SEGMENTS == 2).astype(np.float32)

    def output_of_second_texts(q, k, v):
        out = attention(q, k, v, query_segments_BT=SEGMENTS, key_segments_BS=SEGMENTS)
        return jnp.sum(jnp.sin(out) * own_BT[:, :, None, None])

    grads = jax.jit(jax.grad(output_of_second_texts, argnums=(0, 1, 2)))(q, k, v)
    for grad in map(np.asarray, grads):
        assert np.all(np.isfinite(grad))
        assert np.any(grad[SEGMENTS == 2]) and not np.any(grad[SEGMENTS != 2])


@pytest.mark.parametrize("causal", [False, True])
def test_rows_of_padding_alone_have_finite_gradients(causal):
    """Even where a loss reads them, and where scores are huge."""
    q, k, v = (1e4 * x for x in inputs(2, 1))

    def everything(q, k, v):
        out = attention(
            q, k, v, query_segments_BT=SEGMENTS, key_segments_BS=SEGMENTS, causal=causal
        )
        return jnp.sum(jnp.square(out))

    value, grads = jax.jit(jax.value_and_grad(everything, argnums=(0, 1, 2)))(q, k, v)
    assert all(np.all(np.isfinite(x)) for x in (value, *grads))


def test_bfloat16_comes_out_as_it_went_in():
    q, k, v = inputs(2, 2)
    got = attention(
        *(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)),
        query_segments_BT=SEGMENTS,
        key_segments_BS=SEGMENTS,
    )
    assert got.dtype == jnp.bfloat16
    wanted = by_hand(q, k, v, SEGMENTS, SEGMENTS, False, None)
    sees = SEGMENTS > 0
    got = np.asarray(got.astype(jnp.float32))
    np.testing.assert_allclose(got[sees], wanted[sees], atol=0.04)


def test_a_window_without_causal_is_refused():
    q, k, v = inputs(2, 2)
    with pytest.raises(ValueError, match="window is 3, which only causal attention has"):
        attention(q, k, v, query_segments_BT=SEGMENTS, key_segments_BS=SEGMENTS, window=3)
