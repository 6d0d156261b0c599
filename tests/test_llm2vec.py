"""Preparing the LLM: what is masked, what is compared, and the stages of a run."""

import dataclasses
import json
import os
import shutil
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reduced
import tiny
import tiny_folders
from flax import nnx

import mtllm_jax
from mtllm_jax import config as c
from mtllm_jax.data.held_out import hold_out_texts
from mtllm_jax.data.texts import texts_of
from mtllm_jax.data.tokenise import TargetTokenizer
from mtllm_jax.data.train_tokenizer import train_llama_tokenizer
from mtllm_jax.hf.llama import load_llama
from mtllm_jax.hf.peft import load_merged
from mtllm_jax.models.stack import llm_pooled
from mtllm_jax.recipes import llm2vec
from mtllm_jax.recipes.dry_run import reduced as reduced_config
from mtllm_jax.recipes.finished import begun, open_run
from mtllm_jax.recipes.inputs import idle_fields
from mtllm_jax.schema import resolve

ON = dataclasses.replace(tiny.TRAINING, target_length=12)

# ---------------------------------------------------------------- masked next-token prediction


def test_what_may_be_masked_has_a_position_before():
    segments = np.array([[1, 1, 1, 2, 2, 0], [0, 1, 1, 0, 1, 2]], np.int32)
    wanted = [[0, 1, 1, 0, 1, 0], [0, 0, 1, 0, 0, 0]]
    np.testing.assert_array_equal(llm2vec.has_before(segments), np.array(wanted, bool))


def test_shares_of_what_is_masked():
    B, T, V, mask = 64, 256, 1000, 7
    settings = c.MaskedPrediction(share=0.3, blank=0.6, random=0.3)
    ids = np.random.default_rng(0).integers(10, V, (B, T)).astype(np.int32)
    may = np.random.default_rng(1).random((B, T)) < 0.5
    key = jax.random.key(0)
    read, chosen = (np.asarray(x) for x in llm2vec.masked(settings, ids, may, mask, V, key))
    assert not np.any(chosen & ~may)
    np.testing.assert_array_equal(read[~chosen], ids[~chosen])
    blank, kept = (read == mask)[chosen].mean(), (read == ids)[chosen].mean()
    # Five standard errors of shares of the some 8000, and 2500, tokens.
    assert abs(chosen[may].mean() - 0.3) < 5 * (0.3 * 0.7 / may.sum()) ** 0.5
    assert abs(blank - 0.6) < 5 * (0.6 * 0.4 / chosen.sum()) ** 0.5
    assert abs(kept - 0.1) < 5 * (0.1 * 0.9 / chosen.sum()) ** 0.5
    others = read[chosen & (read != mask) & (read != ids)]
    assert len(np.unique(others)) > 0.3 * len(others) and others.min() < 100 < 900 < others.max()
    again, _ = llm2vec.masked(settings, ids, may, mask, V, key)
    np.testing.assert_array_equal(again, read)
    other, _ = llm2vec.masked(settings, ids, may, mask, V, jax.random.key(1))
    assert np.any(other != read)


def test_the_mask_is_the_tokenizers_own_or_a_blank(tmp_path):
    train_llama_tokenizer(["Kenya and Ghana"], 400, tmp_path / "tokenizer")
    tokenizer = TargetTokenizer(tmp_path / "tokenizer")
    assert tokenizer.pieces([tokenizer.mask_id()]) in (["_"], ["<0x5F>"])
    assert {tokenizer.bos_id, tokenizer.eos_id} <= set(tokenizer.special_ids)
    tokenizer._tokenizer.mask_token = "<unk>"
    assert tokenizer.mask_id() == tokenizer.unk_id


# ---------------------------------------------------------------- unsupervised SimCSE


def by_hand(one, other, example, temperature):
    """(sum of losses, texts), text after text in float64."""
    one, other = (x[example > 0].astype(np.float64) for x in (one, other))
    total = 0.0
    for i, vector in enumerate(one):
        lengths = np.linalg.norm(vector) * np.linalg.norm(other, axis=1)
        scores = other @ vector / lengths / temperature
        total += np.log(np.sum(np.exp(scores))) - scores[i]
    return total, len(one)


@pytest.mark.slow
def test_a_text_is_read_twice_with_other_dropout():
    """The objective is the loss of two readings by two keys, and both rates count."""
    stage = tiny.stage("simcse-lora")
    batch = stage.batch()
    key = jax.random.key(3)

    def read(key, attention):
        llm = nnx.merge(stage.graph, stage.trainable, stage.frozen)
        rows = batch["target_ids"], batch["target_segments"], batch["example"].shape[1]
        return llm_pooled(llm, *rows, causal=False, key=key, attention_dropout=attention)

    one, other = (
        np.asarray(jax.jit(read, static_argnums=1)(k, 0.3)) for k in jax.random.split(key)
    )
    assert np.abs(one - other).max() > 1e-2
    _, terms = stage.gradient(stage.trainable, stage.frozen, batch, key)
    wanted = by_hand(one, other, batch["example"], 0.05)
    # States are some 1e-6 off, being sums in float32, and scores, of up to 20, 20 times as much.
    np.testing.assert_allclose(terms["loss"], wanted, rtol=1e-4, atol=1e-3)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mntp": c.MaskedPrediction(ON, share=0.0)}, "mntp.share is 0.0; it must be a fraction"),
        ({"mntp": c.MaskedPrediction(ON, random=0.3)}, "mntp.random is 0.3; it must be from 0 to"),
        ({"mntp": c.MaskedPrediction(ON), "bidirectional": False}, "mntp.training.steps is 20"),
        ({"simcse": c.Contrastive(ON, temperature=0.0)}, "simcse.temperature is 0.0"),
        (
            {"simcse": c.Contrastive(ON, dropout=0.0)},
            "simcse.dropout is 0.0; it must be above 0 where lora",
        ),
        (
            {"simcse": c.Contrastive(dataclasses.replace(ON, accumulation=2))},
            "simcse.training.accumulation is 2; it must be 1, as a text is compared",
        ),
        (
            {"mntp": c.MaskedPrediction(dataclasses.replace(ON, steps=-1))},
            "mntp.training.steps is -1; it must be at least 1, or 0 to leave it out",
        ),
    ],
)
def test_settings_that_cannot_be(changes, words):
    with pytest.raises(ValueError, match=f"config.{words}"):
        tiny.settings(**changes)


def test_what_is_left_out_is_no_stage_and_its_fields_are_idle():
    off, on = tiny.settings(), tiny.settings(mntp=c.MaskedPrediction(ON))
    assert set(on.stages()) - set(off.stages()) == {"mntp.training"}
    given = ["mntp.share", "mntp.training.steps", "lora.targets"]
    assert idle_fields(off, given) == (
        "without effect here: config.mntp.share (config.mntp.training.steps is 0);"
        " config.lora.targets (config.trained is 'all')."
    )
    assert idle_fields(on, given) == ""
    assert "mntp.training" not in reduced_config(off).stages()
    assert reduced_config(on).stages()["mntp.training"].steps == 1


def test_rows_are_as_many_as_the_steps_take(monkeypatch):
    monkeypatch.setattr("mtllm_jax.data.packing._WINDOW", 10)
    tokenizer = types.SimpleNamespace(
        pad_id=0,
        encode=lambda texts, max_length=99: [
            np.array([1, *map(ord, text)], np.int32)[:max_length] for text in texts
        ],
    )
    config, english = tiny.settings(), texts_of(["", "abcdefghijklmnop", *map(str, range(58))])
    few = dataclasses.replace(ON, steps=3, batch_rows=2, packing=False)
    rows = llm2vec.text_rows(config, tokenizer, english, few, seed=0)
    assert 6 <= len(rows) <= 10 and rows[0]["target_ids"].shape == (12,)
    every = llm2vec.text_rows(
        config, tokenizer, english, dataclasses.replace(few, steps=30), seed=0
    )
    assert len(every) == 59 and every.counts.dropped == 1
    assert every.counts.truncated == {"target": 1}
    for row in every:
        number = row["example"][0] - 1
        ids = row["target_ids"][row["target_segments"] > 0]
        np.testing.assert_array_equal(ids, tokenizer.encode([english[number]], 12)[0])
    held = dataclasses.replace(config.adaptation.training, evaluate_every=10)
    adaptation = dataclasses.replace(config.adaptation, training=held, dev_texts=20)
    settings = dataclasses.replace(config, adaptation=adaptation)
    _, held = hold_out_texts(english, 20)
    fewer = llm2vec.text_rows(settings, tokenizer, english, dataclasses.replace(few, steps=30), 0)
    read = {bytes(row["target_ids"]) for row in fewer}
    assert len(fewer) == 59 - len([text for text in held if text])
    assert read < {bytes(row["target_ids"]) for row in every}
    with pytest.raises(ValueError, match="none of the 2 English texts holds a token"):
        llm2vec.text_rows(config, tokenizer, texts_of(["", ""]), few, seed=0)


# ---------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def prepared_run(tmp_path_factory):
    """A run with both stages, finished and moved since, and the arguments that it was made with."""
    folder = tmp_path_factory.mktemp("prepared")
    fields = reduced.own_fields(folder, folder)
    texts = (folder / "t.txt").read_text().splitlines()
    tiny_folders.m2m100(folder / "encoder", texts * 20)
    tiny_folders.llama(folder / "llm", texts)
    fields |= {"encoder": folder / "encoder", "llm": folder / "llm", "trained": "lora"}
    for stage in ("mntp", "simcse"):
        for field, value in (("steps", 6), ("batch_rows", 8), ("learning_rate", 0.02)):
            fields[f"{stage}.training.{field}"] = value
    trained = ("adaptation.training", "teacher", "distillation.training", "mt_encoder")
    fields |= {f"{stage}.steps": 6 for stage in trained}
    arguments = (*reduced.ARGUMENTS, *reduced.flags(fields))
    done = reduced.train(*arguments, "--workdir=run", cwd=folder)
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    return Path(shutil.move(folder / "run", folder / "moved")), arguments


@pytest.mark.slow
def test_a_run_goes_on_with_the_adapters_that_it_has_trained(prepared_run):
    run, _ = prepared_run
    adapters = json.loads((run / "model.json").read_text())["llm_adapters"]
    assert adapters == ["mntp/adapter", "simcse/adapter"]
    opened = open_run(run)
    assert opened.adapters == adapters
    assert opened.config.llm_adapters == tuple(os.fspath(run / name) for name in adapters)
    # Read with them merged it is what the run's later stages began with, which open_run checks.
    llm = opened.load_parts().llm
    merged = load_merged(opened.config.llm, opened.config.llm_adapters)
    plain = load_llama(opened.config.llm)
    np.testing.assert_array_equal(llm.layers.q.kernel[...], merged.layers.q.kernel[...])
    assert np.abs(llm.layers.q.kernel[...] - plain.layers.q.kernel[...]).max() > 1e-3
    lines = (run / "predictions" / "mt_llm.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    answers = mtllm_jax.load(run).classify(
        [row["text"] for row in rows], [row["language"] for row in rows]
    )
    assert [next(iter(answer)) for answer in answers] == [row["prediction"] for row in rows]
    # Another run begins with its stage 1, and so with its adapters.
    values = json.loads((run / "config.json").read_text())
    values |= {"stage1": os.fspath(run), "encoder": "", "llm": "", "adaptation_text": []}
    config = begun(resolve(c.MTLLM, values))
    assert config.llm_adapters == opened.config.llm_adapters
    assert not {"mntp.training", "simcse.training"} & set(config.stages())


@pytest.mark.slow
def test_a_stage_that_is_done_is_not_begun_again(prepared_run, tmp_path):
    run, arguments = prepared_run
    again = Path(shutil.copytree(run, tmp_path / "run"))
    (again / "results.json").unlink()
    shutil.rmtree(again / "simcse" / "adapter")  # as if killed before it was written
    (again / "simcse" / "done.json").unlink()
    done = reduced.train(*arguments, "--workdir=run", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    assert "LLM preparation, MNTP  done before" in done.stdout
    assert "SimCSE  1/6 steps" not in done.stdout and "MNTP  1/6 steps" not in done.stdout
    name = Path("simcse", "adapter", "adapter_model.safetensors")
    assert (again / name).read_bytes() == (run / name).read_bytes()


@pytest.mark.slow
def test_peft_reads_the_adapters_and_torch_then_what_we_read(prepared_run):
    torch = pytest.importorskip("torch", reason="the reference is torch")
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    run, _ = prepared_run
    model = transformers.AutoModelForCausalLM.from_pretrained(open_run(run).config.llm)
    for name in ("mntp", "simcse"):
        model = peft.PeftModel.from_pretrained(model, run / name / "adapter").merge_and_unload()
    ids = np.arange(3, 23, dtype=np.int32)[None]
    sees_all = torch.zeros(1, 1, 20, 20)
    with torch.no_grad():
        theirs = model.eval().model(torch.tensor(ids).long(), attention_mask=sees_all)
    llm = open_run(run).load_parts().llm
    ours = llm.hidden(llm.embed(jnp.asarray(ids)), jnp.ones_like(ids), causal=False)
    np.testing.assert_allclose(ours, theirs.last_hidden_state, atol=1e-4, rtol=1e-4)
