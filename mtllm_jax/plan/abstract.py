"""The real step of stage 1 from shapes alone: no weight is made, whatever the models' size.

B rows, N texts per row, S encoder positions, T decoder positions.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding

from mtllm_jax import sharding
from mtllm_jax.config import MTLLM
from mtllm_jax.config import Mesh as MeshConfig
from mtllm_jax.models.bert import Bert, BertConfig
from mtllm_jax.models.layers import split
from mtllm_jax.models.llama import Llama, LlamaConfig
from mtllm_jax.models.nllb import NLLB, NLLBConfig
from mtllm_jax.models.quantised import in_dtype
from mtllm_jax.models.stack import Stack
from mtllm_jax.recipes import stacking
from mtllm_jax.train import TrainState, make_optimizer, train_step

AnyMesh = Mesh | AbstractMesh
Encoder = NLLBConfig | BertConfig
Sizes = TypeVar("Sizes", bound=NLLBConfig | BertConfig | LlamaConfig)


@dataclasses.dataclass(frozen=True)
class Step:
    """`run(state, frozen, batch)` is the step; the three are shapes of all devices together.

    texts: packed in a row, N.
    """

    config: MTLLM
    encoder: Encoder
    llm: LlamaConfig
    run: Callable[..., Any]
    state: TrainState
    frozen: Any
    batch: dict[str, jax.ShapeDtypeStruct]
    texts: int

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


def stage_1(config: MTLLM, encoder: Encoder, llm: LlamaConfig, texts: int = 1) -> Step:
    """The step of general adaptation, of models of these sizes. texts: N, packed in a row."""
    training, dtype = config.adaptation.training, jnp.dtype(config.frozen_dtype)
    encoder, llm = with_options(config, encoder), with_options(config, llm)
    encoder_module = in_dtype(nnx.eval_shape(lambda: _new_encoder(encoder)), dtype)
    llm_module = in_dtype(nnx.eval_shape(lambda: Llama(llm, nnx.Rngs(0))), dtype)

    def build(encoder_module: Any, llm_module: Any) -> Stack:
        return stacking.new_stack(config, encoder_module, llm_module, 1.0, 0)

    stack = nnx.eval_shape(build, encoder_module, llm_module)
    graph, trainable, frozen = split(stack, stacking.is_trained(config))
    teacher_graph, teacher = nnx.split(llm_module)
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
    objective = stacking.adaptation_objective(config, graph, teacher_graph)
    both = stacking.adaptation_frozen(config, frozen, teacher)
    run = functools.partial(
        train_step, objective=objective, optimizer=optimizer, accumulation=training.accumulation
    )
    B, S, T = training.batch_rows, training.source_length, training.target_length
    shapes = {"source_ids": S, "source_segments": S, "target_ids": T, "target_segments": T}
    if config.adaptation.aligned_by:
        shapes["aligned_ids"] = S
    batch = {
        name: jax.ShapeDtypeStruct((B, length), jnp.int32)
        for name, length in (shapes | {"example": texts}).items()
    }
    return Step(config, encoder, llm, run, state, both, batch, texts)


def with_options(config: MTLLM, sizes: Sizes) -> Sizes:
    """A model's config with what the recipe says of how its layers are run."""
    options = ("remat", "unroll_layers", "attention")
    return dataclasses.replace(sizes, **{name: getattr(config, name) for name in options})


def laid(tree: Any, mesh: AnyMesh) -> Any:
    """Shapes with the sharding that arrays of theirs get."""

    def with_sharding(x: Any, place: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    return jax.tree.map(with_sharding, tree, sharding.shardings(tree, mesh))


def _new_encoder(config: Encoder) -> NLLB | Bert:
    rngs = nnx.Rngs(0)
    return NLLB(config, rngs) if isinstance(config, NLLBConfig) else Bert(config, rngs)
