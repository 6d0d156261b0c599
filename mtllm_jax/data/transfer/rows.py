"""Prompts with their answers and translations, from files; and which answers are kept.

A row is {id, prompt, answer, reference, rewritten}: the last three as far as they are there,
"answer" being the model's own. Translations are rows of the same ids, in the columns' places what
`launch/translate.py` made of them, and "language".
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtllm_jax.config import TransferSet
from mtllm_jax.data import formats
from mtllm_jax.data.files import ROW_SUFFIXES, cell_value, check_columns
from mtllm_jax.data.transfer.held_out import normalised
from mtllm_jax.languages import check_language

ANSWERS = ("answer", "reference", "rewritten")

# Own answers and their references → whether each answer is kept.
AnswerFilter = Callable[[Sequence[str], Sequence[str]], list[bool]]
Embed = Callable[[Sequence[str]], np.ndarray]  # texts → [texts, width]


@dataclasses.dataclass(frozen=True)
class Row:
    """texts: of the columns that there are. translations: the same by language."""

    id: str
    texts: Mapping[str, str]
    translations: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Reject:
    """A row of a file that cannot be used, and why."""

    file: str
    line: int
    reason: str
    cells: Mapping[str, Any]


def read_rows(path: str | Path, columns: Sequence[str]) -> tuple[list[Row], list[Reject]]:
    """The rows of a file that have a prompt and texts in `columns`, some of ANSWERS.

    "id" is a row's line where it has none. ValueError as `formats.stream`, for a column that is not
    there, and for a file without a row that can be used.
    """
    path = Path(path)
    formats.check_file(path, ROW_SUFFIXES)
    wanted = ("prompt", *columns)
    rows: dict[str, Row] = {}
    rejects: list[Reject] = []
    for line, cells in formats.stream(path):
        if not rows and not rejects:
            check_columns(cells, wanted, formats.header_at(path))
        try:
            id_ = _id(cells, line)
            there = [name for name in ANSWERS if str(cells.get(name) or "").strip()]
            texts = _texts(cells, [*wanted, *there])
            if "answer" in columns and cells.get("ended") is False:
                raise ValueError("the answer was cut before its end")
            if id_ in rows:
                raise ValueError(f"the id {id_!r} was there before")
            rows[id_] = Row(id_, texts)
        except ValueError as error:
            rejects.append(Reject(path.name, line, str(error), cells))
    if not rows:
        why = f"; the first, line {rejects[0].line}: {rejects[0].reason}" if rejects else ""
        raise ValueError(f"{path} holds no row that can be used{why}.")
    return list(rows.values()), rejects


def read_translations(
    path: str | Path, rows: Sequence[Row], columns: Sequence[str], targets: Sequence[str]
) -> tuple[list[Row], list[Reject]]:
    """The rows with translations of a file beside those that they have.

    Languages other than `targets` are left out. ValueError as `read_rows`, and for a language that
    is no FLORES-200 code.
    """
    path = Path(path)
    formats.check_file(path, ROW_SUFFIXES)
    wanted = ("prompt", *columns)
    found: dict[str, dict[str, Mapping[str, str]]] = {
        row.id: dict(row.translations) for row in rows
    }
    rejects: list[Reject] = []
    is_first = True
    for line, cells in formats.stream(path):
        if is_first:
            check_columns(cells, ("id", "language", *wanted), formats.header_at(path))
            is_first = False
        try:
            id_, code = _id(cells, line), _text(cells, "language")
            if id_ not in found:
                raise ValueError(f"no row has the id {id_!r}")
            texts = _texts(cells, wanted)
        except ValueError as error:
            rejects.append(Reject(path.name, line, str(error), cells))
            continue
        try:
            check_language(code)
        except ValueError as error:
            raise ValueError(f"{formats.at(path, line)}: {error}.") from None
        if code in targets:
            found[id_][code] = texts
    return [dataclasses.replace(row, translations=found[row.id]) for row in rows], rejects


def _id(cells: Mapping[str, Any], line: int) -> str:
    return str(line) if cells.get("id") in (None, "") else str(cells["id"])


def _texts(cells: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    return {name: _text(cells, name) for name in names}


def _text(cells: Mapping[str, Any], name: str) -> str:
    cell = cells.get(name)
    try:
        return str(cell_value("" if cell is None else cell, str, name, "row"))
    except ValueError as error:
        raise ValueError(str(error).removeprefix("row: ").rstrip(".")) from None


# ---------------------------------------------------------------- answers


def rewriting_prompts(rows: Sequence[Mapping[str, Any]], prompt: str) -> list[dict[str, str]]:
    """Rows for `launch/generate.py`, which ask for each reference in the model's words (SDFT).

    rows: with id, prompt and reference. prompt: as `TransferSet.rewriting_prompt`.
    """
    return [
        {
            "id": row["id"],
            "prompt": prompt.format(prompt=row["prompt"], reference=row["reference"]),
        }
        for row in rows
    ]


def with_rewritten(
    rows: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The rows with what was answered to `rewriting_prompts` as "rewritten": "" where nothing was,
    or the answer was cut before its end."""
    found = {row["id"]: row["answer"] for row in answers if row["ended"]}
    return [{**row, "rewritten": found.get(row["id"], "")} for row in rows]


def answer_filter(config: TransferSet, embed: Embed | None = None) -> AnswerFilter | None:
    """The filter that a config names; None for none. embed: what similarity is measured by.

    ValueError where it is similarity and there is nothing to measure it by.
    """
    if config.answer_filter == "none":
        return None
    if config.answer_filter == "exact":
        return same_text
    if embed is None:
        raise ValueError(
            "config.transfer.answer_filter is 'similarity', which needs a model that makes vectors"
            " of texts; there is none."
        )
    return similar(embed, config.least_similarity)


def same_text(answers: Sequence[str], references: Sequence[str]) -> list[bool]:
    """Keeps answers that are their references but for case, blanks and punctuation."""
    both = zip(answers, references, strict=True)
    return [normalised(answer) == normalised(reference) for answer, reference in both]


def similar(embed: Embed, least: float) -> AnswerFilter:
    """Keeps answers whose vector's cosine with their reference's is at least `least`."""

    def keeps(answers: Sequence[str], references: Sequence[str]) -> list[bool]:
        both = [np.asarray(embed(texts), np.float64) for texts in (answers, references)]
        a_ND, b_ND = (h_ND / np.linalg.norm(h_ND, axis=1, keepdims=True) for h_ND in both)
        return [bool(cosine >= least) for cosine in np.sum(a_ND * b_ND, axis=1)]

    return keeps
