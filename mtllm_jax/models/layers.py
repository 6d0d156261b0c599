"""What every model here is made of: parameters with named dims, linear maps, norms, stacked layers.

B rows, T positions, S positions read, L layers, E width, N heads, H head width, I input width,
O output width, R LoRA rank.

Modules are containers: they are split once into (graph, trainable state, frozen state), and merged
again inside `jax.jit`, where their methods are pure functions of the arrays they hold.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.filterlib import Filter
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from mtllm_jax.ops.attention import attention
from mtllm_jax.ops.layout import axis_size, constrain, gathered

Initializer = Callable[[Array, tuple[int, ...], DTypeLike], Array]
Layers = TypeVar("Layers", bound=nnx.Module)
_PRODUCT = "product"  # what a linear map gives, to `REMAT_POLICIES`


class LoRAParam(nnx.Param):
    """A low-rank factor. A type of its own, so that a filter can tell it from the base weights."""


def param(
    rngs: nnx.Rngs,
    shape: Sequence[int],
    dims: Sequence[str],
    init: Initializer,
    kind: type[nnx.Param] = nnx.Param,
) -> nnx.Param:
    """A float32 parameter. `dims` names each dim for `sharding.py`: ("layers", "embed", "ffn")."""
    if len(shape) != len(dims):
        raise ValueError(f"shape {tuple(shape)} has {len(shape)} dims, its names are {tuple(dims)}")
    return kind(init(rngs.params(), tuple(shape), jnp.float32), dims=tuple(dims))


def stacked(
    num_layers: int | None, shape: Sequence[int], dims: Sequence[str]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Shape and dims with the layer dim in front, or as they are for `num_layers=None`."""
    if num_layers is None:
        return tuple(shape), tuple(dims)
    return (num_layers, *shape), ("layers", *dims)


def split(module: nnx.Module, chosen: Filter) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """(graph, the state that the filter takes, all other state), as `nnx.merge` takes them."""
    graph, taken, *others = nnx.split(module, chosen, ...)
    return graph, taken, others[0]


class Linear(nnx.Module):
    """y = x @ kernel + bias, plus a low-rank update where `lora.attach` put one.

    kernel_IO is [I, O] (the transpose of torch's), with a leading L in stacked layers. One in int8
    stands for kernel_IO · kernel_scale_O (`models/quantised.py`). The update is
    scale · (dropout(x) @ lora_a_IR) @ lora_b_RO, scale = alpha / R (LoRA, arXiv 2106.09685).
    """

    def __init__(
        self,
        size_in: int,
        size_out: int,
        dims: tuple[str, str],
        *,
        init: Initializer,
        rngs: nnx.Rngs,
        num_layers: int | None = None,
        use_bias: bool = False,
    ):
        shape, names = stacked(num_layers, (size_in, size_out), dims)
        self.kernel = param(rngs, shape, names, init)
        self.kernel_scale: nnx.Param | None = nnx.data(None)
        shape, names = stacked(num_layers, (size_out,), dims[1:])
        zeros = nnx.initializers.zeros
        self.bias = nnx.data(param(rngs, shape, names, zeros) if use_bias else None)
        self.lora_a: nnx.Param | None = nnx.data(None)
        self.lora_b: nnx.Param | None = nnx.data(None)
        self.lora_scale = 0.0
        self.lora_dropout = 0.0

    def __call__(self, x: Array, dropout_key: Array | None = None) -> Array:
        """[..., I] → [..., O] in the dtype of `x`. Without `dropout_key` nothing is dropped."""
        # In two dims: XLA's CPU backward of a three-dim product is far from a plain matrix product.
        # Positions that are cut over the mesh cannot be merged with rows that are cut too.
        rows = x.reshape(-1, x.shape[-1]) if axis_size("context") == 1 else x
        # A bias is added before rounding: rounded twice, a sum is further off than torch's.
        rounded = None if self.bias is None else jnp.float32

        def product(rows: Array) -> Array:
            kernel = weight(self.kernel, x.dtype)
            return jnp.matmul(rows, kernel, preferred_element_type=rounded)

        if self.kernel_scale is not None or axis_size("fsdp") > 1:
            # Backward the kernel is widened and gathered again: kept, all layers would be.
            product = jax.checkpoint(product, prevent_cse=False)
        y = product(rows)
        if self.kernel_scale is not None:
            y = y.astype(jnp.float32) * over_last(weight(self.kernel_scale, jnp.float32), y.ndim)
        if self.bias is not None:
            y = y + over_last(self.bias[...], y.ndim)
        y = y.astype(x.dtype)
        if self.lora_a is not None and self.lora_b is not None:
            low = dropout(rows, self.lora_dropout, dropout_key) @ weight(self.lora_a, x.dtype)
            y = y + self.lora_scale * (low @ weight(self.lora_b, x.dtype))
        return checkpoint_name(y.reshape(*x.shape[:-1], -1), _PRODUCT)


def weight(parameter: nnx.Param, dtype: DTypeLike) -> Array:
    """A matrix or vector of one layer in `dtype`, whole over the mesh's fsdp axis."""
    value = parameter[...]
    dims = parameter.get_metadata("dims")[-value.ndim :]
    if value.dtype == jnp.int8:  # it travels as it is, and is widened where it is used
        return gathered(value, *dims).astype(dtype)
    return gathered(value.astype(dtype), *dims)


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Inverted dropout; the identity for rate 0 or without a key."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


class RMSNorm(nnx.Module):
    """x / rms(x) · scale_D, computed in float32 (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float, rngs: nnx.Rngs, num_layers: int | None = None):
        shape, names = stacked(num_layers, (width,), ("norm",))
        self.scale = param(rngs, shape, names, nnx.initializers.ones)
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + self.eps)
        return (x32 * over_last(self.scale[...], x.ndim)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x − mean) / std · scale_D + bias_D, computed in float32."""

    def __init__(self, width: int, eps: float, rngs: nnx.Rngs, num_layers: int | None = None):
        shape, names = stacked(num_layers, (width,), ("norm",))
        self.scale = param(rngs, shape, names, nnx.initializers.ones)
        self.bias = param(rngs, shape, names, nnx.initializers.zeros)
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, -1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + self.eps)
        y = x32 * over_last(self.scale[...], x.ndim) + over_last(self.bias[...], x.ndim)
        return y.astype(x.dtype)


def over_last(vector_D: Array, ndim: int) -> Array:
    """A float32 vector over the last of `ndim` dims (implicit rank promotion is off in tests)."""
    return jnp.expand_dims(vector_D.astype(jnp.float32), tuple(range(ndim - 1)))


def biased_linear(
    size_in: int, size_out: int, dims: tuple[str, str], num_layers: int, rngs: nnx.Rngs
) -> Linear:
    """A linear map with bias, of stacked layers, Xavier-initialised."""
    init = nnx.initializers.variance_scaling(1.0, "fan_avg", "uniform", batch_axis=0)
    return Linear(
        size_in, size_out, dims, init=init, rngs=rngs, num_layers=num_layers, use_bias=True
    )


def split_key(key: Array | None, num: int) -> list[Array | None]:
    """`num` keys of one, or as many None where there is no key."""
    return [None] * num if key is None else list(jax.random.split(key, num))


class Attention(nnx.Module):
    """Multi-head attention with biases, of stacked layers. backend: a name in `attention.NAMES`."""

    def __init__(
        self, width: int, num_heads: int, num_layers: int, rngs: nnx.Rngs, backend: str = "auto"
    ):
        inward, outward = ("embed", "heads"), ("heads", "embed")
        self.query = biased_linear(width, width, inward, num_layers, rngs)
        self.key = biased_linear(width, width, inward, num_layers, rngs)
        self.value = biased_linear(width, width, inward, num_layers, rngs)
        self.out = biased_linear(width, width, outward, num_layers, rngs)
        self.num_heads = num_heads
        self.backend = backend

    def heads(self, linear: Linear, x_BTE: Array, key: Array | None = None) -> Array:
        """[B, T, E] → [B, T, N, H] by one of the linear maps."""
        y_BTE = linear(x_BTE, key)
        return y_BTE.reshape(*y_BTE.shape[:2], self.num_heads, -1)

    def __call__(
        self,
        x_BTE: Array,
        memory_BSE: Array,
        segments_BT: Array,
        memory_segments_BS: Array,
        *,
        causal: bool = False,
        packed: bool = True,
        dropout_key: Array | None = None,
    ) -> Array:
        """[B, T, E]: what the positions of `x` read from those of `memory` of their own segment."""
        query_key, key_key, value_key, out_key = split_key(dropout_key, 4)
        read_BTNH = attention(
            self.heads(self.query, x_BTE, query_key),
            self.heads(self.key, memory_BSE, key_key),
            self.heads(self.value, memory_BSE, value_key),
            query_segments_BT=segments_BT,
            key_segments_BS=memory_segments_BS,
            causal=causal,
            packed=packed,
            backend=self.backend,
        )
        return self.out(read_BTNH.reshape(x_BTE.shape), out_key)


REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    # Of a linear map with adapters the sum alone is kept, not each of its products.
    "dots": jax.checkpoint_policies.save_only_these_names(_PRODUCT),
}


def scan_layers(
    layers: Layers,
    apply: Callable[[Layers, Array, Array | None], Array],
    h: Array,
    *,
    num_layers: int,
    dropout_key: Array | None = None,
    remat: str = "none",
    unroll: bool = False,
) -> Array:
    """Run stacked layers one after the other: `h = apply(layer, h, key)` for each.

    layers: one module whose parameters lead with dim L. remat: a name in `REMAT_POLICIES`.
    unroll: a Python loop instead of `lax.scan` (larger program, faster for few small layers).
    """
    graph, state = nnx.split(layers)
    keys = None if dropout_key is None else jax.random.split(dropout_key, num_layers)

    def step(h: Array, state_and_key: tuple[nnx.State, Array | None]) -> tuple[Array, None]:
        layer_state, key = state_and_key
        return by_rows(apply(nnx.merge(graph, layer_state), by_rows(h), key)), None

    h = by_rows(h)

    if remat != "none":
        step = jax.checkpoint(step, policy=REMAT_POLICIES[remat], prevent_cse=unroll)
    if not unroll:
        return jax.lax.scan(step, h, (state, keys))[0]
    for i in range(num_layers):
        h, _ = step(h, jax.tree.map(lambda x, i=i: x[i], (state, keys)))
    return h


def scan_encoder(
    stacks: Sequence[Layers | None],
    h_BSE: Array,
    segments_BS: Array,
    *,
    packed: bool,
    dropout_key: Array | None,
    remat: str,
    unroll: bool,
) -> Array:
    """Run an encoder's stacked layers one after the other: its own, and those taken off as `top`,
    None where there are none. The other arguments are those of `encode` and `scan_layers`."""
    for layers in filter(None, stacks):
        h_BSE = scan_layers(
            layers,
            lambda layer, h, key: layer(h, segments_BS, key, packed),
            h_BSE,
            num_layers=depth(layers),
            dropout_key=dropout_key,
            remat=remat,
            unroll=unroll,
        )
    return h_BSE


def depth(layers: nnx.Module) -> int:
    """Of stacked layers, their number."""
    return jax.tree.leaves(nnx.state(layers))[0].shape[0]


def cut_off_last(layers: Layers, num: int) -> tuple[Layers, Layers]:
    """Stacked layers as two modules: all but the last `num`, and those, in float32."""
    graph, state = nnx.split(layers)
    first = jax.tree.map(lambda x: x[:-num], state)
    last = jax.tree.map(lambda x: x[-num:].astype(jnp.float32), state)
    return nnx.merge(graph, first), nnx.merge(graph, last)


def put_together(first: Layers, last: Layers) -> Layers:
    """What `cut_off_last` was given, in the wider dtype of the two."""
    graph, state = nnx.split(first)
    both = jax.tree.map(lambda x, y: jnp.concatenate((x, y)), state, nnx.state(last))
    return nnx.merge(graph, both)


def look_up(table_VD: Array, ids_BT: Array) -> Array:
    """Rows of a table, [B, T, D]. Over fsdp each device reads its part of the width for the rows of
    all its group, and gives each its own: neither table nor batch is ever whole."""
    h_BTD = table_VD[constrain(ids_BT, "groups", "tokens")]
    return by_rows(constrain(h_BTD, "groups", "tokens", "embed"))


def by_rows(h_BTD: Array) -> Array:
    """Activations, laid over the mesh by their rows and positions."""
    return constrain(h_BTD, "rows", "tokens", "features")


def positions_in_segment(segments_BT: Array) -> Array:
    """Position of each token in its packed text, from 0, counting tokens only. int32 [B, T].

    segments_BT: 0 = padding, else the text a token belongs to, in ascending order along a row.
    Padding may stand anywhere; what a padded position gets has no meaning.
    """
    is_token = segments_BT > 0
    before = jnp.pad(jax.lax.cummax(segments_BT, axis=1)[:, :-1], ((0, 0), (1, 0)))
    is_start = is_token & (segments_BT > before)
    counted = jnp.cumsum(is_token, axis=1, dtype=jnp.int32) - 1
    return counted - jax.lax.cummax(jnp.where(is_start, counted, 0), axis=1)
