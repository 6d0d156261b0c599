"""A trained stack in Python: texts in any language of its encoder → vectors and labels.

M texts, D LLM width, C classes.
"""

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.typing import DTypeLike

from mtllm_jax import sharding
from mtllm_jax.config import Mesh
from mtllm_jax.data.benchmarks import source_language
from mtllm_jax.data.tokenise import SourceTokenizer, source_tokenizer
from mtllm_jax.hf.stack import MODEL_TYPES, load_stack
from mtllm_jax.inference import Vectors
from mtllm_jax.models.layers import Linear
from mtllm_jax.models.stack import Stack
from mtllm_jax.recipes import stacking
from mtllm_jax.recipes.finished import open_run
from mtllm_jax.runfolder import read_json

WINDOW = 1024  # rows that are tokenised, sorted by length and answered together


class Model:
    """A stack, and the head of its task where it has one. Made by `load`.

    labels: the task's, in the order of their ids; none for a stack without a task. languages: the
    FLORES-200 codes that texts may be in, those of the encoder; how well it reads each is another
    matter. width: D.
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
        self.width = stack.llm.config.width
        self._head_DC = None if head is None else np.asarray(head.kernel[...], np.float32)
        self._run = Vectors(
            *stacking.stack_forward(stack, causal=causal, dtype=dtype),
            pad_id=tokenizer.pad_id,
            batch_rows=batch_rows,
            mesh=mesh,
        )

    def encode(
        self,
        texts: Sequence[str],
        lang: str | Sequence[str],
        pairs: Sequence[str | None] | None = None,
    ) -> np.ndarray:
        """The stack's pooled state of each text, float32 [M, D].

        lang: one FLORES-200 code, or one for each text; one that the encoder does not know may have
        a stand-in there (`source_language`). pairs: the second text of each pair; None for a text
        that stands alone. A text of more tokens than the run's evaluation.max_length loses its end,
        of a pair the longer one first. Raises ValueError for a language that the encoder does not
        know, naming the three nearest, and for texts that are not a list of str.
        """
        tokens = self._tokens(texts, lang, pairs)
        if not tokens:
            return np.empty((0, self.width), np.float32)
        return self._run(tokens)

    def shares(
        self,
        texts: Sequence[str],
        lang: str | Sequence[str],
        pairs: Sequence[str | None] | None = None,
    ) -> np.ndarray:
        """The probability of every label, in the order of `labels`, float32 [M, C]; as `encode`.

        ValueError also for a stack without a classification head.
        """
        if self._head_DC is None:
            raise ValueError("this stack has no classification head; `encode` gives its vectors.")
        logits_MC = self.encode(texts, lang, pairs) @ self._head_DC
        odds_MC = np.exp(logits_MC - logits_MC.max(axis=1, keepdims=True, initial=-np.inf))
        return odds_MC / odds_MC.sum(axis=1, keepdims=True)

    def classify(
        self,
        texts: Sequence[str],
        lang: str | Sequence[str],
        pairs: Sequence[str | None] | None = None,
    ) -> list[dict[str, float]]:
        """For each text the probability of every label, the likeliest first; as `shares`."""
        return [self.ranked(share_C) for share_C in self.shares(texts, lang, pairs)]

    def ranked(self, share_C: np.ndarray) -> dict[str, float]:
        """Probabilities by label, the likeliest first; of equal ones the first of `labels`."""
        order = np.argsort(-share_C, kind="stable")
        return {self.labels[i]: float(share_C[i]) for i in order}

    def predict(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """Each row with "prediction", a label, and "probabilities" as `classify` has them.

        rows: mappings with "text", "language" and perhaps "text_pair"; what else they hold is kept.
        They are read as answers are asked for, some a thousand ahead. ValueError as `classify`.
        """
        rest = iter(rows)
        while window := list(itertools.islice(rest, WINDOW)):
            for row, answer in zip(window, self.classify(*columns(window)), strict=True):
                yield {**row, "prediction": next(iter(answer)), "probabilities": answer}

    def _tokens(
        self,
        texts: Sequence[str],
        lang: str | Sequence[str],
        pairs: Sequence[str | None] | None,
    ) -> list[np.ndarray]:
        if isinstance(texts, str):
            raise ValueError(f"texts is {texts!r}; it must be a list of texts.")
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"texts[{i}] is {text!r}; it must be a str.")
        codes = [lang] * len(texts) if isinstance(lang, str) else list(lang)
        known = {code: source_language(code, self.languages) for code in set(codes)}
        told = [known[code] for code in codes]
        longest = self._max_length
        if pairs is None:
            return self._tokenizer.encode(texts, told, max_length=longest)
        if len(pairs) != len(texts) or len(told) != len(texts):
            raise ValueError(
                f"there are {len(texts)} texts, {len(pairs)} pairs and {len(told)} languages; it"
                " must be as many of each."
            )
        tokens: dict[int, np.ndarray] = {}
        for paired in (False, True):
            places = [i for i, pair in enumerate(pairs) if (pair is not None) == paired]
            encoded = self._tokenizer.encode(
                [texts[i] for i in places],
                [told[i] for i in places],
                text_pairs=[pairs[i] or "" for i in places] if paired else None,
                max_length=longest,
            )
            tokens |= dict(zip(places, encoded, strict=True))
        return [tokens[i] for i in range(len(texts))]


def columns(
    rows: Sequence[Mapping[str, Any]],
) -> tuple[list[str], list[str], list[str | None] | None]:
    """Texts, languages and pairs of rows, as `Model.encode` takes them."""
    pairs = [row.get("text_pair") for row in rows]
    alone = all(pair is None for pair in pairs)
    return (
        [row["text"] for row in rows],
        [row["language"] for row in rows],
        None if alone else pairs,
    )


def load(
    folder: str | os.PathLike[str],
    *,
    batch_rows: int = 32,
    mesh: jax.sharding.Mesh | None = None,
) -> Model:
    """Open a run that has finished its training, or what was exported of one.

    folder: the run's --workdir, a folder that launch/export.py --format=hf wrote, or one in the
    layout of the authors' release. batch_rows: texts in one forward pass. mesh: the devices that
    weights and texts lie on (`sharding.make_mesh`); None: the first. Raises ValueError for what is
    none of these, or where weights or model folders are missing or damaged.
    """
    if mesh is None:
        mesh = sharding.make_mesh(Mesh(1, 1, 1), jax.local_devices()[:1])
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
        head=None if run.num_choices else student.head,
        labels=() if run.num_choices else run.labels,
        causal=not run.config.bidirectional,
        dtype=run.config.compute_dtype,
        max_length=run.config.evaluation.max_length,
        batch_rows=batch_rows,
        mesh=mesh,
    )
