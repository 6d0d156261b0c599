"""Damaged, cut short or lost checkpoints: the one before is taken, and if none is left, none."""

import json
import shutil
from pathlib import Path

import pytest
from linear_stage import assert_same_trees, run_fit
from saved import (
    assert_same,
    flip_a_byte,
    largest_file,
    make_iterator,
    make_state,
    restore,
    save_steps,
    truncate,
)

from mtllm_jax.checkpoint import Checkpointer

# ---------------------------------------------------------------- a stage that is trained

STEPS = {"steps": 8, "batch_rows": 4, "checkpoint_every": 2}


def fail_at(batch_number):
    """An `add` that ends a run where it asks for that batch."""
    given = 0

    def add(batch):
        nonlocal given
        given += 1
        if given == batch_number:
            raise RuntimeError("the machine is gone")
        return batch

    return add


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return run_fit(tmp_path_factory.mktemp("linear") / "stage", **STEPS)[0]


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory):
    """The folder of a run that ended after step 7, with checkpoints of 4 and 6. Copy it."""
    folder = tmp_path_factory.mktemp("linear") / "stage"
    with pytest.raises(RuntimeError, match="the machine is gone"):
        run_fit(folder, add=fail_at(8), **STEPS)
    steps = {path.name for path in (folder / "checkpoints").iterdir()}
    assert steps == {"4", "6", "newest"}
    return folder


def halve(checkpoint):
    """As a kill leaves it: some files, in a folder with orbax's name for what it writes."""
    (checkpoint / "checksums.json").unlink()
    largest_file(checkpoint).unlink()
    checkpoint.rename(checkpoint.with_name(f"{checkpoint.name}.orbax-checkpoint-tmp"))


DAMAGES = {
    "one byte flipped": lambda checkpoint: flip_a_byte(largest_file(checkpoint)),
    "truncated": lambda checkpoint: truncate(largest_file(checkpoint)),
    "half written": halve,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_goes_on_from_the_checkpoint_before(damage, broken_off, uninterrupted, tmp_path):
    """It says so, and ends as if nothing had been."""
    folder = tmp_path / "stage"
    shutil.copytree(broken_off, folder)
    DAMAGES[damage](folder / "checkpoints" / "6")
    trained, said = run_fit(folder, **STEPS)
    problem = "was never finished" if damage == "half written" else "is damaged (state/"
    assert f"warning: the checkpoint of step 6 {problem}" in said
    assert ": going on from step 4.\n" in said and "going on from step 4 of 8\n" in said
    assert_same_trees(trained, uninterrupted)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_never_begins_anew_where_none_is_left(damage, broken_off, tmp_path):
    folder = tmp_path / "stage"
    shutil.copytree(broken_off, folder)
    for step in ("4", "6"):
        DAMAGES[damage](folder / "checkpoints" / step)
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read: .*step 6 .*step 4 "):
        run_fit(folder, **STEPS)
    assert (folder / "metrics.jsonl").read_bytes() == before
    for path in (folder / "checkpoints").iterdir():
        if path.name != "newest":
            shutil.rmtree(path)
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read: all are gone"):
        run_fit(folder, **STEPS)


# ---------------------------------------------------------------- checkpoints by themselves


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, Path.unlink])
def test_a_damaged_newest_falls_back_and_says_so(tmp_path, damage):
    save_steps(tmp_path, 10, 20)
    damage(largest_file(tmp_path / "20"))
    (state, step), said = restore(tmp_path)
    assert step == 10
    assert_same(state, make_state(10))
    assert len(said) == 1
    assert "step 20 is damaged (state/" in said[0]
    assert said[0].endswith("going on from step 10.")


def test_the_checksums_themselves_are_checked(tmp_path):
    save_steps(tmp_path, 10, 20)
    text = (tmp_path / "20" / "checksums.json").read_text()
    flip_a_byte(tmp_path / "20" / "checksums.json", text.index('"step": 20') + 8)
    (_, step), said = restore(tmp_path)
    assert step == 10
    assert "checksums.json" in said[0]


def test_every_file_is_checked(tmp_path):
    save_steps(tmp_path / "whole", 1)
    files = sorted(p for p in (tmp_path / "whole" / "1").rglob("*") if p.is_file())
    listed = json.loads((tmp_path / "whole" / "1" / "checksums.json").read_text())["checkpoint"]
    assert len(files) == len(listed["files"]) + 1
    for number, path in enumerate(files):
        if path.stat().st_size == 0:
            continue
        copy = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", copy)
        flip_a_byte(copy / path.relative_to(tmp_path / "whole"))
        with pytest.raises(ValueError, match=r"no checkpoint in .* can be read: .* damaged"):
            restore(copy)


def test_without_checksums_a_checkpoint_was_never_finished(tmp_path):
    save_steps(tmp_path, 10, 20)
    (tmp_path / "20" / "checksums.json").unlink()
    (_, step), said = restore(tmp_path)
    assert step == 10
    assert "step 20 was never finished" in said[0]
    (tmp_path / "10" / "checksums.json").unlink()
    with pytest.raises(ValueError, match=r"20 was never .*10 was never .* delete this"):
        restore(tmp_path)
    for step in ("10", "20"):
        shutil.rmtree(tmp_path / step)
    with pytest.raises(ValueError, match="all are gone"):
        restore(tmp_path)


def test_a_first_save_cut_short_starts_from_the_beginning(tmp_path):
    (tmp_path / "10.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    restored, said = restore(tmp_path)
    assert restored is None
    assert said == ["the checkpoint of step 10 was never finished: starting from the beginning."]


def test_a_run_that_fell_back_saves_over_the_damaged_one(tmp_path):
    save_steps(tmp_path, 10, 20, 30)
    flip_a_byte(largest_file(tmp_path / "30"))
    iterator, said = make_iterator(), []
    with Checkpointer(tmp_path, warn=said.append) as checkpointer:
        _, step = checkpointer.restore(make_state(0), iterator)
        assert step == 20
        assert checkpointer.latest_step() == 20
        checkpointer.save(25, make_state(25), iterator)
        checkpointer.wait()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["20", "25", "newest"]
        checkpointer.save(30, make_state(30), iterator)
    (state, step), said = restore(tmp_path)
    assert (step, said) == (30, [])
    assert_same(state, make_state(30))
