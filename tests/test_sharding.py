"""The table from dims to axes, and eight devices against one: the same losses and gradients."""

import functools

import jax
import numpy as np
import pytest
import tiny
from flax import nnx
from jax.sharding import PartitionSpec as P

from mtllm_jax import sharding
from mtllm_jax.config import Mesh
from mtllm_jax.models.layers import param
from mtllm_jax.models.llama import Llama
from mtllm_jax.models.nllb import NLLB
from mtllm_jax.train import TrainState, make_optimizer, train_step

pytestmark = pytest.mark.skipif(
    len(jax.devices()) < 8, reason="needs the eight simulated devices of conftest"
)


@functools.cache
def mesh_of(data=1, fsdp=1, tensor=1):
    num_devices = data * fsdp * tensor
    return sharding.make_mesh(Mesh(data, fsdp, tensor), jax.devices()[:num_devices])


# ---------------------------------------------------------------- the mesh and the table


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ((-1, 1, 1), (8, 1, 1)),
        ((1, -1, 2), (1, 4, 2)),
        ((2, 2, 2), (2, 2, 2)),
        ((2, 2, -1), (2, 2, 2)),
        ((8, -1, 1), (8, 1, 1)),
    ],
)
def test_mesh(sizes, shape):
    mesh = sharding.make_mesh(Mesh(*sizes))
    assert dict(mesh.shape) == {**dict(zip(("data", "fsdp", "tensor"), shape)), "context": 1}
    assert set(mesh.devices.flat) == set(jax.devices())


@pytest.mark.parametrize("sizes", [(3, 1, 1), (4, 1, 1), (16, 1, 1), (3, -1, 1), (16, -1, 1)])
def test_a_mesh_that_does_not_multiply_is_refused(sizes):
    message = r"config\.mesh is .*; its sizes must multiply to the 8 devices\."
    with pytest.raises(ValueError, match=message) as error:
        sharding.make_mesh(Mesh(*sizes))
    assert f"'data': {sizes[0]}, 'fsdp': {sizes[1]}" in str(error.value)


BIG = 2**9  # squared, well above the size of arrays that stay whole


@pytest.mark.parametrize(
    ("dims", "shape", "spec"),
    [
        (("embed", "ffn"), (BIG, BIG), P("fsdp", "tensor")),
        (("layers", "embed", "ffn"), (3, BIG, BIG), P(None, "fsdp", "tensor")),
        (("heads", "embed"), (BIG, BIG), P("tensor", "fsdp")),
        (("vocab", "embed"), (BIG, BIG), P("tensor", "fsdp")),
        (("embed", "bridge"), (BIG, BIG), P("fsdp", "tensor")),
        (("embed", "rank"), (2**14, 4), P("fsdp", None)),
        (("vocab", "embed"), (BIG + 1, BIG), P(None, "fsdp")),  # an axis that does not divide
        (("embed", "ffn"), (BIG, BIG + 1), P("fsdp", None)),
        (("embed", "ffn"), (16, 16), P()),  # small: whole
        (("norm",), (BIG,), P()),
        ((), (), P()),
    ],
)
def test_table(dims, shape, spec):
    assert sharding.partition(dims, shape, mesh_of(2, 2, 2), "weight") == spec


def test_two_dims_on_one_axis_are_refused_by_the_name_of_the_array():
    with pytest.raises(
        ValueError, match=r"two dims of llm\.gate, \('heads', 'ffn'\), claim .*tensor"
    ):
        sharding.partition(("heads", "ffn"), (BIG, BIG), mesh_of(2, 2, 2), "llm.gate")


def test_an_unknown_dim_is_refused_by_the_name_of_the_array():
    with pytest.raises(
        ValueError, match=r"llm\.gate has the unknown dim 'hidden'; known are .*embed"
    ):
        sharding.partition(("embed", "hidden"), (BIG, BIG), mesh_of(2, 2, 2), "llm.gate")


@pytest.mark.parametrize(
    ("dims", "message"),
    [(("ffn", "heads"), "claim the mesh axis"), (("embed", "x"), "unknown dim")],
)
def test_a_tree_names_the_array_by_its_path(dims, message):
    class Outer(nnx.Module):
        def __init__(self):
            self.inner = nnx.Module()
            self.inner.gate = param(nnx.Rngs(0), (4, 4), dims, nnx.initializers.zeros)

    with pytest.raises(ValueError, match=rf"inner.*gate.*{message}"):
        sharding.shardings(nnx.state(Outer()), mesh_of(2, 2, 2))


def test_every_parameter_of_every_model_has_its_place():
    """None raises, and of each matrix that is large enough some dim is cut."""
    for module in (NLLB(tiny.ENCODER, tiny.rngs()), Llama(tiny.LLM, tiny.rngs())):
        for path, variable in nnx.to_flat_state(nnx.state(module)):
            dims = variable.get_metadata("dims")
            large = [4096] * len(dims)
            spec = sharding.partition(dims, large, mesh_of(2, 2, 2), str(path))
            matrix = len([dim for dim in dims if dim != "layers"]) == 2
            assert not matrix or set(spec) >= {"fsdp", "tensor"}, path


def test_rows_that_cannot_be_cut_are_refused():
    sharding.check_rows(12, mesh_of(2, 2, 2), "evaluation.batch_rows")
    with pytest.raises(
        ValueError, match=r"config\.x\.batch_rows is 10; .* multiple of 4, data × fsdp"
    ):
        sharding.check_rows(10, mesh_of(2, 2, 2), "x.batch_rows")


# ---------------------------------------------------------------- eight devices are one


@pytest.fixture
def small_too(monkeypatch):
    """Cuts arrays of any size, as the models of these tests are small."""
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 1)


def on_mesh(case, mesh):
    stage = tiny.stage(case)
    trainable, frozen = (sharding.place(x, mesh) for x in (stage.trainable, stage.frozen))
    batch = sharding.place_batch(stage.batch(), mesh)
    gradient, terms = stage.gradient(trainable, frozen, batch, jax.random.key(0))
    return gradient, terms, trainable


MIXED = (2, 2, 2)
EXTREMES = [(8, 1, 1), (1, 8, 1), (1, 1, 8)]


@pytest.mark.parametrize(
    ("case", "sizes"),
    [(case, MIXED) for case in tiny.CASES if case != "adaptation"]
    + [("adaptation-lora", sizes) for sizes in EXTREMES],
)
def test_losses_and_gradients_are_those_of_one_device(case, sizes, small_too):
    """Packed rows, of which some are padding alone; float32, sums in another order: 2e-5."""
    mesh = mesh_of(*sizes)
    stage = tiny.stage(case)
    wanted = stage(stage.batch())
    gradient, terms, trainable = on_mesh(case, mesh)
    tiny.assert_close_trees((gradient, terms), wanted, 2e-5)
    if sizes != (8, 1, 1):
        cut = [x for x in jax.tree.leaves(trainable) if not x.sharding.is_fully_replicated]
        assert cut and all(x.addressable_shards[0].data.size < x.size for x in cut)


def test_a_step_on_eight_devices(small_too):
    """Moments lie where their parameters lie, before the step and after; the numbers are one's."""
    stage = tiny.stage("teacher-lora")
    optimizer = make_optimizer(tiny.TRAINING)

    def step_on(mesh):
        trainable, frozen = (sharding.place(x, mesh) for x in (stage.trainable, stage.frozen))
        state = TrainState(np.int32(0), trainable, optimizer.init(trainable), jax.random.key(0))
        state = sharding.place(state, mesh)
        step = jax.jit(
            functools.partial(
                train_step, objective=stage.objective, optimizer=optimizer, accumulation=3
            ),
            out_shardings=(sharding.shardings(state, mesh), None),
            compiler_options=tiny.QUICK,
        )
        batch = sharding.place_batch(stage.batch(), mesh)
        return state, *step(state, frozen, batch)

    before, after, terms = step_on(mesh_of(2, 2, 2))
    kernel = after.trainable["llm"]["layers"]["gate"]["lora_b"][...]
    assert kernel.sharding.spec == P(None, None, "tensor")
    for state in (before, after):
        specs = [x.sharding for x in jax.tree.leaves(state.trainable)]
        (adam,) = (
            x
            for x in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu"))
            if hasattr(x, "mu")
        )
        for moment in (adam.mu, adam.nu):
            assert [x.sharding for x in jax.tree.leaves(moment)] == specs
    _, one, terms_of_one = step_on(mesh_of(1, 1, 1))
    tiny.assert_close_trees(terms, terms_of_one, 2e-5)
    # Adam's first move is the sign of the gradient: where that is rounding, it may go either way.
    moved = jax.tree.map(
        lambda x, y: np.mean(np.abs(np.asarray(x) - np.asarray(y)) > 1e-5),
        after.trainable,
        one.trainable,
    )
    assert max(jax.tree.leaves(moved)) < 0.01
