"""The mesh, and the table from dims to axes."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
import tiny
from flax import nnx
from jax.sharding import PartitionSpec as P

from mtllm_jax import sharding
from mtllm_jax.config import Mesh
from mtllm_jax.models.bert import Bert, BertConfig
from mtllm_jax.models.layers import param
from mtllm_jax.models.llama import Llama
from mtllm_jax.models.nllb import NLLB
from mtllm_jax.ops import layout

pytestmark = pytest.mark.skipif(
    len(jax.devices()) < 8, reason="needs the eight simulated devices of conftest"
)


@functools.cache
def mesh_of(data=1, fsdp=1, tensor=1, context=1):
    num_devices = data * fsdp * tensor * context
    return sharding.make_mesh(Mesh(data, fsdp, tensor, context), jax.devices()[:num_devices])


# ---------------------------------------------------------------- the mesh


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ((-1, 1, 1), (8, 1, 1, 1)),
        ((1, -1, 2), (1, 4, 2, 1)),
        ((2, 2, 2), (2, 2, 2, 1)),
        ((2, 2, -1), (2, 2, 2, 1)),
        ((8, -1, 1), (8, 1, 1, 1)),
        ((1, 2, 1, -1), (1, 2, 1, 4)),
        ((1, -1, 2, 2), (1, 2, 2, 2)),
    ],
)
def test_mesh(sizes, shape):
    mesh = sharding.make_mesh(Mesh(*sizes))
    axes = ("data", "fsdp", "tensor", "context")
    assert dict(mesh.shape) == dict(zip(axes, shape, strict=True))
    assert set(mesh.devices.flat) == set(jax.devices())
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize("sizes", [(3, 1, 1), (4, 1, 1), (16, 1, 1), (3, -1, 1), (16, -1, 1)])
def test_a_mesh_that_does_not_multiply_is_refused(sizes):
    message = r"config\.mesh is .*; its sizes must multiply to the 8 devices\."
    with pytest.raises(ValueError, match=message) as error:
        sharding.make_mesh(Mesh(*sizes))
    assert f"'data': {sizes[0]}, 'fsdp': {sizes[1]}" in str(error.value)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What JAX's mesh utilities ask of a TPU."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5p"


def chips(slices, **changes):
    """So many slices of 4 × 4 chips."""
    return [
        Chip(16 * s + 4 * y + x, s, (x, y, 0), **changes)
        for s in range(slices)
        for y in range(4)
        for x in range(4)
    ]


@pytest.mark.parametrize(
    "config",
    [
        Mesh(data=-1, fsdp=16, slices=2),
        Mesh(data=4, fsdp=4, tensor=2, slices=2),
        Mesh(data=4, fsdp=-1, context=2, slices=4),
        Mesh(data=-1, slices=2),
    ],
)
def test_data_alone_runs_over_slices(config):
    devices = chips(config.slices)
    mesh = sharding.make_mesh(config, devices)
    assert set(mesh.devices.flat) == set(devices) and mesh.axis_names == layout.AXES
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    slices = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
    along_data = slices[:, 0, 0, 0]
    assert np.all(slices == along_data[:, None, None, None])
    # Neighbours along data lie in one slice as long as they can.
    np.testing.assert_array_equal(along_data, np.sort(along_data))


@pytest.mark.parametrize(
    ("config", "num_slices", "message"),
    [
        (Mesh(data=2, fsdp=-1), 2, "config.mesh.slices is 1; the devices lie in 2."),
        (Mesh(data=-1, slices=4), 2, "config.mesh.slices is 4; the devices lie in 2."),
        (
            Mesh(data=1, fsdp=-1, slices=2),
            2,
            "config.mesh.data is 1; it must be a multiple of config.mesh.slices, 2.",
        ),
    ],
)
def test_slices_that_the_devices_do_not_lie_in_are_refused(config, num_slices, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        sharding.make_mesh(config, chips(num_slices))


def test_devices_without_slices_lie_in_one():
    with pytest.raises(ValueError, match=r"slices is 2; the devices lie in 1"):
        sharding.make_mesh(Mesh(slices=2))


def test_a_mesh_may_split_a_torus_as_it_likes():
    """4 × 4 chips as 2 × 4 × 2: no axis of the mesh is one of the machine's."""
    mesh = sharding.make_mesh(Mesh(data=2, fsdp=4, tensor=2), chips(1))
    assert mesh.size == 16


def test_one_mesh_may_run_over_nodes_of_gpus():
    """Which JAX calls slices."""
    nodes = chips(2, platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
    assert sharding.make_mesh(Mesh(data=1, fsdp=-1), nodes).shape["fsdp"] == 32


# ---------------------------------------------------------------- the table


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
def test_parameters(dims, shape, spec):
    assert sharding.partition(dims, shape, mesh_of(2, 2, 2), "weight") == spec


@pytest.mark.parametrize(
    ("dims", "shape", "spec"),
    [
        (("rows", "tokens", "features"), (8, 6, 3), P(("data", "fsdp"), "context", None)),
        (("rows", "features", "heads"), (4, 2, 2), P(("data", "fsdp"), None, "tensor")),
        (("groups", "tokens", "embed"), (4, 2, 8), P("data", "context", "fsdp")),
        (("rows", "tokens"), (6, 5), P(None, None)),  # 2 × 2 devices do not divide 6 rows
    ],
)
def test_activations(dims, shape, spec):
    mesh = jax.sharding.AbstractMesh((2, 2, 2, 2), layout.AXES)
    assert layout.spec(dims, shape, mesh, "states") == spec


@pytest.mark.parametrize("dims", [("rows", "embed"), ("groups", "rows"), ("heads", "vocab")])
def test_two_dims_on_one_axis_are_refused_wherever_they_meet(dims):
    with pytest.raises(ValueError, match=r"two dims of states, .*, claim the mesh axis"):
        layout.spec(dims, (BIG, BIG), mesh_of(2, 2, 2), "states")


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
    bert = BertConfig(vocab_size=8, width=8, num_layers=2, num_heads=2, ffn=8, num_positions=8)
    for module in (
        NLLB(tiny.ENCODER, tiny.rngs()),
        Llama(tiny.LLM, tiny.rngs()),
        Bert(bert, tiny.rngs()),
    ):
        for path, variable in nnx.to_flat_state(nnx.state(module)):
            dims = variable.get_metadata("dims")
            large = [4096] * len(dims)
            spec = sharding.partition(dims, large, mesh_of(2, 2, 2), str(path))
            matrix = len(dims) - dims.count("layers") == 2 and not {"positions", "types"} & {*dims}
            assert not matrix or set(spec) >= {"fsdp", "tensor"}, path


def test_rows_that_cannot_be_cut_are_refused():
    sharding.check_rows(12, mesh_of(2, 2, 2), "evaluation.batch_rows")
    with pytest.raises(
        ValueError, match=r"config\.x\.batch_rows is 10; .* multiple of 4, data × fsdp"
    ):
        sharding.check_rows(10, mesh_of(2, 2, 2), "x.batch_rows")


def test_rows_too_short_for_the_mesh_are_refused():
    sharding.check_length(12, mesh_of(1, 2, 1, 4), "adaptation.training.source_length")
    with pytest.raises(
        ValueError, match=r"config\.x\.source_length is 10; .* multiple of 4, config\.mesh\.context"
    ):
        sharding.check_length(10, mesh_of(1, 2, 1, 4), "x.source_length")


def test_a_batch_is_cut_by_rows_and_token_streams_by_positions_too():
    batch = {
        "source_ids": np.arange(32, dtype=np.int32).reshape(4, 8),
        "source_segments": np.ones((4, 8), np.int32),
        "example": np.arange(12, dtype=np.int32).reshape(4, 3),
        "teacher": np.arange(24, dtype=np.float32).reshape(4, 3, 2),
    }
    placed = sharding.place_batch(batch, mesh_of(1, 2, 1, 4))
    for name, array in placed.items():
        np.testing.assert_array_equal(array, batch[name])
        parts = {shard.data.shape for shard in array.addressable_shards}
        stream = name.startswith("source")
        assert parts == {(2, 2) if stream else (2, *batch[name].shape[1:])}
