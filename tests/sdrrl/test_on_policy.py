"""A model's own answers, and what it says of them with the instruction in two languages."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_folders
from etils import epath
from flax import nnx

from configs.sdrrl import mini
from mtllm_jax.config import LoRA
from mtllm_jax.data.packing import ALIGNED, pack
from mtllm_jax.data.templates import Template
from mtllm_jax.data.tokenise import TargetTokenizer
from mtllm_jax.data.transfer.held_out import HeldOut
from mtllm_jax.models.layers import LoRAParam, split
from mtllm_jax.models.llama import Llama, LlamaConfig
from mtllm_jax.recipes import stacking
from mtllm_jax.recipes.on_policy import (
    both_languages,
    both_sides,
    drawn,
    frozen_of,
    teacher_divergence,
)
from mtllm_jax.runfolder import write_jsonl

CONTEXT = "{source} = {prompt}"
LENGTHS = {"target": 24, "teacher": 40}
SAID = [
    {"id": "a", "language": "deu_Latn", "prompt": "Japan <c>", "source": "Japan is <c>"},
    {"id": "b", "language": "deu_Latn", "prompt": "Kenia <c>", "source": "Kenya <c>"},
    {"id": "c", "language": "fin_Latn", "prompt": "Kenia", "source": "Kenya"},
]
ANSWERS = [[5, 6, 7], [8], []]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llm") / "llm"
    texts = [CONTEXT.format(**row) for row in SAID] * 20
    tiny_folders.llama(folder, texts)
    return folder


@pytest.fixture(scope="module")
def template(folder):
    return Template("none", TargetTokenizer(folder))


def with_ids():
    return [row | {"answer_ids": ids} for row, ids in zip(SAID, ANSWERS, strict=True)]


def test_answers_stand_behind_both_prompts_and_their_tokens_side_by_side(template):
    texts, rejects = both_sides(template, CONTEXT, with_ids(), LENGTHS)
    assert not rejects
    for row, text in zip(with_ids(), texts, strict=True):
        (own,) = template([row["prompt"]])
        (both,) = template([CONTEXT.format(**row)])
        np.testing.assert_array_equal(text["target"], [*own, *row["answer_ids"]])
        np.testing.assert_array_equal(text["teacher"], [*both, *row["answer_ids"]])
        places = np.flatnonzero(text[ALIGNED])
        # From the prompt's last token, which says the answer's first, to the answer's last.
        assert places.tolist() == list(range(len(own) - 1, len(text["target"])))
        others = text[ALIGNED][places] - 1
        assert others.tolist() == list(range(len(both) - 1, len(text["teacher"])))


def test_an_answer_without_room_loses_its_end_and_a_prompt_without_is_left_out(template):
    (both,) = template([CONTEXT.format(**SAID[0])])
    lengths = {"target": 24, "teacher": len(both) + 2}
    (text,), _ = both_sides(template, CONTEXT, with_ids()[:1], lengths)
    assert text["target"][-2:].tolist() == [5, 6] and len(text["teacher"]) == len(both) + 2
    lengths["teacher"] = len(both) - 1
    texts, (reject,) = both_sides(template, CONTEXT, with_ids()[:1], lengths)
    assert not texts and reject["id"] == "a" and f"{len(both)} of" in reject["reason"]


def a_batch(template, context):
    texts, _ = both_sides(template, context, with_ids(), LENGTHS)
    lengths = LENGTHS | {ALIGNED: LENGTHS["target"]}
    rows = pack(texts, lengths, dict.fromkeys(lengths, 0))
    assert len(rows) < len(texts)  # some lie in a row together
    found = [rows[i] for i in range(len(rows))]
    # As many rows for all contexts, so that one program does for them.
    found += [jax.tree.map(np.zeros_like, found[0])] * (len(SAID) - len(rows))
    return texts, {name: np.stack([row[name] for row in found]) for name in found[0]}


@pytest.fixture(scope="module")
def llm(template):
    vocab_size = max(int(ids.max()) for ids in template([CONTEXT.format(**r) for r in SAID])) + 1
    return Llama(LlamaConfig(vocab_size, 8, 1, 2, 1, 4, 16), nnx.Rngs(0))


@nnx.jit
def log_p(model, ids_BT, segments_BT):
    h_BTD = model.hidden(model.embed(ids_BT), segments_BT, causal=True)
    return jax.nn.log_softmax(model.logits(h_BTD))


def alone(model, ids):
    """What is said at each token of one text by itself. float64 [tokens, V]."""
    length = max(LENGTHS.values())
    ids_BT = np.pad(ids, (0, length - len(ids)))[None]
    segments_BT = (np.arange(length) < len(ids)).astype(np.int32)[None]
    return np.asarray(log_p(model, ids_BT, segments_BT), np.float64)[0, : len(ids)]


@pytest.mark.parametrize("trained", ["all", "lora"])
def test_the_loss_is_the_divergence_at_the_answers_tokens(template, llm, trained):
    lora = LoRA(2, 4, 0.0, ("down",))
    config = dataclasses.replace(mini(), trained=trained, lora=lora)
    learner = stacking.with_adapters(config, llm, seed=1)
    graph, trainable, kept = split(learner, LoRAParam if trained == "lora" else nnx.Param)
    teacher_graph, teacher = nnx.split(llm)
    frozen = frozen_of(config, kept, teacher)
    objective = jax.jit(teacher_divergence(config, graph, teacher_graph))
    # The student begins as its teacher: given the same prompt, both say the same.
    _, batch = a_batch(template, "{prompt}")
    total, count = objective(trainable, frozen, batch, None)["loss"]
    # Sums of some tens of float32 rounding errors of logits of about 1.
    assert abs(float(total)) < 1e-4 and count == sum(len(ids) + 1 for ids in ANSWERS)

    rng = np.random.default_rng(0)
    trainable = jax.tree.map(
        lambda x: x + rng.normal(scale=0.3, size=x.shape).astype(np.float32), trainable
    )
    texts, batch = a_batch(template, CONTEXT)
    total, count = objective(trainable, frozen, batch, None)["loss"]
    student = nnx.merge(graph, trainable, kept)
    wanted = 0.0
    for text, answer in zip(texts, ANSWERS, strict=True):
        compared = -1 - len(answer)
        p_KV = alone(student, text["target"])[compared:]
        q_KV = alone(llm, text["teacher"])[compared:]
        wanted += np.sum(np.exp(q_KV) * (q_KV - p_KV))
    assert wanted > 0.1 and count == sum(len(ids) + 1 for ids in ANSWERS)
    # Sums of some tens of float32 terms.
    np.testing.assert_allclose(total, wanted, rtol=1e-4)


def test_instructions_are_those_translated_and_not_held_out(tmp_path):
    def written(name, *rows):
        file = epath.Path(tmp_path / name)
        write_jsonl(
            file, [dict(zip(("id", "prompt", "language"), row, strict=True)) for row in rows]
        )
        return file

    deu = "deu_Latn"
    there = (("a", "Japan!", deu), ("b", "Kenia", deu), ("c", "Chile", deu))
    translations = written("t.jsonl", *there)
    answers = written("a.jsonl", ("a", "Japan", ""), ("b", "Kenya", ""), ("c", "Peru", ""))
    files, targets = (answers, translations), ("fin_Latn", "deu_Latn")
    found = both_languages(*files, targets, HeldOut(["kenia", "peru"]))
    assert found == [{"id": "a", "language": "deu_Latn", "prompt": "Japan!", "source": "Japan"}]
    with pytest.raises(ValueError, match="no instruction was translated"):
        both_languages(*files, targets, HeldOut(["japan", "kenia", "peru"]))


def test_a_round_asks_some_by_lot_and_another_asks_others():
    asked = [{"id": str(i)} for i in range(100)]
    how = dataclasses.replace(mini().on_policy, instructions=30)
    first, again, other = (drawn(asked, how, seed) for seed in (0, 0, 1))
    assert len(first) == 30 and first == again != other
    assert drawn(asked, dataclasses.replace(how, instructions=0), 0) == asked
    assert len(drawn(asked[:7], how, 0)) == 7
