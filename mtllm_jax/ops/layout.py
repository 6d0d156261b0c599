"""Where arrays lie: one table from logical dims to mesh axes, and constraints that follow it.

An "axis" is the mesh's, a "dim" an array's. A program is traced for a mesh (`sharding.on`); where
it is for none, or for one device, nothing here does anything.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax import Array
from jax.sharding import AxisType, PartitionSpec

# From the slowest network to the fastest: slices lie along data, neighbours along tensor.
AXES = ("data", "fsdp", "context", "tensor")

# Logical dim → mesh axis, or axes. `embed` is the width that every matrix shares, so it is the one
# that FSDP cuts; heads, ffn and vocab are cut by tensor parallelism. rows and tokens are those of a
# batch, groups the rows of devices that share one copy of the weights, features what a token has.
DIM_TO_AXIS: dict[str, str | tuple[str, ...] | None] = {
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
    "rows": ("data", "fsdp"),
    "groups": "data",
    "tokens": "context",
    "features": None,
}


def spec(dims: Sequence[str], shape: Sequence[int], mesh: Any, name: str) -> PartitionSpec:
    """Where each dim of one array goes.

    Raises ValueError naming the array if a dim is unknown, or if two dims claim one axis. A dim
    that its axes do not divide stays whole.
    """
    axes = []
    for dim in dims:
        if dim not in DIM_TO_AXIS:
            raise ValueError(f"{name} has the unknown dim {dim!r}; known are {list(DIM_TO_AXIS)}.")
        axes.append(DIM_TO_AXIS[dim])
    claimed = [axis for some in axes for axis in _names(some)]
    for axis in set(claimed):
        if claimed.count(axis) > 1:
            raise ValueError(f"two dims of {name}, {tuple(dims)}, claim the mesh axis {axis!r}.")
    fits = [
        some if size % math.prod(mesh.shape[axis] for axis in _names(some)) == 0 else None
        for some, size in zip(axes, shape, strict=True)
    ]
    return PartitionSpec(*fits)


def constrain(x: Array, *dims: str) -> Array:
    """`x`, laid over the mesh by its dims."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(dims, x.shape, mesh, "an activation"))


def gathered(weight: Array, *dims: str) -> Array:
    """A weight in whole over `fsdp`, as the matrix product of a device's own rows needs it; its
    gradient is cut as the weight was.

    Left to itself, the partitioner gathers the rows of all devices instead.
    """
    if jax.sharding.get_abstract_mesh().size <= 1:
        return weight
    return _gathered(weight, dims)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(weight: Array, dims: tuple[str, ...]) -> Array:
    return constrain(weight, *("features" if DIM_TO_AXIS[dim] == "fsdp" else dim for dim in dims))


def _gathered_forward(weight: Array, dims: tuple[str, ...]) -> tuple[Array, None]:
    return _gathered(weight, dims), None


def _gathered_backward(dims: tuple[str, ...], _: None, gradient: Array) -> tuple[Array]:
    return (constrain(gradient, *dims),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def axis_size(axis: str) -> int:
    """Devices along an axis of the mesh that the program is traced for; 1 without one."""
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def ways(size: int, dim: str) -> int:
    """Devices that a dim of this size is yet to be cut over: inside `shard_map` it is cut."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    axes = [name for name in _names(DIM_TO_AXIS[dim]) if kinds.get(name) == AxisType.Auto]
    num = math.prod(mesh.shape[axis] for axis in axes)
    return num if size % num == 0 else 1


def platform() -> str:
    """What the program is traced for: "cpu", "gpu", "tpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def is_placed() -> bool:
    """Whether it is known which devices the program is for."""
    return not jax.sharding.get_abstract_mesh().empty or jax.device_count() == 1


def _names(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else axes
