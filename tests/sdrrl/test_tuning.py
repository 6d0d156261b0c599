"""Answers as training texts: their tokens, and the likelihood that is learnt."""

import dataclasses
import io

import jax
import numpy as np
import pytest
import tiny_folders
from etils import epath
from flax import nnx

from configs.sdrrl import mini
from mtllm_jax import train
from mtllm_jax.chips import CHIPS
from mtllm_jax.data.packing import pack
from mtllm_jax.data.pipeline import add_by_example
from mtllm_jax.data.templates import Template
from mtllm_jax.data.tokenise import TargetTokenizer
from mtllm_jax.hf.llama import load_llama
from mtllm_jax.metrics import Console, read_metrics
from mtllm_jax.models.layers import split
from mtllm_jax.models.llama import Llama, LlamaConfig
from mtllm_jax.recipes.job import Job
from mtllm_jax.recipes.tuning import answer_likelihood, conversations, tune
from mtllm_jax.runfolder import RunFolder
from mtllm_jax.sharding import make_mesh

EXAMPLES = [
    {"id": "a", "prompt": "Japan <currency>", "answer": "Japanese Yen"},
    {"id": "b", "prompt": "Kenya <currency>", "answer": "Shilling"},
    {"id": "c", "prompt": "Kenya", "answer": "Japan Kenya Japan Kenya Japan Kenya Japan"},
    {"id": "d", "prompt": "Japan Kenya " * 20, "answer": "Yen"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny LLM."""
    folder = tmp_path_factory.mktemp("llm") / "llm"
    texts = [f"{e['prompt']} {e['answer']}" for e in EXAMPLES] * 20
    tiny_folders.llama(folder, texts)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return TargetTokenizer(folder)


def test_a_conversation_is_what_the_llm_was_trained_on_as_one_text(tokenizer):
    template = Template("none", tokenizer)
    texts, num_asked, rejects = conversations(tokenizer, template, EXAMPLES, 20)
    whole = tokenizer.encode(["Japan <currency> Japanese Yen"])[0]
    np.testing.assert_array_equal(texts[0], [*whole, tokenizer.eos_id])
    (asked,) = tokenizer.encode(["Japan <currency>"])
    assert num_asked[0] == len(asked)
    assert [len(text) <= 20 for text in texts] == [True] * 3
    assert [reject["id"] for reject in rejects] == ["d"] and "20" in rejects[0]["reason"]


def test_an_answer_beyond_the_row_loses_its_end(tokenizer):
    template = Template("none", tokenizer)
    texts, num_asked, _ = conversations(tokenizer, template, EXAMPLES[2:3], 6)
    whole = tokenizer.encode([f"{EXAMPLES[2]['prompt']} {EXAMPLES[2]['answer']}"])[0]
    np.testing.assert_array_equal(texts[0], whole[:6])
    assert 0 < num_asked[0] < 6


def test_the_loss_is_the_likelihood_of_answers_alone(tokenizer):
    config = dataclasses.replace(mini(), trained="all")
    sizes = LlamaConfig(tokenizer.vocab_size, 8, 1, 2, 1, 4, 16)
    model = Llama(sizes, nnx.Rngs(0))
    template = Template("none", tokenizer)
    texts, num_asked, _ = conversations(tokenizer, template, EXAMPLES[:2], 32)
    rows = pack([{"target": ids} for ids in texts], {"target": 40}, {"target": tokenizer.pad_id})
    assert len(rows) == 1  # both lie in a row
    batch = {name: array[None] for name, array in rows[0].items()}
    batch = add_by_example({"prompt_tokens": num_asked})(batch)
    graph, trainable, frozen = split(model, nnx.Param)
    objective = answer_likelihood(config, graph)
    total, count = jax.jit(objective)(trainable, frozen, batch, jax.random.key(0))["loss"]

    ids_BT = np.stack([np.pad(ids, (0, 20 - len(ids))) for ids in texts])
    segments_BT = np.stack([np.arange(20) < len(ids) for ids in texts]).astype(np.int32)

    @jax.jit
    def log_p(ids_BT, segments_BT):
        h_BTD = model.hidden(model.embed(ids_BT), segments_BT, causal=True)
        return jax.nn.log_softmax(model.logits(h_BTD))

    log_p_BTV = np.asarray(log_p(ids_BT, segments_BT))
    wanted, tokens = 0.0, 0
    for log_p_TV, ids, asked in zip(log_p_BTV, texts, num_asked, strict=True):
        for place in range(asked, len(ids)):
            wanted -= float(log_p_TV[place - 1, ids[place]])
            tokens += 1
    assert count == tokens
    # Sums of some tens of float32 terms.
    np.testing.assert_allclose(total, wanted, rtol=1e-5)


def test_a_chip_of_known_speed_is_told_how_well_it_is_used(
    folder, tokenizer, tmp_path, monkeypatch
):
    chip = CHIPS["v5e"]
    monkeypatch.setattr(train, "chip_of", lambda kind: chip)
    training = dataclasses.replace(mini().training, steps=3, batch_rows=8, target_length=32)
    config = dataclasses.replace(mini(), training=training)
    run = RunFolder(epath.Path(tmp_path), {})
    job = Job(config, run, Console(io.StringIO()), make_mesh(config.mesh), 0)
    tune(job, "sdrrl", "SDRRL", str(folder), EXAMPLES[:2] * 16)
    frame = read_metrics(run.path / "sdrrl" / "metrics.jsonl")
    speed = jax.device_count() * chip.tflops * 1e12
    flops = (frame["mfu"] * frame["seconds"] * speed).iloc[1:]

    texts, _, _ = conversations(tokenizer, Template("none", tokenizer), EXAMPLES[:2] * 16, 32)
    rows = pack([{"target": ids} for ids in texts], {"target": 32}, {"target": tokenizer.pad_id})
    tokens = 8 * sum(map(len, texts)) / len(rows)
    # Each weight of a map forwards and back, twice; attention among so few tokens is next to none.
    weights = sum(x.size for x in jax.tree.leaves(nnx.state(load_llama(folder))) if x.size > 1000)
    weights -= tokenizer.vocab_size * 32  # looked up
    assert np.all(flops > 6 * weights * tokens) and np.all(flops < 6.6 * weights * tokens)
    assert np.all(frame["hfu"].iloc[1:] > frame["mfu"].iloc[1:])
