"""A stage of a linear model, with closed forms: cheap enough to be trained again and again.

What is learnt: x · kernel + bias; what is frozen: a scale per output.
"""

import dataclasses
import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from mtllm_jax import sharding
from mtllm_jax.config import Mesh, Training
from mtllm_jax.metrics import Console
from mtllm_jax.models.layers import param
from mtllm_jax.runfolder import StageFolder
from mtllm_jax.train import TrainState, fit, train_step

ROWS, IN, OUT = 12, 4, 3
TRAINING = Training(steps=6, batch_rows=ROWS, learning_rate=0.05, checkpoint_every=4)


class Linear(nnx.Module):
    def __init__(self):
        init = nnx.initializers.normal(1.0)
        rngs = nnx.Rngs(0)
        self.kernel = param(rngs, (IN, OUT), ("embed", "classes"), init)
        self.bias = param(rngs, (OUT,), ("classes",), init)
        self.frozen_scale = param(rngs, (OUT,), ("classes",), init)


GRAPH, FROZEN, TRAINABLE = nnx.split(Linear(), nnx.PathContains("frozen_scale"), ...)


def squared_error(trainable, frozen, batch, key):
    model = nnx.merge(GRAPH, frozen, trainable)
    y = (batch["x"] @ model.kernel[...] + model.bias[...][None]) * model.frozen_scale[...][None]
    errors = jnp.sum(jnp.square(y - batch["y"]), axis=1)
    valid = batch["example"][:, 0] > 0
    count = jnp.sum(valid.astype(jnp.float32))
    noise = 0.0 if key is None else jax.random.normal(key)
    return {"loss": (jnp.sum(errors * valid), count), "noise": (noise, count)}


def a_batch(seed=0, valid=None):
    rng = np.random.default_rng(seed)
    valid = np.ones(ROWS) if valid is None else np.asarray(valid)
    return {
        "x": rng.normal(size=(ROWS, IN)).astype(np.float32),
        "y": rng.normal(size=(ROWS, OUT)).astype(np.float32),
        "example": (valid * np.arange(1, ROWS + 1))[:, None].astype(np.int32),
    }


def start(optimizer, trainable=TRAINABLE):
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        opt_state=optimizer.init(trainable),
        rng=jax.random.key(0),
    )


@functools.cache
def stepper(optimizer, accumulation=1):
    return jax.jit(
        functools.partial(
            train_step, objective=squared_error, optimizer=optimizer, accumulation=accumulation
        )
    )


def values(tree):
    """{path: array} of a state of parameters."""
    flat = nnx.to_flat_state(tree)
    return {"/".join(map(str, path)): np.asarray(value[...]) for path, value in flat}


def assert_same_trees(one, other):
    def plain(x):
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    jax.tree.map(lambda a, b: np.testing.assert_array_equal(plain(a), plain(b)), one, other)


def run_fit(
    folder,
    *,
    objective=squared_error,
    trainable=TRAINABLE,
    frozen=FROZEN,
    rows=None,
    config=TRAINING,
    add=None,
    dev=None,
    mesh=None,
    **changes,
):
    """`fit` on one device, or a mesh, with these changes to its config. (result, what was said)"""
    arrays = a_batch() | {"row": np.arange(ROWS, dtype=np.int32)}
    source = [{name: array[i] for name, array in arrays.items()} for i in range(ROWS)]
    said = io.StringIO()
    result = fit(
        StageFolder(epath.Path(folder)),
        "a stage",
        dataclasses.replace(config, **changes),
        objective=objective,
        trainable=trainable,
        frozen=frozen,
        rows=rows or (lambda: source),
        mesh=mesh or sharding.make_mesh(Mesh(), jax.devices()[:1]),
        seed=3,
        console=Console(said),
        add=None if add is None else lambda: add,
        dev=None if dev is None else lambda: (dev, None),
    )
    return result, said.getvalue()
