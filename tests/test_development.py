"""Which weights a stage ends with, and when it stops early, against what brute force finds."""

import dataclasses
import itertools
import shutil

import jax
import numpy as np
import pytest
from linear_stage import (
    FROZEN,
    IN,
    OUT,
    ROWS,
    TRAINABLE,
    TRAINING,
    a_batch,
    assert_same_trees,
    run_fit,
    squared_error,
    start,
    values,
)

from mtllm_jax import sharding
from mtllm_jax.checkpoint import Checkpointer, load_params, tree_hash
from mtllm_jax.config import Mesh
from mtllm_jax.metrics import read_metrics
from mtllm_jax.train import make_optimizer

STEPS, EVERY = 12, 2
DEV_ROWS = 17  # more than a batch, and no multiple of it
# The peak is kept to the end: what is learnt runs past what is best on development data.
CONFIG = dataclasses.replace(
    TRAINING,
    steps=STEPS,
    learning_rate=0.1,
    warmup=0.0,
    final_rate=1.0,
    evaluate_every=EVERY,
    checkpoint_every=3,
)


def predicted(trained, x):
    found, fixed = values(trained), values(FROZEN)
    y = x.astype(np.float64) @ found["kernel"] + found["bias"]
    return y * fixed["frozen_scale"]


def dev_rows():
    """Rows whose targets lie on the way from what is predicted at the start: passed, then left."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(DEV_ROWS, IN)).astype(np.float32)
    far = rng.normal(size=(DEV_ROWS, OUT))
    goal = optimum()
    y = predicted(TRAINABLE, x)
    y += 0.3 * ((x @ goal[:-1] + goal[-1]) * values(FROZEN)["frozen_scale"] - y) + 0.05 * far
    y = y.astype(np.float32)
    return [{"x": x[i], "y": y[i], "example": np.array([i + 1], np.int32)} for i in range(DEV_ROWS)]


def optimum():
    """Kernel and bias of least squares on the training rows."""
    batch = a_batch()
    inputs = np.concatenate([batch["x"], np.ones((ROWS, 1))], axis=1)
    return np.linalg.lstsq(inputs, batch["y"] / values(FROZEN)["frozen_scale"], rcond=None)[0]


DEV = dev_rows()


def dev_loss(trained):
    x, y = (np.stack([row[name] for row in DEV]) for name in ("x", "y"))
    return float(np.mean(np.sum((predicted(trained, x) - y) ** 2, axis=1)))


@pytest.fixture(scope="module")
def each_step(tmp_path_factory):
    """The weights after each step of a stage that knows no development data."""
    folder = tmp_path_factory.mktemp("each")
    run_fit(folder, config=CONFIG, evaluate_every=0, checkpoint_every=1, keep_every=1)
    state = start(make_optimizer(CONFIG))
    found = {}
    for step in range(1, STEPS + 1):
        alone = folder / f"only-{step}"
        shutil.copytree(folder / "checkpoints" / str(step), alone / str(step))
        with Checkpointer(alone) as checkpointer:
            saved, _ = checkpointer.restore(state, AnyPlace(), frozen_hash=tree_hash(FROZEN))
        found[step] = saved.trainable
    return found


class AnyPlace:
    def set_state(self, state):
        pass


def test_what_is_evaluated_is_all_development_rows(tmp_path, each_step):
    trained, _ = run_fit(tmp_path, config=CONFIG, dev=DEV, evaluate_every=5)
    assert_same_trees(trained, each_step[STEPS])  # it is looked at, and changes nothing
    frame = read_metrics(tmp_path / "metrics.jsonl")
    found = frame[["step", "dev_loss"]].dropna()
    assert list(found["step"]) == [5, 10, STEPS]  # the last one, whatever its number
    wanted = [dev_loss(each_step[step]) for step in found["step"]]
    np.testing.assert_allclose(found["dev_loss"], wanted, rtol=1e-5)


def test_the_best_is_that_of_the_least_development_loss(tmp_path, each_step):
    best, _ = run_fit(tmp_path, config=CONFIG, dev=DEV, chosen="best")
    losses = {step: dev_loss(each_step[step]) for step in range(EVERY, STEPS + 1, EVERY)}
    step = min(losses, key=losses.get)
    assert EVERY < step < STEPS and losses[STEPS] > 1.5 * losses[step]  # it ran past it
    assert_same_trees(best, each_step[step])
    assert_same_trees(load_params(tmp_path / "params", TRAINABLE), each_step[step])


@pytest.mark.parametrize(
    ("averaged", "steps"), [(2, (10, 12)), pytest.param(5, (5, 10, 12), marks=pytest.mark.slow)]
)
def test_the_average_is_that_of_the_last_checkpoints(tmp_path, each_step, averaged, steps):
    """Those of 5, 10 and the end; more than there are is all of them."""
    found, _ = run_fit(
        tmp_path,
        config=CONFIG,
        chosen="average",
        evaluate_every=0,
        checkpoint_every=5,
        averaged=averaged,
    )
    each = [values(each_step[step]) for step in steps]
    for name, value in values(found).items():
        wanted = np.mean([one[name].astype(np.float64) for one in each], axis=0)
        np.testing.assert_allclose(value, wanted, rtol=1e-6, err_msg=name)  # float32


@pytest.mark.parametrize(
    "patience", [3, *(pytest.param(each, marks=pytest.mark.slow) for each in (1, 9))]
)
def test_it_stops_where_a_list_of_losses_says(tmp_path, each_step, patience):
    best, said = run_fit(
        tmp_path, config=CONFIG, dev=DEV, chosen="best", patience=patience, evaluate_every=1
    )
    losses = [dev_loss(each_step[step]) for step in range(1, STEPS + 1)]
    end = next(
        (
            step
            for step in range(1, STEPS + 1)
            if step - 1 - int(np.argmin(losses[:step])) >= patience
        ),
        STEPS,
    )
    assert (end < STEPS) == (patience < 9)
    assert read_metrics(tmp_path / "metrics.jsonl")["step"].iloc[-1] == end
    assert_same_trees(best, each_step[1 + int(np.argmin(losses[:end]))])
    told = f"stopped at step {end} of {STEPS}: none of {patience} evaluations in a row was the best"
    assert (told in said) == (end < STEPS)


def cut_off_at(place):
    """An `add` that ends the stage before its batch of this number, as a kill would."""
    batches = itertools.count()

    def add(batch):
        if next(batches) == place:
            raise RuntimeError("cut off")
        return batch

    return add


def test_a_stage_that_was_cut_off_ends_with_the_best_before(tmp_path, each_step):
    losses = [dev_loss(each_step[step]) for step in range(1, STEPS + 1)]
    best = 1 + int(np.argmin(losses))
    given = {"config": CONFIG, "dev": DEV, "evaluate_every": 1, "checkpoint_every": best + 1}
    given |= {"chosen": "best", "patience": 3}
    with pytest.raises(RuntimeError, match="cut off"):
        run_fit(tmp_path, add=cut_off_at(best + 2), **given)
    again, said = run_fit(tmp_path, add=cut_off_at(STEPS), **given)
    assert f"going on from step {best + 1} " in said
    frame = read_metrics(tmp_path / "metrics.jsonl")
    assert list(frame["step"]) == list(range(1, best + 3 + 1)) and best + 3 < STEPS
    np.testing.assert_allclose(frame["dev_loss"], losses[: best + 3], rtol=1e-5)  # float32
    assert_same_trees(again, each_step[best])


@pytest.mark.slow
def test_a_stage_that_was_cut_off_ends_with_the_same_average(tmp_path, each_step):
    given = {"config": CONFIG, "evaluate_every": 0, "chosen": "average", "averaged": 3}
    with pytest.raises(RuntimeError, match="cut off"):
        run_fit(tmp_path, add=cut_off_at(10), **given)
    again, said = run_fit(tmp_path, add=cut_off_at(STEPS), **given)
    assert "going on from step 9 " in said
    for name, value in values(again).items():
        wanted = np.mean([values(each_step[step])[name] for step in (6, 9, 12)], axis=0)
        np.testing.assert_allclose(value, wanted, rtol=1e-6, err_msg=name)  # float32


@pytest.mark.slow
def test_several_devices_see_the_same(tmp_path):
    best, _ = run_fit(tmp_path / "one", config=CONFIG, dev=DEV, chosen="best")
    mesh = sharding.make_mesh(Mesh(data=2, fsdp=2), jax.devices()[:4])
    many, _ = run_fit(tmp_path / "four", config=CONFIG, dev=DEV, chosen="best", mesh=mesh)
    for name, value in values(many).items():
        np.testing.assert_allclose(value, values(best)[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_the_more_accurate_is_better_and_of_equals_the_lesser_loss(tmp_path, each_step):
    """An accuracy of 0 leaves it to the loss; one that grows with the loss does not."""

    def objective(sign):
        def with_accuracy(trainable, frozen, batch, key):
            terms = squared_error(trainable, frozen, batch, key)
            total, count = terms["loss"]
            return terms | {"accuracy": (sign * total, count)}

        return with_accuracy

    losses = [dev_loss(each_step[step]) for step in range(1, STEPS + 1)]
    for sign, place in ((0.0, np.argmin(losses)), (1.0, np.argmax(losses))):
        found, _ = run_fit(
            tmp_path / str(sign),
            config=CONFIG,
            dev=DEV,
            objective=objective(sign),
            chosen="best",
            evaluate_every=1,
        )
        assert_same_trees(found, each_step[1 + int(place)])


def test_no_finite_evaluation_has_no_best_one(tmp_path):
    broken = [row | {"y": np.full(OUT, np.nan, np.float32)} for row in DEV]
    with pytest.raises(FloatingPointError, match="none of the evaluations on development data"):
        run_fit(tmp_path, config=CONFIG, dev=broken, chosen="best")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"chosen": "best", "evaluate_every": 0},
            "evaluate_every is 0; .* teacher.chosen is 'best'",
        ),
        ({"patience": 2, "evaluate_every": 0}, "evaluate_every is 0; .* teacher.patience is 2"),
        ({"averaged": 0}, "averaged is 0; it must be at least 1"),
        ({"evaluate_every": -1}, "evaluate_every is -1; it must be 0 .never. or above"),
    ],
)
def test_a_rule_that_cannot_be_followed_is_refused(changes, message):
    with pytest.raises(ValueError, match=rf"config\.teacher\.{message}"):
        dataclasses.replace(CONFIG, **changes).check("teacher", ())
