"""Texts through a model in batches: in their order, each as if alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtllm_jax import sharding
from mtllm_jax.config import Mesh
from mtllm_jax.inference import Vectors

WEIGHTS = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)


def summed(weights_VD, ids_BS, segments_BS):
    return jnp.sum(weights_VD[ids_BS] * segments_BS[:, :, None], axis=1)


def vectors(batch_rows, num_devices=1, **axes):
    mesh = sharding.make_mesh(Mesh(**axes), jax.devices()[:num_devices])
    return Vectors(summed, jnp.asarray(WEIGHTS), pad_id=7, batch_rows=batch_rows, mesh=mesh)


@pytest.mark.parametrize(("batch_rows", "num_devices"), [(4, 1), (64, 1), (16, 8)])
def test_each_text_in_its_place(batch_rows, num_devices):
    rng = np.random.default_rng(1)
    texts = [rng.integers(0, 50, rng.integers(1, 90)) for _ in range(33)]
    got = vectors(batch_rows, num_devices)(texts)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, [WEIGHTS[text].sum(0) for text in texts], atol=1e-4)


def test_lengths_are_cut_over_any_number_of_devices():
    """Six divide no length that is a multiple of 8 or 32 alone."""
    texts = [np.arange(length) % 50 for length in (3, 40, 70)]
    got = vectors(4, num_devices=6, context=6)(texts)
    np.testing.assert_allclose(got, [WEIGHTS[text].sum(0) for text in texts], atol=1e-4)


def test_what_cannot_be_run():
    with pytest.raises(ValueError, match="no texts"):
        vectors(4)([])
    with pytest.raises(ValueError, match=r"config\.evaluation\.batch_rows is 12; .*multiple of 8"):
        vectors(12, num_devices=8)
