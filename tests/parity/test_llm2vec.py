"""Masked next-token prediction against PyTorch, on rows with the same tokens masked."""

import types

import jax
import numpy as np
import pytest
import tiny
from torch_models import QUICK, llm, torch

from mtllm_jax import config as c
from mtllm_jax.hf.llama import load_llama
from mtllm_jax.models.layers import LoRAParam, split
from mtllm_jax.recipes import llm2vec, stacking

BOS, EOS, MASK, VOCAB, T = 1, 2, 7, 50, 10
# Row and position that each text begins at, and its tokens behind BOS.
TEXTS = ((0, 0, 9), (1, 0, 4), (1, 5, 3))


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_is_that_of_torch(tied, tmp_path):
    """Texts packed in rows here stand alone there, and see all of themselves."""
    theirs = llm("llama", tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path)
    base = load_llama(tmp_path, unroll_layers=True)
    settings = tiny.settings(trained="lora", mntp=c.MaskedPrediction(share=0.6))
    graph, trainable, frozen = split(stacking.with_adapters(settings, base, 0), LoRAParam)
    tokenizer = types.SimpleNamespace(
        special_ids=[0, BOS, EOS], mask_id=lambda: MASK, vocab_size=VOCAB
    )
    objective = llm2vec.masked_prediction(settings, tokenizer, graph)
    rng = np.random.default_rng(0)
    ids, segments = np.zeros((2, T), np.int32), np.zeros((2, T), np.int32)
    for row, begin, size in TEXTS:
        ids[row, begin : begin + size + 1] = [BOS, *rng.integers(8, VOCAB, size)]
        segments[row, begin : begin + size + 1] = segments[row].max() + 1
    ids[0, -1] = EOS
    batch = {"target_ids": ids, "target_segments": segments, "example": np.array([[1, 0], [2, 3]])}
    key = jax.random.key(2)
    terms = jax.jit(objective, compiler_options=QUICK)(trainable, frozen, batch, key)
    seen, chosen = seen_by(settings.mntp, ids, segments, key)
    total = count = 0.0
    for row, begin, size in TEXTS:
        at = slice(begin, begin + size + 1)
        text, asked = ids[row, at], chosen[row, at]
        assert not asked[0] and not np.any(asked[text == EOS])
        with torch.no_grad():
            both_ways = torch.zeros(1, 1, len(text), len(text))
            logits = theirs(torch.tensor(seen[row, at][None]).long(), attention_mask=both_ways)
        losses = torch.nn.functional.cross_entropy(
            logits.logits[0, :-1], torch.tensor(text[1:]).long(), reduction="none"
        )
        total += float(losses[torch.tensor(asked[1:])].sum())
        count += asked.sum()
    assert count > 4 and np.any(seen[chosen] == MASK)
    np.testing.assert_allclose(terms["loss"], (total, count), rtol=1e-4)


def seen_by(settings, ids, segments, key):
    """What the objective masks."""
    may = np.asarray(llm2vec.has_before(segments)) & (ids != EOS)
    mask_key = jax.random.split(key)[0]
    return (np.asarray(x) for x in llm2vec.masked(settings, ids, may, MASK, VOCAB, mask_key))
