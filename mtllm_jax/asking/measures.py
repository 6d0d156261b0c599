"""What answers are worth, with intervals: a measure is a formula over sums over rows.

So an accuracy is Σ right / Σ 1, and chrF++ what its formula makes of summed counts. Drawing items,
each with all the languages that it is said in, draws sums, and the same draws for two models give
the interval of their difference.

M rows, I items, R resamples, L languages, K numbers of a row that a measure sums.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mtllm_jax.data.identify import is_in
from mtllm_jax.scores import CONFIDENCE, RESAMPLES

_AT_ONCE = 50  # resamples in memory


def share(sums_RK: np.ndarray) -> np.ndarray:
    """Of two sums the first over the second, [R]; NaN where that is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums_RK[:, 0] / sums_RK[:, 1]


@dataclasses.dataclass(frozen=True)
class Measure:
    """name: as tables have it. about: how it is made, for who reads them. sums_MK: what is summed,
    float64; the last is 1, or all are 0 for a row that it does not speak of. value: sums [R, K] →
    [R], from 0 to 1, NaN where sums say nothing."""

    name: str
    about: str
    sums_MK: np.ndarray
    value: Callable[[np.ndarray], np.ndarray] = share


def mean(name: str, about: str, values: Sequence[float | bool | None]) -> Measure:
    """The mean of a value of each row; None for a row without one."""
    sums_M2 = np.array([(0, 0) if value is None else (value, 1) for value in values], float)
    return Measure(name, about, sums_M2.reshape(-1, 2))


def off_target(name: str, codes: Sequence[str | None], answers: Sequence[str]) -> Measure:
    """The share of answers that are not in the language that they should be in, of those where that
    can be told. codes: None for a row that is not asked about."""
    about = "answers in another language than they should be, of those whose language can be told"
    told = [code and is_in(answer, code) for answer, code in zip(answers, codes, strict=True)]
    return mean(name, about, [None if right is None else not right for right in told])


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A measure in each language: of all rows, and of each resample. NaN where rows say nothing.
    rows_L: that it speaks of."""

    rows_L: np.ndarray
    point_L: np.ndarray
    drawn_RL: np.ndarray


class Resamples:
    """The rows' items, drawn `RESAMPLES` times; the same draws for all measures.

    ids, languages: of the rows. english: the language that stands apart; "" = none does.
    """

    def __init__(self, ids: Sequence[str], languages: Sequence[str], english: str):
        self._items, self._places_M = np.unique(np.array(ids), return_inverse=True)
        self._languages_M = np.array(languages)
        self.codes = list(dict.fromkeys(languages))
        self._is_foreign_L = np.array([code != english for code in self.codes])
        self._english = english
        rng, count = np.random.default_rng(0), len(self._items)
        shares = np.full(count, 1 / count)
        # How often an item is drawn; 255 times is beyond all chance.
        self._times_RI = np.concatenate(
            [
                rng.multinomial(count, shares, size=_AT_ONCE).astype(np.uint8)
                for _ in range(0, RESAMPLES, _AT_ONCE)
            ]
        )

    def of(self, measure: Measure) -> Drawn:
        """The measure of all rows and of each resample."""
        sums_LK = np.stack([self._sums(measure, code)[1].sum(axis=0) for code in self.codes])
        return Drawn(sums_LK[:, -1], measure.value(sums_LK), self._drawn(measure))

    def entry(self, drawn: Drawn) -> dict[str, Any]:
        """{"english", "mean", "languages", "interval", "intervals"} as `scores.summary` has them,
        and {"rows": {code: how many}}; None for what no row speaks of."""
        point_L, drawn_RL = drawn.point_L, drawn.drawn_RL
        values = dict(zip(self.codes, map(_number, point_L), strict=True))
        in_english = values.pop(self._english, None)
        return {
            "rows": {c: int(rows) for c, rows in zip(self.codes, drawn.rows_L, strict=True)},
            "english": in_english,
            "mean": _mean(point_L[self._is_foreign_L]),
            "languages": values,
            "interval": _interval(_means(drawn_RL[:, self._is_foreign_L])),
            "intervals": {
                code: interval
                for code, drawn_R in zip(self.codes, drawn_RL.T, strict=True)
                if (interval := _interval(drawn_R)) is not None
            },
        }

    def change(self, ours: Drawn, theirs: Drawn) -> dict[str, Any]:
        """How far ours is above theirs, both of the same rows: {"mean", "languages", "english"},
        each {"difference", "interval"}, or None where one of the two has no value."""
        point_L = ours.point_L - theirs.point_L
        drawn_RL = ours.drawn_RL - theirs.drawn_RL
        every = {
            code: _change(point, drawn_R)
            for code, point, drawn_R in zip(self.codes, point_L, drawn_RL.T, strict=True)
        }
        in_english = every.pop(self._english, None)
        mean_R = _means(drawn_RL[:, self._is_foreign_L])
        point = _mean(point_L[self._is_foreign_L])
        return {
            "english": in_english,
            "mean": None if point is None else _change(point, mean_R),
            "languages": every,
        }

    def _sums(self, measure: Measure, code: str) -> tuple[np.ndarray, np.ndarray]:
        """Items that have a row in the language, and their sums [items, K]."""
        chosen = self._languages_M == code
        items, places = np.unique(self._places_M[chosen], return_inverse=True)
        sums = np.zeros((len(items), measure.sums_MK.shape[1]))
        np.add.at(sums, places, measure.sums_MK[chosen])
        return items, sums

    def _drawn(self, measure: Measure) -> np.ndarray:
        """[R, L]."""
        columns = []
        for code in self.codes:
            items, sums = self._sums(measure, code)
            columns.append(measure.value(self._times_RI[:, items].astype(np.float64) @ sums))
        return np.stack(columns, axis=1)


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _mean(values: np.ndarray) -> float | None:
    """Over those that there are."""
    there = values[np.isfinite(values)]
    return float(np.mean(there)) if len(there) else None


def _means(values_RL: np.ndarray) -> np.ndarray:
    """The same, resample by resample; NaN where there are none."""
    is_there_RL = np.isfinite(values_RL)
    return share(np.stack([np.where(is_there_RL, values_RL, 0).sum(1), is_there_RL.sum(1)], axis=1))


def _interval(drawn_R: np.ndarray) -> list[float] | None:
    """95 % of the resamples that have a value lie in it."""
    there = drawn_R[np.isfinite(drawn_R)]
    if not len(there):
        return None
    tail = 100 * (1 - CONFIDENCE) / 2
    return [float(x) for x in np.percentile(there, [tail, 100 - tail])]


def _change(point: float, drawn_R: np.ndarray) -> dict[str, Any] | None:
    if not np.isfinite(point):
        return None
    return {"difference": float(point), "interval": _interval(drawn_R)}


def together(measures: Sequence[Measure], is_kept_M: np.ndarray) -> list[Measure]:
    """The same of some of the rows."""
    return [dataclasses.replace(one, sums_MK=one.sums_MK * is_kept_M[:, None]) for one in measures]
