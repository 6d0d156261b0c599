"""The benchmarks that an LLM is asked: their rows, what a prompt may say of one, how an answer is
read, and what it is worth.

An answer is a text that the LLM wrote, or the number, from 1, of the choice that it finds
likeliest; "" stands for none. A row's "label" is what it is compared with.
"""

import dataclasses
import decimal
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mtllm_jax.asking import mkqa
from mtllm_jax.asking.measures import Measure, mean, off_target
from mtllm_jax.asking.summaries import summarised
from mtllm_jax.asking.translation import Pieces, translated
from mtllm_jax.asking.words import first_line
from mtllm_jax.data.benchmarks import read_benchmark, read_bitext
from mtllm_jax.data.benchmarks.bitext import Bitext
from mtllm_jax.data.benchmarks.flores import read_flores
from mtllm_jax.data.benchmarks.questions import read_mgsm, read_mkqa, read_xlsum
from mtllm_jax.evaluate import Source
from mtllm_jax.languages import ENGLISH
from mtllm_jax.results import language_name

Row = Mapping[str, Any]

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ANSWER = re.compile("answer\\s*[:\N{FULLWIDTH COLON}]", re.IGNORECASE)
_NUMBER = re.compile(r"(?:(?<!\w)[-−])?\d+(?:\.\d+)?")
_BETWEEN_THOUSANDS = re.compile(r"(?<=\d)[,\N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}](?=\d)")
_LETTER = re.compile(r"(?<![0-9A-Za-zÀ-ɏ])[A-Z](?![0-9A-Za-zÀ-ɏ])")  # between no Latin ones


@dataclasses.dataclass(frozen=True)
class Questions:
    """Rows in the order of their languages, and sentences for who reads the results."""

    rows: Sequence[Row]
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Asked:
    """A benchmark as it is asked.

    prompt: the file of prompts/ that is filled in. fields: what a template may name, each a text of
    the row; it must name the first. options: of a row, what the LLM chooses among by likelihood, as
    many in each; None = it writes. max_new_tokens: of what it writes. measures: of rows, their
    answers, and a sentencepiece model where the user gives one; the headline first. takes_pieces:
    whether such a model is of use. cut: the field that loses its end where a prompt would not fit
    the context; "" = none does.
    """

    prompt: str
    fields: Mapping[str, Callable[[Row], str]]
    read: Callable[[Source], Questions]
    measures: Callable[[Sequence[Row], Sequence[str], Pieces | None], list[Measure]]
    options: Callable[[Row], Sequence[str]] | None = None
    max_new_tokens: int = 0
    takes_pieces: bool = False
    cut: str = ""


# ---------------------------------------------------------------- answers


def number_in(text: str) -> decimal.Decimal | None:
    """The last number in the line behind the last "Answer:", or in all the text where none stands
    there.

    In any script's digits; commas and narrow blanks between digits part thousands, and a point
    begins a fraction.
    """
    digits = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text)
    plain = _BETWEEN_THOUSANDS.sub("", digits)
    behind = _ANSWER.split(plain)[-1].partition("\n")[0]
    for part in (behind, plain):
        if found := _NUMBER.findall(part):
            return decimal.Decimal(found[-1].replace("−", "-"))
    return None


def letter_in(text: str, num: int) -> str:
    """The number, from 1, of the first letter that stands alone in it, of the first `num` capital
    ones; "" where there is none."""
    for found in _LETTER.findall(text):
        if found in _LETTERS[:num]:
            return str(_LETTERS.index(found) + 1)
    return ""


def letters(choices: Sequence[str]) -> str:
    """ "A. one\\nB. other"."""
    return "\n".join(f"{letter}. {c}" for letter, c in zip(_LETTERS, choices, strict=False))


# ---------------------------------------------------------------- measures


def _chosen(rows: Sequence[Row], answers: Sequence[str], pieces: Pieces | None) -> list[Measure]:
    hits = [row["label"] == answer for row, answer in zip(rows, answers, strict=True)]
    return [mean("accuracy", "the choice is the right one", hits)]


def _letters_written(
    rows: Sequence[Row], answers: Sequence[str], pieces: Pieces | None
) -> list[Measure]:
    read = [
        letter_in(answer, len(row["choices"])) for row, answer in zip(rows, answers, strict=True)
    ]
    about = "the first capital letter of a choice that stands alone in the answer is the right one"
    hits = [row["label"] == each for row, each in zip(rows, read, strict=True)]
    return [mean("accuracy", about, hits), _unread(read)]


def _numbers(rows: Sequence[Row], answers: Sequence[str], pieces: Pieces | None) -> list[Measure]:
    read = [number_in(answer) for answer in answers]
    about = "the last number, in the line of “Answer:” where one stands there, is the result"
    hits = [number_in(row["label"]) == each for row, each in zip(rows, read, strict=True)]
    return [
        mean("accuracy", about, hits),
        _unread(["" if each is None else str(each) for each in read]),
        off_target("off-target", [row["language"] for row in rows], answers),
    ]


def _short(rows: Sequence[Row], answers: Sequence[str], pieces: Pieces | None) -> list[Measure]:
    said = [first_line(answer) for answer in answers]
    measures = []
    for name, about, tokens in (
        ("", "mended", mkqa.mended_tokens),
        (", official", "by the official script's rules", mkqa.official_tokens),
    ):
        for kind, score in (("F1", mkqa.f1), ("exact match", mkqa.exact_match)):
            values = [
                score(answer, row["label"], row["lang"], tokens)
                for row, answer in zip(rows, said, strict=True)
            ]
            measures.append(mean(f"{kind}{name}", f"of the answer's first line, {about}", values))
    return [*measures, off_target("off-target", [row["language"] for row in rows], said)]


def _unread(read: Sequence[str]) -> Measure:
    about = "answers that nothing could be read in, which count as wrong"
    return mean("no answer", about, [each == "" for each in read])


# ---------------------------------------------------------------- rows


def _of_benchmark(name: str) -> Callable[[Source], Questions]:
    def read(source: Source) -> Questions:
        found = read_benchmark(
            name,
            source.data,
            languages=source.languages or "all",
            english_data=source.english_data or None,
            splits=("test",),
            limit=source.limit,
        )
        return Questions(found.test, found.notes)

    return read


def _mgsm(source: Source) -> Questions:
    return Questions(read_mgsm(source.data, source.languages, source.limit))


def _translations(read: Callable[[Source], Bitext]) -> Callable[[Source], Questions]:
    """Each sentence from English and into it, language by language."""

    def rows(source: Source) -> Questions:
        if ENGLISH in source.languages:
            raise ValueError(
                f"--languages names {ENGLISH}; it must name those that are translated from English"
                " and into it."
            )
        found = read(source)
        asked = []
        for code, (english, other) in found.pairs.items():
            for direction, source_code, target_code, texts, labels in (
                ("from", ENGLISH, code, english, other),
                ("into", code, ENGLISH, other, english),
            ):
                asked += [
                    {"id": f"{direction} {i}", "language": code, "text": text, "label": label}
                    | {"source": source_code, "target": target_code}
                    for i, (text, label) in enumerate(zip(texts, labels, strict=True))
                ]
        return Questions(asked, found.notes)

    return rows


def _ntrex(source: Source) -> Bitext:
    return read_bitext(
        "ntrex", source.data, languages=source.languages or "all", limit=source.limit
    )


def _mkqa(source: Source) -> Questions:
    notes = ("Asked are MKQA's questions with a short answer, those alone.",)
    return Questions(read_mkqa(source.data, source.languages, source.limit), notes)


def _column(name: str) -> Callable[[Row], str]:
    return lambda row: row[name]


_LANGUAGE = {"language": lambda row: language_name(row["language"])}
_BELEBELE = Asked(
    prompt="belebele.txt",
    fields={
        "question": _column("question"),
        "context": _column("context"),
        "choices": lambda row: letters(row["choices"]),
        **_LANGUAGE,
    },
    read=_of_benchmark("belebele"),
    measures=_chosen,
    options=lambda row: _LETTERS[: len(row["choices"])],
)

_FLORES = Asked(
    prompt="translation.txt",
    fields={
        "text": _column("text"),
        "source": lambda row: language_name(row["source"]),
        "target": lambda row: language_name(row["target"]),
    },
    read=_translations(lambda source: read_flores(source.data, source.languages, source.limit)),
    measures=translated,
    max_new_tokens=256,
    takes_pieces=True,
)

TASKS: dict[str, Asked] = {
    "mgsm": Asked(
        prompt="mgsm.txt",
        fields={"question": _column("question"), **_LANGUAGE},
        read=_mgsm,
        measures=_numbers,
        max_new_tokens=512,
    ),
    "belebele_letters": _BELEBELE,
    "belebele_generated": dataclasses.replace(
        _BELEBELE, measures=_letters_written, options=None, max_new_tokens=16
    ),
    "xcopa": Asked(
        prompt="xcopa.txt",
        fields={"context": _column("context"), "question": _column("question"), **_LANGUAGE},
        read=_of_benchmark("xcopa"),
        measures=_chosen,
        options=_column("choices"),
    ),
    "mkqa": Asked(
        prompt="mkqa.txt",
        fields={"question": _column("question"), **_LANGUAGE},
        read=_mkqa,
        measures=_short,
        max_new_tokens=32,
    ),
    "xlsum": Asked(
        prompt="xlsum.txt",
        fields={"text": _column("text"), **_LANGUAGE},
        read=lambda source: Questions(read_xlsum(source.data, source.languages, source.limit)),
        measures=summarised,
        max_new_tokens=128,
        takes_pieces=True,
        cut="text",
    ),
    "flores": _FLORES,
    "ntrex": dataclasses.replace(_FLORES, read=_translations(_ntrex)),
}
