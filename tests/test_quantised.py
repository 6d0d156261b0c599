"""Weights in int8 against their definition in numpy: kept, read, multiplied by, learnt over.

L layers, I input width, O output width, R rank, D LLM width.
"""

import importlib.util

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import tiny
import toy_model
from flax import nnx

from mtllm_jax import sharding
from mtllm_jax.hf import reading
from mtllm_jax.hf import tensors as tensors_module
from mtllm_jax.hf.folder import Tensors, export_tensors, load_into
from mtllm_jax.models import lora
from mtllm_jax.models.layers import Linear, LoRAParam
from mtllm_jax.models.quantised import check_available, in_dtype, quantised
from mtllm_jax.train import TrainState, make_optimizer, train_step

RNG = np.random.default_rng(0)


def steps_of(kernel_LIO):
    """The scale [L, 1, O]: 127.5 steps are the largest weight of an output."""
    return np.max(np.abs(kernel_LIO), axis=1, keepdims=True) / 127.5


def dequantised(linear):
    """The kernel that a linear map in int8 stands for, float64."""
    scale_LO = np.asarray(linear.kernel_scale[...], np.float64)
    return np.asarray(linear.kernel[...], np.float64) * np.expand_dims(scale_LO, -2)


def test_what_is_kept_is_within_half_a_step():
    kernel_LIO = RNG.normal(size=(3, 40, 24)) * RNG.lognormal(size=(3, 1, 24))
    kernel_LIO[1, :, 5] = 0.0
    kernel_LIO = kernel_LIO.astype(np.float32)
    int8_LIO, scale_LO = jax.jit(quantised)(kernel_LIO)
    assert int8_LIO.dtype == jnp.int8 and scale_LO.dtype == jnp.float32
    wanted_LO = steps_of(kernel_LIO)[:, 0]
    is_zero = wanted_LO == 0
    np.testing.assert_allclose(np.asarray(scale_LO)[~is_zero], wanted_LO[~is_zero], rtol=1e-6)
    error = np.abs(np.asarray(int8_LIO, np.float64) * np.asarray(scale_LO)[:, None] - kernel_LIO)
    # 1e-4 of a step for the division, whose quotient is up to 127.5 and rounded to 24 bits.
    assert np.all(error <= (0.5 + 1e-4) * np.asarray(scale_LO)[:, None])
    assert not np.any(np.asarray(int8_LIO)[1, :, 5])


def a_linear(*, use_bias=False, rank=0):
    """One layer of a map in int8, as it is inside a scan; [16, 24]."""

    class Holder(nnx.Module):
        def __init__(self):
            init = nnx.initializers.normal(0.3)
            dims, rngs = ("embed", "ffn"), nnx.Rngs(0)
            self.map = Linear(16, 24, dims, init=init, rngs=rngs, num_layers=1, use_bias=use_bias)

    holder = Holder()
    if rank:
        lora.attach(holder, rank=rank, alpha=8, dropout=0, targets=("all",), rngs=nnx.Rngs(1))
    graph, state = nnx.split(tiny.in_int8(tiny.randomised(holder, 2)).map)
    return nnx.merge(graph, jax.tree.map(lambda x: x[0], state))


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (ml_dtypes.bfloat16, 2**-6)])
def test_a_linear_map_multiplies_by_what_its_kernel_stands_for(use_bias, rank, dtype, tolerance):
    """tolerance, of the largest number: some float32 roundings; of bfloat16 (2^-9 each) that of
    the product, of its scaling, and of LoRA's three."""
    linear = a_linear(use_bias=use_bias, rank=rank)
    x_BI = RNG.normal(size=(5, 16)).astype(dtype)
    kernel_IO = dequantised(linear)
    if rank:
        factors = (np.asarray(x[...], np.float64) for x in (linear.lora_a, linear.lora_b))
        kernel_IO = kernel_IO + linear.lora_scale * np.matmul(*factors)
    wanted_BO = x_BI.astype(np.float64) @ kernel_IO
    if use_bias:
        wanted_BO = wanted_BO + np.asarray(linear.bias[...], np.float64)
    got_BO = linear(jnp.asarray(x_BI))
    assert got_BO.dtype == dtype
    limit = tolerance * np.max(np.abs(wanted_BO))
    np.testing.assert_allclose(np.asarray(got_BO, np.float64), wanted_BO, rtol=0, atol=limit)
    gradient_BI = jax.grad(lambda x: jnp.sum(jnp.sin(jnp.arange(24.0))[None] * linear(x)))(
        jnp.asarray(x_BI)
    )
    wanted_BI = np.tile(np.sin(np.arange(24.0)) @ kernel_IO.T, (5, 1))
    limit = tolerance * np.max(np.abs(wanted_BI))
    np.testing.assert_allclose(np.asarray(gradient_BI, np.float64), wanted_BI, rtol=0, atol=limit)


# ---------------------------------------------------------------- read


@pytest.fixture(params=["together", "one by one", "in pieces"])
def _steps(request, monkeypatch):
    """How much is read in one go: all layers, one, or few rows of one."""
    one = toy_model.D * toy_model.F
    sizes = {"together": 2**20, "one by one": one, "in pieces": 5 * toy_model.D}
    for where in (reading, tensors_module):
        monkeypatch.setattr(where, "CHUNK", sizes[request.param])


@pytest.mark.usefixtures("_steps")
@pytest.mark.parametrize("sizes", [None, (1, 4, 2), (2, 2, 2), (8, 1, 1)])
def test_any_mesh_reads_the_same_numbers(sizes, tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 2)
    tensors = toy_model.random_tensors(np.float16)
    toy_model.saved(tmp_path, tensors)
    mesh = toy_model.mesh_of(*sizes) if sizes else None
    told = []
    update = [RNG.normal(size=size).astype(np.float32) for size in ((3, 24, 2), (3, 2, 16))]
    loaded = load_into(
        toy_model.abstract(),
        Tensors(tmp_path),
        toy_model.TABLE,
        jnp.int8,
        mesh=mesh,
        updates={"layers.down.kernel": [tuple(update)]},
        progress=lambda done, total: told.append((done, total)),
    )
    wanted = toy_model.expected_parameters(tensors, np.float32)
    wanted["layers.down.kernel"] = wanted["layers.down.kernel"] + np.matmul(*update)
    found = toy_model.parameters_of(loaded)
    assert found.keys() == wanted.keys() | {"layers.up.kernel_scale", "layers.down.kernel_scale"}
    for path, value in found.items():
        if path.startswith("layers") and path.endswith("kernel"):
            step = steps_of(wanted[path])
            np.testing.assert_allclose(found[f"{path}_scale"], step[:, 0], rtol=1e-6)
            assert value.dtype == jnp.int8
            # As above, and the rounding of the sum.
            assert np.all(np.abs(np.asarray(value) * step - wanted[path]) <= (0.5 + 1e-3) * step)
        elif not path.endswith("_scale"):
            wanted_here = wanted[path].astype(ml_dtypes.bfloat16)
            np.testing.assert_array_equal(value, wanted_here, strict=True)
    state = nnx.state(loaded)
    num_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
    assert told[-1] == (num_bytes, num_bytes)
    shapes = nnx.state(in_dtype(toy_model.abstract(), jnp.int8))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )
    if mesh is not None:
        places = jax.tree.leaves(sharding.shardings(state, mesh))
        assert [x.sharding for x in jax.tree.leaves(state)] == places


def test_what_cannot_be_done_to_int8_is_refused():
    model = tiny.in_int8(toy_model.random_model())
    with pytest.raises(ValueError, match="weights in int8 are not written; read the model in"):
        export_tensors(model, toy_model.TABLE)
    lora.attach(model, rank=2, alpha=2, dropout=0, targets=("up",), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="nothing can be added to weights in int8; read the model"):
        lora.merge(model)


def test_qwix_is_asked_for_by_name(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"take qwix, which is missing; pip install -e '\.\[int8\]'"
    ):
        check_available()


# ---------------------------------------------------------------- trained over


@pytest.mark.slow
def test_only_adapters_and_bridge_learn_over_int8():
    """Two steps of stage 1: what is frozen stays bitwise, what learns is what it would be."""
    stage, floats = tiny.stage("adaptation-int8"), tiny.stage("adaptation-lora")
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), s.trainable) for s in (stage, floats)]
    assert shapes[0] == shapes[1]
    before = jax.tree.map(np.array, stage.frozen)
    optimizer = make_optimizer(tiny.TRAINING)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=stage.trainable,
        opt_state=optimizer.init(stage.trainable),
        rng=jax.random.key(0),
    )
    step = jax.jit(
        lambda *args: train_step(*args, objective=stage.objective, optimizer=optimizer),
        compiler_options=tiny.QUICK,
    )
    for _ in range(2):
        state, terms = step(state, stage.frozen, stage.batch())
        assert terms["skipped"][0] == 0
    jax.tree.map(np.testing.assert_array_equal, stage.frozen, before)
    moved = jax.tree.map(lambda x, y: np.any(x != y), state.trainable, stage.trainable)
    assert all(jax.tree.leaves(moved))
    kept = {x.dtype for x in jax.tree.leaves(stage.frozen)}
    assert kept == {jnp.dtype(jnp.int8), jnp.dtype(jnp.float32)}
    assert jax.tree.leaves(nnx.filter_state(state.trainable, LoRAParam))


@pytest.mark.slow
def test_a_whole_step_is_that_of_the_weights_that_are_stood_for():
    """Equal to float32's roundings; and near the step of the weights that were quantised.

    Half a step is 1/255 of an output's largest weight, and errors that spread evenly up to half a
    step are 1/√3 of it on average: 0.5 % of weights of which the largest of 32 is twice the rms.
    They are independent, so that 28 maps (seven a layer, of two layers, forward and backward) leave
    0.5 % · √28 = 2.6 % of a gradient, and 5 % at twice that.
    """
    one, floats = tiny.stage("adaptation-int8"), tiny.stage("adaptation-lora")
    kept = {part: dict(nnx.to_flat_state(state)) for part, state in one.frozen.items()}

    def stood_for(part):
        """The frozen weights of a part as floats."""
        flat = []
        for path, variable in nnx.to_flat_state(floats.frozen[part]):
            value_LIO = np.asarray(kept[part][path][...], np.float64)
            scale_LO = kept[part].get((*path[:-1], "kernel_scale"))
            if path[-1] == "kernel" and scale_LO is not None:
                value_LIO = value_LIO * np.asarray(scale_LO[...], np.float64)[:, None]
            flat.append((path, variable.replace(jnp.asarray(value_LIO, jnp.float32))))
        return nnx.from_flat_state(flat)

    frozen = {part: stood_for(part) for part in one.frozen}
    batch, key = one.batch(), jax.random.key(0)
    got = one.gradient(one.trainable, one.frozen, batch, key)
    tiny.assert_close_trees(got, floats.gradient(floats.trainable, frozen, batch, key))
    plain = floats.gradient(floats.trainable, floats.frozen, batch, key)
    losses = [float(terms["loss"][0]) for _, terms in (got, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    difference = jax.tree.map(lambda x, y: x - y, got[0], plain[0])
    assert 0 < optax.tree.norm(difference) < 0.05 * optax.tree.norm(plain[0])
