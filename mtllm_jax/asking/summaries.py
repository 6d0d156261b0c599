"""ROUGE of summaries in any language, by the rouge-score package and words of our own.

XL-Sum's own scorer cuts Chinese, Japanese and Thai into words by dictionaries, and stems where it
is asked to. Here each letter of scripts without spaces is a word and nothing is stemmed, so that
figures compare between models, not with those of its paper.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from mtllm_jax.asking.measures import Measure, mean, off_target
from mtllm_jax.asking.translation import Pieces
from mtllm_jax.asking.words import first_line, plain, words

_KINDS = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
_ABOUT = (
    "F1 of the first line, rouge-score: lower case, no punctuation, no stemmer, letters of scripts"
    " without spaces as words"
)


class _Words:
    """As rouge-score takes a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return words(plain(text))


class _InPieces:
    """The same, by a sentencepiece model."""

    def __init__(self, pieces: Pieces):
        self._pieces = pieces

    def tokenize(self, text: str) -> list[str]:
        return self._pieces(text).split()


def summarised(
    rows: Sequence[Mapping[str, Any]], answers: Sequence[str], pieces: Pieces | None
) -> list[Measure]:
    """ROUGE-L, -1 and -2 of each answer's first line; with `pieces` theirs too; off-target."""
    said = [first_line(answer) for answer in answers]
    labels = [row["label"] for row in rows]
    measures = _rouge("", _ABOUT, _Words(), labels, said)
    if pieces is not None:
        about = f"F1 of the first line, rouge-score, {pieces.signature()}"
        measures += _rouge("sp", about, _InPieces(pieces), labels, said)
    return [*measures, off_target("off-target", [row["language"] for row in rows], said)]


def _rouge(
    prefix: str, about: str, tokenizer: Any, labels: Sequence[str], said: Sequence[str]
) -> list[Measure]:
    scorer = _scorer_class()([*_KINDS], tokenizer=tokenizer)
    scores = [scorer.score(label, answer) for label, answer in zip(labels, said, strict=True)]
    return [
        mean(f"{prefix}{_KINDS[kind]}", about, [score[kind].fmeasure for score in scores])
        for kind in ("rougeL", "rouge1", "rouge2")
    ]


@functools.cache
def _scorer_class() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # late: it imports nltk, which takes seconds

    return RougeScorer
