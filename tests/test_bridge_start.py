"""A bridge that begins at a solved map: against least squares over all tokens."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from mtllm_jax import config as c
from mtllm_jax import sharding
from mtllm_jax.data.packing import pack
from mtllm_jax.metrics import Console
from mtllm_jax.recipes import bridge_start, stacking
from mtllm_jax.recipes.job import Job
from mtllm_jax.runfolder import RunFolder

ROWS = c.Mesh(data=-1)
STREAMS = ("source", "target", "aligned")


@pytest.fixture(scope="module")
def texts():
    """Of whose source tokens every third has no token to go with it."""
    rng = np.random.default_rng(10)
    made = tiny.texts("source", "target")[:20]  # of which packing makes one whole batch
    for text in made:
        numbers = rng.integers(1, len(text["target"]) + 1, len(text["source"]))
        numbers[::3] = 0
        text["aligned"] = numbers.astype(np.int32)
    return made


def rows_of(texts):
    return pack(texts, {s: tiny.LENGTHS[s] for s in STREAMS}, tiny.PAD_IDS, packing=True)


def job_of(folder, mesh=ROWS):
    adaptation = c.Adaptation(tiny.TRAINING, bridge_start="embeddings")
    config = tiny.settings(adaptation=adaptation)
    console = Console(io.StringIO())
    return Job(config, RunFolder(folder, {}), console, sharding.make_mesh(mesh), seed=0)


def reference(texts):
    """States and embeddings of all aligned tokens: [M, E], [M, D]."""
    parts = tiny.parts()
    table = np.asarray(parts.llm.embedding[...])
    ids_BS, segments_BS = np.zeros((2, len(texts), 7), np.int32)
    for ids, segments, text in zip(ids_BS, segments_BS, texts, strict=True):
        length = len(text["source"])
        ids[:length], segments[:length] = text["source"], 1
    h_BSE = parts.encoder.encode(jnp.asarray(ids_BS), jnp.asarray(segments_BS), packed=False)
    states, embeddings = [], []
    for h_SE, text in zip(np.asarray(h_BSE), texts, strict=True):
        for state, number in zip(h_SE, text["aligned"], strict=False):
            if number:
                states.append(state)
                embeddings.append(table[text["target"][number - 1]])
    return np.array(states, np.float64), np.array(embeddings, np.float64)


@pytest.mark.parametrize("mesh", [ROWS, c.Mesh(data=2, fsdp=2, tensor=2)])
def test_the_map_is_that_of_least_squares(texts, mesh, tmp_path):
    """Drawn out, its predictions vary as the embeddings do, around the same mean."""
    job = job_of(tmp_path / "run", mesh)
    stack = stacking.build_stack(job.config, tiny.parts(), 0)
    packed = rows_of(texts)
    assert len(packed) == tiny.TRAINING.batch_rows  # so that every text counts once
    bridge_start.begin_bridge(job, stack, lambda: packed, seed=3)

    x_ME, y_MD = reference(texts)
    centred_ME, wanted_MD = x_ME - x_ME.mean(axis=0), y_MD - y_MD.mean(axis=0)
    variance = np.mean(centred_ME**2)
    strength = np.sqrt(len(x_ME) * bridge_start._RIDGE * variance)
    # A ridge is rows more of zeros, with one input each.
    inputs = np.concatenate([centred_ME, strength * np.eye(x_ME.shape[1])])
    outputs = np.concatenate([wanted_MD, np.zeros((x_ME.shape[1], y_MD.shape[1]))])
    kernel_ED, *_ = np.linalg.lstsq(inputs, outputs)
    explained = 1 - np.sum((wanted_MD - centred_ME @ kernel_ED) ** 2) / np.sum(wanted_MD**2)
    kernel_ED *= np.sqrt(np.sum(wanted_MD**2) / np.sum((centred_ME @ kernel_ED) ** 2))

    up = stack.bridge.up
    got_MD = x_ME @ np.asarray(up.kernel[...], np.float64) + np.asarray(up.bias[...], np.float64)
    # Float32 sums of some hundred products, solved with a condition of 1 / the ridge.
    np.testing.assert_allclose(up.kernel[...], kernel_ED, rtol=0, atol=2e-3 * abs(kernel_ED).max())
    np.testing.assert_allclose(got_MD.mean(axis=0), y_MD.mean(axis=0), atol=1e-3)
    assert got_MD.var(axis=0).sum() == pytest.approx(y_MD.var(axis=0).sum(), rel=1e-3)
    notes = job.stages["bridge"]
    assert notes["tokens"] == len(x_ME)
    assert notes["explained"] == pytest.approx(explained, abs=2e-3)


def test_another_start_reads_the_map_back(texts, tmp_path):
    job = job_of(tmp_path / "run")
    first = stacking.build_stack(job.config, tiny.parts(), 0)
    bridge_start.begin_bridge(job, first, lambda: rows_of(texts), seed=3)
    job.run.close()
    again = stacking.build_stack(job.config, tiny.parts(), 1)
    bridge_start.begin_bridge(
        job_of(tmp_path / "run"), again, lambda: pytest.fail("rows were made"), seed=3
    )
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again.bridge), nnx.state(first.bridge))


def test_models_whose_tokens_never_end_together(texts, tmp_path):
    job = job_of(tmp_path / "run")
    stack = stacking.build_stack(job.config, tiny.parts(), 0)
    apart = [text | {"aligned": np.zeros_like(text["source"])} for text in texts]
    with pytest.raises(ValueError, match="bridge_start 'embeddings' finds no tokens"):
        bridge_start.begin_bridge(job, stack, lambda: rows_of(apart), seed=3)


@pytest.mark.parametrize(
    ("bridge", "fields", "message"),
    [
        (c.Bridge(stride=2), {}, "bridge.stride is 2; it must be 1 with"),
        (c.Bridge(hidden=8), {}, "bridge.hidden is 8; it must be 0 with"),
        (c.Bridge(), {"subword_sampling": 0.1}, "is 0.1; it must be 0 with .*bridge_start"),
        (c.Bridge(), {"bridge_batches": 0}, "bridge_batches is 0; it must be at least 1"),
    ],
)
def test_settings_that_cannot_be(bridge, fields, message):
    fields = {"bridge_start": "embeddings", **fields}
    with pytest.raises(ValueError, match=message):
        tiny.settings(bridge=bridge, adaptation=c.Adaptation(tiny.TRAINING, **fields))
