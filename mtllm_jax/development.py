"""Development data: what a stage makes of it, and which weights the stage ends with for that.

Which they are is a rule that the config names, and follows from English rows that no step trains
on: nothing that is reported on decides.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mtllm_jax import sharding
from mtllm_jax.config import Training
from mtllm_jax.data.pipeline import Batch
from mtllm_jax.objectives import Terms

# Random-access rows, as those that are trained on, and what gives a batch of them what it has
# beside.
Data = tuple[Any, Callable[[Batch], Batch] | None]


class Development:
    """The objective over all development rows: without noise and dropout, in their order, nothing
    left out. Several processes read their own rows of a batch, and all get the figures."""

    def __init__(
        self,
        data: Data,
        config: Training,
        objective: Callable[[nnx.State, Any, dict[str, Array], None], Terms],
        mesh: jax.sharding.Mesh,
    ):
        self._rows, self._add = data
        if not len(self._rows):
            raise ValueError("there are no development rows to evaluate on.")
        self._mesh = mesh
        # What fits into memory with gradients, fits without.
        self._batch_rows = config.batch_rows // config.accumulation
        self._mine = sharding.process_rows(self._batch_rows, mesh)

        def terms(trainable: nnx.State, frozen: Any, batch: dict[str, Array]) -> Terms:
            return objective(trainable, frozen, batch, None)

        everywhere = jax.NamedSharding(mesh, jax.P())
        self._terms = jax.jit(sharding.on(mesh, terms), out_shardings=everywhere)

    def __call__(self, trainable: nnx.State, frozen: Any) -> dict[str, float]:
        """The mean of each of the objective's terms."""
        total: Any = None
        for batch in self._batches():
            placed = sharding.place_batch(batch, self._mesh, self._batch_rows)
            terms = self._terms(trainable, frozen, placed)
            total = terms if total is None else jax.tree.map(jnp.add, total, terms)
        return {
            name: float(value) / float(count) if count else math.nan
            for name, (value, count) in jax.device_get(total).items()
        }

    def _batches(self) -> Iterator[Batch]:
        """This process's rows of each batch. The last one is filled up with a row whose texts do
        not count."""
        num_rows = len(self._rows)
        for first in range(0, num_rows, self._batch_rows):
            rows = []
            for place in first + self._mine:
                row = self._rows[int(min(place, num_rows - 1))]
                beyond = {"example": np.zeros_like(row["example"])} if place >= num_rows else {}
                rows.append(row | beyond)
            batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
            yield batch if self._add is None else self._add(batch)


class Kept(flax.struct.PyTreeNode):
    """What the rule has to remember, and a checkpoint holds beside the state.

    weights: of "best", those of the best evaluation; of "average", those of the last checkpoints,
    the newest last.
    """

    score: Any  # float32 [2], of the best evaluation: −accuracy, or 0 without one, and the loss
    step: Any  # int32, of the best evaluation; 0: there was none
    since: Any  # int32, evaluations after it
    taken: Any  # int32, checkpoints so far
    weights: tuple[nnx.State, ...]


class Choice:
    """The rule of `config.chosen`, and early stopping by `config.patience`.

    An evaluation is better than another by its accuracy, where the objective has one, and of equal
    accuracies by the lesser loss.
    """

    def __init__(self, config: Training, trainable: nnx.State, mesh: jax.sharding.Mesh):
        self._config, self._mesh = config, mesh
        self._remembers = config.chosen != "last" or config.patience > 0
        kept = Kept(
            score=np.full(2, np.inf, np.float32),
            step=np.int32(0),
            since=np.int32(0),
            taken=np.int32(0),
            weights=tuple(_copy(trainable) for _ in range(config.copies)),
        )
        self._kept: Kept = sharding.place(kept, mesh)

    def with_kept(self, state: Any) -> Any:
        """What a checkpoint holds: the state, and what is remembered where there is anything."""
        return {"state": state, "kept": self._kept} if self._remembers else state

    def restored(self, saved: Any) -> Any:
        """The state in what `with_kept` made; the rest is remembered again."""
        if not self._remembers:
            return saved
        self._kept = saved["kept"]
        return saved["state"]

    def evaluated(self, step: int, values: Mapping[str, float], trainable: nnx.State) -> None:
        """Take in an evaluation."""
        score = np.array([-values.get("accuracy", 0.0), values["loss"]], np.float32)
        best = np.asarray(self._kept.score)
        changed: dict[str, Any] = {"since": np.int32(self.since + 1)}
        if np.all(np.isfinite(score)) and tuple(score) < tuple(best):
            changed = {"score": score, "step": np.int32(step), "since": np.int32(0)}
            if self._config.chosen == "best":
                changed["weights"] = (_copy(trainable),)
        self._kept = sharding.place(self._kept.replace(**changed), self._mesh)

    def at_checkpoint(self, trainable: nnx.State) -> None:
        """Take in a checkpoint; not those of a stage that was asked to stop, which would not have
        been without."""
        if self._config.chosen == "average":
            weights = (*self._kept.weights[1:], _copy(trainable))
            kept = self._kept.replace(weights=weights, taken=np.int32(int(self._kept.taken) + 1))
            self._kept = sharding.place(kept, self._mesh)

    @property
    def stops(self) -> bool:
        """Whether as many evaluations as the config's patience have brought nothing better."""
        return 0 < self._config.patience <= self.since

    @property
    def since(self) -> int:
        """Evaluations since the best one."""
        return int(self._kept.since)

    def weights(self, last: nnx.State) -> nnx.State:
        """Those that the stage ends with. FloatingPointError if the best of no finite evaluation
        is asked for."""
        if self._config.chosen == "last":
            return last
        if self._config.chosen == "average":
            return sharding.place(_mean(self._counted()), self._mesh)
        if not int(self._kept.step):
            raise FloatingPointError(
                "none of the evaluations on development data was finite: there is no best one."
            )
        return self._kept.weights[0]

    def notes(self) -> dict[str, Any]:
        """The rule and what it came to, for JSON; nothing where the last weights are all."""
        if not self._remembers:
            return {}
        about: dict[str, Any] = {"rule": self._config.chosen}
        if self._config.chosen == "average":
            about["checkpoints"] = len(self._counted())
        if int(self._kept.step):
            accuracy, loss = (float(value) for value in self._kept.score)
            about |= {"best_step": int(self._kept.step), "best_dev_loss": loss}
            about |= {"best_dev_accuracy": -accuracy} if accuracy else {}
        return {"chosen": about}

    def _counted(self) -> tuple[nnx.State, ...]:
        return self._kept.weights[-int(self._kept.taken) :]


def _copy(tree: nnx.State) -> nnx.State:
    """Of its own: the step gives its buffers away."""
    return jax.tree.map(jnp.copy, tree)


def _mean(states: tuple[nnx.State, ...]) -> nnx.State:
    def mean(*values: Array) -> Array:
        total = functools.reduce(jnp.add, (value.astype(jnp.float32) for value in values))
        return (total / len(values)).astype(values[0].dtype)

    return jax.tree.map(mean, *states)
