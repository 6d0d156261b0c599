"""Batches: every row once an epoch, in an order that the seed alone decides, restartable."""

import itertools
import json

import numpy as np
import pytest

from mtllm_jax.data.pipeline import add_by_example, batches, by_length

NUM_ROWS = 10


class Source:
    """Rows whose content is their number."""

    def __len__(self):
        return NUM_ROWS

    def __getitem__(self, row):
        return {"row": np.int32(row), "example": np.array([row + 1, 0], np.int32)}


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def order(seed, count, batch_rows=4):
    iterator = batches(Source(), batch_rows=batch_rows, seed=seed)
    return np.concatenate([batch["row"] for batch in take(iterator, count)])


def test_every_row_once_per_epoch_and_each_epoch_its_own_order():
    epochs = order(seed=3, count=10).reshape(4, NUM_ROWS)  # batches of 4 span the epochs' ends
    for epoch in epochs:
        assert sorted(epoch) == list(range(NUM_ROWS))
    for one, other in itertools.combinations(epochs, 2):
        assert list(one) != list(other)


def test_the_order_is_the_seeds():
    assert list(order(3, 10)) == list(order(3, 10))
    assert list(order(3, 10)) != list(order(4, 10))
    # How rows are grouped into batches does not change their order.
    assert list(order(3, 10)) == list(order(3, 20, batch_rows=2))


def test_seeds_fill_32_bits():
    assert sorted(order(2**32 - 1, 1, batch_rows=NUM_ROWS)) == list(range(NUM_ROWS))


def test_more_rows_in_a_batch_than_there_are():
    assert np.bincount(order(0, 3, batch_rows=2 * NUM_ROWS)).tolist() == [6] * NUM_ROWS


@pytest.mark.parametrize("taken", [0, 1, 2, 3, 7, 23])
def test_a_restored_position_gives_the_batches_that_follow(taken):
    iterator = batches(Source(), batch_rows=4, seed=1)
    take(iterator, taken)
    position = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 12)
    resumed = batches(Source(), batch_rows=4, seed=1)
    take(resumed, 2)  # wherever it stood before
    resumed.set_state(position)
    for one, other in zip(take(resumed, 12), expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_tables_by_example():
    labels = np.arange(NUM_ROWS, dtype=np.int32) * 10
    vectors = np.random.default_rng(0).normal(size=(NUM_ROWS, 3)).astype(np.float32)
    add = add_by_example({"label": labels, "teacher": vectors})
    (batch,) = take(batches(Source(), batch_rows=4, seed=0, add=add), 1)
    assert batch["label"].shape == (4, 2) and batch["teacher"].shape == (4, 2, 3)
    assert batch["label"].dtype == np.int32 and batch["teacher"].dtype == np.float32
    for i, row in enumerate(batch["row"]):
        assert batch["label"][i, 0] == 10 * row
        np.testing.assert_array_equal(batch["teacher"][i, 0], vectors[row])
    assert np.all(batch["example"][:, 1] == 0)


def test_by_length():
    lengths = [3, 9, 1, 9, 4, 2, 8]
    groups = by_length(lengths, 3)
    assert [[lengths[i] for i in group] for group in groups] == [[9, 9, 8], [4, 3, 2], [1]]
    assert sorted(np.concatenate(groups)) == list(range(7))
