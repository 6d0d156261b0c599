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


# ---------------------------------------------------------------- processes and workers


class Many(Source):
    def __len__(self):
        return 1000


class Watched(Many):
    """Notes in a file which rows were read."""

    def __init__(self, path):
        self.path = path

    def __getitem__(self, row):
        with self.path.open("a") as file:
            file.write(f"{row}\n")
        return super().__getitem__(row)


def positions(num_processes, batch_rows):
    """The rows of a batch that each process holds: in turn, as on a mesh that interleaves them."""
    return [np.arange(batch_rows)[i::num_processes] for i in range(num_processes)]


def joined(parts, batch_rows):
    """The global batch that the processes' parts make up."""
    whole = np.empty(batch_rows, np.int32)
    for places, part in zip(positions(len(parts), batch_rows), parts, strict=True):
        whole[places] = part["row"]
    return whole.tolist()


@pytest.mark.parametrize("num_processes", [2, 4])
def test_processes_together_read_the_batches_of_one(num_processes):
    whole = batches(Source(), batch_rows=4, seed=1)
    parts = [
        batches(Source(), batch_rows=4, seed=1, mine=mine) for mine in positions(num_processes, 4)
    ]
    for _ in range(7):
        assert joined([next(part) for part in parts], 4) == next(whole)["row"].tolist()


def test_mine_may_be_a_slice_a_list_or_an_array_and_gives_the_order():
    expected = [batch["row"].tolist() for batch in take(batches(Source(), batch_rows=6, seed=2), 4)]
    for mine in (slice(2, 5), [4, 0], np.array([4, 0]), range(1, 6, 2)):
        part = batches(Source(), batch_rows=6, seed=2, mine=mine)
        places = mine if not isinstance(mine, slice) else range(2, 5)
        for batch in expected:
            assert next(part)["row"].tolist() == [batch[place] for place in places]


def test_a_process_reads_no_rows_of_others(tmp_path):
    part = batches(Watched(tmp_path / "read"), batch_rows=10, seed=1, mine=[3, 7])
    own = [batch["row"].tolist() for batch in take(part, 3)]
    part.close()
    read = {int(line) for line in (tmp_path / "read").read_text().split()}
    ahead = take(batches(Many(), batch_rows=10, seed=1), 30)
    assert own == [batch["row"][[3, 7]].tolist() for batch in ahead[:3]]
    assert len(read) <= 60 and read <= {row for batch in ahead for row in batch["row"][[3, 7]]}


def test_a_position_holds_for_any_number_of_processes_and_workers():
    """Saved by one process with threads, restored by two of which one has two workers, and back."""
    whole = batches(Source(), batch_rows=4, seed=1)
    take(whole, 3)
    position = json.loads(json.dumps(whole.get_state()))
    expected = [batch["row"].tolist() for batch in take(whole, 6)]
    parts = [
        batches(Source(), batch_rows=4, seed=1, mine=mine, workers=workers)
        for mine, workers in zip(positions(2, 4), (2, 0), strict=True)
    ]
    for part in parts:
        part.set_state(position)
    assert [joined([next(part) for part in parts], 4) for _ in range(4)] == expected[:4]
    states = [part.get_state() for part in parts]
    parts[0].close()
    assert states[0] == states[1]
    again = batches(Source(), batch_rows=4, seed=1)
    again.set_state(states[0])
    assert [batch["row"].tolist() for batch in take(again, 2)] == expected[4:]


def test_what_a_batch_gets_beside_goes_by_its_own_rows():
    labels = np.arange(NUM_ROWS, dtype=np.int32) * 10
    part = batches(
        Source(), batch_rows=4, seed=0, mine=[1, 3], add=add_by_example({"label": labels})
    )
    for batch in take(part, 5):
        assert batch["label"][:, 0].tolist() == (10 * batch["row"]).tolist()


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
