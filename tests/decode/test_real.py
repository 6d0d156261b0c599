"""SmolLM2's answers against transformers'; needs the folders that two variables name.

MTLLM_MODELS=MODELS MTLLM_DATA=DATA pytest -m real tests/decode
"""

import jax
import numpy as np
import pytest
from torch_models import torch, transformers

from benchmarks import parity
from mtllm_jax import sampling, sharding
from mtllm_jax.config import Mesh
from mtllm_jax.data.templates import Template
from mtllm_jax.data.tokenise import TargetTokenizer
from mtllm_jax.hf.llama import load_llama, stop_ids
from mtllm_jax.sampling import Sampler, Sampling

pytestmark = pytest.mark.real
TOKENS = 48


@pytest.mark.parametrize("template", ["none", "chat"])
def test_greedy_answers_are_transformers(template, mtllm_models, mtllm_data, monkeypatch):
    """To 20 prompts, token by token, through two sizes of the cache."""
    folder = mtllm_models / parity.LLM
    if not folder.is_dir() or not (mtllm_data / "ntrex128").is_dir():
        pytest.skip("MTLLM_MODELS or MTLLM_DATA has not what is needed")
    monkeypatch.setattr(sampling, "_FIRST_ROOM", 30)
    tokenizer = TargetTokenizer(folder)
    given = Template(template, tokenizer)(parity.prompts(mtllm_data))
    width = max(map(len, given))
    run = Sampler(
        load_llama(folder),
        stop_ids=stop_ids(folder),
        sampling=Sampling(temperature=0),
        max_new_tokens=TOKENS,
        num_rows=len(given),
        mesh=sharding.make_mesh(Mesh(), jax.devices()[:1]),
    )
    ours = run(given, np.zeros((len(given), 2), np.uint32), width + 3)

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.zeros((len(given), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(given):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=mask, do_sample=False, num_beams=1, max_new_tokens=TOKENS
        )
    theirs = out[:, width:].tolist()
    assert len(set(map(tuple, theirs))) > 15
    for ours_T, theirs_T in zip(ours, theirs, strict=True):
        said = ours_T[ours_T != sampling.NOTHING].tolist()
        end = model.generation_config.eos_token_id
        assert said == (theirs_T[: theirs_T.index(end) + 1] if end in theirs_T else theirs_T)
