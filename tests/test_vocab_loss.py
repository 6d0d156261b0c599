"""Cross-entropy over a vocabulary against numpy, in chunks and over a sampled vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtllm_jax.ops.vocab_loss import (
    cross_entropy,
    cross_entropy_of_rows,
    divergence_of_rows,
    label_places,
    sampled_vocabulary,
)


def a_case(M, D, V, seed=0, masked="some"):
    rng = np.random.default_rng(seed)
    weights = np.zeros(M) if masked == "all" else rng.random(M) * (rng.random(M) < 0.7)
    return {
        "h": rng.normal(size=(M, D)).astype(np.float32),
        "kernel": rng.normal(size=(V, D)).astype(np.float32),
        "labels": rng.integers(0, V, M).astype(np.int32),
        "weights": weights.astype(np.float32),
        "bias": rng.normal(size=V).astype(np.float32),
    }


def by_hand(h, kernel, labels, weights, bias):
    """(sum, count, ∂h, ∂kernel, ∂bias) in float64: p − 1[label] is the gradient of the logits."""
    logits = h.astype(np.float64) @ kernel.astype(np.float64).T + bias
    log_p = logits - logits.max(1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    rows = np.arange(len(labels))
    total = np.sum(-log_p[rows, labels] * weights)
    p = np.exp(log_p)
    p[rows, labels] -= 1
    g = p * weights[:, None]
    return total, weights.sum(), g @ kernel, g.T @ h, g.sum(0)


@pytest.mark.parametrize(
    ("M", "D", "V", "chunk"),
    [(13, 5, 17, 0), (13, 5, 17, 1), (13, 5, 17, 5), (13, 5, 17, 100), (8, 4, 33, 4), (1, 3, 2, 1)],
)
def test_values_and_gradients(M, D, V, chunk):
    def loss(h, kernel, bias, labels, weights):
        return cross_entropy(h, kernel, labels, weights, bias_V=bias, chunk=chunk)

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    for masked in ("some", "all"):
        case = a_case(M, D, V, masked=masked)
        order = ("h", "kernel", "bias", "labels", "weights")
        (total, count), grads = gradient(*(case[name] for name in order))
        for got, wanted in zip((total, count, *grads), by_hand(**case), strict=True):
            assert got.dtype == jnp.float32
            np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)
        if masked == "all":
            assert total == 0 and count == 0
            assert all(not np.any(g) for g in grads)


@pytest.mark.parametrize("most_logits", [10**9, 3 * 11 * 4, 3 * 11, 1])
def test_rows_by_pieces_of_positions(most_logits):
    """All 7 positions at a time, 4, or 1: the sums and gradients of the tokens in one line."""
    B, T, D, V = 3, 7, 5, 11
    case = a_case(B * T, D, V)
    rows = {name: case[name].reshape(B, T, *case[name].shape[1:]) for name in ("h", "labels")}
    weights = case["weights"].reshape(B, T)

    def loss(h, kernel):
        limit = {"most_logits": most_logits}
        return cross_entropy_of_rows(h, kernel, rows["labels"], weights, **limit)

    gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (total, count), (of_h, of_kernel) = gradient(rows["h"], case["kernel"])
    wanted = by_hand(**case | {"bias": np.zeros(V)})
    got = (total, count, of_h.reshape(B * T, D), of_kernel)
    for one, other in zip(got, wanted, strict=False):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


def kl_by_hand(h, kernel, teacher, teacher_kernel, weights):
    """(sum, count, ∂h, ∂kernel) in float64: p − q is the gradient of the logits of p."""
    (log_p, log_q) = (
        logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
        for logits in (
            h.astype(np.float64) @ kernel.astype(np.float64).T,
            teacher.astype(np.float64) @ teacher_kernel.astype(np.float64).T,
        )
    )
    total = np.sum(np.sum(np.exp(log_q) * (log_q - log_p), axis=-1) * weights)
    g = (np.exp(log_p) - np.exp(log_q)) * weights[..., None]
    return total, weights.sum(), g @ kernel, np.einsum("btv,btd->vd", g, h)


@pytest.mark.parametrize("most_logits", [10**9, 2 * 3 * 11 * 4, 2 * 3 * 11, 1])
def test_divergence_and_its_gradient_by_pieces_of_positions(most_logits):
    """All 7 positions at a time, 4, or 1; the teacher of another width, and given."""
    B, T, V = 3, 7, 11
    mine, theirs = a_case(B * T, 5, V), a_case(B * T, 6, V, seed=1)
    h, teacher = (case["h"].reshape(B, T, -1) for case in (mine, theirs))
    weights = mine["weights"].reshape(B, T)

    def loss(h, kernel, teacher, teacher_kernel):
        limit = {"most_logits": most_logits}
        return divergence_of_rows(h, kernel, teacher, teacher_kernel, weights, **limit)

    given = (h, mine["kernel"], teacher, theirs["kernel"])
    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
    (total, count), (of_h, of_kernel, *of_teacher) = gradient(*given)
    wanted = kl_by_hand(*given, weights)
    for got, expected in zip((total, count, of_h, of_kernel), wanted, strict=True):
        assert got.dtype == jnp.float32
        # As of the cross-entropy above: sums of some tens of float32 terms.
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)
    assert not any(np.any(g) for g in of_teacher)
    itself = (h, mine["kernel"], h, mine["kernel"])
    # log p − log p is 0 exactly.
    assert loss(*itself)[0] == 0
    all_at_once = f"tensor<{B}x{T}x{V}xf32>"
    assert (all_at_once in gradient.lower(*given).as_text()) == (most_logits == 10**9)


def test_only_one_chunk_of_logits_exists():
    """No array of M × V elements in the program of the chunked loss, forward and backward."""
    M, D, V = 64, 4, 50
    case = a_case(M, D, V)

    def loss(h, kernel, chunk):
        return cross_entropy(h, kernel, case["labels"], case["weights"], chunk=chunk)[0]

    def largest(chunk):
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
        text = gradient.lower(case["h"], case["kernel"], chunk).as_text()
        return f"{M}x{V}x" in text, f"{8}x{V}x" in text

    assert largest(0) == (True, False)
    assert largest(8) == (False, True)


def test_large_logits_do_not_overflow():
    case = a_case(4, 3, 7) | {"bias": np.zeros(7, np.float32)}
    case["h"] *= 1e4
    expected = by_hand(**(case | {"weights": np.ones(4)}))[0]
    total, _ = cross_entropy(case["h"], case["kernel"], case["labels"], np.ones(4))
    np.testing.assert_allclose(total, expected, rtol=1e-5)


IS_LABEL = np.isin(np.arange(40), [3, 7, 8, 31])


def test_labels_are_all_kept_and_the_rest_are_none():
    candidates, bias = sampled_vocabulary(IS_LABEL, 9, jax.random.key(0))
    candidates, places = np.asarray(candidates), np.asarray(label_places(IS_LABEL))
    assert candidates.shape == bias.shape == (4 + 9,)
    assert list(candidates[:4]) == [3, 7, 8, 31]
    assert not np.any(IS_LABEL[candidates[4:]])
    assert not np.any(bias[:4]) and np.allclose(bias[4:], np.log(36 / 9))
    for label in (3, 7, 8, 31):
        assert candidates[places[label]] == label


def test_the_partition_function_is_estimated_without_bias():
    logits = np.random.default_rng(0).normal(size=40).astype(np.float32)

    def estimate(key):
        candidates, bias = sampled_vocabulary(IS_LABEL, 5, key)
        return jnp.sum(jnp.exp(jnp.asarray(logits)[candidates] + bias))

    num = 20_000
    estimates = jax.jit(jax.vmap(estimate))(jax.random.split(jax.random.key(1), num))
    standard_error = float(jnp.std(estimates)) / num**0.5
    assert abs(float(jnp.mean(estimates)) - np.exp(logits).sum()) < 4 * standard_error


@pytest.mark.parametrize("num_sampled", [36, 500])
def test_with_as_many_negatives_as_there_are_it_is_the_full_loss(num_sampled):
    case = a_case(11, 5, 40)
    case["labels"] = np.random.default_rng(0).choice([3, 7, 8, 31], 11).astype(np.int32)
    candidates, bias = sampled_vocabulary(IS_LABEL, num_sampled, jax.random.key(0))
    assert sorted(np.asarray(candidates)) == list(range(40))
    full = cross_entropy(case["h"], case["kernel"], case["labels"], case["weights"])
    sampled = cross_entropy(
        case["h"],
        case["kernel"][np.asarray(candidates)],
        label_places(IS_LABEL)[case["labels"]],
        case["weights"],
        bias_V=bias,
    )
    np.testing.assert_allclose(sampled, full, rtol=1e-6)


@pytest.mark.parametrize("is_label", [np.ones(6, bool), IS_LABEL])
def test_no_negatives(is_label):
    num_sampled = 5 if is_label.all() else 0
    candidates, bias = sampled_vocabulary(is_label, num_sampled, jax.random.key(0))
    np.testing.assert_array_equal(candidates, np.flatnonzero(is_label))
    assert bias.shape == candidates.shape and not np.any(bias)
