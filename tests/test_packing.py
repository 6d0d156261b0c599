"""Packing: nothing lost, nothing mixed, nothing too long, whatever the texts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtllm_jax.data import packing
from mtllm_jax.data.packing import Counts, fitting_lengths, pack, padded, windows

PAD_IDS = {"source": 1, "target": 0}
LENGTHS = {"source": 12, "target": 9}

STREAMS = ("source", "target")


def texts_of(sizes, streams=STREAMS):
    """One text per entry of `sizes`; its tokens are found nowhere else, so that none can stray."""
    counter = 100
    texts = []
    for size in sizes:
        text = {}
        for stream in streams:
            text[stream] = np.arange(counter, counter + size[stream], dtype=np.int32)
            counter += size[stream]
        texts.append(text)
    return texts


def some_sizes(streams):
    one = st.fixed_dictionaries({stream: st.integers(1, LENGTHS[stream]) for stream in streams})
    return st.lists(one, min_size=1, max_size=90)


@settings(max_examples=60)
@given(st.data(), st.sampled_from([STREAMS, ("source",), ("target",)]), st.booleans())
def test_rows_hold_every_text_once_and_nothing_else(data, streams, packing):
    texts = texts_of(data.draw(some_sizes(streams)), streams)
    rows = pack(texts, {s: LENGTHS[s] for s in streams}, PAD_IDS, packing=packing)

    seen = []
    used = dict.fromkeys(streams, 0)
    for i in range(len(rows)):
        row = rows[i]
        examples = row["example"]
        num_texts = int(np.sum(examples > 0))
        assert np.all(examples[:num_texts] > 0), "the texts of a row come first"
        assert packing or num_texts == 1
        for stream in streams:
            ids, segments = row[f"{stream}_ids"], row[f"{stream}_segments"]
            assert ids.shape == segments.shape == (LENGTHS[stream],)
            assert ids.dtype == segments.dtype == np.int32
            expected = [texts[n - 1][stream] for n in examples[:num_texts]]
            numbers = [np.full(len(text), n + 1) for n, text in enumerate(expected)]
            filled = sum(map(len, expected))
            used[stream] += filled
            np.testing.assert_array_equal(ids[:filled], np.concatenate(expected))
            np.testing.assert_array_equal(segments[:filled], np.concatenate(numbers))
            assert np.all(ids[filled:] == PAD_IDS[stream]) and np.all(segments[filled:] == 0)
        seen += list(examples[:num_texts])
    assert sorted(seen) == list(range(1, len(texts) + 1))
    assert all(row["example"].dtype == np.int32 for row in rows)
    assert any(row["example"][-1] > 0 for row in rows), "a last column that no row uses"
    for stream in streams:
        assert rows.fill[stream] == pytest.approx(used[stream] / (len(rows) * LENGTHS[stream]))
    assert rows.counts == Counts(texts=len(texts), rows=len(rows), tokens=used)


@settings(max_examples=60)
@given(some_sizes(("source",)))
def test_of_one_stream_the_longest_come_first_each_into_the_first_row_with_room(sizes):
    """First fit decreasing, done by hand for the rows that are there at the beginning."""
    lengths = np.array([size["source"] for size in sizes])
    left = [12] * -(-int(lengths.sum()) // 12)
    housed = {}
    for text in np.argsort(-lengths, kind="stable").tolist():
        row = next((i for i, room in enumerate(left) if room >= lengths[text]), None)
        if row is not None:
            left[row] -= lengths[text]
            housed.setdefault(row, []).append(text + 1)
    rows = pack(texts_of(sizes, ("source",)), {"source": 12}, PAD_IDS)
    found = [[n for n in row["example"].tolist() if n] for row in rows]
    assert found[: len(housed)] == [sorted(housed[row]) for row in sorted(housed)]


@pytest.mark.parametrize("ratio_noise", [0.0, 0.15])
@pytest.mark.parametrize("median", [25, 60])
def test_both_streams_are_full_where_lengths_follow_the_texts(ratio_noise, median):
    rng = np.random.default_rng(0)
    source = np.clip(rng.lognormal(np.log(median), 0.6, 3000), 3, 400).astype(int)
    target = np.clip(source * 0.8 * np.exp(rng.normal(0, ratio_noise, 3000)), 3, 400).astype(int)
    tokens = {"source": int(source.sum()), "target": int(target.sum())}
    lengths = fitting_lengths(tokens, {"source": 512, "target": 512})
    sizes = [{"source": s, "target": t} for s, t in zip(source, target, strict=True)]
    rows = pack(texts_of(sizes), lengths, PAD_IDS)
    assert min(rows.fill.values()) > 0.975


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.sampled_from([64, 512, 2048]))
def test_fitting_lengths(source, target, longest):
    lengths = fitting_lengths(
        {"source": source, "target": target}, {"source": longest, "target": 8}
    )
    assert max(lengths.values()) == longest and all(n % 8 == 0 for n in lengths.values())
    short, long = sorted(
        ("source", "target"), key=lambda s: {"source": source, "target": target}[s]
    )
    exact = longest * min(source, target) / max(source, target)
    assert lengths[long] == longest
    assert abs(lengths[short] - max(exact, 8)) <= 8


def test_each_window_is_packed_by_itself(monkeypatch):
    monkeypatch.setattr(packing, "_WINDOW", 20)
    rng = np.random.default_rng(0)
    texts = texts_of([{s: int(rng.integers(1, LENGTHS[s])) for s in STREAMS} for _ in range(50)])
    assert windows(50) == [range(0, 16), range(16, 33), range(33, 50)]
    rows = list(pack(texts, LENGTHS, PAD_IDS))
    apart = [
        row for window in windows(50) for row in pack([texts[i] for i in window], LENGTHS, PAD_IDS)
    ]
    assert len(rows) == len(apart)
    for one, other in zip(rows, apart, strict=True):
        np.testing.assert_array_equal(one["source_ids"], other["source_ids"])
        np.testing.assert_array_equal(one["target_segments"], other["target_segments"])


def test_a_text_without_tokens_on_one_side_keeps_the_sides_matched():
    sizes = [{"source": 3, "target": 2}, {"source": 2, "target": 0}, {"source": 1, "target": 3}]
    rows = pack(texts_of(sizes), LENGTHS, PAD_IDS)
    (row,) = rows
    assert list(row["example"][:3]) == [1, 2, 3]
    assert list(row["source_segments"][:7]) == [1, 1, 1, 2, 2, 3, 0]
    assert list(row["target_segments"][:6]) == [1, 1, 3, 3, 3, 0]


def test_packing_is_a_function_of_its_input():
    rng = np.random.default_rng(0)
    sizes = [{s: int(rng.integers(1, LENGTHS[s] + 1)) for s in STREAMS} for _ in range(200)]
    one, other = (pack(texts_of(sizes), LENGTHS, PAD_IDS) for _ in range(2))
    assert one.records == other.records and one.counts == other.counts


@pytest.mark.parametrize("packing", [True, False])
def test_a_text_longer_than_its_row_is_refused(packing):
    texts = texts_of([{"source": 12, "target": 9}, {"source": 12, "target": 10}])
    with pytest.raises(ValueError, match=r"text 1 has 10 target tokens, a row holds 9\."):
        pack(texts, LENGTHS, PAD_IDS, packing=packing)


def test_no_texts_are_refused():
    with pytest.raises(ValueError, match="no texts"):
        pack([], LENGTHS, PAD_IDS)


@given(st.lists(st.integers(1, 150), min_size=1, max_size=6), st.integers(0, 3))
def test_padded(sizes, spare):
    texts = [np.arange(100 * i, 100 * i + size) for i, size in enumerate(sizes, 1)]
    arrays = padded(texts, "source", 7, rows=len(texts) + spare)
    ids, segments = arrays["source_ids"], arrays["source_segments"]
    step = 8 if max(sizes) <= 64 else 32
    assert ids.shape == segments.shape == (len(texts) + spare, -(-max(sizes) // step) * step)
    for i, text in enumerate(texts):
        np.testing.assert_array_equal(ids[i], list(text) + [7] * (ids.shape[1] - len(text)))
        assert list(segments[i]) == [1] * len(text) + [0] * (ids.shape[1] - len(text))
    assert np.all(ids[len(texts) :] == 7) and np.all(segments[len(texts) :] == 0)
