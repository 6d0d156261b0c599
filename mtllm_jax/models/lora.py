"""Low-rank adaptation (LoRA, arXiv 2106.09685): y = x W + (alpha / R) · dropout(x) A B.

L layers, I input width, O output width, R rank.

The factors are of type `LoRAParam`, so one split tells them from the weights they adapt:

    graph, adapters, frozen = split(model, LoRAParam)

and a module that `attach` was not called on, built from the same weights, is the teacher.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from mtllm_jax.models.layers import Linear, LoRAParam, param

Module = TypeVar("Module", bound=nnx.Module)

# U(−1/√I, 1/√I): torch's own initialisation of a linear map, which PEFT gives to A. B starts at 0.
_INIT_A = nnx.initializers.variance_scaling(
    1 / 3, "fan_in", "uniform", in_axis=-2, out_axis=-1, batch_axis=0
)
_INIT_A_BARE = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def attach(
    module: nnx.Module,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str],
    rngs: nnx.Rngs,
) -> None:
    """Put fresh adapters, in place, on every `Linear` whose attribute name is in `targets`.

    targets: names such as "q", "k", "v", "o", "gate", "up", "down", or "all" for every linear map.
    The outputs of `module` do not change until B is trained. ValueError for a target that names no
    linear map, no targets, a map that already has an adapter, a rank below 1 or a dropout outside
    [0, 1); nothing is changed then.
    """
    if rank < 1:
        raise ValueError(f"LoRA rank is {rank}; it must be at least 1")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"LoRA dropout is {dropout}; it must be at least 0 and below 1")
    linears = list(_linears(module))
    names = sorted({name for name, _ in linears})
    allowed = f"allowed: {', '.join(names)}, all"
    if not targets:
        raise ValueError(f"LoRA targets are empty; {allowed}")
    for target in targets:
        if target != "all" and target not in names:
            raise ValueError(f"LoRA target {target!r} matches no linear map; {allowed}")
    chosen = [(name, linear) for name, linear in linears if "all" in targets or name in targets]
    for name, linear in chosen:
        if linear.lora_a is not None:
            raise ValueError(f"LoRA target {name!r} already has an adapter; merge it first")
    for _, linear in chosen:
        _attach_one(linear, rank, alpha, dropout, rngs)


def _attach_one(linear: Linear, rank: int, alpha: float, dropout: float, rngs: nnx.Rngs) -> None:
    *layers, size_in, size_out = linear.kernel.shape
    dims_a, dims_b = _dims(linear)
    init = _INIT_A if layers else _INIT_A_BARE
    linear.lora_a = param(rngs, (*layers, size_in, rank), dims_a, init, LoRAParam)
    zeros = nnx.initializers.zeros
    linear.lora_b = param(rngs, (*layers, rank, size_out), dims_b, zeros, LoRAParam)
    linear.lora_scale = alpha / rank
    linear.lora_dropout = dropout


def put(
    linear: Linear, lora_a: Array, lora_b: Array, *, scale: float, dropout: float = 0.0
) -> None:
    """Put ready factors on a linear map, in place: [I, R] and [R, O], or with a leading L."""
    dims_a, dims_b = _dims(linear)
    linear.lora_a = LoRAParam(lora_a, dims=dims_a)
    linear.lora_b = LoRAParam(lora_b, dims=dims_b)
    linear.lora_scale = scale
    linear.lora_dropout = dropout


def joined(base: Module, one: nnx.Module, other: nnx.Module) -> Module:
    """A copy of `base` with adapters that do what those of `one` and of `other` do together.

    Their factors stand side by side, [I, R + R'] and [R + R', O]. Both are on the same linear maps
    of modules of the form of `base`.
    """
    result = nnx.clone(base)
    threes = zip(_linears(result), _linears(one), _linears(other), strict=True)
    for (_, linear), (_, first), (_, second) in threes:
        if first.lora_a is None or first.lora_b is None:
            continue
        assert second.lora_a is not None and second.lora_b is not None
        share = second.lora_scale / first.lora_scale
        put(
            linear,
            jnp.concatenate([first.lora_a[...], second.lora_a[...]], axis=-1),
            jnp.concatenate([first.lora_b[...], share * second.lora_b[...]], axis=-2),
            scale=first.lora_scale,
            dropout=second.lora_dropout,
        )
    return result


def _dims(linear: Linear) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the dims of both factors."""
    *layers, dim_in, dim_out = linear.kernel.dims
    return (*layers, dim_in, "rank"), (*layers, "rank", dim_out)


def merge(module: nnx.Module) -> None:
    """Add scale · A B to the kernels, in place, and take the adapters off. See `add`."""
    for _, linear in _linears(module):
        if linear.lora_a is None or linear.lora_b is None:
            continue
        add(linear, linear.lora_a[...], linear.lora_b[...], linear.lora_scale)
        linear.lora_a = linear.lora_b = nnx.data(None)
        linear.lora_scale = linear.lora_dropout = 0.0


def add(
    linear: Linear,
    lora_a: Array | np.ndarray,
    lora_b: Array | np.ndarray,
    scale: float,
    *,
    donate: bool = False,
) -> None:
    """Add scale · A B to a linear map's kernel, in place: [I, R] and [R, O], or with a leading L.

    The sum is made in float32, layer by layer, and stored in the kernel's dtype, where the kernel
    lies. donate: into its very memory, which no other module may share then. ValueError for int8.
    """
    if linear.kernel_scale is not None:
        raise ValueError("nothing can be added to weights in int8; read the model in bfloat16")
    kernel = linear.kernel[...]
    place = kernel.sharding if kernel.committed else None
    linear.kernel.set_value(_merge_into(place, donate)(kernel, lora_a, lora_b, scale))


def merged(
    kernel_IO: Array, a_IR: Array, b_RO: Array, scale: Array | float, dtype: DTypeLike
) -> Array:
    """kernel + scale · A B, summed in float32: [I, O] in `dtype`."""
    wide_IO, a_IR, b_RO = (x.astype(jnp.float32) for x in (kernel_IO, a_IR, b_RO))
    update_IO = jnp.matmul(a_IR, b_RO, precision=jax.lax.Precision.HIGHEST)
    return (wide_IO + scale * update_IO).astype(dtype)


@functools.cache
def _merge_into(place: jax.sharding.Sharding | None, donate: bool) -> Callable[..., Array]:
    """Jitted (kernel, A, B, scale) → merged kernel at `place`; None = where the kernel lies."""
    return jax.jit(_merged, out_shardings=place, donate_argnums=(0,) if donate else ())


def _merged(kernel: Array, lora_a: Array, lora_b: Array, scale: Array) -> Array:
    """kernel [I, O], A [I, R] and B [R, O], or all with a leading L."""

    def put(layer: Array, kernel_LIO: Array) -> Array:
        one = kernel_LIO[layer], lora_a[layer], lora_b[layer]
        return kernel_LIO.at[layer].set(merged(*one, scale, kernel.dtype))

    if kernel.ndim == 2:
        return merged(kernel, lora_a, lora_b, scale, kernel.dtype)
    return jax.lax.fori_loop(0, kernel.shape[0], put, kernel)


def _linears(module: nnx.Module) -> Iterator[tuple[str, Linear]]:
    """(attribute name, linear map) of every `Linear` below `module`."""
    for path, node in nnx.iter_graph(module):
        if isinstance(node, Linear) and path:
            yield str(path[-1]), node
