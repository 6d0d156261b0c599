"""FLOPs of an example by formula, against XLA's own count of the programs that are run."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from test_flops import ENCODER, LLM, counted

from mtllm_jax import example_flops
from mtllm_jax.models.bridge import Bridge
from mtllm_jax.models.llama import Llama
from mtllm_jax.models.nllb import NLLB
from mtllm_jax.models.stack import Stack
from mtllm_jax.recipes.prompting import branch_scores

ROWS = 4
NEAR = 0.05  # norms, softmax and other work by element is left out; models are wide for that


def unrolled(config):
    """XLA counts the body of a loop once."""
    return dataclasses.replace(config, unroll_layers=True)


def shapes(module):
    return nnx.split(nnx.eval_shape(module))


def ids(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def test_the_stack():
    graph, state = shapes(
        lambda: Stack(
            NLLB(unrolled(ENCODER), nnx.Rngs(0)),
            Bridge(ENCODER.width, LLM.width, 1.0, nnx.Rngs(0)),
            Llama(unrolled(LLM), nnx.Rngs(0)),
        )
    )

    def pooled(state, ids, segments):
        return nnx.merge(graph, state).pooled(ids, segments, 1, causal=False)

    wanted = counted(pooled, state, ids(ROWS, 96), ids(ROWS, 96)) / ROWS
    got = example_flops.stack_flops(nnx.merge(graph, state), 96)
    assert got == pytest.approx(wanted, rel=NEAR)


def test_prompts():
    """As computed in rows without padding, where a branch's keys are those of all branches."""
    config = dataclasses.replace(unrolled(LLM), vocab_size=512)
    graph, state = shapes(lambda: Llama(config, nnx.Rngs(0)))

    def scores(state, *batch):
        llm = nnx.merge(graph, state)
        return branch_scores(llm, *batch, num_branches=2, dtype=jnp.float32)

    prompt, branches = ids(ROWS, 64), ids(ROWS, 16)
    wanted = counted(scores, state, prompt, prompt, branches, branches) / ROWS
    got = example_flops.branching_flops(nnx.merge(graph, state), 64, [8, 8])
    assert got == pytest.approx(wanted, rel=NEAR)


def test_a_translation():
    """The encoder and a decoder's step, each by XLA; a translation of T tokens by K hypotheses is
    the one and T + 1 of the other, all but the first with logits."""
    config = dataclasses.replace(unrolled(ENCODER), decoder_layers=2, vocab_size=512)
    length, tokens, K = 48, 12, 5
    graph, state = shapes(lambda: NLLB(config, nnx.Rngs(0)))

    def start(state, ids, segments):
        model = nnx.merge(graph, state)
        memory = model.encode(ids, segments, packed=False)
        return model.start_cache(model.decoder_layers(), memory, segments, tokens + 1, K)

    def step(state, ids, cache):
        model = nnx.merge(graph, state)
        return model.step(model.decoder_layers(), ids, jnp.int32(3), cache)

    text = ids(ROWS, length)
    cache = jax.eval_shape(start, state, text, text)
    begun = counted(start, state, text, text)
    # The program reads room for all tokens of all hypotheses; the formula those there are, its own.
    model = nnx.merge(graph, state)
    room = 4 * config.decoder_layers * config.width * (tokens + 1) * K
    own = 4 * config.decoder_layers * config.width * (tokens + 2) / 2
    a_step = counted(step, state, ids(ROWS, K), cache) / ROWS - K * (room - own)
    logits = 2 * config.vocab_size * config.width * K
    wanted = begun / ROWS + (tokens + 1) * a_step + tokens * logits
    assert example_flops.translation_flops(model, length, tokens, K) == pytest.approx(
        wanted, rel=NEAR
    )
