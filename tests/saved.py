"""Checkpoints for tests: states told apart by their seed, and ways to damage what was written."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from mtllm_jax.checkpoint import Checkpointer


class State(NamedTuple):
    step: Array
    trainable: Any
    opt_state: Any
    rng: Array


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
    """Bit for bit."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(leaves(one), leaves(other), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.tobytes() == b.tobytes()


def save_steps(folder: Path, *steps: int, **kept: int) -> None:
    """Checkpoints of states that are told apart by their seed = step; one batch per step."""
    iterator = make_iterator()
    with Checkpointer(folder, **kept) as checkpointer:
        for step in steps:
            next(iterator)
            checkpointer.save(step, make_state(step), iterator)


def restore(folder: Path, **kwargs: Any) -> tuple[tuple[State, int] | None, list[str]]:
    """What `Checkpointer.restore` gives, and what it warned of."""
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


def run_python(code: str, devices: int = 1) -> subprocess.Popen:
    """Python with a number of simulated devices of its own, which finds these helpers."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    source = f"import sys\nsys.path[:0] = {paths!r}\n" + textwrap.dedent(code)
    return subprocess.Popen(
        [sys.executable, "-c", source],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
