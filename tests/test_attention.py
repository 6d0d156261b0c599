"""Attention over packed rows against a loop over queries in numpy, whatever computes it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from mtllm_jax import sharding
from mtllm_jax.config import Mesh
from mtllm_jax.models import layers, llama
from mtllm_jax.models.bert import Bert, BertConfig
from mtllm_jax.models.llama import LlamaConfig
from mtllm_jax.models.nllb import NLLBConfig
from mtllm_jax.models.stack import llm_pooled
from mtllm_jax.ops import attention as module
from mtllm_jax.ops.attention import BACKENDS, attention, check_attention, choose_backend
from mtllm_jax.plan.abstract import abstract_mesh
from mtllm_jax.recipes import stacking

QUICK = {"xla_backend_optimization_level": 0}
GPU = jax.default_backend() == "gpu"

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


# ---------------------------------------------------------------- every backend that runs here


def splash(q, k, v, *, query_segments_BT, key_segments_BS, causal=False, window=None):
    """The TPU's kernel, interpreted."""
    return module.splash_attention(
        q, k, v, query_segments_BT, key_segments_BS, causal=causal, window=window, interpret=True
    )


RUNS = {"xla": functools.partial(attention, backend="xla"), "splash": splash}


def laid_out(lengths, width, first=0):
    """Segments of a row with texts of these lengths side by side, from `first` on."""
    segments = np.zeros(width, np.int32)
    numbers = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    segments[first : first + len(numbers)] = numbers
    return segments


@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 130)])
@pytest.mark.parametrize("backend", RUNS)
def test_values_and_slopes_of_longer_rows(backend, causal, window):
    """Of several blocks of splash's, texts across their borders, a length that is no multiple.

    The gradient is compared along a random direction, with what the loop's outputs do along it.
    """
    width = 300
    segments = np.stack([laid_out([20, 260, 11], width), laid_out([290], width, first=3)])
    rng = np.random.default_rng(3)
    q, k, v = (rng.normal(size=(2, width, n, 8)).astype(np.float32) for n in (2, 1, 1))
    weights = rng.normal(size=q.shape) * (segments > 0)[:, :, None, None]

    def value(*qkv):
        out = RUNS[backend](
            *qkv, query_segments_BT=segments, key_segments_BS=segments, causal=causal, window=window
        )
        return jnp.sum(out * weights.astype(np.float32)), out

    run = jax.jit(jax.grad(value, argnums=(0, 1, 2), has_aux=True), compiler_options=QUICK)
    grads, out = run(q, k, v)
    reference = functools.partial(dense, segments, segments, causal, window)
    sees = segments > 0
    np.testing.assert_allclose(
        np.asarray(out)[sees], reference(q, k, v)[sees], rtol=1e-4, atol=1e-5
    )
    for at in range(3):
        direction = rng.normal(size=(q, k, v)[at].shape)
        ahead, behind = (
            [x + sign * 1e-4 * direction if i == at else x for i, x in enumerate((q, k, v))]
            for sign in (1, -1)
        )
        change = (reference(*ahead) - reference(*behind)) / 2e-4
        slope = np.sum(np.nan_to_num(change) * weights)
        got = np.sum(np.asarray(grads[at], np.float64) * direction)
        assert np.isclose(got, slope, rtol=1e-4, atol=1e-3 * np.linalg.norm(grads[at]))


def dense(query_segments, key_segments, causal, window, q, k, v):
    """All of a row at once, in float64; NaN where a query sees nothing. Held against the loop."""
    distance = np.arange(q.shape[1])[:, None] - np.arange(k.shape[1])[None]
    seen = query_segments[:, :, None] == key_segments[:, None]
    seen &= (key_segments > 0)[:, None]
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= distance < window
    group = q.shape[2] // k.shape[2]
    k, v = (np.repeat(np.asarray(x, np.float64), group, axis=2) for x in (k, v))
    scores = np.einsum("btnh,bsnh->bnts", np.asarray(q, np.float64), k) / np.sqrt(q.shape[3])
    scores = np.where(seen[:, None], scores, -np.inf)
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("bnts,bsnh->btnh", weights, v)


@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, 3)])
def test_the_whole_row_at_once_is_the_loop(causal, window):
    q, k, v = inputs(4, 2)
    wanted = by_hand(q, k, v, SEGMENTS, SEGMENTS, causal, window)
    np.testing.assert_allclose(dense(SEGMENTS, SEGMENTS, causal, window, q, k, v), wanted, 1e-12)


@pytest.mark.parametrize("backend", RUNS)
def test_keys_of_another_length_than_queries(backend):
    """Cross-attention, where blocks of queries and of keys are of different numbers."""
    rng = np.random.default_rng(4)
    query_segments = laid_out([5, 140], 150)[None]
    key_segments = laid_out([3, 30], 40)[None]
    q, k, v = (rng.normal(size=(1, t, 2, 8)).astype(np.float32) for t in (150, 40, 40))
    run = jax.jit(RUNS[backend], compiler_options=QUICK)
    got = run(q, k, v, query_segments_BT=query_segments, key_segments_BS=key_segments)
    wanted = dense(query_segments, key_segments, False, None, q, k, v)
    sees = query_segments > 0
    assert np.all(np.isfinite(got))
    np.testing.assert_allclose(np.asarray(got)[sees], wanted[sees], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", RUNS)
def test_padded_is_unpadded_is_packed(backend, causal):
    """Each text alone in a short row, alone in a long one, there with padding in front, and packed
    with the others: the same states, and the same gradients by their own sums."""
    lengths = (4, 9, 3)
    rng = np.random.default_rng(6)
    texts = [[rng.normal(size=(n, 2, 8)).astype(np.float32) for _ in "qkv"] for n in lengths]

    def rows(width, places):
        """[(row, first)] of each text → arrays and segments."""
        num_rows = 1 + max(row for row, _ in places)
        arrays = [np.zeros((num_rows, width, 2, 8), np.float32) for _ in "qkv"]
        segments = np.zeros((num_rows, width), np.int32)
        for number, (text, (row, first)) in enumerate(zip(texts, places, strict=True), 1):
            for array, part in zip(arrays, text, strict=True):
                array[row, first : first + len(part)] = part
            segments[row, first : first + len(text[0])] = number
        return arrays, segments

    def loss(q, k, v, segments):
        out = RUNS[backend](
            q, k, v, query_segments_BT=segments, key_segments_BS=segments, causal=causal
        )
        return jnp.sum(jnp.sin(out) * (segments > 0)[:, :, None, None]), out

    run = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True), compiler_options=QUICK)
    found = []
    for width, places in (
        (9, [(0, 0), (1, 0), (2, 0)]),
        (20, [(0, 0), (1, 0), (2, 0)]),
        (20, [(0, 16), (1, 11), (2, 5)]),
        (20, [(0, 1), (0, 5), (0, 16)]),
    ):
        arrays, segments = rows(width, places)
        grads, out = run(*arrays, segments)
        found.append(
            [
                np.asarray(x)[row, first : first + n]
                for x in (out, *grads)
                for n, (row, first) in zip(lengths, places, strict=True)
            ]
        )
    for other in found[1:]:
        for x, y in zip(other, found[0], strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- many scores, many devices


@pytest.mark.slow
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 3)])
@pytest.mark.parametrize("most", [1, 200, 600])
def test_some_queries_at_a_time(causal, window, most, monkeypatch):
    """1, 1 and 4 of eight queries; of 7 there the last piece is not full."""
    q, k, v = inputs(4, 2)
    q, query_segments = q[:, :7], SEGMENTS[:, :7]

    def value(q, k, v):
        out = attention(
            q,
            k,
            v,
            query_segments_BT=query_segments,
            key_segments_BS=SEGMENTS,
            causal=causal,
            window=window,
        )
        return jnp.sum(jnp.sin(out)), out

    run = jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True)
    wanted = run(q, k, v)
    monkeypatch.setattr(module, "MOST_SCORES", most)
    scores = re.compile(r"f32\[4,2,2,(\d+),8\]")  # [B, K, G, queries at a time, S]
    assert {*scores.findall(str(jax.make_jaxpr(value)(q, k, v)))} == {"4" if most == 600 else "1"}
    got = run(q, k, v)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), got, wanted)


@pytest.mark.slow
@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs the eight simulated devices")
@pytest.mark.parametrize("most", [2**28, 32])
@pytest.mark.parametrize("config", [Mesh(2, 1, 2, 2), Mesh(1, 1, 2, 4), Mesh(1, 4, 1, 2)], ids=str)
def test_over_a_mesh(config, most, monkeypatch):
    """Queries cut over context know their places in the row, for causal windows too."""
    monkeypatch.setattr(module, "MOST_SCORES", most)
    q, k, v = inputs(4, 2)
    mesh = sharding.make_mesh(config)

    def value(q, k, v):
        out = attention(
            q, k, v, query_segments_BT=SEGMENTS, key_segments_BS=SEGMENTS, causal=True, window=3
        )
        return jnp.sum(jnp.sin(out)), out

    run = jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True)
    everywhere = jax.NamedSharding(mesh, jax.P())
    got = jax.jit(sharding.on(mesh, run))(*(jax.device_put(x, everywhere) for x in (q, k, v)))
    wanted = run(q, k, v)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), got, wanted)


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs the eight simulated devices")
@pytest.mark.parametrize("causal", [False, True])
def test_splash_over_a_mesh(causal):
    """Rows, heads and queries on two devices each; the length is no multiple of anything."""
    rng = np.random.default_rng(7)
    segments = np.stack([laid_out([100, 90, 50], 250)] * 2)
    q, k, v = (rng.normal(size=(2, 250, n, 8)).astype(np.float32) for n in (4, 2, 2))

    def value(q, k, v):
        out = splash(q, k, v, query_segments_BT=segments, key_segments_BS=segments, causal=causal)
        return jnp.sum(jnp.sin(out) * (segments > 0)[:, :, None, None]), out

    mesh = sharding.make_mesh(Mesh(1, 2, 2, 2))
    run = jax.grad(value, argnums=(0, 1, 2), has_aux=True)
    everywhere = jax.NamedSharding(mesh, jax.P())
    grads, out = jax.jit(sharding.on(mesh, run), compiler_options=QUICK)(
        *(jax.device_put(x, everywhere) for x in (q, k, v))
    )
    sees = segments > 0
    wanted = dense(segments, segments, causal, None, q, k, v)
    np.testing.assert_allclose(np.asarray(out)[sees], wanted[sees], rtol=1e-4, atol=1e-5)
    one = jax.jit(run, compiler_options=QUICK)(q, k, v)[0]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), grads, one)


# ---------------------------------------------------------------- cudnn


@pytest.fixture
def without_cudnn(monkeypatch):
    """JAX's own attention in the place of cuDNN's, which only a GPU has; lengths are the same."""
    real = jax.nn.dot_product_attention

    def stand_in(*args, implementation, **options):
        assert implementation == "cudnn"
        return real(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)


ONE_TEXT = np.array([[1, 1, 1, 1, 1, 0, 0, 0], [1] * 8, [0] * 8, [1] + [0] * 7], np.int32)


@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 1), (True, 3)])
def test_cudnn_is_told_lengths_and_windows(causal, window, without_cudnn):
    q, k, v = inputs(4, 2)
    run = functools.partial(module._cudnn_attention, causal=causal, window=window)
    got = np.asarray(run(q, k, v, ONE_TEXT, ONE_TEXT))
    sees = ONE_TEXT > 0
    wanted = by_hand(q, k, v, ONE_TEXT, ONE_TEXT, causal, window)
    np.testing.assert_allclose(got[sees], wanted[sees], rtol=1e-5, atol=1e-6)
    assert not np.any(got[~sees])


def test_a_row_that_cudnn_cannot_read_is_nan(without_cudnn):
    """Several texts, or padding before or inside one: never another text's states."""
    q, k, v = inputs(2, 2)
    bad = SEGMENTS.copy()
    bad[2] = 1
    bad[3, 2:5] = 1
    got = module._cudnn_attention(q, k, v, bad, bad, causal=False, window=None)
    np.testing.assert_array_equal(np.isnan(got).all(axis=(1, 2, 3)), [True, True, False, True])
    assert not np.isnan(got[2]).any()


@pytest.mark.skipif(not GPU, reason="needs a GPU and cuDNN")
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 16)])
def test_cudnn_itself(causal, window):
    rng = np.random.default_rng(8)
    segments = np.stack([laid_out([n], 128) for n in (128, 100, 7, 0)])
    q, k, v = (jnp.asarray(rng.normal(size=(4, 128, n, 64)), jnp.bfloat16) for n in (4, 2, 2))

    def value(backend, q, k, v):
        out = attention(
            q,
            k,
            v,
            query_segments_BT=segments,
            key_segments_BS=segments,
            causal=causal,
            window=window,
            backend=backend,
        )
        masked = out.astype(jnp.float32) * (segments > 0)[:, :, None, None]
        return jnp.sum(jnp.sin(masked)), masked

    got, wanted = (
        jax.jit(jax.grad(functools.partial(value, name), argnums=(0, 1, 2), has_aux=True))(q, k, v)
        for name in ("cudnn", "xla")
    )
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        x, y = (np.asarray(z, np.float32) for z in (x, y))
        np.testing.assert_allclose(x, y, atol=0.03 * max(1, np.abs(y).max()))


# ---------------------------------------------------------------- dropout


@pytest.mark.parametrize("most", [module.MOST_SCORES, 30 * B * 2 * T * 3])
def test_weights_are_dropped_out(most, monkeypatch):
    """All queries at once, or some at a time. Values that are one-hot show the weights."""
    monkeypatch.setattr(module, "MOST_SCORES", most)
    q, k, _ = (np.tile(x, (30, 1, 1, 1)) for x in inputs(2, 1, head_width=T))
    v = np.broadcast_to(np.eye(T, dtype=np.float32)[None, :, None], k.shape)
    segments = np.tile(SEGMENTS, (30, 1))
    options = {"query_segments_BT": segments, "key_segments_BS": segments, "dropout": 0.4}

    def read(key):
        return np.asarray(jax.jit(lambda: attention(q, k, v, **options, dropout_key=key))())

    whole, drawn = read(None), read(jax.random.key(0))
    np.testing.assert_allclose(whole.sum(-1)[segments > 0], 1, rtol=1e-5)
    is_weight = whole > 1e-20
    is_left = is_weight & (drawn > 0)
    np.testing.assert_allclose(drawn[is_left], whole[is_left] / 0.6, rtol=1e-5)
    # Five standard errors of a share of some 6000.
    assert abs(is_left.sum() / is_weight.sum() - 0.6) < 5 * (0.6 * 0.4 / is_weight.sum()) ** 0.5
    full = is_left[2::B]  # the row that is one text: no query's are another's
    assert len(np.unique(full.reshape(-1, T), axis=0)) > 100


# ---------------------------------------------------------------- what a backend can do


@pytest.mark.parametrize("packed", [True, False])
def test_auto_asks_whether_rows_are_packed(packed, monkeypatch):
    """As traced for a GPU: its own kernel reads one text a row."""
    found = []
    for name in ("cudnn", "xla"):

        def stand_in(q_BTNH, *others, name=name, **options):
            found.append(name)
            return q_BTNH

        monkeypatch.setattr(module, f"_{name}_attention", stand_in)
    mesh = abstract_mesh(Mesh(1, 1, 1), 1, "gpu")
    head = jax.ShapeDtypeStruct((2, 128, 4, 64), jnp.bfloat16)
    segments = np.ones((2, 128), np.int32)
    options = {"query_segments_BT": segments, "key_segments_BS": segments, "packed": packed}
    with jax.sharding.use_abstract_mesh(mesh):
        jax.eval_shape(functools.partial(attention, **options), head, head, head)
    assert found == ["xla" if packed else "cudnn"]


@pytest.mark.parametrize("num_texts", [1, 2])
def test_every_model_of_the_stack_says_whether_rows_are_packed(num_texts, monkeypatch):
    told = []

    def spy(*args, packed, **options):
        told.append(packed)
        return attention(*args, packed=packed, **options)

    for place in (layers, llama):
        monkeypatch.setattr(place, "attention", spy)
    parts, ids = tiny.parts(), np.ones((2, 8), np.int32)
    stack = stacking.build_stack(tiny.settings(), parts, 0)
    bert = Bert(BertConfig(8, 16, 1, 2, 16, num_positions=8), nnx.Rngs(0))
    for run in (
        lambda: stack.pooled(ids, ids, num_texts, causal=False),
        lambda: llm_pooled(parts.llm, ids, ids, num_texts, causal=False),
        lambda: stacking.encoder_pooled(
            parts.encoder, ids, ids, num_texts, jnp.float32, None, None
        ),
        lambda: bert.encode(ids, ids, packed=num_texts > 1),
    ):
        told.clear()
        jax.eval_shape(run)
        assert told and set(told) == {num_texts > 1}


def test_the_table_says_what_the_code_does():
    lines = [line for line in module.__doc__.splitlines() if line.startswith("|")]
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    table = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert list(table) == list(BACKENDS)

    def works(name, platform=None, dtype="bfloat16", **asked):
        platform = platform or BACKENDS[name].platforms[0]
        try:
            check_attention(name, platform, dtype=dtype, **asked)
        except ValueError:
            return False
        return True

    for name, row in table.items():
        platforms = [p for p in ("cpu", "gpu", "tpu") if works(name, p)]
        assert ", ".join(platforms) == row["platforms"]
        dtypes = [d for d in ("bfloat16", "float16", "float32") if works(name, dtype=d)]
        assert row["dtypes"] == (", ".join(dtypes) if len(dtypes) < 3 else "any")
        widths = [w for w in range(2, 1000, 2) if works(name, head_width=w)]
        few = len(widths) < 499
        assert row["head widths"] == (f"{widths[0]}, {widths[1]} … {widths[-1]}" if few else "any")
        assert row["packed"] == ("yes" if works(name, segments=True) else "no")
        assert row["context"] == ("yes" if works(name, context=2) else "no")
        assert row["drop"] == ("yes" if works(name, drops=True) else "no")


@pytest.mark.parametrize(
    ("platform", "asked", "chosen"),
    [
        ("cpu", {}, "xla"),
        ("tpu", {}, "splash"),
        ("tpu", {"head_width": 32}, "xla"),
        ("tpu", {"head_width": 80}, "xla"),
        ("tpu", {"dtype": "float32", "context": 4, "window": 100}, "splash"),
        ("gpu", {}, "xla"),
        ("gpu", {"segments": False}, "cudnn"),
        ("gpu", {"segments": False, "dtype": "float32"}, "xla"),
        ("gpu", {"segments": False, "head_width": 256}, "xla"),
        ("gpu", {"segments": False, "context": 2}, "xla"),
    ],
)
def test_auto(platform, asked, chosen):
    usual = {"segments": True, "head_width": 128, "dtype": "bfloat16"}
    assert choose_backend(platform, **(usual | asked)) == chosen


@pytest.mark.parametrize(
    ("backend", "asked", "message"),
    [
        ("flash", {}, "attention is 'flash'; it may be one of auto, xla, cudnn, splash."),
        ("splash", {"platform": "cpu"}, "runs on tpu and not on cpu; others are auto, xla, cudnn."),
        ("cudnn", {"platform": "tpu"}, "runs on gpu and not on tpu"),
        ("cudnn", {"dtype": "float32"}, "computes in bfloat16 or float16, not float32"),
        ("splash", {"head_width": 80}, "has head widths of multiples of 64 up to 256, not 80"),
        ("cudnn", {"head_width": 256}, "has head widths of multiples of 8 up to 128, not 256"),
        ("cudnn", {"segments": True}, "reads one text a row, and rows here are packed"),
        ("cudnn", {"context": 2}, "reads whole rows, and context cuts them over 2 devices"),
        ("splash", {"drops": True}, "attention is 'splash', which drops nothing out"),
        ("auto", {"window": 3, "causal": False}, "window is 3, which only causal attention has."),
    ],
)
def test_what_a_backend_cannot_do_is_refused(backend, asked, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_attention(backend, **asked)


def test_refused_where_it_would_be_computed():
    q, k, v = inputs(2, 2)
    options = {"query_segments_BT": SEGMENTS, "key_segments_BS": SEGMENTS}
    for backend in ("splash", "cudnn"):
        with pytest.raises(ValueError, match=rf"attention is '{backend}', which runs on "):
            jax.eval_shape(functools.partial(attention, backend=backend, **options), q, k, v)


def test_models_refuse_it_when_they_are_built():
    llama = {"vocab_size": 8, "width": 8, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1}
    llama |= {"head_width": 80, "ffn_width": 8}
    nllb = {"vocab_size": 8, "width": 160, "encoder_layers": 1, "decoder_layers": 1}
    nllb |= {"encoder_heads": 1, "decoder_heads": 2, "encoder_ffn": 8, "decoder_ffn": 8}
    bert = {"vocab_size": 8, "width": 80, "num_layers": 1, "num_heads": 1, "ffn": 8}
    for config in (
        functools.partial(LlamaConfig, **llama),
        functools.partial(NLLBConfig, **nllb),
        functools.partial(BertConfig, **bert, num_positions=8),
    ):
        config(attention="xla")
        with pytest.raises(ValueError, match="attention is 'splash', which has head widths"):
            config(attention="splash")
        with pytest.raises(ValueError, match="attention is 'fast'; it may be one of auto"):
            config(attention="fast")
