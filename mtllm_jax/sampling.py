"""What an LLM answers to prompts: token by token, drawn by chance, with cached keys and values.

B rows, S positions of prompts, T new tokens, V vocabulary, C candidates for the next token.

The chance of a token follows from its row's key, its place in the answer and its id alone: what a
row is answered depends on no row beside it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from mtllm_jax import sharding
from mtllm_jax.models.cached import Cache, CachedLlama, apart
from mtllm_jax.models.llama import Llama
from mtllm_jax.ops.largest import argmax, top_k

NOTHING = -1  # in the place of a token, behind the end of an answer
NO_NUMBER = -2  # where an answer breaks off as the model's logits are no numbers

_FIRST_ROOM = 64  # new tokens; a cache that is full is doubled


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    In this order: repetition_penalty divides the logits of tokens that the prompt or the answer
    holds already, where they are above 0, and multiplies them below (CTRL, arXiv 1909.05858);
    temperature divides all, 0 = always the likeliest token; top_k leaves so many of the likeliest,
    0 = all; top_p leaves the fewest of the likeliest that hold this share of the probability
    together. ValueError for a value that none of them may have.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, is_good, allowed in (
            ("temperature", 0 <= self.temperature < np.inf, "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < np.inf, "above 0"),
        ):
            if not is_good:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be {allowed}.")


def next_tokens(
    logits_BV: Array, seen_BV: Array | None, keys_B: Array, place: Array | int, sampling: Sampling
) -> Array:
    """One token a row, int32 [B]; NO_NUMBER where logits are no numbers.

    seen_BV: the tokens in prompt and answer so far, bool; None without a repetition penalty.
    keys_B: the rows' random keys. place: of the token in the answer, from 0.
    """
    is_sound_B = jnp.all(jnp.isfinite(logits_BV), axis=-1)
    if seen_BV is not None:
        penalty = sampling.repetition_penalty
        held_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        logits_BV = jnp.where(seen_BV, held_BV, logits_BV)
    if sampling.temperature == 0:
        return jnp.where(is_sound_B, argmax(logits_BV), NO_NUMBER)
    logits_BV = logits_BV / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        logits_BC, ids_BC = (x[:, 0] for x in top_k(logits_BV[:, None], sampling.top_k))
    else:
        ids_V = jnp.arange(logits_BV.shape[-1], dtype=jnp.int32)
        logits_BC, ids_BC = logits_BV, jnp.broadcast_to(ids_V[None], logits_BV.shape)
    if sampling.top_p < 1:
        logits_BC = jnp.where(likeliest(logits_BC, sampling.top_p), logits_BC, -jnp.inf)
    chosen_B1 = argmax(logits_BC + _gumbel(keys_B, place, ids_BC))[:, None]
    return jnp.where(is_sound_B, jnp.take_along_axis(ids_BC, chosen_B1, axis=1)[:, 0], NO_NUMBER)


def likeliest(logits_BC: Array, share: float) -> Array:
    """The fewest candidates of largest logits that hold `share` of the probability. bool [B, C].

    Without sorting, which is slow: the bound that they lie above is found by halving, among the
    bits of floats, which are in the order of the floats where these are positive.
    """
    p_BC = jax.nn.softmax(logits_BC)
    bits_BC = jax.lax.bitcast_convert_type(p_BC, jnp.int32)

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low_B, high_B = bounds  # those from `low` on hold the share, those from `high` on do not
        middle_B = (low_B + high_B) // 2
        held_B = jnp.sum(jnp.where(bits_BC >= middle_B[:, None], p_BC, 0.0), axis=-1)
        is_held_B = held_B >= share
        return jnp.where(is_held_B, middle_B, low_B), jnp.where(is_held_B, high_B, middle_B)

    above_one = int(np.float32(1).view(np.int32)) + 1
    none_B = jnp.zeros(p_BC.shape[:1], jnp.int32)
    low_B, _ = jax.lax.fori_loop(0, above_one.bit_length(), halve, (none_B, none_B + above_one))
    return bits_BC >= low_B[:, None]


def _gumbel(keys_B: Array, place: Array | int, ids_BC: Array) -> Array:
    """The noise of each candidate; the largest sum with logits is a draw by their softmax."""

    def of_row(key: Array, ids_C: Array) -> Array:
        keys_C = jax.vmap(functools.partial(jax.random.fold_in, jax.random.fold_in(key, place)))
        return jax.vmap(jax.random.gumbel)(keys_C(ids_C))

    return jax.vmap(of_row)(keys_B, ids_BC)


class _Answers(NamedTuple):
    """What is carried from token to token."""

    place: Array  # of the next token
    ids_BT: Array
    is_ended_B: Array
    seen_BV: Array | None
    cache: Cache

    def with_room(self, num_tokens: int) -> "_Answers":
        """The same for answers of so many tokens in all."""
        room = num_tokens - self.ids_BT.shape[1]
        ids_BT = jnp.pad(self.ids_BT, ((0, 0), (0, room)), constant_values=NOTHING)
        return self._replace(ids_BT=ids_BT, cache=self.cache.with_room(room))

    def with_next(
        self, logits_BV: Array, keys_B: Array, stops_E: Array, how: Sampling
    ) -> "_Answers":
        """One more token of all that have not ended."""
        drawn_B = next_tokens(logits_BV, self.seen_BV, keys_B, self.place, how)
        next_B = jnp.where(self.is_ended_B, NOTHING, drawn_B)
        seen_BV = self.seen_BV
        if seen_BV is not None:
            seen_BV = seen_BV.at[jnp.arange(len(next_B)), jnp.maximum(next_B, 0)].max(next_B >= 0)
        ends_B = jnp.any(next_B[:, None] == stops_E[None], axis=1) | (next_B == NO_NUMBER)
        ids_BT = jax.lax.dynamic_update_slice_in_dim(
            self.ids_BT, next_B[:, None], self.place, axis=1
        )
        return _Answers(self.place + 1, ids_BT, self.is_ended_B | ends_B, seen_BV, self.cache)


class Sampler:
    """A model that answers batches of prompts, compiled for few shapes.

    stop_ids: tokens that end an answer. num_rows: of a batch, which is filled up to it; a multiple
    of the devices that rows are cut over (`sharding.rows_for`). dtype: that it computes in, and
    that of the cache.
    """

    def __init__(
        self,
        model: Llama,
        *,
        stop_ids: Sequence[int],
        sampling: Sampling,
        max_new_tokens: int,
        num_rows: int,
        mesh: jax.sharding.Mesh,
        dtype: DTypeLike = jnp.float32,
    ):
        self.max_new_tokens, self.num_rows = max_new_tokens, num_rows
        graph, state = nnx.split(model)
        self._graph, *self._states = apart(nnx.merge(graph, sharding.place(state, mesh)))
        self._stops_E = np.array(stop_ids, np.int32)
        self._sampling, self._dtype, self._mesh = sampling, dtype, mesh
        self._begin, self._go_on = _compiled_for(mesh)

    def __call__(
        self,
        prompts: Sequence[np.ndarray],
        keys: Sequence[np.ndarray],
        num_prompt_slots: int,
        told: Callable[[int], None] = lambda tokens: None,
    ) -> np.ndarray:
        """The tokens of each answer, its stop token with them, int32 [prompts, max_new_tokens];
        behind them NOTHING, or NO_NUMBER and NOTHING.

        prompts: num_rows at most. keys: two uint32 a prompt, the row's random key.
        num_prompt_slots: S, no less than the longest prompt; programs are compiled for it. told:
        tokens so far, now and then.
        """
        ids_BS = np.zeros((self.num_rows, num_prompt_slots), np.int32)
        keys_B2 = np.zeros((self.num_rows, 2), np.uint32)
        lengths_B = np.zeros(self.num_rows, np.int32)
        for row, (prompt, key) in enumerate(zip(prompts, keys, strict=True)):
            ids_BS[row, : len(prompt)], keys_B2[row], lengths_B[row] = prompt, key, len(prompt)
        batch = sharding.place_batch(
            {"prompt_ids": ids_BS, "lengths": lengths_B, "keys": keys_B2}, self._mesh
        )
        model, rest = (self._graph, *self._states), (batch["keys"], self._stops_E, self._sampling)
        answers = self._begin(*model, batch["prompt_ids"], batch["lengths"], *rest, self._dtype)
        room = _FIRST_ROOM
        while True:
            room = min(room, self.max_new_tokens)
            answers = self._go_on(*model, answers, *rest, num_prompt_slots, room)
            ids_BT = np.asarray(answers.ids_BT)[: len(prompts)]
            told(int(np.sum(ids_BT >= 0)))
            if room == self.max_new_tokens or np.all(answers.is_ended_B):
                missing = self.max_new_tokens - room
                return np.pad(ids_BT, ((0, 0), (0, missing)), constant_values=NOTHING)
            room *= 2


@functools.cache
def _compiled_for(mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
    """`_begin` and `_go_on`."""
    static = ("graph", "sampling")
    return (
        jax.jit(sharding.on(mesh, _begin), static_argnames=(*static, "dtype")),
        jax.jit(
            sharding.on(mesh, _go_on), static_argnames=(*static, "num_prompt_slots", "num_tokens")
        ),
    )


def _begin(
    graph: nnx.GraphDef,
    others: nnx.State,
    each: list[nnx.State],
    ids_BS: Array,
    lengths_B: Array,
    keys_B2: Array,
    stops_E: Array,
    sampling: Sampling,
    dtype: DTypeLike,
) -> _Answers:
    """The first token of each answer. Rows without a prompt only fill the batch."""
    model = CachedLlama(graph, others, each)
    logits_BV, cache = model.prefill(ids_BS, lengths_B, dtype)
    B, S = ids_BS.shape
    seen_BV = None
    if sampling.repetition_penalty != 1:
        is_token_BS = jnp.arange(S)[None] < lengths_B[:, None]
        none_BV = jnp.zeros((B, model.config.vocab_size), bool)
        seen_BV = none_BV.at[jnp.arange(B)[:, None], ids_BS].max(is_token_BS)
    nothing_BT = jnp.full((B, 1), NOTHING, jnp.int32)
    answers = _Answers(jnp.int32(0), nothing_BT, lengths_B == 0, seen_BV, cache)
    return answers.with_next(logits_BV, _keys(keys_B2), stops_E, sampling)


def _go_on(
    graph: nnx.GraphDef,
    others: nnx.State,
    each: list[nnx.State],
    answers: _Answers,
    keys_B2: Array,
    stops_E: Array,
    sampling: Sampling,
    num_prompt_slots: int,
    num_tokens: int,
) -> _Answers:
    """The same with `num_tokens` each, or as many as all of them have in the end."""
    model, keys_B = CachedLlama(graph, others, each), _keys(keys_B2)

    def runs(answers: _Answers) -> Array:
        return (answers.place < num_tokens) & ~jnp.all(answers.is_ended_B)

    def one_token(answers: _Answers) -> _Answers:
        index = answers.place - 1
        last_B = jax.lax.dynamic_index_in_dim(answers.ids_BT, index, axis=1, keepdims=False)
        logits_BV, cache = model.step(
            jnp.maximum(last_B, 0), index, answers.cache, num_prompt_slots
        )
        return answers._replace(cache=cache).with_next(logits_BV, keys_B, stops_E, sampling)

    return jax.lax.while_loop(runs, one_token, answers.with_room(num_tokens))


def _keys(keys_B2: Array) -> Array:
    return jax.random.wrap_key_data(keys_B2, impl="threefry2x32")
