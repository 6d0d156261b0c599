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
from mtllm_jax.models.past import Past


class Cache(NamedTuple):
    """Keys and values of all layers, of prompts and of the tokens after them.

    The first S of C slots hold a row's prompt, padded on the right, and slot S + n the n-th token
    after it, in all rows alike. lengths_B: tokens of the prompts, int32.
    """

    layers: tuple[Past, ...]
    lengths_B: Array

    def with_room(self, num_slots: int) -> "Cache":
        """The same with so many more slots."""
        return self._replace(layers=tuple(past.with_room(num_slots) for past in self.layers))


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
            kept.append(Past.of(k_BSKH, v_BSKH))
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
        v_BKCH = cache.layers[0].v_BNPH
        slots_1C = jnp.arange(v_BKCH.shape[2], dtype=jnp.int32)[None]
        behind_1C = slots_1C - num_prompt_slots  # the number of a token after the prompt
        is_read_BC = (slots_1C < lengths_B1) | ((behind_1C >= 0) & (behind_1C <= index))
        if (window := self.config.sliding_window) is not None:
            positions_BC = jnp.where(behind_1C >= 0, lengths_B1 + behind_1C, slots_1C)
            is_read_BC &= positions_B1 - positions_BC < window

        h_B1D = by_rows(self._model.embed(ids_B[:, None], v_BKCH.dtype))
        kept = []
        for layer, past in zip(self._layers, cache.layers, strict=True):
            q_B1NH, k_B1KH, v_B1KH = layer.heads(layer.attention_norm(h_B1D), positions_B1)
            past = past.with_tokens(k_B1KH, v_B1KH, num_prompt_slots + index)
            q_BKGH = _grouped(q_B1NH, v_BKCH.shape[1])
            read_BKGH = past.read(q_BKGH, is_read_BC[:, None, None])
            h_B1D = by_rows(_after_reading(layer, h_B1D, read_BKGH))
            kept.append(past)
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
