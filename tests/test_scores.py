"""Scores against closed forms and brute force over made-up answers."""

import collections
import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from mtllm_jax import scores

LABELS = ("a", "b", "c")


def answers(seed, rows_by_language, share_right=0.7, parallel=True):
    """Made-up rows; ids are shared by languages, or each language has its own."""
    rng = np.random.default_rng(seed)
    rows = []
    for code, count in rows_by_language.items():
        for i in range(count):
            label = LABELS[i % 3]
            right = rng.random() < share_right
            wrong = [other for other in LABELS if other != label]
            rows.append(
                {
                    "id": str(i) if parallel else f"{code}{i}",
                    "language": code,
                    "label": label,
                    "prediction": label if right else wrong[rng.integers(2)],
                }
            )
    return pd.DataFrame(rows)


def f1(rows, label):
    counts = collections.Counter(
        (row.label == label, row.prediction == label) for row in rows.itertuples()
    )
    true, total = counts[True, True], counts[True, False] + counts[False, True]
    return 2 * true / (2 * true + total) if true + total else 0.0


def test_accuracy_and_macro_f1_by_language():
    table = answers(0, {"eng_Latn": 30, "deu_Latn": 60, "jpn_Jpan": 90})
    found = scores.entry([table], "eng_Latn")
    by_hand, f1_by_hand = {}, {}
    for code in ("eng_Latn", "deu_Latn", "jpn_Jpan"):
        rows = table[table["language"] == code]
        by_hand[code] = sum(r.label == r.prediction for r in rows.itertuples()) / len(rows)
        f1_by_hand[code] = sum(f1(rows, label) for label in LABELS) / 3
    assert found["english"] == pytest.approx(by_hand.pop("eng_Latn"))
    assert found["languages"] == pytest.approx(by_hand)
    assert found["mean"] == pytest.approx(sum(by_hand.values()) / 2)  # not weighed by rows
    assert found["macro_f1"]["english"] == pytest.approx(f1_by_hand.pop("eng_Latn"))
    assert found["macro_f1"]["languages"] == pytest.approx(f1_by_hand)
    assert "std" not in found


def test_several_seeds_are_averaged():
    tables = [answers(seed, {"eng_Latn": 30, "deu_Latn": 60, "jpn_Jpan": 60}) for seed in range(3)]
    each = [scores.entry([table], "eng_Latn") for table in tables]
    found = scores.entry(tables, "eng_Latn")
    means = [one["mean"] for one in each]
    assert found["mean"] == pytest.approx(np.mean(means))
    assert found["std"] == pytest.approx(
        math.sqrt(sum((m - np.mean(means)) ** 2 for m in means) / 2)
    )
    for code in ("deu_Latn", "jpn_Jpan"):
        wanted = np.mean([one["languages"][code] for one in each])
        assert found["languages"][code] == pytest.approx(wanted)


def test_a_test_in_english_alone_has_no_mean():
    found = scores.entry([answers(0, {"eng_Latn": 30})], "eng_Latn")
    assert found["mean"] is None and found["interval"] is None and found["languages"] == {}


def test_intervals_are_those_of_the_binomial():
    """Resampling zeros and ones draws from a binomial, whose quantiles are known."""
    table = answers(1, {"eng_Latn": 10, "deu_Latn": 400})
    low, high = scores.entry([table], "eng_Latn")["intervals"]["deu_Latn"]
    right = int((table["label"] == table["prediction"])[table["language"] == "deu_Latn"].sum())
    wanted = scipy.stats.binom.ppf([0.025, 0.975], 400, right / 400) / 400
    # 1000 resamples find a 2.5 % quantile within some 0.15 deviations, here 0.0035.
    assert np.allclose([low, high], wanted, atol=0.01)


def test_parallel_items_are_drawn_with_all_their_languages():
    """The same answers in every language are one item's, so that more languages tell no more."""
    one = answers(2, {"deu_Latn": 200})
    copies = [one.assign(language=code) for code in ("deu_Latn", "fra_Latn", "jpn_Jpan")]
    together = scores.entry([pd.concat(copies)], "eng_Latn")["interval"]
    assert together == pytest.approx(scores.entry([one], "eng_Latn")["interval"], abs=0.01)
    apart = {"deu_Latn": 200, "fra_Latn": 200, "jpn_Jpan": 200}
    low, high = scores.entry([answers(2, apart, parallel=False)], "eng_Latn")["interval"]
    assert (high - low) * 1.4 < together[1] - together[0]  # 1.73 times, as the root of 3


def test_all_right_has_an_interval_of_no_width():
    table = answers(0, {"deu_Latn": 20}, share_right=1.1)
    assert scores.entry([table], "eng_Latn")["interval"] == pytest.approx([1.0, 1.0])


def test_items_may_lack_languages():
    """What is drawn changes how many rows a language has, and its accuracy is of those it has."""
    rng = np.random.default_rng(6)
    table = answers(5, {"deu_Latn": 150, "fra_Latn": 150})
    table = table[(table["language"] == "deu_Latn") | (table["id"].astype(int) % 3 == 0)]
    low, high = scores.entry([table], "eng_Latn")["interval"]
    right = table.assign(right=table["label"] == table["prediction"])
    items = [rows for _, rows in right.groupby("id")]
    means = []
    for _ in range(300):
        drawn = pd.concat([items[i] for i in rng.integers(0, len(items), len(items))])
        means.append(drawn.groupby("language")["right"].mean().mean())
    # Their 300 and our 1000 resamples find a quantile within some 0.3 deviations together.
    wanted = np.quantile(means, [0.025, 0.975])
    assert np.allclose([low, high], wanted, atol=0.35 * np.std(means))
    assert scores.entry([table.assign(prediction=table["label"])], "eng_Latn")["interval"] == [1, 1]


def test_two_systems_are_compared_on_common_rows():
    ours, theirs = (answers(seed, {"deu_Latn": 120, "jpn_Jpan": 120}) for seed in (3, 4))
    theirs = theirs[theirs["id"] != "7"].sample(frac=1.0, random_state=0)  # two less, in any order
    found = scores.compare(ours, theirs)
    right = ours.assign(right=ours["label"] == ours["prediction"])
    other = theirs.assign(right=theirs["label"] == theirs["prediction"])
    both = [
        (r.right, other[(other["id"] == r.id) & (other["language"] == r.language)]["right"].item())
        for r in right[right["id"] != "7"].itertuples()
    ]
    only_ours = sum(a and not b for a, b in both)
    only_theirs = sum(b and not a for a, b in both)
    assert found["rows"] == 238
    assert (found["only_ours"], found["only_theirs"]) == (only_ours, only_theirs)
    assert found["difference"] == pytest.approx((only_ours - only_theirs) / 238)
    net = collections.Counter()
    for (a, b), id_ in zip(both, right[right["id"] != "7"]["id"], strict=True):
        net[id_] += int(a) - int(b)
    wanted = two_sided(sum(x > 0 for x in net.values()), sum(x < 0 for x in net.values()))
    assert found["p"] == pytest.approx(wanted)
    low, high = found["interval"]
    assert low <= found["difference"] <= high


def two_sided(gained, lost):
    """The exact sign test, from its closed form."""
    count = gained + lost
    tail = sum(math.comb(count, k) for k in range(min(gained, lost) + 1)) / 2**count
    return min(1.0, 2 * tail)


def test_of_one_language_it_is_mcnemars_test():
    ours, theirs = (answers(seed, {"deu_Latn": 120}, share) for seed, share in ((3, 0.8), (4, 0.6)))
    found = scores.compare(ours, theirs)
    assert found["p"] == pytest.approx(two_sided(found["only_ours"], found["only_theirs"]))
    assert found["p"] < 0.05


def test_an_item_said_in_many_languages_is_one():
    """Copies of a language tell no more than it does."""
    ours, theirs = (answers(seed, {"deu_Latn": 120}, share) for seed, share in ((3, 0.8), (4, 0.6)))
    codes = ("deu_Latn", "fra_Latn", "jpn_Jpan")
    copies = [pd.concat([one.assign(language=c) for c in codes]) for one in (ours, theirs)]
    assert scores.compare(*copies)["p"] == pytest.approx(scores.compare(ours, theirs)["p"])


def test_what_cannot_be_compared():
    table = answers(0, {"deu_Latn": 6})
    with pytest.raises(ValueError, match="no row in common"):
        scores.compare(table, answers(0, {"fra_Latn": 6}))
    with pytest.raises(ValueError, match="row '0' in deu_Latn has the label 'a' in one and 'b' in"):
        scores.compare(table, table.assign(label="b"))
    same = scores.compare(table, table)
    assert (same["difference"], same["p"], same["interval"]) == (0.0, 1.0, [0.0, 0.0])


def test_confusion_and_majority():
    table = answers(5, {"deu_Latn": 60})
    wanted = np.zeros((3, 3), int)
    for row in table.itertuples():
        wanted[LABELS.index(row.label), LABELS.index(row.prediction)] += 1
    np.testing.assert_array_equal(scores.confusion(table, LABELS), wanted)
    assert scores.majority(pd.Series(["b", "a", "b", "c"])) == 0.5
