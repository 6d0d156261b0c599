"""The step and the loop: closed forms on a linear model, and what a real stage leaves alone."""

import dataclasses
import functools
import json

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from linear_stage import (
    FROZEN,
    ROWS,
    TRAINABLE,
    TRAINING,
    a_batch,
    assert_same_trees,
    run_fit,
    start,
    stepper,
    values,
)

from mtllm_jax.config import Training
from mtllm_jax.metrics import read_metrics
from mtllm_jax.train import make_optimizer, train_step

# ---------------------------------------------------------------- the step


def mean_gradient(batch):
    """∂ mean error over the valid rows, by hand."""
    kernel, bias = (values(TRAINABLE)[name] for name in ("kernel", "bias"))
    scale = values(FROZEN)["frozen_scale"]
    valid = batch["example"][:, 0] > 0
    x, y = batch["x"][valid], batch["y"][valid]
    error = 2 * ((x @ kernel + bias) * scale - y) * scale
    return {"kernel": x.T @ error / len(x), "bias": error.sum(0) / len(x)}


@pytest.mark.parametrize("accumulation", [1, 2, 3, 12])
def test_one_step_is_that_of_the_mean_over_the_whole_batch(accumulation):
    """However many rows of each micro-batch count, and if none does."""
    batch = a_batch(valid=[1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0])
    optimizer = optax.sgd(1.0)
    state, terms = stepper(optimizer, accumulation)(start(optimizer), FROZEN, batch)
    wanted = mean_gradient(batch)
    before, after = values(TRAINABLE), values(state.trainable)
    for name, gradient in wanted.items():
        np.testing.assert_allclose(before[name] - after[name], gradient, atol=2e-5)
    norm = np.sqrt(sum(np.sum(g**2) for g in wanted.values()))
    np.testing.assert_allclose(terms["grad_norm"], (norm, 1), rtol=1e-5)
    assert terms["loss"][1] == 4 and terms["skipped"] == (0, 1)
    assert state.step == 1


def test_every_step_and_micro_batch_draws_its_own_noise():
    optimizer = optax.sgd(0.1)
    state, drawn = start(optimizer), []
    for _ in range(3):
        state, terms = stepper(optimizer)(state, FROZEN, a_batch())
        drawn.append(float(terms["noise"][0]))
    _, again = stepper(optimizer)(dataclasses.replace(state, step=jnp.int32(1)), FROZEN, a_batch())
    assert len(set(drawn)) == 3 and again["noise"][0] == drawn[1]
    _, terms = stepper(optimizer, 2)(start(optimizer), FROZEN, a_batch())
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), 0), 2)
    np.testing.assert_allclose(
        terms["noise"][0], sum(float(jax.random.normal(key)) for key in keys), rtol=1e-6
    )


# ---------------------------------------------------------------- the optimizer


def rate(i, config):
    """The learning rate of update `i`, from 0, as the README of the schedule would put it."""
    warmup = round(config.warmup * config.steps)
    if i < warmup:
        return config.learning_rate * (i + 1) / (warmup + 1)
    done = (i - warmup) / max(1, config.steps - warmup)
    shape = 1 - done if config.schedule == "linear" else (1 + np.cos(np.pi * done)) / 2
    return config.learning_rate * (config.final_rate + (1 - config.final_rate) * shape)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(
    ("warmup", "final_rate"), [(0.0, 0.1), (0.3, 0.05), (0.01, 0.0), (1.0, 0.5)]
)
def test_schedule(schedule, warmup, final_rate):
    """Adam on a constant gradient moves by the learning rate, so the moves tell the schedule."""
    config = Training(
        steps=20,
        batch_rows=1,
        learning_rate=0.3,
        schedule=schedule,
        warmup=warmup,
        final_rate=final_rate,
        weight_decay=0.0,
        clip_norm=0.0,
    )
    optimizer = make_optimizer(config)
    ones = jax.tree.map(jnp.ones_like, TRAINABLE)
    opt_state = optimizer.init(TRAINABLE)
    update = jax.jit(optimizer.update)
    moves = []
    for _ in range(config.steps):
        updates, opt_state = update(ones, opt_state, TRAINABLE)
        moves.append(-float(updates["bias"][...][0]))
    np.testing.assert_allclose(moves, [rate(i, config) for i in range(20)], rtol=1e-4)
    assert min(moves) > 0, "no update is wasted"


def test_weight_decay_spares_norms_and_biases_of_stacked_layers_too():
    """With no gradient at all, what changes is what decays, by rate × decay × weight."""
    config = Training(
        steps=10, batch_rows=1, learning_rate=0.2, weight_decay=0.3, warmup=0.0, clip_norm=1.0
    )
    optimizer = make_optimizer(config)
    update = jax.jit(optimizer.update, compiler_options=tiny.QUICK)
    for case in ("adaptation", "translation"):
        trainable = tiny.stage(case).trainable
        zeros = jax.tree.map(lambda x: jnp.asarray(np.zeros(x.shape, x.dtype)), trainable)
        updates, _ = update(zeros, jax.jit(optimizer.init)(trainable), trainable)
        for name, change in values(updates).items():
            is_vector = name.rpartition("/")[2] in ("bias", "scale")
            wanted = 0.0 if is_vector else -0.2 * 0.3 * values(trainable)[name]
            np.testing.assert_allclose(change, wanted, rtol=1e-5, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 1e6])
def test_clipping(clip_norm):
    """Adam's first moment is a tenth of the gradient it was shown."""
    config = Training(steps=10, batch_rows=1, learning_rate=0.1, clip_norm=clip_norm)
    optimizer = make_optimizer(config)
    gradient = jax.tree.map(lambda x: 3 * x, TRAINABLE)
    _, opt_state = optimizer.update(gradient, optimizer.init(TRAINABLE), TRAINABLE)
    (adam,) = (
        part
        for part in jax.tree.leaves(opt_state, is_leaf=lambda x: hasattr(x, "mu"))
        if hasattr(part, "mu")
    )
    norm = float(optax.tree.norm(gradient))
    assert 0.5 < norm < 1e6
    wanted = clip_norm if clip_norm == 0.5 else norm
    np.testing.assert_allclose(optax.tree.norm(adam.mu), 0.1 * wanted, rtol=1e-5)


# ---------------------------------------------------------------- what a stage holds


@pytest.mark.parametrize("case", tiny.CASES)
def test_no_array_of_any_size_is_a_constant_of_the_program(case):
    """The weights, frozen ones above all, come in as arguments and not by a closure."""
    stage = tiny.stage(case)
    optimizer = make_optimizer(tiny.TRAINING)
    step = functools.partial(train_step, objective=stage.objective, optimizer=optimizer)
    state = start(optimizer, stage.trainable)
    program = jax.make_jaxpr(step)(state, stage.frozen, stage.batch())
    assert max([np.size(x) for x in constants(program)], default=0) <= 2 * tiny.VOCAB


def constants(program):
    """All arrays that stand in a closed jaxpr or in the ones within it."""
    yield from program.consts
    for equation in program.jaxpr.eqns:
        yield from (x.val for x in equation.invars if isinstance(x, jax.extend.core.Literal))
        for inner in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: isinstance(x, jax.extend.core.ClosedJaxpr),
        ):
            if isinstance(inner, jax.extend.core.ClosedJaxpr):
                yield from constants(inner)


@pytest.mark.slow
def test_processes_that_read_rows_change_nothing(tmp_path):
    (by_threads, _), (by_one, _) = (run_fit(tmp_path / str(n), workers=n) for n in (0, 1))
    assert_same_trees(by_threads, by_one)


def leaves_of(folder):
    """Names of the arrays in a checkpoint."""
    return set(json.loads((folder / "checksums.json").read_text())["checkpoint"]["leaves"])


@pytest.mark.slow
def test_frozen_weights_are_nowhere_but_in_the_argument(tmp_path):
    """Not in the gradient, not in the optimizer, not on disk, and bitwise what they were."""
    stage = tiny.stage("adaptation-lora")
    frozen, trainable = (
        jax.tree.map(lambda x: np.array(x), tree) for tree in (stage.frozen, stage.trainable)
    )
    gradient, _ = stage(stage.batch())
    names = set(values(stage.trainable))
    frozen_names = set(values(stage.frozen["stack"]))
    assert names and frozen_names and not names & frozen_names
    assert set(values(gradient)) == names

    trained, _ = run_fit(
        tmp_path,
        objective=stage.objective,
        trainable=stage.trainable,
        frozen=stage.frozen,
        rows=stage.rows,
        config=dataclasses.replace(tiny.TRAINING, steps=3),
    )
    assert_same_trees(stage.frozen, frozen)
    assert_same_trees(stage.trainable, trainable)
    assert all(np.any(values(trained)[name] != values(trainable)[name]) for name in names)

    # Each trained array thrice, as weight and as Adam's two moments, and what counts the steps.
    stored = leaves_of(tmp_path / "checkpoints" / "3")
    assert {name for name in stored if name.startswith("trainable/")} == {
        f"trainable/{name}/value" for name in names
    }
    for moment in ("/mu/", "/nu/"):
        of_moment = {name.split(moment)[1] for name in stored if moment in name}
        assert of_moment == {f"{name}/value" for name in names}
    others = {name for name in stored if not name.endswith("/value")}
    assert len(others) == len(stored) - 3 * len(names)
    assert {name for name in others if not name.endswith("/count")} == {"step", "rng"}
    assert leaves_of(tmp_path / "params") == {f"{name}/value" for name in names}


# ---------------------------------------------------------------- the loop


def test_a_finished_stage_is_read_back_and_its_data_left_alone(tmp_path):
    trained, _ = run_fit(tmp_path)
    before = files(tmp_path)
    again, said = run_fit(tmp_path, steps=500)  # would take other steps, if it took any
    assert_same_trees(again, trained)
    assert said == ""
    assert before == files(tmp_path)


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_weights_that_were_not_finished_are_written_again(tmp_path):
    """A kill between the last checkpoint and the end of the weights costs nothing."""
    trained, _ = run_fit(tmp_path)
    (tmp_path / "params" / "checksums.json").unlink()
    again, said = run_fit(tmp_path)
    assert_same_trees(again, trained)
    assert "going on from step 6 of 6" in said
    assert_same_trees(run_fit(tmp_path)[0], trained)


def test_metrics_are_those_of_each_step(tmp_path):
    run_fit(tmp_path)
    frame = read_metrics(tmp_path / "metrics.jsonl")
    assert list(frame["step"]) == [1, 2, 3, 4, 5, 6]
    optimizer = make_optimizer(TRAINING)
    state = start(optimizer)  # all rows are in every batch, so their order is nothing
    for loss in frame["loss"]:
        state, terms = stepper(optimizer)(state, FROZEN, a_batch())
        np.testing.assert_allclose(loss, terms["loss"][0] / ROWS, rtol=1e-5)
    assert np.all(frame["skipped"] == 0)


def test_the_config_says_which_checkpoints_are_kept(tmp_path):
    run_fit(tmp_path, checkpoint_every=1, keep_last=1, keep_every=2)
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {"2", "4", "6", "newest"}


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("keep_last", 0, "at least 1"),
        ("keep_every", -4, "0 .none. or a multiple of checkpoint_every, 4"),
        ("keep_every", 6, "0 .none. or a multiple of checkpoint_every, 4"),
    ],
)
def test_what_cannot_be_kept_is_refused(field, value, allowed):
    config = dataclasses.replace(TRAINING, **{field: value})
    with pytest.raises(
        ValueError, match=rf"config.teacher.{field} is {value}; it must be {allowed}"
    ):
        config.check("teacher", ())


def test_after_a_checkpoint_the_metrics_say_what_time_goes_into(tmp_path):
    run_fit(tmp_path, steps=6, checkpoint_every=2)
    frame = read_metrics(tmp_path / "metrics.jsonl")
    for name in ("goodput", "seconds_p50", "seconds_p90", "seconds_p99"):
        # Step 1 compiles and has no time, so that step 2 was the first whose time is known.
        assert list(frame["step"][frame[name].notna()]) == [3, 5], name
    assert frame["goodput"].dropna().between(0, 1).all()
    middle = frame["seconds"][frame["step"] <= 4].median()
    np.testing.assert_allclose(frame["seconds_p50"][frame["step"] == 5], middle, atol=1e-5)
