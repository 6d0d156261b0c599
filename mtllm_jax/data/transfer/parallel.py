"""A parallel corpus → instructions to translate and to complete.

Corpora are those of `benchmarks.bitext` (NTREX-128, NLLB-Seed, Tatoeba); pairs of two languages
other than English are found by the English line that both translate.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mtllm_jax.data import formats
from mtllm_jax.data.benchmarks.bitext import read_bitext
from mtllm_jax.data.transfer.lexicon import is_unspaced
from mtllm_jax.languages import ENGLISH

_ALIGNED = ("ntrex", "seed")  # of which line n is the same sentence in all languages
_DOCUMENTS = {"ntrex": "DOCUMENT_IDS.tsv"}  # a line for each sentence


@dataclass(frozen=True)
class Pair:
    """A sentence in the source language and in a target's. id: corpus and line. document: what it
    stands in; "" where the corpus does not say."""

    id: str
    source: str
    target: str
    document: str = ""


def read_parallel(name: str, path: str | Path, source: str, target: str) -> list[Pair]:
    """The pairs of a corpus. name: as of `read_bitext`, whose errors these are; ValueError too for
    a corpus whose languages are aligned with English alone, and for documents of another number of
    sentences."""
    if source == ENGLISH:
        english, other = read_bitext(name, path, languages=[target]).pairs[target]
        return _pairs(name, path, target, english, other)
    if target == ENGLISH:
        english, other = read_bitext(name, path, languages=[source]).pairs[source]
        return _pairs(name, path, source, other, english)
    if name not in _ALIGNED:
        raise ValueError(
            f"{name} is aligned with English alone; it has no pairs of {source} and {target}."
        )
    pairs = read_bitext(name, path, languages=[source, target]).pairs
    return _pairs(name, path, source, pairs[source][1], pairs[target][1])


def _pairs(
    name: str, path: str | Path, code: str, sources: Sequence[str], targets: Sequence[str]
) -> list[Pair]:
    # Lines of one number may be different sentences in other languages.
    corpus = name if name in _ALIGNED else f"{name}:{code}"
    lines = zip(sources, targets, _documents(name, Path(path), len(sources)), strict=True)
    return [
        Pair(f"{corpus}:{i}", source, target, document)
        for i, (source, target, document) in enumerate(lines, 1)
    ]


def _documents(name: str, folder: Path, count: int) -> list[str]:
    """That of each sentence; "" for all where no file says it."""
    if name not in _DOCUMENTS or not (folder / _DOCUMENTS[name]).is_file():
        return [""] * count
    file = folder / _DOCUMENTS[name]
    found = [line.strip() for _, line in formats.lines(file)]
    if len(found) != count:
        raise ValueError(f"{file} has {len(found)} lines; there are {count} sentences.")
    return found


def cut(text: str, language: str, shares: tuple[float, float], rng: np.random.Generator) -> int:
    """Where a text is cut in two: after a share of its words (of its characters in scripts without
    blanks) that is drawn from `shares`; 0 for a text of one word."""
    places = list(_places(text, language))
    if not places:
        return 0
    place = int(rng.uniform(*shares) * (len(places) + 1))
    return places[min(max(place, 1), len(places)) - 1]


def _places(text: str, language: str) -> Iterator[int]:
    """Where the text may be cut: behind blanks, or between characters."""
    if is_unspaced(language):
        for i in range(1, len(text)):
            if unicodedata.category(text[i])[0] not in "MZ":
                yield i
        return
    for i in range(1, len(text)):
        if text[i - 1].isspace() and not text[i].isspace():
            yield i
