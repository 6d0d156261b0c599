"""Log-likelihoods of labels behind prompts, against PyTorch reading each of them alone."""

import jax
import numpy as np
import pytest
from torch_models import assert_close, llm, torch

from mtllm_jax import sharding
from mtllm_jax.config import Mesh
from mtllm_jax.hf.llama import load_llama
from mtllm_jax.recipes.prompting import Scores


def by_torch(model, prompt, following):
    """log p(following | prompt), by one pass over both."""
    ids = torch.tensor(np.concatenate([prompt, following]), dtype=torch.long)[None]
    with torch.no_grad():
        said = model(input_ids=ids).logits.log_softmax(-1)[0]
    places = range(len(prompt) - 1, ids.shape[1] - 1)
    return sum(said[place, ids[0, place + 1]].item() for place in places)


@pytest.mark.parametrize(
    ("family", "mesh"), [("llama", Mesh(data=8)), ("qwen2", Mesh(data=2, context=2, tensor=2))]
)
def test_log_likelihoods(tmp_path, family, mesh):
    """Prompts and continuations of many lengths, more of them than a batch holds."""
    reference = llm(family)
    reference.save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    rows = [
        (
            rng.integers(3, 50, size).astype(np.int32),
            [rng.integers(3, 50, n).astype(np.int32) for n in rng.integers(1, 6, 3)],
        )
        for size in (1, 30, 7, 8, 9, 2, 16, 4, 31, 6)
    ]
    devices = sharding.make_mesh(mesh, jax.devices())
    score = Scores(load_llama(tmp_path), 0, 8, dtype="float32", mesh=devices)
    wanted = [[by_torch(reference, prompt, one) for one in following] for prompt, following in rows]
    assert_close(score(rows), wanted, 1e-4)  # sums of up to five, each to the usual 1e-5
