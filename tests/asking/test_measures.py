"""Measures and their intervals, against numpy, scipy and each other; how answers are read."""

from decimal import Decimal

import numpy as np
import pytest
import scipy.stats

from mtllm_jax.asking.measures import Measure, Resamples, mean, together
from mtllm_jax.asking.tasks import letter_in, number_in

IDS = [str(i) for i in range(40)] * 3
CODES = ["eng_Latn"] * 40 + ["deu_Latn"] * 40 + ["swh_Latn"] * 40


def hits(seed, share=0.6):
    return (np.random.default_rng(seed).random(120) < share).tolist()


def test_a_mean_is_that_of_numpy_and_its_interval_that_of_scipy():
    values = hits(0)
    draws = Resamples(IDS, CODES, "eng_Latn")
    entry = draws.entry(draws.of(mean("accuracy", "", values)))
    by_code = dict(
        zip(("eng_Latn", "deu_Latn", "swh_Latn"), np.reshape(values, (3, 40)), strict=True)
    )
    assert entry["english"] == np.mean(by_code["eng_Latn"])
    assert entry["languages"] == {code: np.mean(by_code[code]) for code in ("deu_Latn", "swh_Latn")}
    both = (by_code["deu_Latn"] + 0.0 + by_code["swh_Latn"]) / 2
    assert entry["mean"] == pytest.approx(both.mean())
    for interval, data in (
        (entry["interval"], both),
        (entry["intervals"]["eng_Latn"], by_code["eng_Latn"] + 0.0),
    ):
        wanted = scipy.stats.bootstrap(
            (data,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
        ).confidence_interval
        # Two bootstraps of 1,000 and 4,000 draws: their ends differ by the noise of a percentile,
        # about a tenth of the interval's width.
        assert interval == pytest.approx(list(wanted), abs=0.15 * (wanted.high - wanted.low))


def test_a_change_is_of_the_same_draws():
    """Of two models that differ in a constant, the interval has no width."""
    sums = np.random.default_rng(2).random((120, 1))
    low, high = (Measure("m", "", np.hstack([sums + x, np.ones((120, 1))])) for x in (0, 0.25))
    draws = Resamples(IDS, CODES, "eng_Latn")
    change = draws.change(draws.of(high), draws.of(low))
    for one in (change["english"], change["mean"], *change["languages"].values()):
        assert one["difference"] == pytest.approx(0.25)
        assert one["interval"] == pytest.approx([0.25, 0.25])


def test_a_formula_is_put_on_the_sums_of_a_language():
    rng = np.random.default_rng(3)
    sums = rng.integers(1, 9, (120, 3)).astype(float)

    def value(sums_RK):
        return sums_RK[:, 0] * sums_RK[:, 1] / sums_RK[:, 2] ** 2

    draws = Resamples(IDS, CODES, "")
    entry = draws.entry(draws.of(Measure("m", "", sums, value)))
    assert entry["english"] is None
    assert entry["languages"]["deu_Latn"] == pytest.approx(
        value(sums[40:80].sum(axis=0, keepdims=True))[0]
    )
    assert entry["mean"] == pytest.approx(np.mean(list(entry["languages"].values())))


def test_what_no_row_speaks_of_has_no_value():
    values = [*hits(4)[:40], *[None] * 40, *hits(5)[:40]]
    draws = Resamples(IDS, CODES, "eng_Latn")
    ours = draws.of(mean("m", "", values))
    entry = draws.entry(ours)
    assert entry["rows"] == {"eng_Latn": 40, "deu_Latn": 0, "swh_Latn": 40}
    assert entry["languages"]["deu_Latn"] is None and "deu_Latn" not in entry["intervals"]
    assert entry["mean"] == entry["languages"]["swh_Latn"]
    (none,) = together([mean("m", "", values)], np.zeros(120, bool))
    nothing = draws.of(none)
    assert draws.entry(nothing)["mean"] is None and draws.entry(nothing)["interval"] is None
    change = draws.change(ours, nothing)
    assert change["mean"] is None and change["languages"]["swh_Latn"] is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 + 4 = 7\nAnswer: 7", "7"),
        ("Answer: 12 dollars, or 1,200 cents", "1200"),
        ("first 5\nanswer: none\nAnswer: 8.50 (of 9?) is 8.5", "8.5"),
        ("It is 70\N{NARROW NO-BREAK SPACE}000.", "70000"),
        ("答案是18個", "18"),
        ("উত্তর ১,০০০", "1000"),
        ("๒๕ บาท", "25"),
        ("x = -4", "-4"),
        ("10-4", "4"),
        ("7 or 8. answer：4.\nThat is 5 less than 9.", "4"),
        ("Answer:\n\n42", "42"),
        ("Answer:\n", None),
        ("7 then Answer: unknown", "7"),
    ],
)
def test_the_number_of_an_answer(text, number):
    assert number_in(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(("B", "2"), ("(C)", "3"), ("The answer is D.", "4"), ("B. Because", "2")),
        *(("Because B", "2"), ("", ""), ("E", ""), ("ABC", ""), ("b", ""), ("答案是A。", "1")),
    ],
)
def test_the_letter_of_an_answer(text, number):
    assert letter_in(text, 4) == number
