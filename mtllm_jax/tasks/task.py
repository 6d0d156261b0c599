"""A labelled task: its rows, label names, and how rows become texts.

A row is {"id", "language", "label", "text"}, of pairs of texts with "text_pair", all strings;
labels are named, ids count within a language, and rows of one id are translations of each other.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Row = Mapping[str, Any]

TEXTS = ("text", "text_pair")  # the columns of a row that are read


@dataclasses.dataclass(frozen=True)
class Task:
    """English rows to train on, and rows in English and other languages to test.

    labels: names in the order of their ids. tests: by name; the first is the headline ("systems" in
    results.json), a second one named "unseen" stands beside it ("systems_unseen"). translated: test
    rows in English that are given as translations of others; by their language and id these are
    found. notes: what a reader of the results should know, a sentence each.
    """

    name: str
    labels: tuple[str, ...]
    train: Sequence[Row]
    tests: Mapping[str, Sequence[Row]]
    translated: Sequence[Row] = ()
    notes: tuple[str, ...] = ()

    def label_ids(self, rows: Sequence[Row]) -> np.ndarray:
        """int32 [rows]."""
        place = {label: i for i, label in enumerate(self.labels)}
        return np.array([place[row["label"]] for row in rows], np.int32)


def texts_of(rows: Sequence[Row]) -> tuple[list[str], list[str] | None]:
    """The rows' texts, and of pairs the second ones."""
    pairs = [row["text_pair"] for row in rows] if rows and "text_pair" in rows[0] else None
    return [row["text"] for row in rows], pairs
