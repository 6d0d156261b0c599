"""Translation: token by token from an encoder-decoder's states, with cached keys and values.

B rows, S encoder positions, T new tokens, K hypotheses of a row's translation ("beams"), E encoder
width, V vocabulary.

The convention is M2M100's: the decoder reads `</s>`, then the target language's token, which is
forced, and from there on what it says itself, up to the next `</s>`.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

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
from mtllm_jax.models.nllb import NLLB, Cache, DecoderLayers
from mtllm_jax.ops.largest import argmax, top_k


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
    layers = model.decoder_layers()
    last_BK, cache = _start(
        model, layers, ids_BS, segments_BS, target_language_id, max_new_tokens + 1, 1, dtype
    )
    last_B = last_BK[:, 0]
    out_BT = jnp.full((last_B.shape[0], max_new_tokens), pad_id, jnp.int32)
    ended_B = jnp.all(segments_BS == 0, axis=1)  # rows that only fill the batch

    def go_on(carry: tuple[Any, ...]) -> Array:
        index, ended_B = carry[0], carry[1]
        return (index < max_new_tokens) & ~jnp.all(ended_B)

    def one_token(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        index, ended_B, last_B, out_BT, cache = carry
        h_BKE, cache = model.step(layers, last_B[:, None], index + 1, cache)
        next_B = jnp.where(ended_B, pad_id, argmax(model.logits(h_BKE[:, 0])))
        out_BT = jax.lax.dynamic_update_slice_in_dim(out_BT, next_B[:, None], index, axis=1)
        return index + 1, ended_B | (next_B == eos_id), next_B, out_BT, cache

    start: tuple[Any, ...] = (0, ended_B, last_B, out_BT, cache)
    return jax.lax.while_loop(go_on, one_token, start)[3]


class _Beams(NamedTuple):
    """What beam search carries from token to token. Scores are float32, the best first."""

    place: Array  # of the next token, from 0
    # Hypotheses that go on: the sum of their tokens' log-probabilities, their tokens, and where in
    # the cache the keys and values of their inputs lie (`NLLB.step`).
    score_BK: Array
    out_BKT: Array
    history_BKT: Array
    cache: Cache
    # The best that ended so far, with the score that they are compared by.
    is_ended_BK: Array
    ended_score_BK: Array
    ended_BKT: Array
    improves_B: Array  # whether one that goes on may yet be better than those


_NONE = -1e9  # the score of a hypothesis that is not there


def beam_translate(
    model: NLLB,
    ids_BS: Array,
    segments_BS: Array,
    target_language_id: int | Array,
    max_new_tokens: int,
    dtype: DTypeLike = jnp.float32,
    *,
    num_beams: int,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
) -> Array:
    """The likeliest translation that a search over `num_beams` hypotheses finds.

    Arguments and result as `greedy_translate`'s. A hypothesis that ended counts as the sum of its
    tokens' log-probabilities ÷ (their number, language and `</s>` among them) ^ `length_penalty`.
    A row's search ends when no running hypothesis, as long as it is now, counts more than the worst
    of `num_beams` that ended, or with `early_stopping` as soon as there are so many; this and the
    order of things are those of transformers' `generate`.
    """
    eos_id, pad_id = model.config.eos_id, model.config.pad_id
    K, T = num_beams, max_new_tokens
    layers = model.decoder_layers()
    last_BK, cache = _start(
        model, layers, ids_BS, segments_BS, target_language_id, max_new_tokens + 1, K, dtype
    )
    B = last_BK.shape[0]
    # All are alike at first: one alone counts.
    first_K = jnp.where(jnp.arange(K) == 0, 0.0, _NONE)
    slots_BK = jnp.broadcast_to(jnp.arange(K, dtype=jnp.int32)[None], (B, K))
    nothing_BKT = jnp.full((B, K, T), pad_id, jnp.int32)
    start = _Beams(
        place=jnp.int32(0),
        score_BK=jnp.broadcast_to(first_K[None], (B, K)),
        out_BKT=nothing_BKT,
        history_BKT=jnp.broadcast_to(slots_BK[..., None], (B, K, T + 1)),
        cache=cache,
        is_ended_BK=jnp.zeros((B, K), bool),
        ended_score_BK=jnp.full((B, K), _NONE),
        ended_BKT=nothing_BKT,
        improves_B=jnp.any(segments_BS > 0, axis=1),  # other rows only fill the batch
    )

    def go_on(beams: _Beams) -> Array:
        is_open_B = beams.improves_B
        if early_stopping:
            is_open_B &= ~jnp.all(beams.is_ended_BK, axis=1)
        return (beams.place < T) & jnp.any(is_open_B)

    def one_token(beams: _Beams) -> _Beams:
        index = beams.place
        before_BK = jax.lax.dynamic_index_in_dim(
            beams.out_BKT, jnp.maximum(index - 1, 0), axis=2, keepdims=False
        )
        ids_BK = jnp.where(index == 0, last_BK, before_BK)
        h_BKE, cache = model.step(layers, ids_BK, index + 1, beams.cache, beams.history_BKT)
        # Twice as many as are kept, as each hypothesis may have one that ends.
        score_BC, parent_BC, token_BC = _best_continuations(
            beams.score_BK, model.logits(h_BKE), 2 * K
        )
        out_BCT = jnp.take_along_axis(beams.out_BKT, parent_BC[..., None], axis=1)
        out_BCT = jax.lax.dynamic_update_slice_in_dim(out_BCT, token_BC[..., None], index, axis=2)
        ends_BC = (token_BC == eos_id) | (index == T - 1)

        score_BK, kept_BK = jax.lax.top_k(score_BC + jnp.where(ends_BC, _NONE, 0.0), K)
        parent_BK = jnp.take_along_axis(parent_BC, kept_BK, axis=1)
        history_BKT = jnp.take_along_axis(beams.history_BKT, parent_BK[..., None], axis=1)
        # Where the token just read was put: its slot was its hypothesis'.
        history_BKT = jax.lax.dynamic_update_slice_in_dim(
            history_BKT, parent_BK[..., None], index + 1, axis=2
        )

        penalty = (index + 2).astype(jnp.float32) ** length_penalty  # of language and tokens
        is_new_BC = ends_BC & (jnp.arange(2 * K) < K)[None] & beams.improves_B[:, None]
        if early_stopping:
            is_new_BC &= ~jnp.all(beams.is_ended_BK, axis=1, keepdims=True)
        all_scores = [beams.ended_score_BK, jnp.where(is_new_BC, score_BC / penalty, _NONE)]
        ended_score_BK, chosen_BK = jax.lax.top_k(jnp.concatenate(all_scores, axis=1), K)
        is_ended_BK = jnp.take_along_axis(
            jnp.concatenate([beams.is_ended_BK, is_new_BC], axis=1), chosen_BK, axis=1
        )
        ended_BKT = jnp.take_along_axis(
            jnp.concatenate([beams.ended_BKT, out_BCT], axis=1), chosen_BK[..., None], axis=1
        )
        worst_B = jnp.where(jnp.all(is_ended_BK, axis=1), ended_score_BK[:, -1], _NONE)
        return _Beams(
            place=index + 1,
            score_BK=score_BK,
            out_BKT=jnp.take_along_axis(out_BCT, kept_BK[..., None], axis=1),
            history_BKT=history_BKT,
            cache=cache,
            is_ended_BK=is_ended_BK,
            ended_score_BK=ended_score_BK,
            ended_BKT=ended_BKT,
            improves_B=beams.improves_B & (score_BK[:, 0] / penalty > worst_B),
        )

    return jax.lax.while_loop(go_on, one_token, start).ended_BKT[:, 0]


def _best_continuations(
    score_BK: Array, logits_BKV: Array, count: int
) -> tuple[Array, Array, Array]:
    """The `count` likeliest hypotheses of one more token: score, parent and token, [B, count]."""
    B = logits_BKV.shape[0]
    log_sum_BK1 = jax.nn.logsumexp(logits_BKV, axis=-1, keepdims=True)
    logits_BKC, token_BKC = top_k(logits_BKV, min(count, logits_BKV.shape[-1]))
    all_BKC = score_BK[..., None] + (logits_BKC - log_sum_BK1)
    score_BC, place_BC = jax.lax.top_k(all_BKC.reshape(B, -1), count)
    token_BC = jnp.take_along_axis(token_BKC.reshape(B, -1), place_BC, axis=1)
    return score_BC, place_BC // all_BKC.shape[-1], token_BC


def translate(
    model: NLLB,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    source_language: str | Sequence[str],
    target_language: str | Sequence[str],
    *,
    max_length: int,
    max_new_tokens: int,
    num_beams: int = 1,
    mesh: jax.sharding.Mesh | None = None,
    batch_size: int = 256,
    dtype: DTypeLike = jnp.float32,
) -> list[str]:
    """Translations of `texts`, in their order. Both languages: one code, or one per text.

    max_length: tokens of a source text, the language and `</s>` among them; longer ones are cut.
    num_beams: hypotheses that are searched over (`beam_translate`); 1 = greedy.
    Rows of like length are translated together, at one of few widths, so that little is computed
    for padding and little is compiled. mesh: None = the first device; ValueError if rows cannot be
    cut over it. Several processes call it with the same texts, and all get the translations.
    """
    if mesh is None:
        mesh = sharding.make_mesh(Mesh(), jax.devices()[:1])
    sharding.check_rows(batch_size, mesh, "evaluation.batch_rows")
    graph, state = nnx.split(model)
    state = sharding.place(state, mesh)
    translated = _translated_on(mesh)
    limits = max_new_tokens, num_beams, dtype
    codes = [target_language] * len(texts) if isinstance(target_language, str) else target_language
    language_ids = np.array([tokenizer.language_id(code) for code in codes], np.int32)
    encoded = tokenizer.encode(texts, source_language, max_length=max_length)
    pending = []
    for places in by_length([len(ids) for ids in encoded], batch_size):
        chosen = [encoded[i] for i in places]
        size = min(batch_size, sharding.rows_for(len(encoded), mesh))
        rows_here = padded(chosen, "text", tokenizer.pad_id, rows=size)
        rows_here["into"] = np.resize(language_ids[places], size)
        batch = sharding.place_batch(rows_here, mesh)
        text = batch["text_ids"], batch["text_segments"], batch["into"]
        # Dispatch does not wait: the next batch is padded while this one is translated.
        pending.append((places, translated(graph, state, *text, *limits)))
    rows: list[np.ndarray] = [np.empty(0)] * len(encoded)
    for places, ids_BT in pending:
        # The last batch may have filler rows.
        for i, ids_T in zip(places, np.asarray(ids_BT), strict=False):
            rows[i] = ids_T[ids_T != model.config.pad_id]
    return tokenizer.decode(rows)


@functools.cache
def _translated_on(mesh: jax.sharding.Mesh) -> Any:
    """`_translated`, compiled for a mesh; every process gets all of the result."""
    return jax.jit(
        sharding.on(mesh, _translated),
        static_argnames=("graph", "max_new_tokens", "num_beams", "dtype"),
        out_shardings=jax.NamedSharding(mesh, jax.P()),
    )


def _translated(
    graph: nnx.GraphDef,
    state: nnx.State,
    ids_BS: Array,
    segments_BS: Array,
    target_language_id: Array,
    max_new_tokens: int,
    num_beams: int,
    dtype: DTypeLike,
) -> Array:
    text = nnx.merge(graph, state), ids_BS, segments_BS, target_language_id
    if num_beams == 1:
        return greedy_translate(*text, max_new_tokens, dtype)
    return beam_translate(*text, max_new_tokens, dtype, num_beams=num_beams)


def _start(
    model: NLLB,
    layers: Sequence[DecoderLayers],
    ids_BS: Array,
    segments_BS: Array,
    target_language_id: int | Array,
    num_inputs: int,
    num_hypotheses: int,
    dtype: DTypeLike,
) -> tuple[Array, Cache]:
    """The forced language token [B, K], and the cache that holds the `</s>` before it."""
    shape = (ids_BS.shape[0], num_hypotheses)
    memory_BSE = model.encode(ids_BS, segments_BS, dtype, packed=False)
    cache = model.start_cache(layers, memory_BSE, segments_BS, num_inputs, num_hypotheses)
    ends_BK = jnp.full(shape, model.config.eos_id, jnp.int32)
    _, cache = model.step(layers, ends_BK, jnp.int32(0), cache)
    language_B = jnp.broadcast_to(jnp.asarray(target_language_id, jnp.int32), shape[:1])
    return jnp.broadcast_to(language_B[:, None], shape), cache
