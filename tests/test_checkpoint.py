"""Checkpoints: what goes in comes out bit for bit. What damages them is in faults/."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from saved import (
    assert_same,
    flip_a_byte,
    largest_file,
    make_iterator,
    make_state,
    restore,
    run_python,
    save_steps,
)

from mtllm_jax.checkpoint import Checkpointer, load_params, save_params, tree_hash


def test_round_trip_is_bitwise(tmp_path):
    state, iterator = make_state(7), make_iterator(threads=2)  # which read ahead
    for _ in range(5):
        next(iterator)
    with Checkpointer(tmp_path / "new" / "folder") as checkpointer:
        assert checkpointer.latest_step() is None
        checkpointer.save(7, state, iterator, frozen_hash="f" * 64)
        following = [next(iterator) for _ in range(9)]  # the save is of before these
    abstract = jax.eval_shape(lambda: make_state(0))
    again = make_iterator(threads=2)
    with Checkpointer(tmp_path / "new" / "folder") as checkpointer:
        assert checkpointer.latest_step() == 7
        restored, step = checkpointer.restore(abstract, again, frozen_hash="f" * 64)
    assert step == 7
    assert_same(restored, state)
    assert isinstance(restored.trainable, nnx.State)
    assert restored.trainable["bridge"]["kernel"].get_metadata("dims") == ("a", "b")
    np.testing.assert_array_equal([next(again) for _ in range(9)], following)


def test_a_relative_folder_will_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_steps(Path("checkpoints"), 3)
    (found, step), said = restore(Path("checkpoints"))
    assert (step, said) == (3, [])
    assert_same(found, make_state(3))
    save_params("params", make_state(3).trainable)
    assert_same(load_params("params", make_state(0).trainable), make_state(3).trainable)


def test_any_json_position_comes_back_as_it_was(tmp_path):
    class Position:
        state: Any = None

        def get_state(self):
            return self.state

        def set_state(self, state):
            self.state = state

    position, again = Position(), Position()
    position.state = {"next": 5, "parents": [{"at": None, "done": False}, {}], "rate": 0.1}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1), position)
        checkpointer.restore(make_state(0), again)
    # As text: 5 == np.int64(5), and False == 0.
    assert repr(again.state) == repr(position.state)
    (file,) = (tmp_path / "1" / "iterator").iterdir()
    assert json.loads(file.read_text()) == position.state


def test_no_checkpoint_at_all_is_none(tmp_path):
    assert restore(tmp_path / "absent") == (None, [])
    (tmp_path / "empty").mkdir()
    assert restore(tmp_path / "empty") == (None, [])
    assert not (tmp_path / "absent").exists()


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    """The step after a save writes into the very buffers that are still being saved."""

    def updates(x):
        return jax.lax.fori_loop(0, 3, lambda _, x: x * 1.5 + 1, x)

    donating = jax.jit(updates, donate_argnums=0)
    folder, start = tmp_path / "run", np.random.default_rng(0).normal(size=(512, 1024))
    state = {"w": jnp.asarray(start, jnp.float32)}
    with Checkpointer(folder, keep_last=9) as checkpointer:
        for step in range(1, 5):
            state = {"w": donating(state["w"])}
            checkpointer.save(step, state, make_iterator())
        jax.block_until_ready(donating(state["w"]))
    state = {"w": jnp.asarray(start, jnp.float32)}
    plain = jax.jit(updates)
    for step in range(1, 5):
        state = {"w": plain(state["w"])}
        load = tmp_path / str(step)
        load.mkdir()
        shutil.copytree(folder / str(step), load / str(step))
        restored, _ = Checkpointer(load).restore(state, make_iterator())
        assert_same(restored, state)
    # What was restored may be donated in turn.
    expected = plain(state["w"])
    assert_same(donating(restored["w"]), expected)


def test_the_oldest_are_deleted(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "4.orbax-checkpoint-tmp").mkdir()
    save_steps(tmp_path, 5, 6, 7, 100, keep_last=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["100", "6", "7", "newest", "notes"]
    with pytest.raises(ValueError, match="keep_last is 0"):
        Checkpointer(tmp_path, keep_last=0)


def test_each_so_many_steps_one_is_kept_for_good(tmp_path):
    """By whichever start it was written."""
    kept = {"keep_last": 2, "keep_every": 20}
    save_steps(tmp_path, 10, 20, 30, **kept)
    iterator = make_iterator()
    with Checkpointer(tmp_path, **kept) as checkpointer:
        checkpointer.restore(make_state(0), iterator)
        for step in (37, 40, 50):
            checkpointer.save(step, make_state(step), iterator)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["20", "40", "50", "newest"]
    for step in ("40", "50"):
        shutil.rmtree(tmp_path / step)
    assert_same(restore(tmp_path)[0][0], make_state(20))
    with pytest.raises(ValueError, match="keep_every is -1"):
        Checkpointer(tmp_path, keep_every=-1)


def test_saving_without_restoring_is_refused(tmp_path):
    save_steps(tmp_path, 10)
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(ValueError, match="holds a checkpoint of step 10"):
            checkpointer.save(20, make_state(20), make_iterator())
        checkpointer.restore(make_state(0), make_iterator())
        checkpointer.save(10, make_state(11), make_iterator())  # just restored: already there
        with pytest.raises(ValueError, match="holds a checkpoint of step 10"):
            checkpointer.save(5, make_state(5), make_iterator())
    (state, _), _ = restore(tmp_path)
    assert_same(state, make_state(10))


def test_another_state_is_refused_by_the_name_of_the_leaf(tmp_path):
    save_steps(tmp_path, 1)
    with Checkpointer(tmp_path) as checkpointer:
        wider = make_state(0, width=9)
        with pytest.raises(ValueError, match=r"kernel.* is float32\[8,16\] there.*\[9,16\] here"):
            checkpointer.restore(wider, make_iterator())
        half = jax.eval_shape(lambda: make_state(0))
        half = half._replace(step=jax.ShapeDtypeStruct((), jnp.int16))
        with pytest.raises(ValueError, match=r"step is int32\[\] there and int16\[\] here"):
            checkpointer.restore(half, make_iterator())
        with pytest.raises(ValueError, match=r"rng is .* there and absent here"):
            checkpointer.restore(make_state(0)._replace(rng=None), make_iterator())


def test_params_alone(tmp_path):
    params = make_state(3).trainable
    folder = tmp_path / "params"
    with pytest.raises(ValueError, match="cannot be read: that folder was never finished"):
        load_params(folder, params)
    for seed in (1, 3):  # the second replaces the first
        save_params(folder, make_state(seed).trainable)
    assert_same(load_params(folder, jax.eval_shape(lambda: params)), params)
    with pytest.raises(ValueError, match="absent here"):
        load_params(folder, {"bridge": params["bridge"]})
    flip_a_byte(largest_file(folder))
    with pytest.raises(ValueError, match="damaged"):
        load_params(folder, params)


def test_tree_hash():
    kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
    one_bit = kernel.copy()
    one_bit.view(np.uint32)[1, 2] ^= 1
    bias = np.zeros(3, np.float32)
    tree = {"kernel": kernel, "bias": bias}
    same = [
        {"bias": bias, "kernel": kernel},
        {"bias": jnp.asarray(bias), "kernel": jnp.asarray(kernel)},
        {"bias": bias, "kernel": np.asfortranarray(kernel)},
    ]
    others = [
        {"bias": bias, "kernel": one_bit},
        {"bias": bias, "kernel": kernel.reshape(3, 2)},
        {"bias": bias, "kernel": kernel.view(np.int32)},
        {"b": bias, "kernel": kernel},
        {"bias": -bias, "kernel": kernel},
        {"kernel": kernel},
    ]
    assert {tree_hash(t) for t in same} == {tree_hash(tree)}
    assert len({tree_hash(t) for t in [tree, *others]}) == len(others) + 1
    assert tree_hash(make_state(1)) == tree_hash(make_state(1)) != tree_hash(make_state(2))


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs the eight simulated devices of conftest")
def test_one_device_onto_eight_and_back(tmp_path):
    save_steps(tmp_path / "one", 4)
    axes = {"axis_types": (jax.sharding.AxisType.Auto,)}
    mesh = jax.make_mesh((8,), ("data",), **axes)

    def spread(leaf):
        spec = jax.P("data") if leaf.ndim else jax.P()
        sharding = jax.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    abstract = jax.tree.map(spread, jax.eval_shape(lambda: make_state(0)))
    iterator = make_iterator()
    with Checkpointer(tmp_path / "one") as checkpointer:
        eight, step = checkpointer.restore(abstract, iterator)
    assert step == 4
    assert_same(eight, make_state(4))
    wanted = [leaf.sharding for leaf in jax.tree.leaves(abstract)]
    assert [leaf.sharding for leaf in jax.tree.leaves(eight)] == wanted
    kernel = eight.trainable["bridge"]["kernel"].get_value()
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(1, 16)}
    assert tree_hash(eight) == tree_hash(make_state(4))
    with Checkpointer(tmp_path / "eight") as checkpointer:
        checkpointer.save(4, eight, iterator)
    (one, _), _ = restore(tmp_path / "eight")
    assert_same(one, make_state(4))


@pytest.mark.slow
def test_another_process_with_fewer_devices_and_nothing_printed(tmp_path):
    save_steps(tmp_path, 1, 2, 3)
    code = f"""
    from absl import logging
    logging.set_verbosity(logging.INFO)
    import saved
    iterator = saved.make_iterator()
    with saved.Checkpointer({str(tmp_path)!r}) as checkpointer:
        state, step = checkpointer.restore(saved.make_state(0), iterator)
        saved.assert_same(state, saved.make_state(3))
        checkpointer.save(4, saved.make_state(4), iterator)
    """
    process = run_python(code, devices=2)
    said, _ = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "")
    (state, _), said = restore(tmp_path)
    assert said == []
    assert_same(state, make_state(4))
