"""Losses against their closed forms."""

import itertools

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mtllm_jax.config import Objective, TaskObjective
from mtllm_jax.objectives import (
    classification,
    contrastive,
    cosine,
    likeness,
    logits_kl,
    next_tokens,
    per_token,
)

B, N, D, C = 3, 4, 5, 3
VALID = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], bool)


def states(seed):
    return np.random.default_rng(seed).normal(size=(B, N, D)).astype(np.float32)


def pooled_mse(student, teacher, valid):
    """The default of stages 1 and 2b."""
    default = Objective()
    return likeness(student, teacher, valid, default.weights(), default.temperature)


def test_pooled_mse_and_the_variance_it_leaves():
    student, teacher = states(0), states(1)
    terms = pooled_mse(student, teacher, VALID)
    s, t = student[VALID], teacher[VALID]  # the texts there are, [6, D]
    np.testing.assert_allclose(terms["loss"][0], np.mean((s - t) ** 2, axis=1).sum(), rtol=1e-6)
    assert terms["loss"][1] == 6
    error, variance = terms["fvu"]
    np.testing.assert_allclose(error / variance, _fvu(s, t), rtol=1e-6)
    assert set(terms) == {"loss", "fvu"}


def _fvu(s, t):
    """Σ|s − t|² ÷ Σ|t − mean t|²."""
    return ((s - t) ** 2).sum() / (np.var(t, axis=0).sum() * len(t))


def test_micro_batches_are_their_whole_batch():
    """Sums over parts of a batch are those of all, but where texts are each other's negatives."""
    student, teacher = states(0), states(1)
    weights = TaskObjective(mse=0.5, cosine=2.0, logits_kl=3.0).weights()

    def terms(rows):
        parts = student[rows], teacher[rows], VALID[rows]
        return likeness(*parts, weights, 0.05, {"logits_kl": logits_kl(*parts, 1.0)})

    parts, whole = (terms(slice(0, 1)), terms(slice(1, 3))), terms(slice(0, 3))
    for name in ("loss", "mse", "cosine", "logits_kl"):
        total = [sum(float(part[name][i]) for part in parts) for i in (0, 1)]
        np.testing.assert_allclose(total, whole[name], rtol=1e-6)


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


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_cosine():
    student, teacher = states(0), states(1)
    wanted = 1 - (unit(student[VALID]) * unit(teacher[VALID])).sum(1)
    np.testing.assert_allclose(cosine(student, teacher, VALID), (wanted.sum(), 6), rtol=1e-6)
    grad = jax.grad(lambda s: cosine(s, teacher, VALID)[0])(np.zeros_like(student))
    assert np.all(np.isfinite(grad))


def test_contrastive_is_over_all_texts_of_the_batch_and_those_alone():
    """Against a loop over the texts that there are, whatever lies where there are none."""
    student, teacher = states(0), states(1)
    s, t = unit(student[VALID]), unit(teacher[VALID])
    wanted = -sum(log_softmax(s[i] @ t.T / 0.1)[i] for i in range(len(s)))
    got = contrastive(student, teacher, VALID, 0.1)
    np.testing.assert_allclose(got, (wanted, 6), rtol=1e-5)
    odd = np.where(VALID[..., None], teacher, 100 * student)
    np.testing.assert_array_equal(contrastive(student, odd, VALID, 0.1), got)
    grad = jax.grad(lambda s: contrastive(s, teacher, VALID, 0.1)[0])(student)
    assert np.any(grad[VALID]) and not np.any(np.asarray(grad)[~VALID])


def test_kl_of_logits():
    """Of the classes of a text, and over the choices of a row, each of which counts."""
    student, teacher = states(0), states(1)
    p, q = log_softmax(teacher[VALID] / 2), log_softmax(student[VALID] / 2)
    wanted = 4 * (np.exp(p) * (p - q)).sum()
    np.testing.assert_allclose(logits_kl(student, teacher, VALID, 2.0), (wanted, 6), rtol=1e-5)

    student, teacher = student[..., :1], teacher[..., :1]  # N choices, of one logit
    rows = np.broadcast_to(np.array([[True], [False], [True]]), (B, N))
    p, q = log_softmax(teacher[[0, 2], :, 0]), log_softmax(student[[0, 2], :, 0])
    total, count = logits_kl(student, teacher, rows, 1.0, across=True)
    np.testing.assert_allclose(total / count, (np.exp(p) * (p - q)).sum(1).mean(), rtol=1e-5)
    assert count == 2 * N


def test_per_token():
    """Against a loop over texts and their tokens; one text has no pair, padding is of none."""
    student, teacher = states(0), np.concatenate([states(1), states(2)], axis=1)  # 4 and 8 long
    source = np.array([[1, 1, 2, 2], [0, 1, 2, 3], [0, 0, 0, 0]], np.int32)
    target = np.array([[1, 1, 1, 2, 2, 0, 0, 0], [0, 1, 2, 2, 3, 3, 3, 0], [0] * 8], np.int32)
    aligned = np.array([[3, 1, 0, 2], [1, 0, 2, 3], [0, 0, 0, 0]], np.int32)
    valid, wanted = np.zeros((B, N), bool), 0.0
    for row in range(B):
        for text in range(1, N + 1):
            of_text = teacher[row][target[row] == text]
            pairs = [
                (student[row, i], of_text[aligned[row, i] - 1])
                for i in range(4)
                if source[row, i] == text and aligned[row, i]
            ]
            valid[row, text - 1] = len(of_text) > 0
            if pairs:
                wanted += np.mean([np.mean((s - t) ** 2) for s, t in pairs])
    got = per_token(student, teacher, aligned, source, target, valid)
    np.testing.assert_allclose(got, (wanted, 5), rtol=1e-6)


def test_the_loss_is_the_weighted_sum_of_its_terms():
    student, teacher = states(0), states(1)
    wanted = TaskObjective(mse=0.5, cosine=2.0, contrastive=0.0, logits_kl=3.0)
    kl = logits_kl(student, teacher, VALID, 1.0)
    terms = likeness(student, teacher, VALID, wanted.weights(), 0.05, {"logits_kl": kl})
    assert set(terms) == {"loss", "fvu", "mse", "cosine", "logits_kl"}
    parts = {name: total for name, (total, _) in terms.items()}
    total = 0.5 * parts["mse"] + 2 * parts["cosine"] + 3 * parts["logits_kl"]
    np.testing.assert_allclose(parts["loss"], total, rtol=1e-6)
    assert {float(terms[name][1]) for name in ("loss", "mse", "cosine", "logits_kl")} == {6}
    alone = TaskObjective(mse=0.0, cosine=1.0)
    terms = likeness(student, teacher, VALID, alone.weights(), 0.05)
    assert terms["loss"][0] == parts["cosine"] and set(terms) == {"loss", "fvu"}


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
        likeness(states(0), states(1), nothing, Objective(1, 1, 1).weights(), 0.05),
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
