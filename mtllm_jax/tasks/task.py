"""A labelled task: its rows, label names, and how rows become texts.

A row is {"id", "language", "label", "text"}, of pairs of texts with "text_pair", all strings; or,
of multiple choice, {"id", "language", "label", "context", "question", "choices"}, choices being a
list and the label the number of the right one, from 1. Labels are named, ids count within a
language, and rows of one id are translations of each other.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Row = Mapping[str, Any]

TEXTS = ("text", "text_pair", "context", "question", "choices")  # the columns that are read


@dataclasses.dataclass(frozen=True)
class Task:
    """English rows to train on, and rows in English and other languages to test.

    labels: names in the order of their ids. tests: by name; the first is the headline ("systems" in
    results.json), a second one named "unseen" stands beside it ("systems_unseen"). translated: test
    rows in English that are given as translations of others; by their language and id these are
    found. notes: what a reader of the results should know, a sentence each. dev: rows in English
    that may decide on training; none where nothing asks for them. prompt: a template
    (`tasks/prompt.py`) for these texts; "" = that of their kind.
    """

    name: str
    labels: tuple[str, ...]
    train: Sequence[Row]
    tests: Mapping[str, Sequence[Row]]
    translated: Sequence[Row] = ()
    notes: tuple[str, ...] = ()
    dev: Sequence[Row] = ()
    prompt: str = ""

    @property
    def num_choices(self) -> int:
        """Choices of a row; 0 where a row is a text or a pair, to be classified."""
        return len(self.labels) if "choices" in self.train[0] else 0

    @property
    def num_outputs(self) -> int:
        """Of the head: a score for each label, or one, which each choice gets."""
        return 1 if self.num_choices else len(self.labels)

    @property
    def test_texts(self) -> set[str]:
        """All texts of all test rows, which stage 1 must not see."""
        rows = [row for rows in self.tests.values() for row in (*rows, *self.translated)]
        return {text for row in rows for text in texts_in(row)}

    def label_ids(self, rows: Sequence[Row]) -> np.ndarray:
        """int32 [rows]."""
        place = {label: i for i, label in enumerate(self.labels)}
        return np.array([place[row["label"]] for row in rows], np.int32)


def texts_in(row: Row) -> list[str]:
    """All texts of a row, in the order of TEXTS."""
    found: list[str] = []
    for name in TEXTS:
        cell = row.get(name, [])
        found += cell if isinstance(cell, list) else [cell]
    return found


def with_texts(row: Row, texts: Sequence[str]) -> Row:
    """The row with these in the place of its own, in the order of `texts_in`."""
    rest, changed = list(texts), dict(row)
    for name in TEXTS:
        if isinstance(cell := row.get(name), str):
            changed[name], *rest = rest
        elif cell is not None:
            changed[name], rest = rest[: len(cell)], rest[len(cell) :]
    return changed


def texts_of(rows: Sequence[Row]) -> tuple[list[str], list[str] | None]:
    """The rows' texts, and of pairs the second ones."""
    pairs = [row["text_pair"] for row in rows] if rows and "text_pair" in rows[0] else None
    return [row["text"] for row in rows], pairs
