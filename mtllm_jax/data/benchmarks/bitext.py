"""Sentences and their English, aligned by line: to measure retrieval on, or to train on.

Tatoeba (LASER's test set of 2019): tatoeba.<iso3>-eng.{<iso3>,eng} in data/tatoeba/v1. The English
side differs between languages, so that scores of two languages do not compare.

NTREX-128 (Federmann et al. 2022): newstest2019-ref.<code>.txt beside newstest2019-src.eng.txt in
NTREX-128; one English text, lines end with CR LF.

NLLB-Seed (github.com/openlanguagedata/seed): seed/<code> beside seed/eng_Latn; one English text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mtllm_jax.data import formats
from mtllm_jax.data.benchmarks.benchmark import rank
from mtllm_jax.data.benchmarks.codes import NTREX, SEED, TATOEBA
from mtllm_jax.languages import check_language


@dataclass(frozen=True)
class Bitext:
    """pairs: by FLORES-200 code, lines of English and those in the language, equally many."""

    name: str
    pairs: Mapping[str, tuple[Sequence[str], Sequence[str]]]
    licence: str
    notes: tuple[str, ...] = ()

    @property
    def texts(self) -> set[str]:
        """All lines of both sides."""
        return {line for pair in self.pairs.values() for side in pair for line in side}


@dataclass(frozen=True)
class _Source:
    """english, other: places of the two files below the folder, with the language's own code."""

    english: str
    other: str
    codes: Mapping[str, str]
    source: str
    licence: str


BITEXTS = {
    "tatoeba": _Source(
        english="data/tatoeba/v1/tatoeba.{}-eng.eng",
        other="data/tatoeba/v1/tatoeba.{0}-eng.{0}",
        codes=TATOEBA,
        source="github.com/facebookresearch/LASER",
        licence="CC BY 2.0 FR",
    ),
    "ntrex": _Source(
        english="NTREX-128/newstest2019-src.eng.txt",
        other="NTREX-128/newstest2019-ref.{}.txt",
        codes=NTREX,
        source="github.com/MicrosoftTranslator/NTREX",
        licence="CC BY-SA 4.0",
    ),
    "seed": _Source(
        english="seed/eng_Latn",
        other="seed/{}",
        codes=SEED,
        source="github.com/openlanguagedata/seed",
        licence="CC BY-SA 4.0",
    ),
}


def read_bitext(
    name: str,
    path: str | Path,
    *,
    languages: Sequence[str] | Literal["all"] = "all",
    limit: int | None = None,
) -> Bitext:
    """One of BITEXTS, from a clone of its repository.

    languages: FLORES-200 codes, or all that there are; what the bitext calls by a name without such
    a code is left out. limit: lines of a language, always the same ones.

    Raises ValueError for an unknown name, a folder without its files, a language that it does not
    have, a blank line, files of unequal length, and bad UTF-8.
    """
    if name not in BITEXTS:
        raise ValueError(f"bitext {name!r} is not one of {', '.join(BITEXTS)}.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1.")
    source, folder = BITEXTS[name], Path(path)
    there = {
        code: theirs
        for theirs, code in source.codes.items()
        if (folder / source.other.format(theirs)).is_file()
    }
    if not there:
        place = source.other.format("<code>")
        raise ValueError(f"{folder} holds no {name}: that is {place} of {source.source}.")
    for code in [] if languages == "all" else languages:
        try:
            check_language(code, there)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}.") from None
    pairs = {}
    for code in sorted(there if languages == "all" else languages):
        theirs = there[code]
        files = [folder / form.format(theirs) for form in (source.english, source.other)]
        english, other = map(_lines, files)
        if len(english) != len(other):
            raise ValueError(
                f"{files[0]} has {len(english)} lines and {files[1].name} has {len(other)}; they"
                " must be as many."
            )
        kept = sorted(sorted(range(len(english)), key=lambda i: rank(str(i)))[:limit])
        pairs[code] = [english[i] for i in kept], [other[i] for i in kept]
    return Bitext(name, pairs, source.licence)


def _lines(path: Path) -> list[str]:
    lines = []
    for number, line in formats.lines(path):
        if not line.strip():
            raise ValueError(f"{formats.at(path, number)}: the line is blank.")
        lines.append(line.rstrip("\r\n"))
    return lines
