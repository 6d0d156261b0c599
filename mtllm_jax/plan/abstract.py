"""A training step from shapes alone: no weight is made, whatever the models' size.

Recipes have each a `Step` of their own: `adaptation` and `tuning` make them.

N texts per row.
"""

import abc
import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding

from mtllm_jax import sharding
from mtllm_jax.chips import Machine
from mtllm_jax.config import MTLLM, SDRRL, Training
from mtllm_jax.config import Mesh as MeshConfig
from mtllm_jax.flops import Flops, is_matrix
from mtllm_jax.models.bert import BertConfig
from mtllm_jax.models.llama import LlamaConfig
from mtllm_jax.models.nllb import NLLBConfig
from mtllm_jax.train import Objective, TrainState, make_optimizer, train_step

AnyMesh = Mesh | AbstractMesh
Encoder = NLLBConfig | BertConfig
Sizes = TypeVar("Sizes", bound=NLLBConfig | BertConfig | LlamaConfig)
Config = TypeVar("Config", MTLLM, SDRRL)
AnyStep = TypeVar("AnyStep", bound="Step[Any]")


@dataclasses.dataclass(frozen=True)
class Pass:
    """A model, or a part of one, that a step sends the positions of its rows through.

    matrices: those that positions are multiplied with; length: positions of a row. Of a position:
    width of the residual stream, keys: elements of keys and values in all layers, embedding: those
    that are looked up for it or, where the table learns, sent back.
    """

    matrices: tuple[jax.ShapeDtypeStruct, ...]
    length: int
    num_layers: int = 0
    width: int = 0
    keys: int = 0
    embedding: int = 0
    backward: bool = False  # gradients go through it
    kept: bool = False  # whole over fsdp from forward to backward


@dataclasses.dataclass(frozen=True)
class Step(abc.ABC, Generic[Config]):
    """`run(state, frozen, batch)` is the step; the three are shapes of all devices together.

    llm: that whose layers gradients go through. texts: packed in a row, N.
    """

    WHERE: ClassVar[str]  # the dotted name of the settings of its training
    TITLE: ClassVar[str]
    TOKENS: ClassVar[str]  # what is counted for its speed

    config: Config
    llm: LlamaConfig
    run: Callable[..., Any]
    state: TrainState
    frozen: Any
    batch: dict[str, jax.ShapeDtypeStruct]
    texts: int

    # ------------------------------------------------------------ what a recipe says of its step

    @classmethod
    @abc.abstractmethod
    def check(cls, config: Config) -> None:
        """Raise ValueError for a config that has no such step."""

    @classmethod
    @abc.abstractmethod
    def of_names(cls: type[AnyStep], config: Config, encoder: str, llm: str, texts: int) -> AnyStep:
        """The step, of models that the config names, or else of these names (`sizes`)."""

    @abc.abstractmethod
    def made_with(self: AnyStep, config: Config) -> AnyStep:
        """The step of the same models under another config."""

    @abc.abstractmethod
    def passes(self) -> tuple[Pass, ...]:
        """What positions go through, the LLM that learns first."""

    @abc.abstractmethod
    def flops(self, mesh: AnyMesh) -> Flops:
        """Of a step."""

    def num_reduced(self) -> int:
        """Elements of what learns whose gradients are sums over fsdp."""
        return sum(x.size for x in jax.tree.leaves(self.state.trainable))

    def loss_bytes(self, mesh: AnyMesh) -> float:
        """What a device has beside what its layers left, while the loss is computed."""
        return 0.0  # of a pooled state a row

    @abc.abstractmethod
    def told_rows(self) -> str:
        """How long a row is."""

    def savings(self) -> dict[str, Any]:
        """Fields that save memory, or may, by other values than now; and these."""
        config, found = self.config, {}
        if config.remat != "full":
            found["remat"] = "full"
        if config.frozen_dtype == "float32":
            found["frozen_dtype"] = "bfloat16"
        if config.trained == "all":
            found["trained"] = "lora"
        return found

    @abc.abstractmethod
    def beside(self, machine: Machine) -> dict[str, Any]:
        """What the rest of the recipe costs at least, by arithmetic; plain values."""

    @abc.abstractmethod
    def told_beside(self, machine: Machine) -> str:
        """The same in a sentence."""

    # ------------------------------------------------------------ what they share

    @classmethod
    def training_of(cls, config: Config) -> Training:
        """The settings of the step's training."""
        found: Training = operator.attrgetter(cls.WHERE)(config)
        return found

    @classmethod
    def with_training(cls, config: Config, **values: Any) -> Config:
        """The config with other values in the step's training."""

        def put(group: Any, names: list[str]) -> Any:
            if not names:
                return dataclasses.replace(group, **values)
            inner = put(getattr(group, names[0]), names[1:])
            return dataclasses.replace(group, **{names[0]: inner})

        changed: Config = put(config, cls.WHERE.split("."))
        return changed

    @property
    def training(self) -> Training:
        return self.training_of(self.config)

    @property
    def learner(self) -> Pass:
        """That of the LLM that learns."""
        return self.passes()[0]

    def under(self: AnyStep, config: Any) -> AnyStep:
        """The step for an estimate under another mesh, remat policy or batch; not to be run."""
        return dataclasses.replace(self, config=config, llm=with_options(config, self.llm))

    def mesh(self, machine: Machine) -> AbstractMesh:
        """The config's mesh of a machine's chips. ValueError where they are not as many."""
        return abstract_mesh(self.config.mesh, machine.num_chips, machine.chip.platform)

    def lower(self, mesh: AnyMesh) -> jax.stages.Lowered:
        """The step laid over a mesh as `train.fit` does it, lowered for the mesh's devices."""
        jitted = jax.jit(
            sharding.on(mesh, self.run),
            donate_argnums=0,
            out_shardings=(sharding.shardings(self.state, mesh), None),
        )
        rows = {
            name: jax.ShapeDtypeStruct(
                x.shape,
                x.dtype,
                sharding=NamedSharding(mesh, sharding.batch_partition(name)),
            )
            for name, x in self.batch.items()
        }
        traced = jitted.trace(laid(self.state, mesh), laid(self.frozen, mesh), rows)
        if isinstance(mesh, Mesh):
            return traced.lower()
        platform = mesh.abstract_device.platform
        return traced.lower(lowering_platforms=(_LOWERED_AS.get(platform, platform),))


# What `lower` calls a platform where a device calls it something else.
_LOWERED_AS = {"gpu": "cuda"}


def abstract_mesh(config: MeshConfig, num_devices: int, platform: str) -> AbstractMesh:
    """The mesh of so many devices of a platform ("tpu", "gpu", "cpu"), without devices."""
    sizes = sharding.mesh_sizes(config, num_devices)
    return AbstractMesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        abstract_device=AbstractDevice(device_kind=platform, num_cores=None, platform=platform),
    )


def trained_by(
    training: Training, objective: Objective, trainable: nnx.State
) -> tuple[Callable[..., Any], TrainState]:
    """`Step.run` and `Step.state`, as `train.fit` makes them."""
    optimizer = make_optimizer(training)
    state = jax.eval_shape(
        lambda trainable: TrainState(
            step=jnp.zeros((), jnp.int32),
            trainable=trainable,
            opt_state=optimizer.init(trainable),
            rng=jax.random.key(0),
        ),
        trainable,
    )
    run = functools.partial(
        train_step, objective=objective, optimizer=optimizer, accumulation=training.accumulation
    )
    return run, state


def batch_of(rows: int, lengths: dict[str, int]) -> dict[str, jax.ShapeDtypeStruct]:
    """Its arrays of integers, each `rows` long and as wide as its length."""
    return {name: jax.ShapeDtypeStruct((rows, n), jnp.int32) for name, n in lengths.items()}


def matrices(*states: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Those of linear maps."""
    leaves = jax.tree_util.tree_leaves_with_path(states)
    return tuple(x for path, x in leaves if is_matrix(path))


def with_options(config: MTLLM | SDRRL, sizes: Sizes) -> Sizes:
    """A model's config with what the recipe says of how its layers are run."""
    options = ("remat", "unroll_layers", "attention")
    return dataclasses.replace(sizes, **{name: getattr(config, name) for name in options})


def laid(tree: Any, mesh: AnyMesh) -> Any:
    """Shapes with the sharding that arrays of theirs get."""

    def with_sharding(x: Any, place: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    return jax.tree.map(with_sharding, tree, sharding.shardings(tree, mesh))
