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


class LayerCache(NamedTuple):
    """Keys and values of a layer. They lie as they are read, which is once for every token: keys
    have their features before their slots."""

    k_BKHC: Array
    v_BKCH: Array

    def with_room(self, num_slots: int) -> "LayerCache":
        """The same with so many more slots."""
        none, room = (0, 0), (0, num_slots)
        k_BKHC = jnp.pad(self.k_BKHC, (none, none, none, room))
        return LayerCache(k_BKHC, jnp.pad(self.v_BKCH, (none, none, room, none)))

    def with_token(self, k_B1KH: Array, v_B1KH: Array, slot: Array | int) -> "LayerCache":
        """The same with a token's in a slot."""
        update = jax.lax.dynamic_update_slice_in_dim
        k_BKHC = update(self.k_BKHC, k_B1KH.transpose(0, 2, 3, 1), slot, axis=3)
        return LayerCache(k_BKHC, update(self.v_BKCH, v_B1KH.swapaxes(1, 2), slot, axis=2))

    def laid(self) -> "LayerCache":
        """Over the mesh by rows and heads."""
        return LayerCache(*(constrain(x, "rows", "heads", "features", "features") for x in self))


class Cache(NamedTuple):
    """Keys and values of all layers, of prompts and of the tokens after them.

    The first S of C slots hold a row's prompt, padded on the right, and slot S + n the n-th token
    after it, in all rows alike. lengths_B: tokens of the prompts, int32.
    """

    layers: tuple[LayerCache, ...]
    lengths_B: Array

    def with_room(self, num_slots: int) -> "Cache":
        """The same with so many more slots."""
        return self._replace(layers=tuple(layer.with_room(num_slots) for layer in self.layers))


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
            kept.append(LayerCache(k_BSKH.transpose(0, 2, 3, 1), v_BSKH.swapaxes(1, 2)).laid())
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
        v_BKCH = cache.layers[0].v_BKCH
        slots_1C = jnp.arange(v_BKCH.shape[2], dtype=jnp.int32)[None]
        behind_1C = slots_1C - num_prompt_slots  # the number of a token after the prompt
        is_read_BC = (slots_1C < lengths_B1) | ((behind_1C >= 0) & (behind_1C <= index))
        if (window := self.config.sliding_window) is not None:
            positions_BC = jnp.where(behind_1C >= 0, lengths_B1 + behind_1C, slots_1C)
            is_read_BC &= positions_B1 - positions_BC < window

        h_B1D = by_rows(self._model.embed(ids_B[:, None], v_BKCH.dtype))
        kept = []
        for layer, of_layer in zip(self._layers, cache.layers, strict=True):
            q_B1NH, k_B1KH, v_B1KH = layer.heads(layer.attention_norm(h_B1D), positions_B1)
            with_token = of_layer.with_token(k_B1KH, v_B1KH, num_prompt_slots + index)
            read_BKGH = _read(_grouped(q_B1NH, v_BKCH.shape[1]), *with_token, is_read_BC)
            h_B1D = by_rows(_after_reading(layer, h_B1D, read_BKGH))
            kept.append(with_token.laid())
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


def _grouped(q_B1NH: Array, num_kv_heads: int) -> Array:
    """[B, 1, N, H] → [B, K, G, H]."""
    return q_B1NH.reshape(len(q_B1NH), num_kv_heads, -1, q_B1NH.shape[-1])


def _read(q_BKGH: Array, k_BKHC: Array, v_BKCH: Array, is_read_BC: Array) -> Array:
    """What each query reads from the slots it may read, [B, K, G, H]."""
    q_BKGH = q_BKGH * jnp.asarray(q_BKGH.shape[-1] ** -0.5, q_BKGH.dtype)
    scores_BKGC = jnp.einsum("bkgh,bkhc->bkgc", q_BKGH, k_BKHC, preferred_element_type=jnp.float32)
    scores_BKGC = jnp.where(is_read_BC[:, None, None], scores_BKGC, -jnp.inf)
    weights_BKGC = jax.nn.softmax(scores_BKGC).astype(v_BKCH.dtype)
    return jnp.einsum("bkgc,bkch->bkgh", weights_BKGC, v_BKCH)
