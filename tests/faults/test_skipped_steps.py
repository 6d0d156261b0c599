"""Steps whose gradient is no number: nothing is learnt from them, and ten in a row end the run."""

import dataclasses
import itertools

import numpy as np
import pytest
from linear_stage import (
    FROZEN,
    ROWS,
    TRAINING,
    a_batch,
    assert_same_trees,
    run_fit,
    start,
    stepper,
    values,
)

from mtllm_jax import distributed
from mtllm_jax.config import Training
from mtllm_jax.data.pipeline import batches
from mtllm_jax.metrics import read_metrics
from mtllm_jax.train import learning_rate, make_optimizer


def spoilt(kind):
    batch = a_batch()
    if kind == "nothing to count":
        batch["example"][:] = 0
    else:
        batch["x"][3, 1] = float(kind)
    return batch


@pytest.mark.parametrize("kind", ["nothing to count", "nan", "inf", "1e30"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_step_without_a_sound_gradient_changes_nothing(kind, accumulation):
    """Weights, moments and the schedule's count stay bit for bit; the step counts as skipped."""
    optimizer = make_optimizer(Training(steps=10, batch_rows=ROWS, learning_rate=0.1))
    step = stepper(optimizer, accumulation)
    state, _ = step(start(optimizer), FROZEN, a_batch())
    after, terms = step(state, FROZEN, spoilt(kind))
    assert terms["skipped"] == (1, 1)
    assert after.step == 2
    assert_same_trees(
        (after.trainable, after.opt_state, after.rng), (state.trainable, state.opt_state, state.rng)
    )
    final, terms = step(after, FROZEN, a_batch())
    assert terms["skipped"] == (0, 1)
    assert np.any(values(final.trainable)["kernel"] != values(state.trainable)["kernel"])


def spoiling(steps, first=1):
    """An `add` that makes the gradients of some steps not a number; step `first` is its first."""
    numbers = itertools.count(first)

    def add(batch):
        spoilt = next(numbers) in steps
        return {**batch, "x": batch["x"] * np.float32("nan")} if spoilt else batch

    return add


def test_ten_in_a_row_end_the_run_and_name_their_texts(tmp_path):
    bad = {2, 4, *range(6, 15), *range(16, 40)}  # nine in a row are not ten
    with pytest.raises(FloatingPointError, match=r"10 steps in a row .* not finite") as raised:
        run_fit(tmp_path, steps=60, batch_rows=4, checkpoint_every=100, add=spoiling(bad))
    frame = read_metrics(tmp_path / "metrics.jsonl")
    assert list(frame["step"]) == list(range(1, 26))
    skipped = list(frame["step"][frame["skipped"] == 1])
    assert skipped == sorted(bad)[: len(skipped)] and frame["loss"].isna().sum() == len(skipped)
    assert not (tmp_path / "params").exists()
    of_step_25 = list(itertools.islice(batches(range_rows(), batch_rows=4, seed=3), 25))[-1]
    texts = ", ".join(map(str, sorted(of_step_25["row"])))
    assert f"the last of them step 25, with the texts {texts} (counted from 0" in str(raised.value)


def range_rows():
    """The linear stage's rows, of which each holds the text of its own number."""
    return [{"row": np.int32(i)} for i in range(ROWS)]


def test_skipped_steps_are_counted_over_all_starts(tmp_path):
    settings = {"steps": 8, "checkpoint_every": 3}
    add, numbers = spoiling({2, 4}), itertools.count(1)

    def until_step_5(batch):
        if next(numbers) == 6:
            raise RuntimeError("the machine is gone")
        return add(batch)

    with pytest.raises(RuntimeError, match="the machine is gone"):
        run_fit(tmp_path, add=until_step_5, **settings)
    _, said = run_fit(tmp_path, add=spoiling({4, 7}, first=4), **settings)
    assert "going on from step 3 of 8" in said
    assert "warning: 3 of 8 steps were skipped, as their gradients were not finite" in said
    frame = read_metrics(tmp_path / "metrics.jsonl")
    assert list(frame["step"][frame["skipped"] == 1]) == [2, 4, 7]
    # What is logged is the rate that the optimizer takes, for which a skipped step is none.
    updates = frame.index - frame["skipped"].shift(fill_value=0).cumsum()
    schedule = learning_rate(dataclasses.replace(TRAINING, **settings))
    np.testing.assert_allclose(frame["lr"], schedule(updates.to_numpy()), rtol=1e-6)
    assert len(set(frame["lr"])) == 5  # as many as there were updates


def test_processes_with_other_rows_do_not_begin(tmp_path, monkeypatch):
    """As where one machine's copy of the data is an older one."""

    def of_another_process_0(function):
        said = function()
        return said | {"data": "other"} if isinstance(said, dict) else said

    monkeypatch.setattr(distributed, "by_first", of_another_process_0)
    with pytest.raises(ValueError, match="the rows of a stage are not those of process 0; texts, "):
        run_fit(tmp_path, steps=2)
    assert not (tmp_path / "metrics.jsonl").exists()
