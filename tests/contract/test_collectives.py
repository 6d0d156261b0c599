"""What a compiled step sends between devices: on eight of them, models scaled down."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from configs.mtllm import llama3_8b
from mtllm_jax import chips, sharding
from mtllm_jax import config as c
from mtllm_jax.models.llama import LlamaConfig
from mtllm_jax.models.nllb import NLLB, NLLBConfig
from mtllm_jax.plan import abstract, adaptation, hlo
from mtllm_jax.plan.estimate import estimate

ENCODER = NLLBConfig(
    vocab_size=512,
    width=256,
    encoder_layers=3,
    decoder_layers=0,
    encoder_heads=4,
    decoder_heads=4,
    encoder_ffn=1024,
    decoder_ffn=1024,
)
LLM = LlamaConfig(
    vocab_size=512,
    width=1024,
    num_layers=5,
    num_heads=16,
    num_kv_heads=4,
    head_width=64,
    ffn_width=2048,
)
ROWS, LENGTH = 16, 64


@functools.cache
def step():
    recipe = llama3_8b()
    training = dataclasses.replace(
        recipe.adaptation.training, batch_rows=ROWS, source_length=LENGTH, target_length=LENGTH
    )
    config = dataclasses.replace(
        recipe,
        adaptation=c.Adaptation(training=training),
        compute_dtype="float32",  # the CPU's compiler would change bfloat16 on its own
        frozen_dtype="float32",
    )
    return adaptation.stage_1(config, ENCODER, LLM)


def mesh_of(**axes):
    return sharding.make_mesh(c.Mesh(**{"data": 1, **axes}), jax.devices()[:8])


def compiled_encoder(mesh):
    graph, state = nnx.split(nnx.eval_shape(lambda: NLLB(ENCODER, nnx.Rngs(0))))
    rows = jax.ShapeDtypeStruct(
        (ROWS, LENGTH),
        jnp.int32,
        sharding=NamedSharding(mesh, sharding.batch_partition("source_ids")),
    )

    def forward(state, ids_BS, segments_BS):
        return nnx.merge(graph, state).encode(ids_BS, segments_BS)

    return jax.jit(sharding.on(mesh, forward)).lower(abstract.laid(state, mesh), rows, rows)


def found_in(lowered):
    return hlo.collectives(lowered.compile().as_text())


def test_none_in_the_encoder_on_a_pure_data_mesh():
    assert found_in(compiled_encoder(mesh_of(data=8))) == []
    # That it would be seen: the same with its weights cut.
    cut = found_in(compiled_encoder(mesh_of(fsdp=8)))
    assert {one.times for one in cut} >= {ENCODER.encoder_layers}


@pytest.mark.slow
def test_gradients_alone_cross_a_pure_data_mesh():
    found = found_in(step().lower(mesh_of(data=8)))
    assert {one.kind for one in found} == {"all-reduce"}
    gradients = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(step().state.trainable))
    assert hlo.by_kind(found)["all-reduce"] == pytest.approx(2 * 7 / 8 * gradients, rel=0.05)


@pytest.mark.slow
def test_weights_are_gathered_layer_by_layer_under_fsdp():
    """As often, and as many bytes, as the plan's arithmetic says."""
    found = found_in(step().lower(mesh_of(fsdp=8)))
    gathers = [one for one in found if one.kind == "all-gather"]
    layers = [one for one in gathers if one.times > 1]
    assert {one.times for one in layers} == {ENCODER.encoder_layers, LLM.num_layers}
    # No more than one layer's largest matrix is ever gathered at a time.
    assert max(one.bytes for one in gathers) == 4 * LLM.width * LLM.ffn_width * 7 / 8
    config = dataclasses.replace(step().config, mesh=c.Mesh(data=1, fsdp=8))
    planned = estimate(dataclasses.replace(step(), config=config), chips.topology("h100:8"))
    wanted = planned.traffic["all-gather"]
    assert hlo.by_kind(layers)["all-gather"] == pytest.approx(wanted, rel=0.05)
