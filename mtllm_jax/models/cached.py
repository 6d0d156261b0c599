"""A Llama that reads on, token after token: keys and values of what it has read are kept.

B rows, S positions of prompts, C slots of a cache, D width, N query heads, K key/value heads,
G = N / K, H head width, V vocabulary.

The layers lie apart here: of stacked weights each layer's would be copied at every token.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from mtllm_jax.models.layers import by_rows, split
from mtllm_jax.models.llama import Llama, LlamaLayers
from mtllm_jax.ops.layout import constrain

_ROOM_DIM = 2  # of keys and values: C


class Cache(NamedTuple):
    """Keys and values [B, K, C, H] of each layer, of prompts and of the tokens after them.

    The first S of C slots hold a row's prompt, padded on the right, and slot S + n the n-th token
    after it, in all rows alike. lengths_B: tokens of the prompts, int32.
    """

    layers: tuple[tuple[Array, Array], ...]
    lengths_B: Array

    def with_room(self, num_slots: int) -> "Cache":
        """The same with so many more slots."""
        room = [(0, num_slots if dim == _ROOM_DIM else 0) for dim in range(4)]
        return self._replace(layers=jax.tree.map(lambda x: jnp.pad(x, room), self.layers))


def apart(model: Llama) -> tuple[nnx.GraphDef, nnx.State, list[nnx.State]]:
    """A model → (graph, its state but for layers, the state of each layer), as `CachedLlama` takes
    them."""
    graph, stacked, others = split(model, nnx.PathContains("layers"))
    num_layers = len(jax.tree.leaves(stacked)[0])
    each = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(num_layers)]
    return graph, others, each


class CachedLlama:
    """The model in parts; to be made inside `jax.jit`."""

    def __init__(self, graph: nnx.GraphDef, others: nnx.State, each: Sequence[nnx.State]):
        models: list[Llama] = [nnx.merge(graph, layer, others) for layer in each]
        self._model = models[0]
        self._layers: list[LlamaLayers] = [model.layers for model in models]
        self.config = self._model.config

    def prefill(
        self, ids_BS: Array, lengths_B: Array, dtype: DTypeLike = jnp.float32
    ) -> tuple[Array, Cache]:
        """Prompts, padded on the right → float32 logits [B, V] behind their last tokens, and their
        cache, which has no room yet."""
        places_1S = jnp.arange(ids_BS.shape[1], dtype=jnp.int32)[None]
        segments_BS = (places_1S < lengths_B[:, None]).astype(jnp.int32)
        positions_BS = jnp.broadcast_to(places_1S, ids_BS.shape)
        h_BSD = by_rows(self._model.embed(ids_BS, dtype))
        kept = []
        for layer in self._layers:
            q_BSNH, k_BSKH, v_BSKH = layer.heads(layer.attention_norm(h_BSD), positions_BS)
            read_BSNH = layer.read(q_BSNH, k_BSKH, v_BSKH, segments_BS, causal=True, packed=False)
            h_BSD = by_rows(_after_reading(layer, h_BSD, read_BSNH))
            kept.append((_laid(k_BSKH.swapaxes(1, 2)), _laid(v_BSKH.swapaxes(1, 2))))
        last_B11 = jnp.maximum(lengths_B - 1, 0)[:, None, None]
        return self._logits(jnp.take_along_axis(h_BSD, last_B11, axis=1)), Cache(
            tuple(kept), lengths_B
        )

    def step(
        self, ids_B: Array, index: Array | int, cache: Cache, num_prompt_slots: int
    ) -> tuple[Array, Cache]:
        """The logits [B, V] behind token number `index` (from 0) after the prompts, which have the
        first S = `num_prompt_slots` slots; and the cache with that token in it."""
        lengths_B1 = cache.lengths_B[:, None]
        positions_B1 = lengths_B1 + index
        slots_1C = jnp.arange(cache.layers[0][0].shape[_ROOM_DIM], dtype=jnp.int32)[None]
        behind_1C = slots_1C - num_prompt_slots  # the number of a token after the prompt
        is_read_BC = (slots_1C < lengths_B1) | ((behind_1C >= 0) & (behind_1C <= index))
        if (window := self.config.sliding_window) is not None:
            positions_BC = jnp.where(behind_1C >= 0, lengths_B1 + behind_1C, slots_1C)
            is_read_BC &= positions_B1 - positions_BC < window

        h_B1D = by_rows(self._model.embed(ids_B[:, None], cache.layers[0][0].dtype))
        kept = []
        for layer, of_layer in zip(self._layers, cache.layers, strict=True):
            q_B1NH, *new = layer.heads(layer.attention_norm(h_B1D), positions_B1)
            k_BKCH, v_BKCH = (
                jax.lax.dynamic_update_slice_in_dim(
                    whole, x_B1KH.swapaxes(1, 2), num_prompt_slots + index, axis=_ROOM_DIM
                )
                for whole, x_B1KH in zip(of_layer, new, strict=True)
            )
            read_BKGH = _read(_grouped(q_B1NH, k_BKCH.shape[1]), k_BKCH, v_BKCH, is_read_BC)
            h_B1D = by_rows(_after_reading(layer, h_B1D, read_BKGH))
            kept.append((_laid(k_BKCH), _laid(v_BKCH)))
        return self._logits(h_B1D), cache._replace(layers=tuple(kept))

    def _logits(self, h_B1D: Array) -> Array:
        h_BD = self._model.norm(h_B1D)[:, 0]
        kernel_VD = self._model.output_kernel().astype(h_BD.dtype)
        logits_VB = jnp.einsum("vd,bd->vb", kernel_VD, h_BD, preferred_element_type=jnp.float32)
        # Few rows times a large matrix take XLA's CPU half as long again the other way round, and
        # without a barrier the compiler turns the product back.
        return jax.lax.optimization_barrier(logits_VB).T


def _after_reading(layer: LlamaLayers, h_BTD: Array, read: Array) -> Array:
    """The residual stream after a layer whose heads have read this, [B, T, N · H] in any dims."""
    h_BTD = h_BTD + layer.o(read.reshape(*h_BTD.shape[:2], -1))
    return h_BTD + layer.feed_forward(layer.ffn_norm(h_BTD))


def _laid(x_BKCH: Array) -> Array:
    """Keys or values, laid over the mesh by rows and heads."""
    return constrain(x_BKCH, "rows", "heads", "features", "features")


def _grouped(q_B1NH: Array, num_kv_heads: int) -> Array:
    """[B, 1, N, H] → [B, K, G, H]."""
    return q_B1NH.reshape(len(q_B1NH), num_kv_heads, -1, q_B1NH.shape[-1])


def _read(q_BKGH: Array, k_BKCH: Array, v_BKCH: Array, is_read_BC: Array) -> Array:
    """What each query reads from the slots it may read, [B, K, G, H]."""
    q_BKGH = q_BKGH * jnp.asarray(q_BKGH.shape[-1] ** -0.5, q_BKGH.dtype)
    scores_BKGC = jnp.einsum("bkgh,bkch->bkgc", q_BKGH, k_BKCH, preferred_element_type=jnp.float32)
    scores_BKGC = jnp.where(is_read_BC[:, None, None], scores_BKGC, -jnp.inf)
    weights_BKGC = jax.nn.softmax(scores_BKGC).astype(v_BKCH.dtype)
    return jnp.einsum("bkgc,bkch->bkgh", weights_BKGC, v_BKCH)
