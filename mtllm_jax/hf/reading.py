"""A parameter of a model, read from a folder's tensors straight into the devices that hold it.

A parameter is one tensor, or those of all layers stacked along its leading dim. Kernels are the
transpose of what torch stores. Beside the parameter itself the host holds a layer of it and some
pieces of rows.

L layers, I input width, O output width, R rank.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from mtllm_jax.hf.tensors import CHUNK, Tensors, row_chunks
from mtllm_jax.models import lora
from mtllm_jax.models.quantised import quantised

_READERS = 4  # pieces read at a time
_TRANSPOSED_ROWS = 256  # transposing more at a time misses the processor's caches

Bounds = tuple[tuple[int, int], ...]  # (begin, end) of each dim
_ALIGNMENT = 64  # bytes

Rows = tuple[str, int, int]  # of a tensor, as it is stored: its name, begin, end
# Where rows go: into all of an array, of which they may have more columns.
Target = tuple[np.ndarray, tuple[slice, ...]]


def read_parameter(
    tensors: Tensors,
    names: Sequence[str],
    shape: tuple[int, ...],
    dtype: np.dtype,
    place: NamedSharding | None,
    *,
    is_stacked: bool,
    is_kernel: bool,
) -> jax.Array:
    """The parameter that the tensors `names` make up: one tensor, or one for each layer.

    place: None = the first device. Small layers are read together. Large ones go one by one into a
    buffer that lies where the parameter is to be; on the CPU that is the host's own memory, and all
    are read straight into it. Of several processes all must call.
    """
    read = functools.partial(
        _read, tensors, dtype=dtype, place=place, is_stacked=is_stacked, is_kernel=is_kernel
    )
    groups = list(_together(names, shape))
    if not is_stacked or len(groups) == 1 or _is_on_host(place):
        return read(names, shape)
    buffer = _zeros(shape, dtype, place)
    for first, group in groups:
        layers = read(group, (len(group), *shape[1:]))
        # Waiting keeps the host from reading ahead of the device, layer upon layer.
        buffer = _put(place)(buffer, layers, np.int32(first)).block_until_ready()
    return buffer


def read_quantised(
    tensors: Tensors,
    names: Sequence[str],
    shape: tuple[int, ...],
    places: tuple[NamedSharding | None, NamedSharding | None],
    updates: Sequence[tuple[np.ndarray, np.ndarray]] = (),
) -> tuple[jax.Array, jax.Array]:
    """The kernels of all layers in int8, and the scales of their outputs: see `quantised`.

    places: of both; None = the first device. updates: A [L, I, R] and B [L, R, O], whose products
    are added to the kernels before. Small layers are quantised together and large ones one by one,
    in float32, where they are to lie: no more of the wide kernels is ever anywhere.
    """
    num_layers, _, size_out = shape
    kernel = _zeros(shape, np.dtype(np.int8), places[0])
    scale = _zeros((num_layers, size_out), np.dtype(np.float32), places[1])
    for first, group in _together(names, shape):
        layers = _read(
            tensors,
            group,
            (len(group), *shape[1:]),
            dtype=np.dtype(np.float32),
            place=places[0],
            is_stacked=True,
            is_kernel=True,
        )
        chosen = slice(first, first + len(group))
        factors = [(a_LIR[chosen], b_LRO[chosen]) for a_LIR, b_LRO in updates]
        put = _put_quantised(*places)
        kernel, scale = put(kernel, scale, layers, factors, np.int32(first))
        scale.block_until_ready()
    return kernel, scale


def _together(names: Sequence[str], shape: tuple[int, ...]) -> Iterator[tuple[int, Sequence[str]]]:
    """(first layer, names) of the layers that are read in one go."""
    step = max(1, CHUNK // max(1, math.prod(shape[1:])))
    for first in range(0, len(names), step):
        yield first, names[first : first + step]


def _zeros(shape: tuple[int, ...], dtype: np.dtype, place: NamedSharding | None) -> jax.Array:
    return jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=place)()


def _is_on_host(place: NamedSharding | None) -> bool:
    device = jax.devices()[0] if place is None else next(iter(place.device_set))
    return device.platform == "cpu"


@functools.cache
def _put(place: NamedSharding | None) -> Any:
    """Jitted (buffer, layers, first) → the buffer itself, with `layers` at `first` and after it."""

    def put(buffer: jax.Array, layers: jax.Array, first: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(buffer, layers, first, 0)

    return jax.jit(put, donate_argnums=0, out_shardings=place)


@functools.cache
def _put_quantised(*places: NamedSharding | None) -> Any:
    """Jitted (kernel, scale, layers, factors, first) → both with what `layers` become in them."""

    def put(
        kernel_LIO: jax.Array,
        scale_LO: jax.Array,
        layers: jax.Array,
        factors: Sequence[tuple[jax.Array, jax.Array]],
        first: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        for a_LIR, b_LRO in factors:
            layers = lora.merged(layers, a_LIR, b_LRO, 1.0, jnp.float32)
        kernel, scale = quantised(layers)
        return (
            jax.lax.dynamic_update_slice_in_dim(kernel_LIO, kernel, first, 0),
            jax.lax.dynamic_update_slice_in_dim(scale_LO, scale, first, 0),
        )

    return jax.jit(put, donate_argnums=(0, 1), out_shardings=places)


def _read(
    tensors: Tensors,
    names: Sequence[str],
    shape: tuple[int, ...],
    *,
    dtype: np.dtype,
    place: NamedSharding | None,
    is_stacked: bool,
    is_kernel: bool,
) -> jax.Array:
    """An array of one tensor or of a stack of them, by way of the host.

    Rows of a tensor that no device of this process holds are not read, the others once. Rows are
    read whole, also for parts that are cut across them: a seek for each would cost more than it
    saves.
    """
    whole = (slice(None),) * len(shape)
    indices: list[tuple[slice, ...] | None] = [whole]
    if place is not None:
        indices = list(place.addressable_devices_indices_map(shape).values())
    bounds = {_bounds(index, shape) for index in indices}
    parts = {part: _aligned([end - begin for begin, end in part], dtype) for part in bounds}
    _fill(tensors, _targets(parts, names, is_stacked, is_kernel), is_kernel)
    if place is None:
        part = parts[_bounds(whole, shape)]
        return jax.device_put(part, jax.devices()[0], may_alias=True).block_until_ready()
    return jax.make_array_from_callback(
        shape, place, lambda index: parts[_bounds(index, shape)]
    ).block_until_ready()


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An array that begins where the CPU's compiler wants it: there it becomes jax's uncopied."""
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + num_bytes].view(dtype).reshape(shape)


def _bounds(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> Bounds:
    """What a part takes of an array. (Slices cannot be keys before Python 3.12.)"""
    assert index is not None
    return tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))


def _targets(
    parts: dict[Bounds, np.ndarray], names: Sequence[str], is_stacked: bool, is_kernel: bool
) -> dict[Rows, list[Target]]:
    """For each range of rows that is needed, where it goes to, seen as torch lays it out."""
    targets: dict[Rows, list[Target]] = {}
    for bounds, part in parts.items():
        for layer, name in enumerate(names):
            target, of_tensor = (part[layer], bounds[1:]) if is_stacked else (part, bounds)
            if is_kernel:
                target, of_tensor = target.T, of_tensor[::-1]
            (begin, end), *columns = of_tensor
            taken = tuple(slice(*column) for column in columns)
            targets.setdefault((name, begin, end), []).append((target, taken))
    return targets


def _fill(tensors: Tensors, targets: dict[Rows, list[Target]], is_kernel: bool) -> None:
    """Reads the rows, in pieces and several at a time, and casts them into their targets."""

    def read_piece(rows: Rows, begin: int, end: int) -> None:
        name, start, _ = rows
        piece = tensors.read(name, start + begin, start + end)
        step = _TRANSPOSED_ROWS if is_kernel else max(1, len(piece))
        for target, columns in targets[rows]:
            for row in range(0, len(piece), step):
                some = piece[(slice(row, row + step), *columns)]
                target[begin + row : begin + row + len(some)] = some

    pieces = [
        (rows, begin, end)
        for rows in targets
        for begin, end in row_chunks((rows[2] - rows[1], *tensors.shape(rows[0])[1:]))
    ]
    with ThreadPoolExecutor(_READERS) as pool:
        for _ in pool.map(lambda piece: read_piece(*piece), pieces):
            pass  # raises what a reader raised
