"""Losses against their closed forms."""

import itertools

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mtllm_jax.objectives import classification, next_tokens, pooled_mse

B, N, D, C = 3, 4, 5, 3
VALID = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], bool)


def states(seed):
    return np.random.default_rng(seed).normal(size=(B, N, D)).astype(np.float32)


def test_pooled_mse_and_the_variance_it_leaves():
    student, teacher = states(0), states(1)
    terms = pooled_mse(student, teacher, VALID)
    s, t = student[VALID], teacher[VALID]  # the texts there are, [6, D]
    np.testing.assert_allclose(terms["loss"][0], np.mean((s - t) ** 2, axis=1).sum(), rtol=1e-6)
    assert terms["loss"][1] == 6
    error, variance = terms["fvu"]
    np.testing.assert_allclose(error / variance, _fvu(s, t), rtol=1e-6)


def _fvu(s, t):
    """Σ|s − t|² ÷ Σ|t − mean t|²."""
    return ((s - t) ** 2).sum() / (np.var(t, axis=0).sum() * len(t))


def test_fvu_of_the_mean_is_one_and_of_the_teacher_zero():
    teacher = states(1)
    mean = np.broadcast_to(teacher[VALID].mean(0), teacher.shape)
    error, variance = pooled_mse(mean, teacher, VALID)["fvu"]
    np.testing.assert_allclose(error / variance, 1, rtol=1e-5)
    assert pooled_mse(teacher, teacher, VALID)["fvu"][0] == 0


def test_gradient_of_pooled_mse():
    student, teacher = states(0), states(1)
    grad = jax.grad(lambda s: pooled_mse(s, teacher, VALID)["loss"][0])(student)
    wanted = 2 / D * (student - teacher) * VALID[:, :, None]
    np.testing.assert_allclose(grad, wanted, rtol=1e-5, atol=1e-7)


def test_classification():
    logits = np.random.default_rng(0).normal(size=(B, N, C)).astype(np.float32)
    labels = np.random.default_rng(1).integers(0, C, (B, N)).astype(np.int32)
    terms = classification(logits, labels, VALID)
    rows, wanted = logits[VALID], labels[VALID]
    p = np.exp(rows) / np.exp(rows).sum(1, keepdims=True)
    loss = -np.log(p[np.arange(len(wanted)), wanted])
    np.testing.assert_allclose(terms["loss"], (loss.sum(), 6), rtol=1e-6)
    np.testing.assert_allclose(terms["accuracy"], ((p.argmax(1) == wanted).sum(), 6))
    grad = jax.grad(lambda x: classification(x, labels, VALID)["loss"][0])(logits)
    np.testing.assert_allclose(grad[VALID], p - np.eye(C)[wanted], atol=1e-6)
    assert not np.any(np.asarray(grad)[~VALID])


def test_nothing_counted_is_zero_and_zero():
    nothing = np.zeros((B, N), bool)
    for terms in (
        pooled_mse(states(0), states(1), nothing),
        classification(states(0)[..., :C], np.zeros((B, N), np.int32), nothing),
    ):
        for total, count in terms.values():
            assert total == 0 and count == 0


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.booleans())
def test_next_tokens_stay_within_their_text(lengths, full):
    width = 26  # one shape, compiled once
    if full:
        lengths.append(width - sum(lengths))
    texts = [range(10 * n, 10 * n + length) for n, length in enumerate(lengths, 1)]
    ids, segments = np.zeros((2, 1, width), np.int32)
    ids[0, : sum(lengths)] = np.concatenate(texts)
    segments[0, : sum(lengths)] = np.repeat(np.arange(len(texts)) + 1, lengths)
    labels, valid = map(np.asarray, next_tokens(ids, segments))
    pairs = set(zip(ids[valid].tolist(), labels[valid].tolist(), strict=True))
    assert pairs == {pair for text in texts for pair in itertools.pairwise(text)}
    assert valid.sum() == sum(length - 1 for length in lengths)
