"""The step of stage 1 at full size, from shapes alone: it lowers for every machine, and is cut."""

import dataclasses
import functools
import math
import re

import jax
import pytest
from traced import products

from configs.mtllm import llama3_8b
from mtllm_jax import config as c
from mtllm_jax import flops
from mtllm_jax.plan import abstract, adaptation, sizes

MACHINES = {
    "v5e:4x4": ("tpu", 16),
    "v5e:16x16": ("tpu", 256),
    "v6e:2x4": ("tpu", 8),
    "v6e:16x16": ("tpu", 256),
    "v5p:4x4x4": ("tpu", 64),
    "8×H100": ("gpu", 8),
}
MODELS = [("nllb-600m", "llama3-8b"), ("nllb-3.3b", "llama3-70b")]
MB = 1_000_000


@functools.cache
def step(models, trained="lora", remat="full", rows=256, attention="auto"):
    recipe = llama3_8b()
    training = dataclasses.replace(recipe.adaptation.training, batch_rows=rows)
    config = dataclasses.replace(
        recipe,
        trained=trained,
        remat=remat,
        attention=attention,
        adaptation=c.Adaptation(training=training),
    )
    encoder, llm = sizes.encoder_sizes(config, models[0]), sizes.llm_sizes(config, models[1])
    return adaptation.stage_1(config, encoder, llm)


def mesh_of(num_devices, platform="tpu", **axes):
    config = c.Mesh(**{"data": 1, "fsdp": -1, **axes})
    return abstract.abstract_mesh(config, num_devices, platform)


@pytest.mark.parametrize("models", MODELS)
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.slow
def test_it_lowers_for(machine, models):
    lower_and_look(machine, models)


def test_it_lowers():
    lower_and_look("v5e:4x4", MODELS[0])


def lower_and_look(machine, models):
    platform, num_devices = MACHINES[machine]
    mesh = mesh_of(num_devices, platform)
    # cuDNN's attention lowers where its library is.
    one = step(models, attention="xla" if platform == "gpu" else "auto")
    lowered = one.lower(mesh)
    text = lowered.as_text()
    assert f'"fsdp"={num_devices}' in text
    # Plain products on GPUs; a kernel on TPUs.
    assert ("tpu_custom_call" in text) == (platform == "tpu")
    # Weights are arguments: a constant of the program would be on every chip, uncut.
    for value, shape in re.findall(
        r"stablehlo\.constant (dense\S*).*? : tensor<([\dx]*)x?\w+>", text
    ):
        is_one_number = re.fullmatch(r"dense<[-+.\w]+>", value)
        assert is_one_number or math.prod(int(n) for n in shape.split("x") if n) < 10_000
    # The state that a step leaves lies where it lay before, so that its memory is taken over.
    state = jax.tree.leaves(abstract.laid(one.state, mesh))
    outputs = jax.tree.leaves(lowered.out_info[0])
    assert [x.shape for x in outputs] == [x.shape for x in state]
    assert text.count("jax.buffer_donor") + text.count("tf.aliasing_output") == len(state)


@pytest.mark.parametrize("trained", ["lora", "all"])
@pytest.mark.parametrize("models", MODELS)
def test_every_parameter_above_1_mb_is_cut(models, trained):
    """Moments of the optimizer too."""
    one = step(models, trained)
    meshes = [mesh_of(n) for n in sorted({n for _, n in MACHINES.values()})]
    meshes += [mesh_of(64, tensor=4), mesh_of(8, fsdp=1, tensor=8)]
    for mesh in meshes:
        placed = abstract.laid((one.state, one.frozen), mesh)
        for path, x in jax.tree_util.tree_leaves_with_path(placed):
            if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) and (
                x.size * x.dtype.itemsize > MB
            ):
                assert not x.sharding.is_fully_replicated, (jax.tree_util.keystr(path), mesh.shape)


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_flops_are_those_of_the_traced_program(remat):
    """The products that jax traced, each as often as its loop runs."""
    # So few rows that attention scores all queries at once.
    one = step(MODELS[0], remat=remat, rows=16)
    traced = products(jax.make_jaxpr(one.run)(one.state, one.frozen, one.batch).jaxpr)
    training = one.config.adaptation.training
    batch = flops.Batch(training.batch_rows, training.source_length, training.target_length)
    trainable, frozen = one.state.trainable, one.frozen["stack"]
    formula = flops.adaptation_flops(trainable, frozen, one.encoder, one.llm, batch)
    assert formula.hardware_total == pytest.approx(traced, rel=0.01)
