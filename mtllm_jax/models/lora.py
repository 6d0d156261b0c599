"""Low-rank adaptation (LoRA, arXiv 2106.09685): y = x W + (alpha / R) · dropout(x) A B.

L layers, I input width, O output width, R rank.

The factors are of type `LoRAParam`, so one split tells them from the weights they adapt:

    graph, adapters, frozen = split(model, LoRAParam)

and a module that `attach` was not called on, built from the same weights, is the teacher.
"""

from collections.abc import Iterator, Sequence

import jax.numpy as jnp
from flax import nnx

from mtllm_jax.models.layers import Linear, LoRAParam, param, stacked

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
    num_layers = layers[0] if layers else None
    dim_in, dim_out = linear.kernel.dims[-2:]
    shape, dims = stacked(num_layers, (size_in, rank), (dim_in, "rank"))
    init = _INIT_A if layers else _INIT_A_BARE
    linear.lora_a = param(rngs, shape, dims, init, LoRAParam)
    shape, dims = stacked(num_layers, (rank, size_out), ("rank", dim_out))
    linear.lora_b = param(rngs, shape, dims, nnx.initializers.zeros, LoRAParam)
    linear.lora_scale = alpha / rank
    linear.lora_dropout = dropout


def merge(module: nnx.Module) -> None:
    """Add scale · A B to the kernels, in place, and take the adapters off.

    The sum is made in float32 and stored in the kernel's dtype.
    """
    for _, linear in _linears(module):
        if linear.lora_a is None or linear.lora_b is None:
            continue
        a, b = (x[...].astype(jnp.float32) for x in (linear.lora_a, linear.lora_b))
        kernel = linear.kernel[...]
        merged = kernel.astype(jnp.float32) + linear.lora_scale * (a @ b)
        linear.kernel[...] = merged.astype(kernel.dtype)
        linear.lora_a = linear.lora_b = nnx.data(None)
        linear.lora_scale = linear.lora_dropout = 0.0


def _linears(module: nnx.Module) -> Iterator[tuple[str, Linear]]:
    """(attribute name, linear map) of every `Linear` below `module`."""
    for path, node in nnx.iter_graph(module):
        if isinstance(node, Linear) and path:
            yield str(path[-1]), node
