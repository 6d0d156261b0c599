"""What answers are worth: accuracy and macro-F1 by language, their intervals, two systems compared.

Answers are a table of a row each: id, language, label, prediction; with several seeds a table for
each. Rows of one id in several languages count as one item said in each of them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
from sklearn.metrics import confusion_matrix, f1_score

RESAMPLES = 1000
CONFIDENCE = 0.95


def entry(answers: Sequence[pd.DataFrame], english: str) -> dict[str, Any]:
    """A system's entry in results.json, from its answers under each seed to the same rows.

    {"english": accuracy, "mean": over the other languages, "languages": {code: accuracy},
    "interval": of the mean, "intervals": {code: interval}, English too, "macro_f1": {"english",
    "mean", "languages"}}; each a mean over seeds. "mean" weighs languages alike, whatever their
    number of rows. An interval is [low, high], 95 % by the percentile bootstrap over items, seeds
    taken as they are. With several seeds also "std": the sample deviation of their means. None for
    what has no rows.
    """
    found = summary(_hits(answers), english)
    f1 = _mean_over([_macro_f1(one) for one in answers])
    f1_in_english = f1.pop(english, None)
    found["macro_f1"] = {"english": f1_in_english, "mean": _mean(f1), "languages": f1}
    if len(answers) > 1 and found["languages"]:
        means = [entry_mean(one, english) for one in answers]
        found["std"] = float(np.std(means, ddof=1))
    return found


def summary(rows: pd.DataFrame, english: str) -> dict[str, Any]:
    """What `entry` has of accuracy, of any value of each row: id, language, and the value, from 0
    to 1, as "right"."""
    right = rows.groupby("language", sort=False)["right"].mean().to_dict()
    in_english = right.pop(english, None)
    return {
        "english": in_english,
        "mean": _mean(right),
        "languages": right,
        "interval": _interval_of_mean(rows[rows["language"] != english]),
        "intervals": {
            code: _interval(of_language["right"].to_numpy())
            for code, of_language in rows.groupby("language", sort=False)
        },
    }


def ratios(rows: pd.DataFrame, english: str) -> dict[str, Any]:
    """As `summary`, of Σ value / Σ size over each language's rows: id, language, value, size."""
    rows = rows.astype({"value": float, "size": float})
    sums = rows.groupby("language", sort=False)[["value", "size"]].sum()
    by_language = (sums["value"] / sums["size"]).to_dict()
    in_english = by_language.pop(english, None)

    def interval(rows: pd.DataFrame) -> list[float] | None:
        if rows.empty:
            return None
        both = rows.pivot_table(["value", "size"], "id", "language", aggfunc="sum", fill_value=0.0)
        return _interval_of_items(*(both[name].to_numpy(float) for name in ("value", "size")))

    return {
        "english": in_english,
        "mean": _mean(by_language),
        "languages": by_language,
        "interval": interval(rows[rows["language"] != english]),
        "intervals": {code: interval(said) for code, said in rows.groupby("language", sort=False)},
    }


def entry_mean(answers: pd.DataFrame, english: str) -> float:
    """Accuracy, mean over the languages but English."""
    foreign = answers[answers["language"] != english]
    hits = foreign["label"] == foreign["prediction"]
    return float(hits.groupby(foreign["language"]).mean().mean())


def by_group(
    answers: pd.DataFrame, english: str, group_of: Callable[[str], str]
) -> dict[str, dict[str, Any]]:
    """{group: {"languages": how many, "mean", "interval", "macro_f1"}} of languages but English.

    group_of: from a language's code. Means weigh the languages of a group alike.
    """
    foreign = answers[answers["language"] != english]
    found = {}
    for name, rows in foreign.groupby(foreign["language"].map(group_of)):
        hits = _hits([rows])
        found[str(name)] = {
            "languages": int(hits["language"].nunique()),
            "mean": entry_mean(rows, english),
            "interval": _interval_of_mean(hits),
            "macro_f1": _mean(_macro_f1(rows)),
        }
    return found


def confusion(answers: pd.DataFrame, labels: Sequence[str]) -> np.ndarray:
    """Rows by label and prediction. int64 [C, C]."""
    return confusion_matrix(answers["label"], answers["prediction"], labels=list(labels))


def compare(ours: pd.DataFrame, theirs: pd.DataFrame) -> dict[str, Any]:
    """Two systems on the rows that both have answered, as a paired test.

    {"rows", "difference" of accuracies, ours less theirs, "interval" of it, "only_ours" and
    "only_theirs": rows that one of them alone has right, "p": of the exact two-sided sign test over
    items, by which of the two has an item right in more of its languages}. Where each item is one
    row that is McNemar's test (doi:10.1007/BF02295996). ValueError if no row is common, or if
    labels differ.
    """
    both = ours.merge(theirs, on=["id", "language"], suffixes=("", "_theirs"))
    if both.empty:
        raise ValueError("the two have no row in common, by id and language")
    if (different := both["label"] != both["label_theirs"]).any():
        row = both[different].iloc[0]
        raise ValueError(
            f"row {row['id']!r} in {row['language']} has the label {row['label']!r} in one and"
            f" {row['label_theirs']!r} in the other"
        )
    right = (both["label"] == both["prediction"]).to_numpy(int)
    right_theirs = (both["label"] == both["prediction_theirs"]).to_numpy(int)
    gained, lost = int(np.sum(right > right_theirs)), int(np.sum(right < right_theirs))
    change = pd.DataFrame({"id": both["id"], "right": right - right_theirs})
    items = change.groupby("id")["right"].agg(["sum", "size"])
    by_item = items["sum"].to_numpy()
    # Of items in which they are level nothing is learnt; none of the others is no difference.
    better, worse = int(np.sum(by_item > 0)), int(np.sum(by_item < 0))
    p = scipy.stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
    return {
        "rows": len(both),
        "difference": float(change["right"].mean()),
        "interval": _interval_of_items(items[["sum"]].to_numpy(), items[["size"]].to_numpy()),
        "only_ours": gained,
        "only_theirs": lost,
        "p": float(p),
    }


def majority(labels: pd.Series) -> float:
    """Accuracy of always answering the most frequent label of the rows' own set.

    A baseline that knows the test set's proportions, and so the strictest of its kind.
    """
    return float(labels.value_counts(normalize=True).iloc[0])


def _hits(answers: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """id, language, and the share of seeds whose answer is right, row by row."""
    shares = np.mean([one["label"].eq(one["prediction"]).to_numpy(float) for one in answers], 0)
    return answers[0][["id", "language"]].assign(right=shares)


def _macro_f1(answers: pd.DataFrame) -> dict[str, float]:
    """Mean F1 over the labels that occur among a language's rows, by language."""
    return {
        str(code): float(
            f1_score(
                rows["label"],
                rows["prediction"],
                labels=sorted(rows["label"].unique()),
                average="macro",
                zero_division=0.0,
            )
        )
        for code, rows in answers.groupby("language", sort=False)
    }


def _mean_over(found: Sequence[dict[str, float]]) -> dict[str, float]:
    return {code: float(np.mean([one[code] for one in found])) for code in found[0]}


def _mean(values: dict[str, float]) -> float | None:
    return float(np.mean(list(values.values()))) if values else None


def _interval_of_mean(hits: pd.DataFrame) -> list[float] | None:
    """Of the mean over languages: what is drawn are items, each with all its languages."""
    if hits.empty:
        return None
    asked = pd.crosstab(hits["id"], hits["language"])
    right = hits.pivot_table("right", "id", "language", aggfunc="sum", fill_value=0.0)
    return _interval_of_items(right.to_numpy(float), asked.to_numpy(float))


def _interval_of_items(values_IL: np.ndarray, counts_IL: np.ndarray) -> list[float]:
    """95 % interval of the mean over columns of Σ values / Σ counts, I items being drawn. Columns
    of which a resample has nothing are no part of its mean."""

    def mean(drawn_I: np.ndarray) -> float:
        times_I = np.bincount(drawn_I, minlength=len(values_IL))
        counts_L = times_I @ counts_IL
        return float(np.mean((times_I @ values_IL)[counts_L > 0] / counts_L[counts_L > 0]))

    return _bootstrap(np.arange(len(values_IL)), mean, vectorized=False)


def _interval(values: np.ndarray) -> list[float]:
    """95 % interval of the mean."""
    return _bootstrap(values, np.mean, batch=100)  # resamples in memory at a time


def _bootstrap(drawn: np.ndarray, statistic: Callable[..., Any], **options: Any) -> list[float]:
    if len(drawn) == 1 or (drawn == drawn[0]).all():  # every resample is the same
        return [float(statistic(drawn))] * 2
    found = scipy.stats.bootstrap(
        (drawn,),
        statistic,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
        **options,
    ).confidence_interval
    return [float(found.low), float(found.high)]
