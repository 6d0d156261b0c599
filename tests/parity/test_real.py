"""Two real checkpoints against PyTorch on real text; needs the folders that two variables name.

    MTLLM_MODELS=MODELS MTLLM_DATA=DATA pytest -m real tests/parity/test_real.py

benchmarks/parity.py measures, and prints by how much it was.
"""

import numpy as np
import pytest

pytest.importorskip("torch", reason="parity needs torch (the `test` extra on Python 3.11)")
from benchmarks import parity

pytestmark = pytest.mark.real


def folder_of(models, name):
    if not (models / name).is_dir():
        pytest.skip(f"MTLLM_MODELS has no {name}")
    return models / name


def text(data):
    if not (data / "ntrex128").is_dir():
        pytest.skip("MTLLM_DATA has no ntrex128")
    return data


def test_log_likelihoods(mtllm_models, mtllm_data):
    """Of 200 English sentences, per token: within 1e-3 nats for each sentence, and each token."""
    sentences = parity.english(text(mtllm_data))
    assert len(set(sentences)) == 200
    ours, theirs = parity.log_likelihoods(folder_of(mtllm_models, parity.LLM), sentences)
    for one, other in zip(ours, theirs, strict=True):
        assert len(one) > 2
        assert abs(one.mean() - other.mean()) < 1e-3
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-3)
    assert 3 < -np.concatenate(theirs).mean() < 7, "as a model of English and no random one"


def test_greedy_continuations(mtllm_models, mtllm_data):
    """Of 20 prompts, token by token as torch's `generate`. Ours are the best token at each place of
    one pass over prompt and continuation: where all agree, so do two greedy decodings, by induction
    over the places, as each best token depends on agreed tokens alone."""
    prompts = parity.prompts(text(mtllm_data))
    assert len(set(prompts)) == 20
    ours, theirs, _ = parity.continuations(folder_of(mtllm_models, parity.LLM), prompts)
    assert sum(map(len, theirs)) > 10 * len(prompts)
    assert len(set(map(tuple, theirs))) == len(prompts)
    assert ours == theirs


def test_embeddings(mtllm_models, mtllm_data):
    """Of 200 sentences in 20 languages: each a cosine of at least .99999 to torch's."""
    sentences = parity.multilingual(text(mtllm_data))
    assert len(set(sentences)) == 200
    assert len(set(parity.LANGUAGES)) == 20
    ours, theirs = parity.embeddings(folder_of(mtllm_models, parity.ENCODER), sentences)
    assert np.sum(ours * theirs, axis=1).min() >= 0.99999
    assert (theirs @ theirs.T).min() < 0.9, "sentences differ"
