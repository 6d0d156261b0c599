"""Translations against references, as sacreBLEU counts: chrF++, BLEU, and spBLEU by a given model.

M rows, R resamples, K numbers that a metric sums of each row.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sacrebleu
import sentencepiece
from sacrebleu.metrics.base import Metric
from sacrebleu.tokenizers.tokenizer_base import BaseTokenizer

from mtllm_jax.asking.measures import Measure, off_target
from mtllm_jax.asking.words import first_line
from mtllm_jax.languages import ENGLISH

Row = Mapping[str, Any]

# Chinese as WMT has it. Of other scripts without spaces each letter is a word: MeCab, by which
# WMT cuts Japanese, is not at hand. All else is cut by 13a.
_TOKENIZERS = {"Hans": "zh", "Hant": "zh"} | dict.fromkeys(
    ("Jpan", "Thai", "Khmr", "Laoo", "Mymr", "Tibt"), "char"
)


class Pieces(BaseTokenizer):
    """The pieces of a sentencepiece model. ValueError for a file that is none."""

    def __init__(self, file: Path):
        try:
            content = file.read_bytes()
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except (OSError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no such model"
            raise ValueError(
                f"--spm={file} cannot be read as a sentencepiece model: {reason}."
            ) from None
        self._name = f"spm-{file.stem}-{hashlib.sha256(content).hexdigest()[:8]}"

    def signature(self) -> str:
        return self._name

    def __call__(self, line: str) -> str:
        return " ".join(self._model.encode_as_pieces(line))


def translated(rows: Sequence[Row], answers: Sequence[str], pieces: Pieces | None) -> list[Measure]:
    """Of rows with "source" and "target", codes, in both directions: chrF++, BLEU, with `pieces`
    spBLEU, and the share in another language."""
    metrics: dict[str, Callable[[str], Metric]] = {"chrF++": _chrf, "BLEU": _bleu}
    if pieces is not None:
        metrics["spBLEU"] = lambda code: _sp_bleu(pieces)
    said = [first_line(answer) for answer in answers]
    measures = []
    for direction, end in (("from English", "source"), ("into English", "target")):
        chosen = [row[end] == ENGLISH for row in rows]
        for name, metric_of in metrics.items():
            measures.append(_corpus(f"{name} {direction}", metric_of, rows, said, chosen))
        told = [
            row["target"] if is_about else None for row, is_about in zip(rows, chosen, strict=True)
        ]
        measures.append(off_target(f"off-target {direction}", told, said))
    return measures


def _chrf(code: str) -> sacrebleu.CHRF:
    """The same for all targets."""
    return sacrebleu.CHRF(word_order=2)


def _bleu(code: str) -> sacrebleu.BLEU:
    """Of a target's words, cut as its script asks."""
    return sacrebleu.BLEU(tokenize=_TOKENIZERS.get(code[4:], "13a"), force=True)


def _sp_bleu(pieces: Pieces) -> sacrebleu.BLEU:
    bleu = sacrebleu.BLEU(tokenize="none", force=True)
    bleu.tokenizer, bleu.tokenizer_signature = pieces, pieces.signature()
    return bleu


def _corpus(
    name: str,
    metric_of: Callable[[str], Metric],
    rows: Sequence[Row],
    said: Sequence[str],
    chosen: Sequence[bool],
) -> Measure:
    """A corpus metric over 100, of the rows that are chosen.

    metric_of: from a target's code; what each makes of sums is alike.
    """
    codes = dict.fromkeys(row["target"] for row, yes in zip(rows, chosen, strict=True) if yes)
    metrics = {code: metric_of(code) for code in codes}
    sums: list[list[float]] = [
        _sums(metrics[row["target"]], answer, row["label"]) if yes else []
        for row, answer, yes in zip(rows, said, chosen, strict=True)
    ]
    width = max(map(len, sums))
    one = next(iter(metrics.values()))

    def value(sums_RK: np.ndarray) -> np.ndarray:
        return np.array(
            [
                one._compute_score_from_stats(each[:-1]).score / 100 if each[-1] else np.nan
                for each in sums_RK.tolist()
            ]
        )

    about = _signatures(metrics)
    return Measure(name, about, np.array([each or [0.0] * width for each in sums]), value)


def _sums(metric: Metric, answer: str, reference: str) -> list[float]:
    """What sacrebleu's own bootstrap sums, by methods of the base that all its metrics have."""
    (found,) = metric._extract_corpus_statistics([answer], [[reference]])
    return [*map(float, found), 1.0]


def _signatures(metrics: Mapping[str, Metric]) -> str:
    """sacrebleu's, the most frequent one first, and the targets of others."""
    targets: dict[str, list[str]] = {}
    for code, metric in metrics.items():
        targets.setdefault(metric.get_signature().format(), []).append(code)
    first, *others = sorted(targets, key=lambda signature: -len(targets[signature]))
    return ", ".join([first, *(f"{text} for {', '.join(targets[text])}" for text in others)])
