"""FLOPs of one example at evaluation, counted as `flops` counts those of training: forward alone.

Useful ones: paddings, and what attention masks behind a row's text, are left out; causal attention
counts as full. Heads, norms and pooling are left out too. Lengths are in tokens.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from mtllm_jax.flops import attention_width, is_matrix
from mtllm_jax.models.llama import Llama
from mtllm_jax.models.nllb import NLLB
from mtllm_jax.models.stack import Stack


def reading_flops(model: Any, length: float) -> float:
    """Of an encoder, or an LLM, that reads one text; adapters beside its maps are counted."""
    weights = _weights(model) - _weights(model, "decoder")
    return 2.0 * weights * length + 4.0 * attention_width(model.config) * length**2


def stack_flops(stack: Stack, length: float) -> float:
    """Of the stack that reads one text of so many encoder tokens."""
    inputs = math.ceil(length / stack.bridge.stride)
    bridge = 2.0 * _weights(stack.bridge) * inputs
    return reading_flops(stack.encoder, length) + bridge + reading_flops(stack.llm, inputs)


def branching_flops(llm: Llama, length: float, branches: Sequence[int]) -> float:
    """Of the log-likelihoods of texts behind one of `length`, which is read once: the layers at all
    tokens, and the logits that say those of the branches."""
    config, said = llm.config, sum(branches)
    attended = 4.0 * attention_width(config) * sum(size * (length + size) for size in branches)
    logits = 2.0 * config.vocab_size * config.width * said
    return reading_flops(llm, length) + 2.0 * _weights(llm) * said + attended + logits


def translation_flops(model: NLLB, length: float, tokens: float, beams: int) -> float:
    """Of a translation of `tokens`, its `</s>` among them, by so many hypotheses.

    On each of these: a step for the `</s>` it starts with and one for each token that is said,
    which reads the tokens so far and the encoder's states, whose keys and values are made once; the
    first step says nothing. What a search does beyond the length of what it chose is left out.
    """
    config, steps = model.config, tokens + 1
    memory = sum(_weights(model, "cross_attention", name) for name in ("key", "value"))
    read = steps * (steps + 1) / 2 + steps * length
    attended = 4.0 * config.decoder_layers * config.width * read
    maps = 2.0 * (_weights(model, "decoder") - memory) * steps
    logits = 2.0 * config.vocab_size * config.width * tokens
    encoded = reading_flops(model, length) + 2.0 * memory * length
    return encoded + beams * (maps + attended + logits)


def _weights(model: nnx.Module, *names: str) -> int:
    """Elements of the matrices in the parts of all these names."""
    return sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(model))
        if is_matrix(path)
        and {str(entry.key) for entry in path if hasattr(entry, "key")} >= set(names)
    )
