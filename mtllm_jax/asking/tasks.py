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

from mtllm_jax.asking.measures import Measure, mean
from mtllm_jax.data.benchmarks import read_benchmark
from mtllm_jax.data.benchmarks.questions import read_mgsm
from mtllm_jax.data.identify import is_in
from mtllm_jax.evaluate import Source
from mtllm_jax.results import language_name

Row = Mapping[str, Any]

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ANSWER = re.compile(r"answer\s*[::]", re.IGNORECASE)
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
    many in each; None = it writes. max_new_tokens: of what it writes. measures: of rows and their
    answers, the headline first.
    """

    prompt: str
    fields: Mapping[str, Callable[[Row], str]]
    read: Callable[[Source], Questions]
    measures: Callable[[Sequence[Row], Sequence[str]], list[Measure]]
    options: Callable[[Row], Sequence[str]] | None = None
    max_new_tokens: int = 0


# ---------------------------------------------------------------- answers


def number_in(text: str) -> decimal.Decimal | None:
    """The last number behind the last "Answer:", or of all the text where none stands there.

    In any script's digits; commas and narrow blanks between digits part thousands, and a point
    begins a fraction.
    """
    digits = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text)
    plain = _BETWEEN_THOUSANDS.sub("", digits)
    for part in (_ANSWER.split(plain)[-1], plain):
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


def _chosen(rows: Sequence[Row], answers: Sequence[str]) -> list[Measure]:
    hits = [row["label"] == answer for row, answer in zip(rows, answers, strict=True)]
    return [mean("accuracy", "the choice is the right one", hits)]


def _letters_written(rows: Sequence[Row], answers: Sequence[str]) -> list[Measure]:
    read = [
        letter_in(answer, len(row["choices"])) for row, answer in zip(rows, answers, strict=True)
    ]
    about = "the first capital letter of a choice that stands alone in the answer is the right one"
    hits = [row["label"] == each for row, each in zip(rows, read, strict=True)]
    return [mean("accuracy", about, hits), _unread(read)]


def _numbers(rows: Sequence[Row], answers: Sequence[str]) -> list[Measure]:
    read = [number_in(answer) for answer in answers]
    about = "the last number, behind “Answer:” where that is there, is the result"
    hits = [number_in(row["label"]) == each for row, each in zip(rows, read, strict=True)]
    return [
        mean("accuracy", about, hits),
        _unread(["" if each is None else str(each) for each in read]),
        off_target("off-target", [row["language"] for row in rows], answers),
    ]


def _unread(read: Sequence[str]) -> Measure:
    about = "answers that nothing could be read in, which count as wrong"
    return mean("no answer", about, [each == "" for each in read])


def off_target(name: str, languages: Sequence[str], answers: Sequence[str]) -> Measure:
    """The share of answers that are in another language, of those where it can be told."""
    about = "answers in another language than the row's, of those whose language can be told"
    told = [is_in(answer, code) for answer, code in zip(answers, languages, strict=True)]
    return mean(name, about, [None if right is None else not right for right in told])


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
}
