"""Classification of single texts: rows, label names, accuracy.

A row is {"id", "text", "label", "language"}, all strings; labels are named, ids count within a
language.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

Row = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Classification:
    """A labelled task: English training rows, and test sets in English and other languages.

    tests: by name; the first is the headline ("systems" in results.json), a second one named
    "unseen" stands beside it ("systems_unseen").
    """

    name: str
    train: Sequence[Row]
    tests: Mapping[str, Sequence[Row]]

    @property
    def labels(self) -> tuple[str, ...]:
        """Label names in the order of their ids."""
        return tuple(sorted({row["label"] for row in self.train}))

    def label_ids(self, rows: Sequence[Row]) -> np.ndarray:
        """int32 [rows]."""
        place = {label: i for i, label in enumerate(self.labels)}
        return np.array([place[row["label"]] for row in rows], np.int32)


def accuracy_by_language(
    rows: Sequence[Row], predictions: Sequence[str], english: str
) -> dict[str, object]:
    """{"english": accuracy, "mean": over the other languages, "languages": {code: accuracy}}.

    "mean" weighs languages alike, whatever their number of rows.
    """
    right: dict[str, list[bool]] = collections.defaultdict(list)
    for row, prediction in zip(rows, predictions, strict=True):
        right[row["language"]].append(row["label"] == prediction)
    scores = {code: float(np.mean(hits)) for code, hits in right.items()}
    in_english = scores.pop(english, None)
    mean = float(np.mean(list(scores.values()))) if scores else None
    return {"english": in_english, "mean": mean, "languages": scores}


def majority(rows: Sequence[Row]) -> float:
    """Accuracy of always answering the most frequent label of the rows' own set.

    A baseline that knows the test set's proportions, and so the strictest of its kind.
    """
    counts = collections.Counter(row["label"] for row in rows)
    return max(counts.values()) / len(rows)
