"""Bilingual word lists, and texts in which some words are replaced by their translations.

Two layouts, whose file names say the languages, from the first column to the second:

    <code>_<code>.tsv   GATITOS: word, tab, translation; ln_en.tsv is Lingala to English
    <code>-<code>.txt   MUSE: word, blank, translation; en-fr.txt, also en-fr.0-5000.txt

A file of the other direction is read backwards. A word on several lines has several translations.
"""

import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mtllm_jax.data import formats
from mtllm_jax.data.benchmarks.codes import GATITOS, TWO_LETTER
from mtllm_jax.data.formatting import prose
from mtllm_jax.languages import LANGUAGES, check_language

_NAMES = (
    re.compile(r"(?P<first>[A-Za-z-]+)_(?P<second>[A-Za-z-]+)\.tsv"),
    re.compile(r"(?P<first>[a-z]{2,3})-(?P<second>[a-z]{2,3})(\.[\d-]+)?\.txt"),
)
# In GATITOS these hold another language than their names say.
_MISNAMED = {"ts_en.tsv": "Tswana", "cpf_en.tsv": "Jamaican Creole", "dyu_en.tsv": "Bambara"}
_NOTE = re.compile(r"\s*\([^()]*\)")  # translators' remarks: "pike (verb)"
_UNSPACED = ("Hans", "Hant", "Jpan", "Thai", "Laoo", "Khmr", "Mymr", "Tibt")

_BY_LOCALE = {
    language.locale: code for code, language in LANGUAGES.items() if language.locale is not None
}
_CODES: Mapping[str, str] = {**_BY_LOCALE, "no": "nob_Latn", **TWO_LETTER, **GATITOS}


@dataclass(frozen=True)
class Lexicon:
    """Words of `source`, in lower case, and their translations into `target`.

    name: the file's. longest: words of its longest phrase, or characters of its longest word where
    the source's script has no blanks. skipped: lines that are no pair.
    """

    name: str
    source: str
    target: str
    entries: Mapping[str, tuple[str, ...]]
    longest: int
    skipped: int = 0


def read_lexicon(path: str | Path, source: str, target: str) -> Lexicon:
    """The words of `source` (a FLORES-200 code) in `target`, from a file or a folder of files.

    ValueError for a file whose name says another pair or unknown languages, a folder without one
    for the pair, and a file without entries.
    """
    path = Path(path)
    if path.is_dir():
        path = _file_of(path, source, target)
    formats.check_file(path, (".tsv", ".txt"))
    pair = languages_of(path)
    if set(pair) != {source, target}:
        raise ValueError(
            f"{path} is a lexicon of {pair[0]} and {pair[1]}; it must be one of {source} and"
            f" {target}."
        )
    found: dict[str, dict[str, None]] = {}
    skipped = 0
    for _, line in formats.lines(path):
        cells = [_bare(cell) for cell in _cells(line, path)]
        if len(cells) != 2 or not all(cells):
            skipped += 1
            continue
        word, translation = cells if pair[0] == source else reversed(cells)
        if _key(word) != _key(translation):  # names, and words that both have
            found.setdefault(_key(word), {})[translation] = None
    if not found:
        raise ValueError(f"{path} holds no words of {source} with another one in {target}.")
    return lexicon_of(path.name, source, target, found, skipped)


def lexicon_of(
    name: str,
    source: str,
    target: str,
    entries: Mapping[str, Mapping[str, None] | tuple[str, ...]],
    skipped: int = 0,
) -> Lexicon:
    """A lexicon of words that are in memory."""
    kept = {_key(word): tuple(translations) for word, translations in entries.items()}
    size = len if is_unspaced(source) else (lambda word: len(word.split()))
    longest = max(map(size, kept), default=0)
    return Lexicon(name, source, target, kept, longest, skipped)


def languages_of(path: Path) -> tuple[str, str]:
    """FLORES-200 codes of a lexicon's two columns, by its name. ValueError for another name, a
    language that is not known, and a file that is known to be misnamed."""
    if path.name in _MISNAMED:
        raise ValueError(f"{path} is known to hold {_MISNAMED[path.name]}, not what its name says.")
    match = next(filter(None, (name.fullmatch(path.name) for name in _NAMES)), None)
    if match is None:
        raise ValueError(
            f"{path} is not called as lexicons are, ln_en.tsv (GATITOS) or en-fr.txt (MUSE)."
        )
    codes = []
    for code in (match["first"], match["second"]):
        try:
            codes.append(_CODES.get(code) or check_language(code))
        except ValueError as error:
            raise ValueError(f"{path}: {error}.") from None
    return codes[0], codes[1]


def switch(text: str, lexicon: Lexicon, rate: float, rng: np.random.Generator) -> tuple[str, int]:
    """The text with words replaced by their translations, and how many were.

    rate: the probability that a word which the lexicon has is replaced; its longest phrases count
    as one. Code, URLs, placeholders and the like stay, and so does the case of letters.
    """
    parts: list[str] = []
    count = 0
    for part, is_prose in prose(text):
        if is_prose:
            part, replaced = _switch_prose(part, lexicon, rate, rng)
            count += replaced
        parts.append(part)
    return "".join(parts), count


def _switch_prose(
    text: str, lexicon: Lexicon, rate: float, rng: np.random.Generator
) -> tuple[str, int]:
    made: list[str] = []
    end, count = 0, 0
    for start, stop in _known(text, lexicon):
        if rng.random() < rate:
            choices = lexicon.entries[_key(text[start:stop])]
            chosen = choices[int(rng.integers(len(choices)))]
            made += [text[end:start], _cased(chosen, text[start:stop])]
            end = stop
            count += 1
    return "".join([*made, text[end:]]), count


def _known(text: str, lexicon: Lexicon) -> Iterator[tuple[int, int]]:
    """The spans of the text that the lexicon has, from the left, the longest first."""
    spans = list(_words(text))
    if is_unspaced(lexicon.source):
        for word_start, word_stop in spans:
            start = word_start
            while start < word_stop:
                stop = _longest(text, start, word_stop, lexicon)
                if stop > start:
                    yield start, stop
                start = max(stop, start + 1)
        return
    i = 0
    while i < len(spans):
        for j in range(min(i + lexicon.longest, len(spans)), i, -1):
            start, stop = spans[i][0], spans[j - 1][1]
            between = (
                text[a:b] for (_, a), (b, _) in zip(spans[i:j], spans[i + 1 : j], strict=False)
            )
            if _key(text[start:stop]) in lexicon.entries and not any(
                gap.strip(" ") for gap in between
            ):
                yield start, stop
                i = j
                break
        else:
            i += 1


def _longest(text: str, start: int, end: int, lexicon: Lexicon) -> int:
    """Where the longest word that begins at `start` ends; `start` where none does."""
    for stop in range(min(end, start + lexicon.longest), start, -1):
        # No vowel sign or tone mark is cut off its letter.
        cuts = stop < end and unicodedata.category(text[stop])[0] == "M"
        if not cuts and _key(text[start:stop]) in lexicon.entries:
            return stop
    return start


def _words(text: str) -> Iterator[tuple[int, int]]:
    """Spans of letters and their marks, with apostrophes and hyphens between letters."""
    start = None
    for i, c in enumerate(text):
        inside = unicodedata.category(c)[0] in "LM"
        if start is not None and not inside and c in "'’-":
            inside = i + 1 < len(text) and text[i + 1].isalpha()
        if inside and start is None:
            start = i
        elif not inside and start is not None:
            yield start, i
            start = None
    if start is not None:
        yield start, len(text)


def _cased(word: str, like: str) -> str:
    if len(like) > 1 and like.isupper():
        return word.upper()
    return word[:1].upper() + word[1:] if like[0].isupper() else word


def is_unspaced(code: str) -> bool:
    """Whether words of a language, a FLORES-200 code, are written without blanks between them."""
    return code.endswith(_UNSPACED)


def _file_of(folder: Path, source: str, target: str) -> Path:
    there = sorted(p for p in folder.rglob("*") if any(n.fullmatch(p.name) for n in _NAMES))
    for path in there:
        if path.name not in _MISNAMED and _pair(path) in ((source, target), (target, source)):
            return path
    raise ValueError(f"{folder} holds no lexicon of {source} and {target}.")


def _pair(path: Path) -> tuple[str, str] | None:
    match = next(filter(None, (name.fullmatch(path.name) for name in _NAMES)))
    first, second = (_CODES.get(match[name]) for name in ("first", "second"))
    return (first, second) if first and second else None


def _cells(line: str, path: Path) -> list[str]:
    line = line.rstrip("\r\n")
    return line.split("\t") if path.suffix == ".tsv" or "\t" in line else line.split(maxsplit=1)


def _bare(cell: str) -> str:
    """A cell without translators' notes."""
    return _NOTE.sub("", cell).strip()


def _key(word: str) -> str:
    return " ".join(unicodedata.normalize("NFC", word).casefold().split())
