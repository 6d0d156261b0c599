"""Classification of single texts: rows and label names.

A row is {"id", "text", "label", "language"}, all strings; labels are named, ids count within a
language.
"""

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
