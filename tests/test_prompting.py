"""Prompts as templates and tokens, and the system that answers by what is likeliest behind them."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from configs.mtllm import mini
from mtllm_jax import sharding
from mtllm_jax.config import SYSTEMS, Mesh
from mtllm_jax.data.tokenise import TargetTokenizer
from mtllm_jax.data.train_tokenizer import train_llama_tokenizer
from mtllm_jax.models.llama import Llama
from mtllm_jax.recipes import inputs, systems
from mtllm_jax.recipes.inputs import idle_fields
from mtllm_jax.recipes.prompting import prompt_tokens, prompted
from mtllm_jax.tasks.prompt import PROMPTS, check_prompt, last_words, prompts
from mtllm_jax.tasks.task import Task

TEXT = {"id": "1", "language": "eng_Latn", "text": "Peru and {Chile}", "label": "Asia"}
PAIR = TEXT | {"text_pair": "Kenya"}
CHOICE = {
    "id": "1",
    "language": "eng_Latn",
    "context": "Peru",
    "question": "Where?",
    "choices": ["Asia", "South America"],
    "label": "2",
}
LIMITS = mini().evaluation


def test_rows_beyond_the_sliding_window_are_refused_at_the_door(tokenizer, monkeypatch):
    asked = task(TEXT | {"text": "Kenya is in Africa. " * 40})
    monkeypatch.setattr(inputs, "local_files", lambda folder: folder)
    monkeypatch.setattr(inputs, "TargetTokenizer", lambda files: tokenizer)
    mesh = sharding.make_mesh(Mesh(), jax.devices()[:1])
    ((prompt, following),) = prompt_tokens(LIMITS, tokenizer, asked, asked.tests["seen"])
    assert len(prompt) == LIMITS.max_length == 128 and sum(map(len, following)) <= 32

    def check(window):
        sizes = types.SimpleNamespace(sliding_window=window)
        monkeypatch.setattr(inputs, "check_llama", lambda folder: sizes)
        inputs._check_window(mini(), asked, mesh)

    check(None)
    check(160)
    with pytest.raises(
        ValueError, match=r"config\.evaluation\.max_length is 128; .* window of 128"
    ):
        check(128)


def test_the_llm_is_read_when_it_is_asked(monkeypatch):
    """Answers that an earlier start has left take none."""

    def read(job, made):
        raise InterruptedError

    monkeypatch.setattr(systems, "_causal_llm", read)
    monkeypatch.setattr(systems, "_readers", lambda *_: (None, None))
    monkeypatch.setattr(systems, "_llm_reader", lambda *_: None)
    limits = dataclasses.replace(LIMITS, systems=("llm_prompted",))
    job = types.SimpleNamespace(config=dataclasses.replace(mini(), evaluation=limits))
    tuned = {0: types.SimpleNamespace(teacher=None, translate_train=None)}
    made = types.SimpleNamespace(
        task=task(TEXT), parts=None, tuned=tuned, translator_folder=None, llm_adapters=["a"]
    )
    built = systems.build_systems(job, made)(0)
    with pytest.raises(InterruptedError):
        built["llm_prompted"].predict([TEXT])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = ["Peru and Chile are in South America", "Kenya is in Africa", "Where is Asia?"] * 5
    train_llama_tokenizer(texts, 300, folder)
    return TargetTokenizer(folder)


def task(row, labels=("Africa", "South America", "Asia")):
    return Task("t", labels, [row], {"seen": [row]})


def test_rows_as_prompts():
    labels = ("a", "b")
    (told,) = prompts(PROMPTS["text"], [TEXT], labels)
    assert told == ("Text: Peru and {Chile}", "\nLabels: a, b\nLabel:")
    (told,) = prompts(PROMPTS["pair"], [PAIR], labels)
    assert told == ("Text 1: Peru and {Chile}\nText 2: Kenya", "\nLabels: a, b\nLabel:")
    (told,) = prompts(PROMPTS["choice"], [CHOICE], ("1", "2"))
    assert told == ("Peru", "\nQuestion: Where?\nAnswer:")
    assert [last_words(t) for t in ("{text} are in", "a\nb", "{text}", PROMPTS["text"])] == [
        *(" are in", "b", "", "Label:")
    ]


@pytest.mark.parametrize("length", [128, 20])
@pytest.mark.parametrize("row", [TEXT, CHOICE])
def test_what_follows_is_tokenised_as_in_the_whole_text(tokenizer, row, length):
    """And of a prompt that is too long the end of its text alone is cut."""
    limits = dataclasses.replace(LIMITS, max_length=length)
    row = row | {key: row[key] * 20 for key in ("text", "context") if key in row}
    asked = task(row, ("1", "2") if "choices" in row else ("Africa", "South America", "Asia"))
    ((prompt, following),) = prompt_tokens(limits, tokenizer, asked, [row])
    ((first, second),) = prompts(
        PROMPTS["choice" if "choices" in row else "text"], [row], asked.labels
    )
    names = row.get("choices", asked.labels)
    assert len(following) == len(names) and len({len(ids) for ids in following}) > 1
    whole = tokenizer.encode([f"{first}{second} {name}" for name in names])
    behind = len(tokenizer.encode([second])[0])
    for ids, one in zip(whole, following, strict=True):
        said = len(ids) - len(one)
        np.testing.assert_array_equal(ids[said:], one)
        if len(ids) <= length:
            np.testing.assert_array_equal(ids[:said], prompt)
    if length == 20 and behind < 20:
        assert len(prompt) == 20
    tail = tokenizer.decode([prompt])[0]
    assert tail.endswith(second)


def test_the_likeliest_label_is_the_answer(tokenizer):
    """As by scoring each label's text whole; a sum and a mean over its tokens may differ."""
    config = dataclasses.replace(tiny.LLM, vocab_size=tokenizer.vocab_size)
    llm = Llama(config, nnx.Rngs(3))
    rows = [
        TEXT | {"text": text} for text in ("Peru", "Kenya and Chile", "Where is Asia?", "a b c")
    ]
    mesh = sharding.make_mesh(Mesh(), jax.devices()[:1])
    limits = dataclasses.replace(LIMITS, batch_rows=4, prompt="{text} is in")
    labels = ("Africa", "South America", "Asia", "Where")

    @jax.jit
    def log_softmax(ids):
        h = llm.hidden(llm.embed(ids[None]), jnp.ones((1, len(ids)), jnp.int32), causal=True)
        return jax.nn.log_softmax(llm.logits(h))[0]

    def said(row, label):
        (ids,) = tokenizer.encode([f"{row['text']} is in {label}"])
        num = len(ids) - len(tokenizer.encode([f"{row['text']} is in"])[0])
        told = log_softmax(np.pad(ids, (0, 40 - len(ids))))  # what is behind is not seen
        return sum(float(told[i - 1, ids[i]]) for i in range(len(ids) - num, len(ids))), num

    for how in ("sum", "mean"):
        chosen = dataclasses.replace(limits, prompt_score=how)
        asked = task(rows[0], labels)
        answer = prompted(chosen, llm, tokenizer, asked, dtype="float32", mesh=mesh)
        found = []
        for row in rows:
            scores = [said(row, label) for label in labels]
            values = [total / (num if how == "mean" else 1) for total, num in scores]
            found.append(labels[int(np.argmax(values))])
        assert answer(rows) == found


@pytest.mark.parametrize(
    ("template", "kind", "message"),
    [
        ("{text} {tekst}", "text", r"names \{tekst\}; it may name \{text\}, \{labels\}"),
        ("{labels}:", "text", r"must name \{text\}"),
        ("{text}:", "pair", r"must name \{text_pair\}"),
        ("{question} {labels}", "choice", r"names \{labels\}; it may name \{context\}, \{quest"),
        ("{text} is ", "text", "ends with white space"),
        ("{text", "text", "is no template: expected '}'"),
        ("{text!r}", "text", "more than a name in braces"),
    ],
)
def test_templates_that_cannot_be(template, kind, message):
    with pytest.raises(ValueError, match=message):
        check_prompt(template, kind)


def test_systems_are_chosen_by_name():
    def chosen(*names):
        limits = dataclasses.replace(LIMITS, systems=names)
        return dataclasses.replace(mini(), evaluation=limits)

    with pytest.raises(ValueError, match=r"systems .* \(nearest to 'llm_prompt': llm_prompted\)"):
        chosen("mt_llm", "llm_prompt")
    for names in ((), ("mt_llm", "mt_llm")):
        with pytest.raises(ValueError, match="a list without repetitions"):
            chosen(*names)
    assert "mt_encoder" in chosen(*SYSTEMS).stages()
    config = chosen("mt_llm")
    assert "mt_encoder" not in config.stages()
    told = idle_fields(config, ["mt_encoder.steps", "evaluation.prompt"])
    assert "config.mt_encoder.steps (config.evaluation.systems has no mt_encoder)" in told
    assert "config.evaluation.prompt (config.evaluation.systems has no llm_prompted)" in told
