"""A trained stack in Python: texts in any language of its encoder → vectors and labels.

M texts, D LLM width, C classes.
"""

import os
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath
from jax.typing import DTypeLike

from mtllm_jax import sharding
from mtllm_jax.config import Mesh
from mtllm_jax.data.tokenise import SourceTokenizer, source_tokenizer
from mtllm_jax.hf.stack import MODEL_TYPES, load_stack
from mtllm_jax.inference import Vectors
from mtllm_jax.models.layers import Linear
from mtllm_jax.models.stack import Stack
from mtllm_jax.recipes import stacking
from mtllm_jax.recipes.finished import open_run
from mtllm_jax.runfolder import read_json


class Model:
    """A stack, and the head of its task where it has one. Made by `load`.

    labels: the task's, in the order of their ids; none for a stack without a task. languages: the
    FLORES-200 codes that texts may be in, those of the encoder; how well it reads each is another
    matter.
    """

    def __init__(
        self,
        stack: Stack,
        tokenizer: SourceTokenizer,
        *,
        head: Linear | None,
        labels: Sequence[str],
        causal: bool,
        dtype: DTypeLike,
        max_length: int,
        batch_rows: int,
        mesh: jax.sharding.Mesh,
    ):
        self.labels = tuple(labels)
        self.languages = tokenizer.languages
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._width = stack.llm.config.width
        self._head_DC = None if head is None else np.asarray(head.kernel[...], np.float32)
        self._run = Vectors(
            *stacking.stack_forward(stack, causal=causal, dtype=dtype),
            pad_id=tokenizer.pad_id,
            batch_rows=batch_rows,
            mesh=mesh,
        )

    def encode(self, texts: Sequence[str], lang: str | Sequence[str]) -> np.ndarray:
        """The stack's pooled state of each text, float32 [M, D].

        lang: one FLORES-200 code, or one for each text. A text of more tokens than the run's
        evaluation.max_length loses its end. Raises ValueError for a language that the encoder does
        not know, naming the three nearest, and for texts that are not a list of str.
        """
        if isinstance(texts, str):
            raise ValueError(f"texts is {texts!r}; it must be a list of texts.")
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"texts[{i}] is {text!r}; it must be a str.")
        tokens = self._tokenizer.encode(texts, lang, max_length=self._max_length)
        if not tokens:
            return np.empty((0, self._width), np.float32)
        return self._run(tokens)

    def classify(self, texts: Sequence[str], lang: str | Sequence[str]) -> list[dict[str, float]]:
        """For each text the probability of every label, the likeliest first; as `encode`.

        ValueError also for a stack without a classification head.
        """
        if self._head_DC is None:
            raise ValueError("this stack has no classification head; `encode` gives its vectors.")
        logits_MC = self.encode(texts, lang) @ self._head_DC
        odds_MC = np.exp(logits_MC - logits_MC.max(axis=1, keepdims=True, initial=-np.inf))
        answers = []
        for share_C in odds_MC / odds_MC.sum(axis=1, keepdims=True):
            order = np.argsort(-share_C, kind="stable")
            answers.append({self.labels[i]: float(share_C[i]) for i in order})
        return answers


def load(folder: str | os.PathLike[str], *, batch_rows: int = 32) -> Model:
    """Open a run that has finished its training, or what was exported of one, on the first device.

    folder: the run's --workdir, a folder that launch/export.py --format=hf wrote, or one in the
    layout of the authors' release. batch_rows: texts in one forward pass. Raises ValueError for
    what is none of these, or where weights or model folders are missing or damaged.
    """
    mesh = sharding.make_mesh(Mesh(1, 1, 1), jax.devices()[:1])
    config = epath.Path(folder) / "config.json"
    values = read_json(config) if config.exists() else None
    if isinstance(values, dict) and values.get("model_type") in MODEL_TYPES:
        exported = load_stack(folder, mesh=mesh)
        legacy = exported.legacy_source_order
        return Model(
            exported.stack,
            source_tokenizer(folder, legacy_source_order=legacy),
            head=exported.head if exported.kind == "classification" else None,
            labels=exported.labels,
            causal=not exported.bidirectional,
            dtype=np.float32,
            max_length=exported.max_length,
            batch_rows=batch_rows,
            mesh=mesh,
        )
    run = open_run(folder)
    parts = run.load_parts(mesh)
    _, student = run.load_trained(parts)
    return Model(
        student.stack,
        parts.source,
        head=student.head,
        labels=run.labels,
        causal=not run.config.bidirectional,
        dtype=run.config.compute_dtype,
        max_length=run.config.evaluation.max_length,
        batch_rows=batch_rows,
        mesh=mesh,
    )
