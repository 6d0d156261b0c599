"""Frozen linear maps in int8: a kernel of whole numbers, and a float32 scale for each output.

L layers, I input width, O output width.

kernel_LIO ≈ int8_LIO · scale_LO, where the largest weight of an output is 127.5 steps: what is
stored is within half a step of what was read. `Linear` multiplies by the whole numbers, which
bfloat16 holds exactly, and then by the scale. Embeddings, norms and biases stay floats.
"""

import importlib.util
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from mtllm_jax.models.layers import Linear

Module = TypeVar("Module", bound=nnx.Module)


def check_available() -> None:
    """ValueError where qwix is missing, which does the rounding."""
    if importlib.util.find_spec("qwix") is None:
        raise ValueError("weights in int8 take qwix, which is missing; pip install -e '.[int8]'")


def quantised(kernel_LIO: Array) -> tuple[Array, Array]:
    """int8 [L, I, O], and the float32 scale [L, O] of its outputs. ValueError without qwix."""
    check_available()
    import qwix  # here, as it is an extra

    found = qwix.quantize(kernel_LIO.astype(jnp.float32), jnp.int8, channelwise_axes=(0, 2))
    return found.qvalue, found.scale[:, 0]


def in_dtype(module: Module, dtype: DTypeLike) -> Module:
    """The shapes of a module (of arrays or shapes), its parameters in `dtype`.

    int8: kernels of stacked layers, which get a scale beside them; the rest is bfloat16 then.
    """
    is_int8 = jnp.dtype(dtype) == jnp.int8
    floats = jnp.bfloat16 if is_int8 else dtype
    graph, state = nnx.split(module)
    shapes = nnx.merge(graph, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, floats), state))
    for _, linear in nnx.iter_graph(shapes) if is_int8 else ():
        if isinstance(linear, Linear) and len(linear.kernel.shape) == 3:
            num_layers, _, size_out = linear.kernel.shape
            layers, _, dim_out = dims = linear.kernel.get_metadata("dims")
            kernel = jax.ShapeDtypeStruct(linear.kernel.shape, jnp.int8)
            scale = jax.ShapeDtypeStruct((num_layers, size_out), jnp.float32)
            linear.kernel = nnx.Param(kernel, dims=dims)
            linear.kernel_scale = nnx.Param(scale, dims=(layers, dim_out))
    return shapes
