"""FLOPs by formula against XLA's own count of unrolled models, and against closed forms."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
import tiny
from flax import nnx

from configs.mtllm import llama3_8b
from mtllm_jax import config as c
from mtllm_jax import flops
from mtllm_jax.models.llama import Llama, LlamaConfig
from mtllm_jax.models.nllb import NLLB, NLLBConfig
from mtllm_jax.plan import adaptation, sizes

# Wide enough for the matrix products to be nearly all that XLA counts, and small to compile.
ENCODER = NLLBConfig(
    vocab_size=64,
    width=256,
    encoder_layers=2,
    decoder_layers=0,
    encoder_heads=4,
    decoder_heads=4,
    encoder_ffn=1024,
    decoder_ffn=1024,
)
LLM = LlamaConfig(
    vocab_size=64,
    width=384,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_width=64,
    ffn_width=1536,
)
BATCH = flops.Batch(rows=4, source_length=96, target_length=64)
TRAINING = c.Training(
    steps=1,
    batch_rows=BATCH.rows,
    learning_rate=1e-3,
    source_length=BATCH.source_length,
    target_length=BATCH.target_length,
)


@functools.cache
def step(trained="lora", remat="none"):
    config = tiny.settings(
        trained=trained,
        remat=remat,
        lora=c.LoRA(rank=16, alpha=32, dropout=0.0, targets=("all",)),
        adaptation=c.Adaptation(training=TRAINING),
    )
    return adaptation.stage_1(config, ENCODER, LLM)


def counted(function, *arguments):
    """XLA's count of a compiled program, on one device and without its optimisations of speed."""
    compiled = jax.jit(function).lower(*arguments).compile(tiny.QUICK)
    return compiled.cost_analysis()["flops"]


def formula(step, batch=BATCH):
    state, frozen = step.state.trainable, step.frozen["stack"]
    return flops.adaptation_flops(state, frozen, step.encoder, step.llm, batch)


@pytest.mark.parametrize("part", ["encoder", "teacher"])
def test_a_forward_pass(part):
    one = step()
    if part == "encoder":
        module, length = nnx.eval_shape(lambda: NLLB(one.encoder, nnx.Rngs(0))), BATCH.source_length
    else:
        module, length = nnx.eval_shape(lambda: Llama(one.llm, nnx.Rngs(0))), BATCH.target_length
    graph, state = nnx.split(module)
    ids = jax.ShapeDtypeStruct((BATCH.rows, length), jnp.int32)

    def read(state, ids, segments):
        model = nnx.merge(graph, state)
        if part == "encoder":
            return model.encode(ids, segments)
        return model.hidden(model.embed(ids), segments, causal=False)

    parts = formula(one).hardware
    wanted = counted(read, state, ids, ids)
    assert parts[part] + parts[f"{part}'s attention"] == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize(
    ("trained", "remat"), [("lora", "none"), ("lora", "full"), ("lora", "dots"), ("all", "none")]
)
def test_a_step_of_stage_1(trained, remat):
    one = step(trained, remat)
    wanted = counted(one.run, one.state, one.frozen, one.batch)
    got = formula(one)
    assert got.hardware_total == pytest.approx(wanted, rel=0.05)
    assert (got.hardware_total > got.model_total) == (remat != "none")


@pytest.mark.parametrize("trained", ["lora", "all"])
def test_weights_are_counted_by_what_is_asked_of_them(trained):
    """Llama-3-8B under NLLB-600M, by the numbers of their weights."""
    config = dataclasses.replace(llama3_8b(), trained=trained)
    encoder, llm = sizes.encoder_sizes(config, "nllb-600m"), sizes.llm_sizes(config, "llama3-8b")
    one = adaptation.stage_1(config, encoder, llm)
    batch = flops.Batch(rows=256, source_length=512, target_length=384)
    got = formula(one, batch).model
    sources, targets = 256 * 512, 256 * 384
    llm_weights = 32 * 4096 * (2 * 4096 + 2 * 1024 + 3 * 14_336)
    widths = {"q": 8192, "k": 5120, "v": 5120, "o": 8192, "gate": 18_432, "up": 18_432}
    adapters = 32 * 16 * (sum(widths.values()) + 18_432) if trained == "lora" else 0
    assert adapters in (41_943_040, 0)  # what PEFT says of rank 16 on all maps of Llama-3-8B
    per_weight = 4 if trained == "lora" else 6
    assert got["encoder"] == 2 * sources * 12 * 1024 * (4 * 1024 + 2 * 4096)
    assert got["bridge"] == 4 * sources * 1024 * 4096
    assert got["student"] == sources * (per_weight * llm_weights + 6 * adapters)
    assert got["teacher"] == 2 * targets * llm_weights
    # Scores and means, 2 · 4096 · length each, once forward and twice backward.
    assert got["student's attention"] == 3 * sources * 32 * 4 * 4096 * 512
    assert got["teacher's attention"] == targets * 32 * 4 * 4096 * 384


def test_packed_texts_read_themselves_alone():
    whole = formula(step())
    packed = formula(step(), dataclasses.replace(BATCH, texts=4))
    assert packed.hardware == whole.hardware
    for name, of_whole in whole.model.items():
        wanted = of_whole / 4 if name.endswith("attention") else of_whole
        assert packed.model[name] == wanted
