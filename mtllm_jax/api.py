"""A trained stack in Python: texts in any language of its encoder → vectors and labels.

M texts or rows, D LLM width, C classes or choices.
"""

import functools
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
from mtllm_jax.data.files import choice_row
from mtllm_jax.data.tokenise import Marked, SourceTokenizer, source_tokenizer
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

    kind: of the head, "none", "classification" or "multiple_choice". labels: of a classification,
    in the order of their ids; choices are called "1", "2", … by their place. languages: the
    FLORES-200 codes that texts may be in, those of the encoder; how well it reads each is another
    matter. width: D.
    """

    def __init__(
        self,
        stack: Stack,
        tokenizer: SourceTokenizer,
        *,
        head: Linear | None,
        kind: str,
        labels: Sequence[str],
        causal: bool,
        dtype: DTypeLike,
        max_length: int,
        batch_rows: int,
        mesh: jax.sharding.Mesh,
    ):
        self.kind = kind
        self.labels = tuple(labels)
        self.languages = tokenizer.languages
        self._tokenizer = tokenizer
        self._max_length = max_length
        self.width = stack.llm.config.width
        self._head_DC = None if head is None else np.asarray(head.kernel[...], np.float32)

        @functools.cache
        def run(num_choices: int) -> Vectors:
            return Vectors(
                *stacking.stack_forward(stack, causal=causal, dtype=dtype, num_choices=num_choices),
                pad_id=tokenizer.pad_id,
                batch_rows=batch_rows,
                mesh=mesh,
            )

        self._run = run  # for texts 0, or by the number of a row's choices

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
        return self._run(0)(tokens)

    def shares(
        self,
        texts: Sequence[str],
        lang: str | Sequence[str],
        pairs: Sequence[str | None] | None = None,
    ) -> np.ndarray:
        """The probability of every label, in the order of `labels`, float32 [M, C]; as `encode`.

        ValueError also for a stack without a classification head.
        """
        if self._head_DC is None or self.kind != "classification":
            other = "`choose`" if self._head_DC is not None else "`encode`"
            raise ValueError(f"this stack has no classification head; there is {other}.")
        return _softmax(self.encode(texts, lang, pairs) @ self._head_DC)

    def classify(
        self,
        texts: Sequence[str],
        lang: str | Sequence[str],
        pairs: Sequence[str | None] | None = None,
    ) -> list[dict[str, float]]:
        """For each text the probability of every label, the likeliest first; as `shares`."""
        return [self.ranked(share_C) for share_C in self.shares(texts, lang, pairs)]

    def choose(
        self,
        contexts: Sequence[str],
        questions: Sequence[str],
        choices: Sequence[Sequence[str]],
        lang: str | Sequence[str],
    ) -> list[list[float]]:
        """The probability of each choice of each row, in the order given; lang as of `encode`.

        A row of too many tokens loses the end of its context. ValueError also for a stack without a
        head for choices, and for a row whose question and choices alone are too long.
        """
        if self._head_DC is None or self.kind != "multiple_choice":
            raise ValueError("this stack has no head for choices.")
        codes = [lang] * len(contexts) if isinstance(lang, str) else list(lang)
        columns = zip(contexts, questions, choices, codes, strict=True)
        rows = [
            {"id": i, "context": context, "question": question, "choices": each, "language": code}
            for i, (context, question, each, code) in enumerate(columns)
        ]
        answers: list[list[float]] = [[] for _ in rows]
        for count in sorted({len(each) for each in choices}):
            places = [i for i, each in enumerate(choices) if len(each) == count]
            marked = self._choice_tokens([rows[i] for i in places])
            scores_MC = (self._run(count)(*marked) @ self._head_DC)[..., 0]
            for i, share_C in zip(places, _softmax(scores_MC).tolist(), strict=True):
                answers[i] = share_C
        return answers

    def _choice_tokens(self, rows: Sequence[Mapping[str, Any]]) -> Marked:
        known = {row["language"] for row in rows}
        told = {code: source_language(code, self.languages) for code in known}
        codes = [told[row["language"]] for row in rows]
        return self._tokenizer.encode_choices(rows, codes, max_length=self._max_length)

    def refusal(self, row: Mapping[str, Any]) -> str:
        """Why a row of multiple choice, in a language that is known, has no answer, or ""."""
        try:
            told = choice_row(row, "row") | {"id": "", "language": row["language"]}
            self._choice_tokens([told])
        except ValueError as error:
            return str(error).partition(": ")[2].rstrip(".")
        return ""

    def row_shares(self, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """As `shares`, of rows as of `predict`; 0 for choices that a row does not have."""
        if self.kind != "multiple_choice":
            return self.shares(*columns(rows))
        given = [choice_row(row, f"row {i}") for i, row in enumerate(rows)]
        shares = self.choose(
            [row["context"] for row in given],
            [row["question"] for row in given],
            [row["choices"] for row in given],
            [row["language"] for row in rows],
        )
        share_MC = np.zeros((len(rows), max(map(len, shares), default=0)), np.float32)
        for i, row_shares in enumerate(shares):
            share_MC[i, : len(row_shares)] = row_shares
        return share_MC

    def answer(self, row: Mapping[str, Any], share_C: np.ndarray) -> dict[str, Any]:
        """Of a row and its shares: "prediction", a label or the number of a choice, from 1, and
        "probabilities" by label, the likeliest first."""
        names = self.labels
        if self.kind == "multiple_choice":
            count = len(choice_row(row, "row")["choices"])
            names, share_C = tuple(str(i + 1) for i in range(count)), share_C[:count]
        ranked = _ranked(names, share_C)
        return {"prediction": next(iter(ranked)), "probabilities": ranked}

    def ranked(self, share_C: np.ndarray) -> dict[str, float]:
        """Probabilities by label, the likeliest first; of equal ones the first of `labels`."""
        return _ranked(self.labels, share_C)

    def predict(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """Each row with its "prediction" and "probabilities", as of `answer`.

        rows: mappings with "text", "language" and perhaps "text_pair"; of multiple choice with
        "context" or "text", perhaps "question", and "choices". What else they hold is kept. They
        are read as answers are asked for, some a thousand ahead. ValueError as `classify` and
        `choose`.
        """
        rest = iter(rows)
        while window := list(itertools.islice(rest, WINDOW)):
            for row, share_C in zip(window, self.row_shares(window), strict=True):
                yield {**row, **self.answer(row, share_C)}

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


def _softmax(scores_MC: np.ndarray) -> np.ndarray:
    odds_MC = np.exp(scores_MC - scores_MC.max(axis=1, keepdims=True, initial=-np.inf))
    return odds_MC / odds_MC.sum(axis=1, keepdims=True)


def _ranked(names: Sequence[str], share_C: np.ndarray) -> dict[str, float]:
    order = np.argsort(-share_C, kind="stable")
    return {names[i]: float(share_C[i]) for i in order}


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
            head=exported.head,
            kind=exported.kind,
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
        kind="multiple_choice" if run.num_choices else "classification",
        labels=() if run.num_choices else run.labels,
        causal=not run.config.bidirectional,
        dtype=run.config.compute_dtype,
        max_length=run.config.evaluation.max_length,
        batch_rows=batch_rows,
        mesh=mesh,
    )
