"""What of a text is to be said in another language, and what stays as it is.

A text is cut into pieces that joined are the text again, byte for byte. Sentences are pieces to be
translated; line ends, blanks around sentences, list and heading marks, table bars, code and
whatever holds no letter are kept. Inside a sentence, URLs, inline code, formulas, placeholders and
numbers must come back (`lost`); where they do not, the sentence is cut around them (`around`).

Sentences are found by sentencex, which knows abbreviations and ends of sentences in some 300
languages, and which alone of what was tried here cut every text without losing a blank.
"""

import collections
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import sentencex

from mtllm_jax.languages import LANGUAGES

_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
_FENCE = re.compile(r"\s*(?P<fence>`{3,}|~{3,})")
_INDENTED = re.compile(r"(?: {4}|\t)")
# Indented text is code where it looks like it: list items are indented too.
_LIKE_CODE = re.compile(
    r"[{};=]\s*$|\w\(.*\)|[=!<>]=|\w\[|->|=>"
    r"|^\s*(?:#|//|import |from |def |class |return\b|for |if )"
)
_RULE = re.compile(r"\s*\|?[\s|:+=_*-]+\|?\s*")  # below headings, between the rows of tables
_MARK = re.compile(
    r"\s*(?:(?:[-*+•‣◦·–—]|\#{1,6}|>|\[[ xX]\]|\(?(?:\d{1,3}|[A-Za-z]|[ivxIVX]{2,5})[.)])[ \t]+)*"
)
_BAR = re.compile(r"\s*\|\s*")

_PROTECTED = re.compile(
    r"(`+)(?!`).+?(?<!`)\1(?!`)"  # inline code
    r"|\$\$[^$\n]+\$\$|\\\(.+?\\\)|\\\[.+?\\\]"  # formulas
    r"|\$[^$\s](?:[^$\n]*[^$\s])?\$(?!\d)"
    r"|(?:(?:https?|ftp)://|www\.)(?:(?![<>\"'])[!-~])+(?<![.,;:!?)\]])"
    r"|[A-Za-z0-9_.+-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+"
    r"|\{\{[^{}\n]*\}\}|\$?\{[^{}\n]*\}|%\(\w+\)[sdif]|%[sdif](?!\w)|\$[A-Za-z_]\w*"  # placeholders
    r"|</?[A-Za-z][^<>\n]*>|\[[A-Z][A-Z0-9_ ]*\]|_{2,}"
)
# One that stands by itself: 3.5 and 1,000, but not 3rd.
_NUMBER = re.compile(r"(?<![^\W_])\d+(?:[.,:\u066b\u066c]\d+)*(?![^\W_])")

_SIGNS = " \t,;:.!?)]"
_UNSPACED = ("Hans", "Hant", "Jpan")  # no blanks between sentences; others without words' have them


@dataclass(frozen=True)
class Piece:
    """A part of a text: a sentence, or what stays."""

    text: str
    is_sentence: bool


def pieces(text: str, language: str) -> list[Piece]:
    """The parts of a text, in their order. language: its FLORES-200 code."""
    found: list[Piece] = []
    for part, is_code in _blocks(text):
        if is_code or _RULE.fullmatch(part):
            found.append(Piece(part, False))
        else:
            found += _line_pieces(part, language)
    return found


def prose(text: str) -> Iterator[tuple[str, bool]]:
    """The text in parts: what may be changed inside, and code, URLs, placeholders and the like."""
    for part, is_code in _blocks(text):
        if is_code:
            yield part, False
            continue
        end = 0
        for match in _PROTECTED.finditer(part):
            yield part[end : match.start()], True
            yield match[0], False
            end = match.end()
        yield part[end:], True


def _blocks(text: str) -> Iterator[tuple[str, bool]]:
    """Lines with their ends, and whether they are code."""
    fence, after_blank, in_code = "", True, False
    for line in _LINE.findall(text):
        opening = _FENCE.match(line)
        if fence or opening:
            yield line, True
            if opening and not fence:
                fence = opening["fence"]
            elif opening and opening["fence"].startswith(fence) and not line.strip(" `~\r\n\t"):
                fence = ""
            continue
        blank = not line.strip()
        indented = bool(_INDENTED.match(line)) and not blank
        in_code = indented and (in_code or (after_blank and bool(_LIKE_CODE.search(line))))
        after_blank = blank or in_code
        yield line, in_code


def _line_pieces(line: str, language: str) -> Iterator[Piece]:
    mark = _MARK.match(line)
    start = mark.end() if mark else 0
    if start:
        yield Piece(line[:start], False)
    rest = line[start:]
    if rest.count("|") < 2:
        yield from _sentences(rest, language)
        return
    end = 0
    for bar in _BAR.finditer(rest):
        yield from _sentences(rest[end : bar.start()], language)
        yield Piece(bar[0], False)
        end = bar.end()
    yield from _sentences(rest[end:], language)


def _sentences(text: str, language: str) -> Iterator[Piece]:
    """Of text without line ends inside."""
    body = text.rstrip()
    cut = sentencex.segment(_segmenter(language), body) if body else []
    if "".join(cut) != body:
        cut = [body]
    for sentence in cut:
        yield from _framed(sentence)
    if len(body) < len(text):
        yield Piece(text[len(body) :], False)


def _framed(text: str) -> Iterator[Piece]:
    """One sentence between the blanks around it, or what is none."""
    said = text.strip()
    if not any(map(str.isalpha, said)):
        yield Piece(text, False)
        return
    start = text.index(said)
    if start:
        yield Piece(text[:start], False)
    yield Piece(said, True)
    if rest := text[start + len(said) :]:
        yield Piece(rest, False)


def _segmenter(language: str) -> str:
    """What sentencex calls a language: ISO 639-1 where there is one, or else 639-3."""
    known = LANGUAGES.get(language)
    locale = known.locale if known else None
    return (locale or language[:3]).split("_")[0]


# ---------------------------------------------------------------- what must come back


def lost(sentence: str, translation: str) -> bool:
    """Whether a translation lacks something that was to stay: numbers may be written in other
    digits and with other separators, all else comes back letter by letter."""
    wanted = collections.Counter(match[0] for match in _PROTECTED.finditer(sentence))
    if any(translation.count(text) < count for text, count in wanted.items()):
        return True
    return not _numbers(sentence) <= _numbers(translation)


def around(sentence: str) -> list[Piece]:
    """The sentence cut around all that must come back."""
    found: list[Piece] = []
    end = 0
    for start, stop in [*_kept_spans(sentence), (len(sentence), len(sentence))]:
        between = sentence[end:start]
        # What stands before the first word belongs to what was before it.
        said = between.lstrip(_SIGNS)
        if len(said) < len(between):
            found.append(Piece(between[: len(between) - len(said)], False))
        if said:
            found += _framed(said)
        if start < stop:
            found.append(Piece(sentence[start:stop], False))
        end = stop
    return found


def _kept_spans(text: str) -> list[tuple[int, int]]:
    spans = [match.span() for match in _PROTECTED.finditer(text)]
    outside = [
        match.span()
        for match in _NUMBER.finditer(text)
        if not any(start <= match.start() < stop for start, stop in spans)
    ]
    return sorted(spans + outside)


def _numbers(text: str) -> collections.Counter[str]:
    """The numbers outside of what is protected, as ASCII digits without separators."""
    bare = _PROTECTED.sub(" ", text)
    return collections.Counter(
        "".join(str(unicodedata.decimal(c)) for c in match[0] if c.isdecimal())
        for match in _NUMBER.finditer(bare)
    )


def joined(
    parts: Sequence[Piece], translations: Mapping[str, str], source: str, target: str
) -> str:
    """The text of the parts with the sentences' translations in their places.

    Blanks between two sentences go where the target's script has none, and come where the source's
    has none.
    """
    drops = _unspaced(target) and not _unspaced(source)
    adds = _unspaced(source) and not _unspaced(target)
    text: list[str] = []
    for i, part in enumerate(parts):
        if part.is_sentence:
            if adds and i and parts[i - 1].is_sentence:
                text.append(" ")
            # Lines stay: a translation has none of its own.
            text.append(" ".join(translations[part.text].split("\n")))
        elif not (drops and _between(parts, i) and not part.text.strip(" ")):
            text.append(part.text)
    return "".join(text)


def _between(parts: Sequence[Piece], i: int) -> bool:
    """Whether a part stands between two sentences of a line."""
    return 0 < i < len(parts) - 1 and parts[i - 1].is_sentence and parts[i + 1].is_sentence


def _unspaced(code: str) -> bool:
    return code.endswith(_UNSPACED)
