"""Translation: token by token from an encoder-decoder's states, with cached keys and values.

B rows, S encoder positions, T new tokens, E encoder width, V vocabulary.

The convention is M2M100's: the decoder reads `</s>`, then the target language's token, which is
forced, and from there on what it says itself, up to the next `</s>`.
"""

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from mtllm_jax import sharding
from mtllm_jax.config import Mesh
from mtllm_jax.data.packing import padded
from mtllm_jax.data.pipeline import by_length
from mtllm_jax.models.nllb import NLLB, Cache


class Tokenizer(Protocol):
    """What `translate` asks of a tokenizer."""

    @property
    def pad_id(self) -> int:
        """The id of padding."""

    def encode(
        self, texts: Sequence[str], language: str | Sequence[str], *, max_length: int
    ) -> Sequence[np.ndarray]:
        """Ids of each text as the encoder reads them: language token, text, `</s>`."""

    def decode(self, rows: Sequence[np.ndarray]) -> list[str]:
        """The text of each row of ids, without the tokens that stand for no text."""

    def language_id(self, code: str) -> int:
        """The id of a language's token. ValueError for an unknown code."""


def greedy_translate(
    model: NLLB,
    ids_BS: Array,
    segments_BS: Array,
    target_language_id: int | Array,
    max_new_tokens: int,
    dtype: DTypeLike = jnp.float32,
) -> Array:
    """The likeliest next token, again and again: ids [B, max_new_tokens], int32.

    One text a row; `segments_BS` is 0 for padding. The result begins after the language's token
    and has padding after the `</s>`; rows that found no end have none. `target_language_id` is one
    id or [B]. Stops when all rows ended. To be called under `jax.jit`, `model` merged inside.
    """
    eos_id, pad_id = model.config.eos_id, model.config.pad_id
    last_B, cache = _start(
        model, ids_BS, segments_BS, target_language_id, max_new_tokens + 1, dtype
    )
    out_BT = jnp.full((last_B.shape[0], max_new_tokens), pad_id, jnp.int32)
    ended_B = jnp.all(segments_BS == 0, axis=1)  # rows that only fill the batch

    def go_on(carry: tuple[Any, ...]) -> Array:
        index, ended_B = carry[0], carry[1]
        return (index < max_new_tokens) & ~jnp.all(ended_B)

    def one_token(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        index, ended_B, last_B, out_BT, cache = carry
        h_BE, cache = model.step(last_B, index + 1, cache)
        next_B = jnp.where(ended_B, pad_id, _argmax(model.logits(h_BE)))
        out_BT = jax.lax.dynamic_update_slice_in_dim(out_BT, next_B[:, None], index, axis=1)
        return index + 1, ended_B | (next_B == eos_id), next_B, out_BT, cache

    start: tuple[Any, ...] = (0, ended_B, last_B, out_BT, cache)
    return jax.lax.while_loop(go_on, one_token, start)[3]


def translate(
    model: NLLB,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    source_language: str | Sequence[str],
    target_language: str,
    *,
    max_length: int,
    max_new_tokens: int,
    mesh: jax.sharding.Mesh | None = None,
    batch_size: int = 256,
    dtype: DTypeLike = jnp.float32,
) -> list[str]:
    """Greedy translations of `texts`, in their order. source_language: one code, or one per text.

    max_length: tokens of a source text, the language and `</s>` among them; longer ones are cut.
    Rows of like length are translated together, at one of few widths, so that little is computed
    for padding and little is compiled. mesh: None = the first device; ValueError if rows cannot be
    cut over it. Several processes call it with the same texts, and all get the translations.
    """
    if mesh is None:
        mesh = sharding.make_mesh(Mesh(), jax.devices()[:1])
    sharding.check_rows(batch_size, mesh, "evaluation.batch_rows")
    graph, state = nnx.split(model)
    state = sharding.place(state, mesh)
    greedy = _greedy_on(mesh)
    language_id = tokenizer.language_id(target_language)
    encoded = tokenizer.encode(texts, source_language, max_length=max_length)
    pending = []
    for places in by_length([len(ids) for ids in encoded], batch_size):
        chosen = [encoded[i] for i in places]
        size = min(batch_size, sharding.rows_for(len(encoded), mesh))
        batch = sharding.place_batch(padded(chosen, "text", tokenizer.pad_id, rows=size), mesh)
        text = batch["text_ids"], batch["text_segments"]
        # Dispatch does not wait: the next batch is padded while this one is translated.
        pending.append((places, greedy(graph, state, *text, language_id, max_new_tokens, dtype)))
    rows: list[np.ndarray] = [np.empty(0)] * len(encoded)
    for places, ids_BT in pending:
        # The last batch may have filler rows.
        for i, ids_T in zip(places, np.asarray(ids_BT), strict=False):
            rows[i] = ids_T[ids_T != model.config.pad_id]
    return tokenizer.decode(rows)


@functools.cache
def _greedy_on(mesh: jax.sharding.Mesh) -> Any:
    """`_greedy`, compiled for a mesh; every process gets all of the result."""
    return jax.jit(
        sharding.on(mesh, _greedy),
        static_argnames=("graph", "max_new_tokens", "dtype"),
        out_shardings=jax.NamedSharding(mesh, jax.P()),
    )


def _greedy(
    graph: nnx.GraphDef,
    state: nnx.State,
    ids_BS: Array,
    segments_BS: Array,
    target_language_id: Array,
    max_new_tokens: int,
    dtype: DTypeLike,
) -> Array:
    model = nnx.merge(graph, state)
    return greedy_translate(model, ids_BS, segments_BS, target_language_id, max_new_tokens, dtype)


def _start(
    model: NLLB,
    ids_BS: Array,
    segments_BS: Array,
    target_language_id: int | Array,
    num_inputs: int,
    dtype: DTypeLike,
) -> tuple[Array, Cache]:
    """The forced language token [B], and the cache that holds the `</s>` before it."""
    B = ids_BS.shape[0]
    memory_BSE = model.encode(ids_BS, segments_BS, dtype, packed=False)
    cache = model.start_cache(memory_BSE, segments_BS, num_inputs)
    start_B = jnp.full((B,), model.config.eos_id, jnp.int32)
    _, cache = model.step(start_B, jnp.int32(0), cache)
    return jnp.broadcast_to(jnp.asarray(target_language_id, jnp.int32), (B,)), cache


def _argmax(logits_BV: Array) -> Array:
    """The first index of each row's maximum, by two plain maxima: XLA's argmax is slow on CPUs."""
    best_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    index_V = jnp.arange(logits_BV.shape[-1], dtype=jnp.float32)[None]  # exact below 2^24
    return -jnp.max(jnp.where(logits_BV == best_B1, -index_V, -jnp.inf), axis=-1).astype(jnp.int32)
