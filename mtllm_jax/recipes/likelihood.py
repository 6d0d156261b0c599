"""How likely an LLM finds texts.

B rows, T positions, D width, V vocabulary, M tokens.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mtllm_jax import sharding
from mtllm_jax.config import SDRRL
from mtllm_jax.data.tokenise import TargetTokenizer
from mtllm_jax.hf.files import local_files
from mtllm_jax.inference import Vectors
from mtllm_jax.models.llama import Llama
from mtllm_jax.objectives import next_tokens
from mtllm_jax.ops.vocab_loss import log_likelihoods
from mtllm_jax.recipes import stacking
from mtllm_jax.recipes.job import Job

_CHUNK = 1024  # tokens whose logits are there at a time


def bits(job: Job[SDRRL], folder: str, texts: Sequence[str]) -> np.ndarray:
    """−log2 of each text's likelihood under the LLM of a folder: of its tokens but the first, each
    given those before it. float64 [texts]. What a tokenizer begins texts with is the first."""
    config = job.config
    dtype = jnp.dtype(config.compute_dtype)
    tokenizer = TargetTokenizer(local_files(folder))
    graph, state = nnx.split(stacking.load_llm(config, folder, (), job.mesh, job.console))

    def forward(state: nnx.State, ids_BT: Array, segments_BT: Array) -> Array:
        model: Llama = nnx.merge(graph, state)
        labels_BT, valid_BT = next_tokens(ids_BT, segments_BT)
        h_BTD = model.hidden(model.embed(ids_BT, dtype), segments_BT, causal=True, packed=False)
        kernel_VD = model.output_kernel().astype(dtype)
        h_MD = h_BTD.reshape(-1, h_BTD.shape[-1])
        said_M = log_likelihoods(h_MD, kernel_VD, labels_BT.reshape(-1), chunk=_CHUNK)
        said_BT = jnp.where(valid_BT, said_M.reshape(labels_BT.shape), 0.0)
        return jnp.sum(said_BT, axis=1, keepdims=True)

    said = Vectors(
        forward,
        state,
        pad_id=tokenizer.pad_id,
        batch_rows=sharding.rows_for(config.answering.batch_rows, job.mesh),
        mesh=job.mesh,
    )
    return -said(tokenizer.encode(texts))[:, 0].astype(np.float64) / np.log(2)
