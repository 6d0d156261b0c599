"""The mesh, and one table from logical dims to mesh axes.

An "axis" is the mesh's, a "dim" an array's.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mtllm_jax.config import Mesh

AXES = ("data", "fsdp", "tensor")

# Logical dim → mesh axis. `embed` is the width that every matrix shares, so it is the one that
# FSDP cuts; heads, ffn and vocab are cut by tensor parallelism.
DIM_TO_AXIS: dict[str, str | None] = {
    "layers": None,
    "norm": None,
    "rank": None,
    "classes": None,
    "bridge": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "ffn": "tensor",
    "vocab": "tensor",
    "positions": None,
    "types": None,
}

BATCH = PartitionSpec(("data", "fsdp"))  # the rows of a batch are cut over both axes

# Arrays below this many elements stay whole: gathering them costs more than they weigh.
SMALLEST_SHARDED = 2**16


def make_mesh(config: Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Mesh data × fsdp × tensor over all devices. Raises ValueError where sizes do not multiply."""
    devices = list(jax.devices() if devices is None else devices)
    sizes = [config.data, config.fsdp, config.tensor]
    if -1 in sizes:
        known = math.prod(n for n in sizes if n != -1)
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        given = dict(zip(AXES, (config.data, config.fsdp, config.tensor), strict=True))
        raise ValueError(
            f"config.mesh is {given}; its sizes must multiply to the {len(devices)} devices."
        )
    # axis_types by hand: the default has changed between releases.
    kinds = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes), AXES, axis_types=kinds, devices=devices)


def partition(
    dims: Sequence[str], shape: Sequence[int], mesh: jax.sharding.Mesh | Any, name: str
) -> PartitionSpec:
    """Where each dim of one array goes.

    Raises ValueError naming the array if a dim is unknown, or if two dims claim one axis. A dim
    that its axis does not divide, and every dim of a small array, stays whole.
    """
    axes: list[str | None] = []
    for dim in dims:
        if dim not in DIM_TO_AXIS:
            raise ValueError(f"{name} has the unknown dim {dim!r}; known are {list(DIM_TO_AXIS)}.")
        axes.append(DIM_TO_AXIS[dim])
    claimed = [axis for axis in axes if axis is not None]
    for axis in set(claimed):
        if claimed.count(axis) > 1:
            raise ValueError(f"two dims of {name}, {tuple(dims)}, claim the mesh axis {axis!r}.")
    if math.prod(shape) < SMALLEST_SHARDED:
        return PartitionSpec()
    fits = [
        axis if axis is not None and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(axes, shape, strict=True)
    ]
    return PartitionSpec(*fits)


def shardings(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """A NamedSharding for each leaf: by `dims` for parameters (and Adam's moments, which keep the
    parameter's type), whole for everything else. Works on arrays and on abstract shapes."""

    def of(path: jax.tree_util.KeyPath, leaf: Any) -> Any:
        if isinstance(leaf, nnx.Variable):
            value = leaf.get_raw_value()
            spec = partition(
                leaf.get_metadata("dims"), value.shape, mesh, jax.tree_util.keystr(path)
            )
            return leaf.replace(NamedSharding(mesh, spec))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(of, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


def place(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Put a tree of arrays where `shardings` says."""
    return jax.tree.map(jax.device_put, tree, shardings(tree, mesh))


def place_batch(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch → global arrays cut over the rows."""
    sharding = NamedSharding(mesh, BATCH)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
    }


def check_rows(rows: int, mesh: jax.sharding.Mesh, field: str) -> None:
    """Raise ValueError unless `rows` can be cut over the mesh."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % ways:
        raise ValueError(f"config.{field} is {rows}; it must be a multiple of {ways}, data × fsdp.")
