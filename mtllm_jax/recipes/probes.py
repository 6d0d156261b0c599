"""Probes without labels: whether a sentence's nearest English one is its own translation.

M texts, D width.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mtllm_jax import distributed
from mtllm_jax.config import MTLLM
from mtllm_jax.data.benchmarks import Bitext, source_language
from mtllm_jax.inference import Vectors
from mtllm_jax.models.stack import llm_pooled
from mtllm_jax.recipes import stacking
from mtllm_jax.recipes.job import Job

_FILE = "retrieval.json"

# Texts of one language, by its code → vectors [M, D].
Embed = Callable[[Sequence[str], str], np.ndarray]


def retrieval(
    job: Job[MTLLM], parts: stacking.Parts, adapted: nnx.State, bitext: Bitext
) -> dict[str, Any]:
    """Accuracy of retrieval by the encoder, the stack after stage 1 and the LLM as they are.

    {"bitext", "systems": {name: {"mean", "languages": {code: accuracy}}}}: from each language into
    English, by the cosine of pooled vectors. Written to the folder of a stage, and read where an
    earlier start has left it.
    """
    with job.stage("probes", f"retrieval on {bitext.name}") as stage:
        path = stage.path / _FILE
        if not distributed.by_first(path.exists):
            found = {}
            for name, embed in _embedders(job, parts, adapted).items():
                values = _accuracies(embed, bitext, job.config.english)
                found[name] = {"mean": float(np.mean(list(values.values()))), "languages": values}
            job.run.write_json(f"probes/{_FILE}", {"bitext": bitext.name, "systems": found})
            distributed.meet()  # the first writes, and all read
        return dict(job.run.read_json(f"probes/{_FILE}"))


def accuracy(foreign_MD: np.ndarray, english_MD: np.ndarray, texts: Sequence[str]) -> float:
    """Of row i of the one by its nearest row of the other; texts that say the same count alike."""
    foreign_MD, english_MD = _unit(foreign_MD), _unit(english_MD)
    nearest_M = np.argmax(foreign_MD @ english_MD.T, axis=1)
    return float(np.mean([texts[i] == text for i, text in zip(nearest_M, texts, strict=True)]))


def _accuracies(embed: Embed, bitext: Bitext, english: str) -> dict[str, float]:
    """By language. English texts that several languages share are embedded once."""
    every = list(dict.fromkeys(text for texts, _ in bitext.pairs.values() for text in texts))
    vectors, place = embed(every, english), {text: i for i, text in enumerate(every)}
    return {
        code: accuracy(embed(theirs, code), vectors[[place[text] for text in texts]], texts)
        for code, (texts, theirs) in bitext.pairs.items()
    }


def _unit(x_MD: np.ndarray) -> np.ndarray:
    norm_M1 = np.linalg.norm(x_MD, axis=1, keepdims=True)
    return x_MD / np.maximum(norm_M1, np.finfo(np.float32).tiny)


def _embedders(job: Job[MTLLM], parts: stacking.Parts, adapted: nnx.State) -> dict[str, Embed]:
    config, limits = job.config, job.config.evaluation
    causal, dtype = not config.bidirectional, config.compute_dtype
    stack = stacking.with_trained(config, stacking.build_stack(config, parts, seed=0), adapted)
    llm_graph, llm_state = nnx.split(parts.llm)

    def by_llm(state: nnx.State, ids_BT: Array, segments_BT: Array) -> Array:
        llm = nnx.merge(llm_graph, state)
        pooled_BND = llm_pooled(llm, ids_BT, segments_BT, 1, causal=causal, dtype=jnp.dtype(dtype))
        return pooled_BND[:, 0]

    def runner(forward_and_state: Any, pad_id: int) -> Vectors:
        rows = limits.batch_rows
        return Vectors(*forward_and_state, pad_id=pad_id, batch_rows=rows, mesh=job.mesh)

    encoder = runner(stacking.encoder_forward(config, parts.encoder), parts.source.pad_id)
    stacked = stacking.stack_forward(stack, causal=causal, dtype=dtype)
    through = runner(stacked, parts.source.pad_id)
    alone = runner((by_llm, llm_state), parts.target.pad_id)

    def source(texts: Sequence[str], code: str) -> list[np.ndarray]:
        told = source_language(code, parts.source.languages)
        return parts.source.encode(texts, told, max_length=limits.max_length)

    def target(texts: Sequence[str]) -> list[np.ndarray]:
        return parts.target.encode(texts, max_length=limits.max_length)

    return {
        "encoder": lambda texts, code: encoder(source(texts, code)),
        "stack": lambda texts, code: through(source(texts, code)),
        "llm": lambda texts, code: alone(target(texts)),
    }
