"""LoRA against its formula in numpy: attached, merged, split, refused.

B rows, T positions, L layers, I input width, O output width, R rank.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtllm_jax.models import lora
from mtllm_jax.models.layers import REMAT_POLICIES, Linear, LoRAParam, split
from mtllm_jax.models.llama import Llama, LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=20, width=16, num_layers=2, num_heads=4, num_kv_heads=2, head_width=4, ffn_width=24
)
LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
IDS = np.random.default_rng(0).integers(0, 20, (2, 6))
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 0, 0]], np.int32)


class Bare(nnx.Module):
    """One linear map without a layer dim."""

    def __init__(self):
        init = nnx.initializers.normal(0.3)
        self.map = Linear(8, 5, ("embed", "ffn"), init=init, rngs=nnx.Rngs(0), use_bias=True)


@functools.cache
def made_llama():
    return Llama(CONFIG, nnx.Rngs(jax.random.key(0, impl="rbg")))  # compiles fastest


def llama():
    """The same weights each time, in a module of its own."""
    return nnx.clone(made_llama())


def attach(module, targets=("all",), *, rank=3, alpha=6.0, dropout=0.0, seed=1):
    lora.attach(
        module, rank=rank, alpha=alpha, dropout=dropout, targets=targets, rngs=nnx.Rngs(seed)
    )
    return module


def train_b(module):
    """Gives every B the size that training would."""
    for i, (_, node) in enumerate(nnx.iter_graph(module)):
        if isinstance(node, Linear) and node.lora_b is not None:
            key = jax.random.key(i)
            node.lora_b[...] = 0.3 * jax.random.normal(key, node.lora_b.shape)
    return module


@functools.partial(jax.jit, static_argnums=0)
def run(graph, state, dropout_key):
    model = nnx.merge(graph, state)
    h_BTD = model.hidden(model.embed(IDS), SEGMENTS, causal=True, dropout_key=dropout_key)
    return model.logits(h_BTD)


def logits(model, dropout_key=None):
    return np.asarray(run(*nnx.split(model), dropout_key))


def test_forward_is_the_papers_formula():
    bare = train_b(attach(Bare()))
    x = np.random.default_rng(1).normal(size=(2, 4, 8)).astype(np.float32)
    w, b, a, b_up = (
        np.asarray(p[...], np.float64)
        for p in (bare.map.kernel, bare.map.bias, bare.map.lora_a, bare.map.lora_b)
    )
    expected = np.empty((2, 4, 5))
    for i in range(2):
        for t in range(4):
            for o in range(5):
                low = [sum(x[i, t, j] * a[j, r] for j in range(8)) for r in range(3)]
                update = sum(low[r] * b_up[r, o] for r in range(3))
                expected[i, t, o] = x[i, t] @ w[:, o] + b[o] + 6.0 / 3 * update
    np.testing.assert_allclose(bare.map(jnp.asarray(x)), expected, atol=1e-5)


def test_a_is_uniform_as_in_peft_and_b_zero():
    """PEFT gives A torch's initialisation of a linear map: uniform within ±I^-1/2."""
    model = attach(llama(), ("q", "down"), rank=64)
    for name, size_in in (("q", 16), ("down", 24)):
        linear = getattr(model.layers, name)
        a = np.asarray(linear.lora_a[...])
        bound = size_in**-0.5
        assert a.shape == (2, size_in, 64)
        assert np.abs(a).max() <= bound
        np.testing.assert_allclose(a.std(axis=(1, 2)), bound / 3**0.5, rtol=0.05)
        assert abs(a.mean()) < 0.05 * bound
        assert not np.any(linear.lora_b[...])
        assert linear.lora_a.dims == ("layers", linear.kernel.dims[1], "rank")
        assert linear.lora_b.dims == ("layers", "rank", linear.kernel.dims[2])


def test_fresh_adapters_change_nothing():
    model = llama()
    before = logits(model)
    np.testing.assert_array_equal(logits(attach(model)), before)


def test_only_the_targets_are_adapted():
    model = attach(llama(), ("q", "v"))
    adapted = {name for name in LINEARS if getattr(model.layers, name).lora_a is not None}
    assert adapted == {"q", "v"}


def test_merged_equals_attached():
    model = train_b(attach(llama()))
    kernel = np.asarray(model.layers.q.kernel[...])
    a, b = np.asarray(model.layers.q.lora_a[...]), np.asarray(model.layers.q.lora_b[...])
    attached = logits(model)
    assert np.abs(attached - logits(llama())).max() > 0.1
    lora.merge(model)
    np.testing.assert_allclose(logits(model), attached, atol=2e-5)
    expected = kernel + 2.0 * np.einsum("lir,lro->lio", a, b)
    np.testing.assert_allclose(model.layers.q.kernel[...], expected, atol=1e-6)
    assert not jax.tree.leaves(nnx.state(model, LoRAParam))
    assert nnx.graphdef(model) == nnx.graphdef(llama())


def test_bare_map_merges():
    bare = train_b(attach(Bare(), ("map",)))
    x = jnp.ones((1, 2, 8))
    attached = bare.map(x)
    lora.merge(bare)
    np.testing.assert_allclose(bare.map(x), attached, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sums_are_made_in_float32_and_stored_as_the_kernel_is(dtype):
    """Many small updates, none of which bfloat16 would notice by itself."""
    rng = np.random.default_rng(3)
    linear = Linear(4, 3, ("embed", "ffn"), init=nnx.initializers.ones, rngs=nnx.Rngs(0))
    linear.kernel.set_value(linear.kernel[...].astype(dtype))
    a_IR, b_RO = np.full((4, 64), 1e-3, np.float32), rng.uniform(0, 1, (64, 3)).astype(np.float32)
    lora.add(linear, a_IR, b_RO, 0.5)
    expected = jnp.asarray(1 + 0.5 * a_IR @ b_RO, dtype)
    np.testing.assert_allclose(linear.kernel[...], expected, rtol=1e-6)
    assert linear.kernel.dtype == dtype and np.all(expected > 1)


def test_merging_takes_the_memory_of_the_kernel_and_of_a_few_layers():
    linear = llama().layers.gate
    kernel = linear.kernel[...]
    a_LIR, b_LRO = np.zeros((2, 16, 3), np.float32), np.zeros((2, 3, 24), np.float32)
    lora.add(linear, a_LIR, b_LRO, 1.0)
    assert not kernel.is_deleted()
    kernel = linear.kernel[...]
    lora.add(linear, a_LIR, b_LRO, 1.0, donate=True)
    assert kernel.is_deleted() and not linear.kernel[...].is_deleted()
    large, factors = jnp.zeros((32, 64, 48)), (jnp.zeros((32, 64, 2)), jnp.zeros((32, 2, 48)))
    program = lora._merge_into(None, True).lower(large, *factors, 1.0).compile()
    needed = program.memory_analysis()
    assert needed.alias_size_in_bytes == large.nbytes
    assert needed.temp_size_in_bytes < 4 * large[0].nbytes


def test_ready_factors_are_put_as_fresh_ones_are():
    linear, other = (attach(llama(), ("up",)).layers.up for _ in range(2))
    lora.put(other, linear.lora_a[...], linear.lora_b[...], scale=2.0)
    assert nnx.graphdef(linear) == nnx.graphdef(other)
    assert other.lora_a.dims == linear.lora_a.dims and other.lora_b.dims == linear.lora_b.dims


def test_gradients_exist_for_adapters_alone():
    model = attach(llama(), ("q", "down"))
    graph, adapters, frozen = nnx.split(model, LoRAParam, ...)

    @jax.jit
    def loss(adapters, frozen):
        model = nnx.merge(graph, adapters, frozen)
        h_BTD = model.hidden(model.embed(IDS), SEGMENTS, causal=True)
        return jnp.sum(jnp.square(model.logits(h_BTD)))

    gradients = nnx.to_flat_state(jax.grad(loss)(adapters, frozen))
    assert {path[1:] for path, _ in gradients} == {
        (name, factor) for name in ("q", "down") for factor in ("lora_a", "lora_b")
    }
    for path, gradient in gradients:  # while B is 0, A has no gradient yet
        assert np.any(gradient[...]) == (path[-1] == "lora_b")


def test_dropout_needs_a_key_and_follows_it():
    model = train_b(attach(llama(), dropout=0.5))
    without = train_b(attach(llama(), dropout=0.0))
    np.testing.assert_array_equal(logits(model), logits(without))
    key = jax.random.key(0)
    dropped = logits(model, dropout_key=key)
    assert np.any(dropped != logits(model))
    np.testing.assert_array_equal(dropped, logits(model, dropout_key=key))
    assert np.any(dropped != logits(model, dropout_key=jax.random.key(1)))
    np.testing.assert_array_equal(logits(without, dropout_key=key), logits(without))


def test_dropout_keeps_the_expectation():
    bare = train_b(attach(Bare(), dropout=0.25))
    x = jnp.ones((1, 1, 8))
    many = jax.vmap(lambda key: bare.map(x, key))(jax.random.split(jax.random.key(0), 20_000))
    np.testing.assert_allclose(many.mean(axis=0), bare.map(x), atol=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ("q", "qproj")}, "'qproj' matches no linear map; allowed: down, gate, k, o"),
        ({"targets": ("norm",)}, "'norm' matches no linear map"),
        ({"targets": ()}, "LoRA targets are empty"),
        ({"rank": 0}, "rank is 0"),
        ({"dropout": 1.0}, r"dropout is 1\.0"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(changes, message):
    model = llama()
    with pytest.raises(ValueError, match=message):
        attach(model, **{"targets": ("q",)} | changes)
    assert not jax.tree.leaves(nnx.state(model, LoRAParam))


def test_a_second_adapter_is_refused():
    model = attach(llama(), ("q",))
    with pytest.raises(ValueError, match="'q' already has an adapter"):
        attach(model, ("k", "q"))
    assert model.layers.k.lora_a is None


def test_what_dots_keeps_of_a_map_with_adapters_is_their_sum(capsys):
    init = nnx.initializers.normal(1.0)
    linear = Linear(6, 10, ("embed", "ffn"), init=init, rngs=nnx.Rngs(0))
    lora.attach(linear, rank=2, alpha=4.0, dropout=0.0, targets=("all",), rngs=nnx.Rngs(1))
    graph, adapters, frozen = split(linear, LoRAParam)

    @functools.partial(jax.checkpoint, policy=REMAT_POLICIES["dots"])
    def total(adapters, x):
        return jnp.sin(nnx.merge(graph, adapters, frozen)(x)).sum()

    jax.ad_checkpoint.print_saved_residuals(total, adapters, jnp.ones((7, 6)))
    kept = [line for line in capsys.readouterr().out.splitlines() if line.startswith("f32[7,10]")]
    assert len(kept) == 1, kept
