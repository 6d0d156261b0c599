"""Checkpoints: what goes in comes out bit for bit, and nothing damaged comes out at all."""

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import Array

from mtllm_jax.checkpoint import Checkpointer, load_params, save_params, tree_hash


class State(NamedTuple):
    step: Array
    trainable: Any
    opt_state: Any
    rng: Array


HERE = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
OPTIMIZER = optax.adamw(0.1)


def make_state(seed: int, width: int = 8) -> State:
    key = jax.random.key(seed)
    trainable = nnx.State(
        {
            "bridge": {"kernel": nnx.Param(jax.random.normal(key, (width, 16)), dims=("a", "b"))},
            "norm": nnx.Param(jax.random.normal(key, (width,), jnp.bfloat16)),
        }
    )
    opt_state = jax.tree.map(lambda x: x + 1, OPTIMIZER.init(trainable))
    return State(jnp.int32(seed), trainable, opt_state, jax.random.fold_in(key, 1))


def make_iterator(threads: int = 0) -> grain.DatasetIterator:
    rows = grain.MapDataset.range(50).shuffle(seed=3).repeat().batch(8)
    return iter(rows.to_iter_dataset(grain.ReadOptions(num_threads=threads)))


def leaves(tree: Any) -> list[np.ndarray]:
    def raw(leaf):
        typed_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if typed_key else leaf)

    return [raw(leaf) for leaf in jax.tree.leaves(tree)]


def assert_same(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(leaves(one), leaves(other), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.tobytes() == b.tobytes()


def save_steps(folder: Path, *steps: int, keep_last: int = 2) -> None:
    """Checkpoints of states that are told apart by their seed = step; one batch per step."""
    iterator = make_iterator()
    with Checkpointer(folder, keep_last=keep_last) as checkpointer:
        for step in steps:
            next(iterator)
            checkpointer.save(step, make_state(step), iterator)


def restore(folder: Path, **kwargs: Any) -> tuple[tuple[State, int] | None, list[str]]:
    said: list[str] = []
    with Checkpointer(folder, warn=said.append) as checkpointer:
        return checkpointer.restore(make_state(0), make_iterator(), **kwargs), said


def largest_file(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_a_byte(path: Path, at: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


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


def test_the_oldest_are_deleted(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "4.orbax-checkpoint-tmp").mkdir()
    save_steps(tmp_path, 5, 6, 7, 100, keep_last=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["100", "6", "7", "newest", "notes"]
    with pytest.raises(ValueError, match="keep_last is 0"):
        Checkpointer(tmp_path, keep_last=0)


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


def test_other_frozen_weights_are_refused(tmp_path):
    one, other = tree_hash({"w": jnp.zeros(3)}), tree_hash({"w": jnp.ones(3)})
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1), make_iterator(), frozen_hash=one)
    assert restore(tmp_path, frozen_hash=one)[0][1] == 1
    with pytest.raises(ValueError, match=f"{one[:12]}.*{other[:12]}"):
        restore(tmp_path, frozen_hash=other)
    with pytest.raises(ValueError, match=f"{one[:12]}.*none"):
        restore(tmp_path)


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


def run_python(code: str, *paths: str, devices: int = 1) -> subprocess.Popen:
    """Python with a number of simulated devices of its own."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    source = f"import sys\nsys.path[:0] = {paths!r}\n" + textwrap.dedent(code)
    return subprocess.Popen(
        [sys.executable, "-c", source],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_another_process_with_fewer_devices_and_nothing_printed(tmp_path):
    save_steps(tmp_path, 1, 2, 3)
    code = f"""
    from absl import logging
    logging.set_verbosity(logging.INFO)
    import test_checkpoint as t
    folder = t.Path({str(tmp_path)!r})
    iterator = t.make_iterator()
    with t.Checkpointer(folder) as checkpointer:
        state, step = checkpointer.restore(t.make_state(0), iterator)
        t.assert_same(state, t.make_state(3))
        checkpointer.save(4, t.make_state(4), iterator)
    """
    process = run_python(code, *HERE, devices=2)
    said, _ = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "")
    (state, _), said = restore(tmp_path)
    assert said == []
    assert_same(state, make_state(4))


def test_killed_while_saving(tmp_path):
    """kill -9 at any moment of a save: what is restored is whole, and no older than announced."""
    code = f"""
    import grain, jax
    from mtllm_jax.checkpoint import Checkpointer
    state = {{"w": jax.numpy.arange(400_000.0), "n": jax.numpy.int32(0)}}
    iterator = iter(grain.MapDataset.range(50).repeat().batch(8).to_iter_dataset())
    checkpointer = Checkpointer({str(tmp_path)!r}, warn=lambda _: None)
    restored = checkpointer.restore(state, iterator)
    step = 0
    if restored:
        state, step = restored
    print(step, flush=True)
    while True:
        next(iterator)
        state = jax.tree.map(lambda x: x + 1, state)
        step += 1
        checkpointer.save(step, state, iterator)
        checkpointer.wait()
        print(step, flush=True)
    """
    announced = 0
    for delay in (0.004, 0.015, 0.03):
        process = run_python(code, *HERE)
        assert process.stdout is not None
        first = int(process.stdout.readline())
        assert first >= announced
        for line in itertools.islice(process.stdout, 3):
            announced = int(line)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        rest, _ = process.communicate(timeout=30)
        announced = max([announced, *map(int, rest.split())])
        iterator = make_iterator()
        like = {"w": jnp.zeros(400_000), "n": jnp.int32(0)}
        with Checkpointer(tmp_path, warn=lambda _: None) as checkpointer:
            state, step = checkpointer.restore(like, iterator)
        assert step in (announced, announced + 1)
        assert int(state["n"]) == step
        np.testing.assert_array_equal(state["w"], np.arange(400_000.0) + step)
        assert iterator.get_state() == {"next_index": step}


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small disk is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_the_one_before(small_disk, capfd):
    def state(seed, count):
        return {"w": jax.random.normal(jax.random.key(seed), (count,))}

    big, small = 2_000_000, 500_000
    with Checkpointer(small_disk) as checkpointer:
        checkpointer.save(1, state(1, small), make_iterator())
        checkpointer.save(2, state(2, big), make_iterator())
        with pytest.raises(OSError, match=r"step 2 could not .*No space left") as raised:
            checkpointer.wait()
        assert raised.value.errno == errno.ENOSPC
        assert "that of step 1 is kept" in str(raised.value)
        assert sorted(p.name for p in small_disk.iterdir()) == ["1", "newest"]
        checkpointer.save(2, state(2, small), make_iterator())
    restored, step = Checkpointer(small_disk).restore(state(0, small), make_iterator())
    assert step == 2
    assert_same(restored, state(2, small))
    assert capfd.readouterr() == ("", "")
