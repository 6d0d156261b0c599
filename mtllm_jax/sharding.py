"""The mesh, and what lies where on it: parameters, optimizer state, batches.

An "axis" is the mesh's, a "dim" an array's. The table from dims to axes is `ops/layout.py`'s, as
models lay their activations by it too.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mtllm_jax.config import Mesh
from mtllm_jax.ops.layout import AXES, DIM_TO_AXIS, spec

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# Arrays below this many elements stay whole: gathering them costs more than they weigh.
SMALLEST_SHARDED = 2**16
# From this many on, 1 MB of float32, they are cut even where the table cuts none of their dims.
SMALLEST_CUT_ANYHOW = 2**18


def make_mesh(config: Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Mesh data × fsdp × context × tensor over all devices.

    With several slices, data runs over them and every other axis inside one: what crosses the
    slow network are gradients alone. ValueError where sizes do not multiply to the devices, or
    slices are not those that the devices lie in.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(config, len(devices))
    _check_slices(config.slices, sizes["data"], devices)
    if config.slices == 1:
        grid = mesh_utils.create_device_mesh(
            tuple(sizes.values()), devices, allow_split_physical_axes=True
        )
    else:
        inside = sizes | {"data": sizes["data"] // config.slices}
        across = dict.fromkeys(AXES, 1) | {"data": config.slices}
        grid = mesh_utils.create_hybrid_device_mesh(
            tuple(inside.values()),
            tuple(across.values()),
            devices,
            allow_split_physical_axes=True,
        )
    # axis_types by hand: the default has changed between releases.
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_sizes(config: Mesh, num_devices: int) -> dict[str, int]:
    """Devices along each axis, the -1 resolved. ValueError where they do not multiply."""
    given = {axis: getattr(config, axis) for axis in AXES}
    known = math.prod(size for size in given.values() if size != -1)
    sizes = {axis: num_devices // known if n == -1 else n for axis, n in given.items()}
    if math.prod(sizes.values()) != num_devices:
        raise ValueError(
            f"config.mesh is {given}; its sizes must multiply to the {num_devices} devices."
        )
    return sizes


def _check_slices(slices: int, data: int, devices: Sequence[jax.Device]) -> None:
    found = len({getattr(device, "slice_index", 0) for device in devices})
    # GPUs call each node a slice; their one mesh may run over nodes as it likes.
    free = slices == 1 and devices[0].platform != "tpu"
    if slices != found and not free:
        raise ValueError(f"config.mesh.slices is {slices}; the devices lie in {found}.")
    if data % slices:
        raise ValueError(
            f"config.mesh.data is {data}; it must be a multiple of config.mesh.slices, {slices}."
        )


def on(
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, function: Callable[Arguments, Result]
) -> Callable[Arguments, Result]:
    """`function`, traced for this mesh: what its activations are laid over. To be put in `jit`."""

    @functools.wraps(function)
    def traced(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return traced


def partition(
    dims: Sequence[str],
    shape: Sequence[int],
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
    name: str,
) -> PartitionSpec:
    """Where each dim of one parameter goes.

    Raises ValueError naming the array if a dim is unknown, or if two dims claim one axis. A dim
    that its axis does not divide, and every dim of a small array, stays whole. A large array that
    the table leaves whole on this mesh, such as LoRA's B under FSDP, is cut along its last dim.
    """
    by_table = spec(dims, shape, mesh, name)
    if math.prod(shape) < SMALLEST_SHARDED:
        return PartitionSpec()
    is_cut = not NamedSharding(mesh, by_table).is_fully_replicated
    if is_cut or math.prod(shape) < SMALLEST_CUT_ANYHOW:
        return by_table
    for axis in ("fsdp", "tensor"):
        for place in reversed(range(len(shape))):
            size = mesh.shape[axis]
            if size > 1 and dims[place] != "layers" and shape[place] % size == 0:
                return PartitionSpec(*(axis if i == place else None for i in range(len(shape))))
    return by_table


def shardings(tree: Any, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> Any:
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
    """Put a tree of arrays where `shardings` says.

    What lies in one process's memory must be the same in all; each takes the parts that it holds.
    """

    def put(leaf: Any, sharding: NamedSharding) -> Any:
        at_hand = getattr(leaf, "is_fully_addressable", True)
        if sharding.is_fully_addressable or not at_hand:
            return jax.device_put(leaf, sharding)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = put(jax.random.key_data(leaf), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        # device_put would first send all of it to all processes, to compare.
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda part: whole[part])

    return jax.tree.map(put, tree, shardings(tree, mesh))


def whole(array: Any) -> np.ndarray:
    """All of an array, wherever its parts lie. All processes call it, for the same arrays."""
    if getattr(array, "is_fully_addressable", True):
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def batch_partition(name: str) -> PartitionSpec:
    """Where an array of a batch goes: its rows, and of a token stream the positions too."""
    dims = ["rows", "tokens"] if name.endswith(("_ids", "_segments")) else ["rows"]
    return PartitionSpec(*(DIM_TO_AXIS[dim] for dim in dims))


@functools.cache  # asked for at each step
def process_rows(batch_rows: int, mesh: jax.sharding.Mesh) -> np.ndarray:
    """The places in a global batch of the rows that this process's devices hold, in order.

    Where the mesh cuts models or positions over processes, several of them hold the same rows.
    """
    sharding = NamedSharding(mesh, batch_partition("rows"))
    parts = sharding.addressable_devices_indices_map((batch_rows,)).values()
    return np.unique(np.concatenate([np.arange(batch_rows)[part] for part in parts]))


def place_batch(
    batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh, batch_rows: int | None = None
) -> dict[str, jax.Array]:
    """A batch → global arrays, cut as `batch_partition` says.

    batch_rows: how many rows the global batch has, of which `batch` holds those of `process_rows`;
    None: it holds all of them, the same in every process.
    """

    mine = None if batch_rows is None else process_rows(batch_rows, mesh)

    def put(name: str, rows: np.ndarray) -> jax.Array:
        places = np.arange(len(rows)) if mine is None else mine
        shape = (batch_rows or len(rows), *rows.shape[1:])

        def part(index: Any) -> np.ndarray:
            here = np.searchsorted(places, np.arange(shape[0])[index[0]])
            return rows[here][:, *index[1:]]

        sharding = NamedSharding(mesh, batch_partition(name))
        return jax.make_array_from_callback(shape, sharding, part)

    return {name: put(name, rows) for name, rows in batch.items()}


def check_rows(rows: int, mesh: jax.sharding.Mesh, field: str, accumulation: int = 1) -> None:
    """Raise ValueError unless `rows`, in so many micro-batches, can be cut over the mesh."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % (ways * accumulation):
        parts = "data × fsdp" + (f" × accumulation, {accumulation}" if accumulation > 1 else "")
        raise ValueError(
            f"config.{field} is {rows}; it must be a multiple of {ways * accumulation}, {parts}."
        )


def rows_for(rows: int, mesh: jax.sharding.Mesh) -> int:
    """The least number of rows, not below `rows`, that can be cut over the mesh."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-rows // ways) * ways


def check_length(length: int, mesh: jax.sharding.Mesh, field: str) -> None:
    """Raise ValueError unless rows of `length` tokens can be cut over the mesh."""
    ways = mesh.shape["context"]
    if length % ways:
        raise ValueError(
            f"config.{field} is {length}; it must be a multiple of {ways}, config.mesh.context."
        )
