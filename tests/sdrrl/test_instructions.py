"""The embedded instructions: what is asked and answered, and that held-out ones are held out."""

import pytest
from babel import Locale

from mtllm_jax.data.babel_instructions import SPLITS, TASKS, Instructions, items

LANGUAGES = ("deu_Latn", "jpn_Jpan", "swh_Latn")


@pytest.fixture(scope="module")
def instructions():
    return Instructions(LANGUAGES, seed=3)


def test_facts_are_those_that_cldr_has():
    answers = {item.id: item.answer for item in items()}
    assert answers["region/territory/KE"] == "continent/002"
    assert answers["currency/territory/JP"] == "currency/JPY"
    assert answers["language/territory/JP"] == "language/ja"
    assert answers["script/language/ru"] == "script/Cyrl"
    assert answers["territory/language/ru"] == "territory/RU"
    assert "language/territory/CH" not in answers  # four official ones
    assert len(answers) == len(items()) > 600
    assert {item.task for item in items()} == set(TASKS)


def test_an_instruction_says_the_same_in_every_language(instructions):
    found = {}
    for code in ("eng_Latn", *LANGUAGES):
        for split in SPLITS:
            found |= {(row["id"], code): row for row in instructions.rows(split, code)}
    german = found["currency/territory/JP", "deu_Latn"]
    assert german["prompt"] == f"{Locale('de').territories['JP']} <currency>"
    assert german["reference"] == Locale("de").currencies["JPY"]
    assert found["currency/territory/JP", "eng_Latn"]["prompt"] == "Japan <currency>"
    assert found["region/territory/KE", "jpn_Jpan"]["reference"] == "アフリカ"


def test_an_item_is_in_one_split(instructions):
    found = [item for split in SPLITS for item in instructions.items[split]]
    assert all(instructions.items.values())
    assert sorted(item.id for item in found) == sorted(item.id for item in items())
    train = {row["prompt"] for code in LANGUAGES for row in instructions.rows("train", code)}
    test = {row["prompt"] for code in LANGUAGES for row in instructions.rows("test", code)}
    assert train and test and train.isdisjoint(test)
    # Another seed holds out others; the same one, the same.
    again = Instructions(LANGUAGES, seed=3)
    assert again.items == instructions.items
    assert Instructions(LANGUAGES, seed=4).items != instructions.items


def test_the_llm_reads_no_instruction_in_another_language(instructions):
    texts = set(instructions.llm_texts())
    asked = [row for split in SPLITS for row in instructions.rows(split, "eng_Latn")]
    assert {f"{row['prompt']} {row['reference']}" for row in asked} <= texts
    english = {row["prompt"] for row in asked}
    others = {
        row["prompt"]
        for code in LANGUAGES
        for split in SPLITS
        for row in instructions.rows(split, code)
    }
    begins = {f"{text.split('> ')[0]}>" for text in texts if "> " in text}
    assert begins == english
    assert others - english and begins.isdisjoint(others - english)
    pairs = instructions.pairs("deu_Latn")
    assert ("Kenya", "Kenia") in pairs
    assert {"Kenia = Kenya", "Kenia, Kenia-Schilling"} <= texts
