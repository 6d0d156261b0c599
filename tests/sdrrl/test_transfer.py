"""The transfer set: its kinds, where each example comes from, words switched, what is left out."""

import collections
import dataclasses
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import Processes

from mtllm_jax.config import COMBINATIONS, SDRRL_PARTS, TransferSet
from mtllm_jax.data.formatting import prose
from mtllm_jax.data.transfer import build
from mtllm_jax.data.transfer.build import Inputs, Transfer, make
from mtllm_jax.data.transfer.held_out import HeldOut, normalised, read_texts
from mtllm_jax.data.transfer.lexicon import Lexicon, lexicon_of, read_lexicon, switch
from mtllm_jax.data.transfer.parallel import Pair, cut, read_parallel
from mtllm_jax.data.transfer.rows import (
    Row,
    answer_filter,
    read_rows,
    read_translations,
    rewriting_prompts,
    same_text,
    similar,
    with_rewritten,
)

ENG, DEU, LIN = "eng_Latn", "deu_Latn", "lin_Latn"
TARGETS = (DEU, LIN)
COUNT = 6
KEYS = ("prompt", "answer", "reference")
ROWS = [
    Row(
        str(i),
        {name: f"eng {name} of the house {i}" for name in KEYS},
        {code: {name: f"{code[:3]} {name} {i}" for name in KEYS} for code in TARGETS},
    )
    for i in range(COUNT)
]
LEXICONS = {
    (ENG, code): lexicon_of(f"{code}.tsv", ENG, code, {"house": (f"haus-{code}",), "the": ("de",)})
    for code in TARGETS
}
PARALLEL = {
    code: [
        Pair(f"p:{i}", f"One two three {i}.", f"Ein zwei drei vier {code} {i}.") for i in range(4)
    ]
    for code in TARGETS
}
INPUTS = Inputs(ROWS, LEXICONS, PARALLEL, model="LLM", translator="NLLB")
WHOLE = TransferSet(ENG, TARGETS, switch_rate=1.0)


def sides(example):
    return example["prompt"], example["answer"]


def of(made, kind):
    return [example for example in made.examples if example["kind"] == kind]


# ---------------------------------------------------------------- kinds


def test_combinations_are_those_of_the_rows_written_out_by_hand():
    made = make(WHOLE, INPUTS)
    wanted = {}
    for i, (a, b) in itertools.product(range(COUNT), COMBINATIONS):
        for code in TARGETS:
            begins = {"L": "eng {} of the house " + str(i), "T": code[:3] + " {} " + str(i)}
            prompt = begins[a].format("prompt")
            if a != b:
                name = {ENG: "English", DEU: "German", LIN: "Lingala"}[ENG if b == "L" else code]
                prompt += f"\n\nAnswer in {name}."
            target = "" if a + b == "LL" else code
            wanted[a + b, target, str(i)] = prompt, begins[b].format("answer")
    found = {
        (e["kind"], e["target"], e["row"]): sides(e)
        for e in made.examples
        if e["kind"] in COMBINATIONS
    }
    assert found == wanted
    for example in made.examples:
        if example["kind"] in COMBINATIONS:
            codes = {"L": ENG, "T": example["target"]}
            said = [example["prompt_language"], example["answer_language"]]
            assert said == [codes[letter] for letter in example["kind"]]
            assert example["translator"] == ("NLLB" if "T" in example["kind"] else "")
            assert example["model"] == "LLM"
    per_row = {"LL": 1, "LT": 2, "TL": 2, "TT": 2, "switched": 4}
    counts = {kind: COUNT * times for kind, times in per_row.items()}
    assert made.counts == counts | {"translation": 4 * 2 * 2, "completion": 4 * 2}
    assert len({e["id"] for e in made.examples}) == len(made.examples) and not made.dropped


def test_switched_copies_say_their_words_by_their_lexicon():
    made = of(make(WHOLE, INPUTS), "switched")
    for example in made:
        code, row = example["target"], example["row"]
        prompt = f"eng prompt of de haus-{code} {row}"
        if example["combination"] == "LT":
            prompt += f"\n\nAnswer in {'German' if code == DEU else 'Lingala'}."
        assert example["prompt"] == prompt
        assert (example["replaced"], example["lexicon"]) == (2, f"{code}.tsv")
        own = f"eng answer of the house {row}"
        assert example["answer"] == (
            own if example["combination"] == "LL" else f"{code[:3]} answer {row}"
        )
    back = {
        (code, ENG): lexicon_of("back", code, ENG, {"deu": ("ger",), "prompt": ("task",)})
        for code in TARGETS
    }
    both = dataclasses.replace(WHOLE, switched_from=("TL",), switched_sides="both")
    made = make(both, dataclasses.replace(INPUTS, lexicons=LEXICONS | back))
    one = next(e for e in of(made, "switched") if e["target"] == DEU and e["row"] == "3")
    answer = "eng answer of de haus-deu_Latn 3"
    assert sides(one) == ("ger task 3\n\nAnswer in English.", answer) and one["replaced"] == 4


def test_the_language_of_an_answer_is_asked_for_as_the_template_says():
    plain = dataclasses.replace(WHOLE, crossed_prompt="{prompt}")
    prompts = {e["prompt"] for kind in ("LT", "TL") for e in of(make(plain, INPUTS), kind)}
    rows = {text for row in INPUTS.rows for text in (row.texts["prompt"],)}
    rows |= {t["prompt"] for row in INPUTS.rows for t in row.translations.values()}
    assert prompts == rows


def test_parallel_sentences_become_translations_both_ways_and_completions():
    made = make(WHOLE, INPUTS)
    found = {sides(e) for e in of(made, "translation") if e["target"] == DEU}
    wanted = set()
    for pair in PARALLEL[DEU]:
        into = "Translate the following English text into German.\n\n" + pair.source
        back = "Translate the following German text into English.\n\n" + pair.target
        wanted |= {(into, pair.target), (back, pair.source)}
    assert found == wanted
    wholes = {pair.target for pair in PARALLEL[DEU]}
    for example in of(made, "completion"):
        given = example["prompt"].split("\n\n", 1)[1]
        if example["target"] == DEU:
            assert f"{given} {example['answer']}" in wholes and given and example["answer"]
    few = dataclasses.replace(WHOLE, parallel_pairs=2)
    assert make(few, INPUTS).counts["completion"] == 2 * 2


def test_weights_are_how_often_and_halves_are_drawn_row_by_row():
    config = dataclasses.replace(WHOLE.of("sft"), ll=2.5)
    rows = [Row(str(i), {n: f"{n} {i}" for n in KEYS}) for i in range(400)]
    made = make(config, Inputs(rows))
    times = collections.Counter(e["row"] for e in made.examples)
    assert set(times.values()) == {2, 3} and len({e["id"] for e in made.examples}) == len(
        made.examples
    )
    # Of 400 fair draws, outside of 150 to 250 once in a million.
    assert 150 < sum(n == 3 for n in times.values()) < 250
    fewer = collections.Counter(e["row"] for e in make(config, Inputs(rows[:100])).examples)
    assert all(times[row] == count for row, count in fewer.items())


def test_what_is_drawn_follows_the_seed_and_not_the_rows_beside_it():
    half = dataclasses.replace(WHOLE, switch_rate=0.5)
    lines = {e["id"]: e for e in make(half, INPUTS).examples}
    other_order = dataclasses.replace(INPUTS, rows=ROWS[::-1][:4])
    again = make(half, other_order).examples
    assert all(lines[e["id"]] == e for e in again)
    assert make(half, INPUTS).examples == list(lines.values())
    other = make(dataclasses.replace(half, seed=1), INPUTS).examples
    assert [e["id"] for e in other] != [e["id"] for e in lines.values()]


def test_each_baseline_is_the_kinds_that_it_is_known_for():
    given = [{"id": row.id, **row.texts} for row in ROWS]
    asked = rewriting_prompts(given, WHOLE.rewriting_prompt)
    assert ROWS[1].texts["prompt"] in asked[1]["prompt"]
    assert ROWS[1].texts["reference"] in asked[1]["prompt"]
    answers = [{"id": r["id"], "answer": f"anew {r['id']}", "ended": True} for r in asked]
    rewritten = with_rewritten(given, answers)
    assert rewritten[0] == given[0] | {"rewritten": f"anew {ROWS[0].id}"}
    # Not answered, or not to its end.
    cut_short = answers[1] | {"ended": False}
    assert [r["rewritten"] for r in with_rewritten(given[:2], [cut_short])] == ["", ""]
    rows = [
        dataclasses.replace(row, texts={**row.texts, "rewritten": made["rewritten"]})
        for row, made in zip(ROWS, rewritten, strict=True)
    ]
    inputs = dataclasses.replace(INPUTS, rows=rows)
    kinds = {
        "sft": {"LL"},
        "t_sft": {"TT"},
        "cross_lingual": {"LL", "TT", "translation"},
        "sdrrl": {*COMBINATIONS, "switched", "translation", "completion"},
        "sdft": {"LL"},
    }
    says = {"sdrrl": "answer", "sdft": "anew"}
    for system, wanted in kinds.items():
        made = make(WHOLE.of(system), inputs)
        assert set(made.counts) == wanted
        (first, *_) = [e for e in made.examples if e["kind"] in ("LL", "TT")]
        assert says.get(system, "reference") in first["answer"]
    every = {*COMBINATIONS, "switched", "translation", "completion"}
    for part in SDRRL_PARTS[1:]:
        made = make(WHOLE.of(f"sdrrl_without_{part}"), inputs)
        left = {kind for kind in every if kind.lower() != part}
        assert set(made.counts) == left
    assert {*SDRRL_PARTS} == {"own_answers", *map(str.lower, WHOLE.weights)}
    without = dataclasses.replace(WHOLE, answer_filter="exact").of("sdrrl_without_own_answers")
    assert without == dataclasses.replace(WHOLE, answers="reference")
    for system in ("base", "sdrrl_without_mt", "ll", "own_answers"):
        with pytest.raises(ValueError, match=f"'{system}' is no system .* one of sft, t_sft"):
            WHOLE.of(system)


def test_a_baseline_has_the_prompts_of_the_set_that_it_is_compared_with():
    mine = dataclasses.replace(WHOLE, translation_prompt="{text} <{source} to {target}>", seed=3)
    made = mine.of("cross_lingual")
    assert (made.translation_prompt, made.seed) == (mine.translation_prompt, 3)
    assert made.check() is None


@pytest.mark.parametrize(
    ("changes", "translates"),
    [
        ({}, True),
        ({"lt": 0.0, "tl": 0.0, "tt": 0.0}, True),  # one switched copy is of LT
        ({"lt": 0.0, "tl": 0.0, "tt": 0.0, "switched_from": ("LL",)}, False),
        ({"lt": 0.0, "tl": 0.0, "tt": 0.0, "switched": 0.0}, False),
    ],
)
def test_what_is_made_of_translations_is_known(changes, translates):
    assert dataclasses.replace(WHOLE, **changes).translates == translates


# ---------------------------------------------------------------- what is left out


def test_held_out_texts_and_their_translations_are_left_out_and_counted():
    held = ["ENG  prompt, of the House 2!", "deu answer 4", PARALLEL[LIN][0].target]
    made = make(WHOLE, dataclasses.replace(INPUTS, held_out=HeldOut(held)))
    assert not [e for e in made.examples if e["row"] == "2" and e["kind"] in COMBINATIONS]
    four = {(e["kind"], e["target"]) for e in made.examples if e["row"] == "4"}
    assert ("LT", DEU) not in four and ("TT", DEU) not in four
    assert {("LL", ""), ("TL", LIN), ("LT", LIN)} <= four
    assert not [e for e in made.examples if e["target"] == LIN and e["row"] == "p:0"]
    counts = made.dropped_counts["held out for evaluation"]
    # Row 2 in all; of row 4 what says the answer in German, its switched copy of LT too.
    assert counts == {"LL": 1, "LT": 2 + 1, "TL": 2, "TT": 2 + 1, "switched": 4 + 1} | {
        **{"translation": 2, "completion": 1}
    }
    whole = make(WHOLE, INPUTS).counts
    assert {k: whole[k] - made.counts[k] for k in whole} == dict(counts)


def test_a_switched_copy_that_says_what_is_held_out_is_left_out():
    held_out = HeldOut(["eng prompt of de haus-deu_Latn 2"])
    made = make(WHOLE, dataclasses.replace(INPUTS, held_out=held_out))
    assert made.dropped_counts == {"held out for evaluation": {"switched": 2}}  # of LL and of LT


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=40), st.text(max_size=10))
def test_equal_is_what_differs_in_case_blanks_and_punctuation_alone(text, other):
    held = HeldOut([text])
    assert held.holds(f"  {text}… ") == bool(normalised(text))
    assert held.holds(other) == (normalised(other) == normalised(text) != "")


def test_texts_to_hold_out_come_from_files_of_any_kind(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"q": "one", "c": ["two", {"x": "three"}], "n": 1}\n')
    (tmp_path / "b.csv").write_text('id,text\n1,"four, ""4""\nand more"\n')
    (tmp_path / "c.tsv").write_text('x\ttext\n"said ""five"""\tsix\r\n')
    (tmp_path / "flores.dev").write_text("seven\neight\n")
    (tmp_path / "tool.py").write_text("nine\n")
    held = HeldOut(read_texts(tmp_path))
    for text in (
        "one",
        "two",
        "three",
        'four "4" and more',
        'said "five"',
        "six",
        "seven",
        "eight",
    ):
        assert held.holds(text), text
    assert not held.holds("nine") and not held.holds("1 one")
    assert HeldOut(read_texts(tmp_path / "a.jsonl")).holds("three")
    long = "this line is long enough to be known by"
    assert HeldOut([long]).holds(f"Please read:\n{long}.\nThanks") and not held.holds("hm\none")
    with pytest.raises(ValueError, match="does not exist"):
        list(read_texts(tmp_path / "no"))


def test_answers_are_kept_by_their_references():
    assert same_text(["It is 5.", "no"], ["it is  5", "yes"]) == [True, False]
    vectors = {"a": [1, 0], "b": [1, 1], "c": [0, -2]}
    keeps = similar(lambda texts: np.array([vectors[t] for t in texts]), 0.7)
    assert keeps(["a", "a", "b"], ["a", "b", "c"]) == [True, True, False]  # cosines 1, .707, -.707
    config = dataclasses.replace(WHOLE, answer_filter="exact")
    rows = [
        dataclasses.replace(r, texts={**r.texts, "reference": r.texts["answer"]}) for r in ROWS[:2]
    ]
    rows += [ROWS[2], Row("9", {"prompt": "i", "answer": "a"})]
    made = make(config, dataclasses.replace(INPUTS, rows=rows, answer_filter=answer_filter(config)))
    assert {e["row"] for e in of(made, "LL")} == {"0", "1"}
    assert made.dropped_counts["answer filter: exact"] == {"row": 1}
    assert made.dropped_counts["there is no reference"] == {"row": 1}
    with pytest.raises(ValueError, match="'similarity', which needs a model"):
        answer_filter(dataclasses.replace(WHOLE, answer_filter="similarity"))
    assert answer_filter(WHOLE) is None


def test_rows_without_a_translation_or_a_word_to_switch_are_counted():
    rows = [dataclasses.replace(ROWS[0], translations={DEU: ROWS[0].translations[DEU]})]
    made = make(WHOLE, dataclasses.replace(INPUTS, rows=rows))
    assert made.dropped_counts == {
        "there is no translation": {"LT": 1, "TL": 1, "TT": 1, "switched": 1}
    }
    rows = [Row("x", {"prompt": "`the house` {house}", "answer": "a"})]
    config = dataclasses.replace(WHOLE, lt=0.0, tl=0.0, tt=0.0, switched_from=("LL",))
    made = make(config, dataclasses.replace(INPUTS, rows=rows))
    assert made.dropped_counts == {"no word was replaced": {"switched": 2}}


# ---------------------------------------------------------------- lexicons


def test_both_layouts_and_both_directions(tmp_path):
    (tmp_path / "ln_en.tsv").write_text(
        "Ndako\thouse\nndako ya\tHouse\nalone\nmbisi\tpike (verb)\nradio\tradio\nte\tnot\nte\tno\n"
    )
    (tmp_path / "en-fr.txt").write_text("the le\nthe la\nhouse\tmaison\n")
    (tmp_path / "ts_en.tsv").write_text("ntlo\thouse\n")
    lexicon = read_lexicon(tmp_path, ENG, LIN)
    entries = {"house": ("Ndako", "ndako ya"), "pike": ("mbisi",), "not": ("te",), "no": ("te",)}
    assert (dict(lexicon.entries), lexicon.skipped, lexicon.longest) == (entries, 1, 1)
    back = read_lexicon(tmp_path / "ln_en.tsv", LIN, ENG)
    assert back.entries["te"] == ("not", "no") and back.longest == 2
    assert read_lexicon(tmp_path, ENG, "fra_Latn").entries["the"] == ("le", "la")
    for path, target, words in (
        (
            "ln_en.tsv",
            DEU,
            "is a lexicon of lin_Latn and eng_Latn; it must be one of eng_Latn and deu",
        ),
        ("ts_en.tsv", "tso_Latn", "is known to hold Tswana"),
        (".", "tso_Latn", "holds no lexicon of eng_Latn and tso_Latn"),
    ):
        with pytest.raises(ValueError, match=words):
            read_lexicon(tmp_path / path, ENG, target)
    for name, words in (
        ("xq_en.tsv", "language 'xq' is not one of .* the nearest are [a-z_A-Z]+, [a-z_A-Z]+, "),
        ("words.tsv", "is not called as lexicons are"),
    ):
        (tmp_path / name).write_text("a\tb\n")
        with pytest.raises(ValueError, match=words):
            read_lexicon(tmp_path / name, ENG, DEU)
    (tmp_path / "de_en.tsv").write_text("radio\tradio\n")
    with pytest.raises(ValueError, match="holds no words of eng_Latn"):
        read_lexicon(tmp_path / "de_en.tsv", ENG, DEU)


def switched(text, lexicon, rate=1.0, seed=0):
    return switch(text, lexicon, rate, np.random.default_rng(seed))[0]


def test_words_phrases_case_and_scripts_without_blanks():
    words = {"house": ("Haus",), "thank you": ("danke",), "you": ("du",), "don't": ("nicht",)}
    lexicon = lexicon_of("x", ENG, DEU, words)
    text = (
        "HOUSE, house, House; housing! Thank  you. You don't `house` https://house.org {you} you's"
    )
    assert switched(text, lexicon) == (
        "HAUS, Haus, Haus; housing! Danke. Du nicht `house` https://house.org {you} you's"
    )
    assert switched("Thank, you", lexicon) == "Thank, du"
    thai = lexicon_of("x", "tha_Thai", ENG, {"แมว": ("cat",), "แมวน้ำ": ("seal",), "น้ำ": ("water",)})
    assert switched("ฉันเห็นแมวน้ำกับแมว", thai) == "ฉันเห็นsealกับcat"
    # นำ is no word of it, though น and a following sign are cut nowhere.
    assert switched("น้", lexicon_of("x", "tha_Thai", ENG, {"น": ("n",)})) == "น้"
    chinese = lexicon_of("x", "zho_Hans", ENG, {"我": ("I",), "我们": ("we",), "猫": ("cat",)})
    assert switched("我们爱猫。", chinese) == "we爱cat。"
    hindi = lexicon_of("x", "hin_Deva", ENG, {"हिन्दी": ("Hindi",)})
    assert switched("मैं हिन्दी हूँ", hindi) == "मैं Hindi हूँ"
    several = lexicon_of("x", ENG, DEU, {"a": ("b", "c")})
    assert {switched("a", several, seed=seed) for seed in range(20)} == {"b", "c"}


WORD = st.sampled_from(["the", "House", "tree", "`the`", "{the}", "\n", ",", "3", "https://the.re"])


@settings(max_examples=60, deadline=None)
@given(st.lists(WORD, max_size=15).map(" ".join), st.floats(0.1, 1.0))
def test_switching_is_replacing_word_by_word_outside_of_code(text, rate):
    """Against a brute force: translations mark themselves, and undone they give the text."""
    lexicon = lexicon_of("x", ENG, DEU, {w: (f"<{w}>",) for w in ("the", "house")})
    made, count = switch(text, lexicon, rate, np.random.default_rng(0))
    assert re.sub(r"<(\w+)>", r"\1", made).casefold() == text.casefold()
    marked = len(re.findall(r"<\w+>", made))
    assert marked == count
    if rate == 1.0:
        inside = "".join(part for part, is_prose in prose(text) if is_prose)
        assert count == len(re.findall(r"\b(?:the|house)\b", inside.casefold()))


# ---------------------------------------------------------------- parallel corpora


def test_seed_and_ntrex_are_read_and_joined_by_line(tmp_path):
    seed, ntrex = tmp_path / "seed", tmp_path / "NTREX-128"
    seed.mkdir()
    ntrex.mkdir()
    for code, lines in (("eng_Latn", "one\ntwo\n"), ("gug_Latn", "peteĩ\nmokõi\n")):
        (seed / code).write_text(lines)
    name = "newstest2019-{}.txt".format
    (ntrex / name("src.eng")).write_bytes(b"one\r\ntwo\r\n")
    (ntrex / name("ref.deu")).write_bytes(b"eins\r\nzwei\r\n")
    (ntrex / name("ref.fra")).write_bytes(b"un\ndeux\n")
    assert read_parallel("seed", tmp_path, ENG, "grn_Latn")[1] == Pair("seed:2", "two", "mokõi")
    assert read_parallel("ntrex", tmp_path, "fra_Latn", DEU)[0] == Pair("ntrex:1", "un", "eins")
    assert read_parallel("ntrex", tmp_path, DEU, ENG)[0] == Pair("ntrex:1", "eins", "one")
    with pytest.raises(ValueError, match="tatoeba is aligned with English alone"):
        read_parallel("tatoeba", tmp_path, "fra_Latn", DEU)
    with pytest.raises(ValueError, match="nearest are"):
        read_parallel("ntrex", tmp_path, ENG, "swa")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text("abc", min_size=1, max_size=4), min_size=2, max_size=30))
def test_a_text_is_cut_between_words_near_the_share_that_is_asked_for(words):
    text = " ".join(words)
    place = cut(text, ENG, (0.5, 0.5), np.random.default_rng(0))
    given, rest = text[:place].split(), text[place:].split()
    assert given + rest == words and given and rest
    assert abs(len(given) - len(words) / 2) <= 1


def test_a_text_without_blanks_is_cut_between_characters():
    rng = np.random.default_rng(0)
    places = {cut("我们去", "zho_Hans", (0.1, 0.9), rng) for _ in range(50)}
    assert places == {1, 2} and cut("word", ENG, (0.5, 0.5), rng) == 0


# ---------------------------------------------------------------- files and folders


def write(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_and_translations_are_read_and_what_fails_is_a_reject(tmp_path):
    good = {"prompt": "i", "answer": "a", "reference": ""}
    rows = [
        good | {"id": "x"},
        good | {"answer": " "},
        good,
        good | {"id": "x"},
        good | {"answer": None},
        good | {"ended": False},
    ]
    read, rejects = read_rows(write(tmp_path / "r.jsonl", rows), ["answer"])
    assert [(r.id, dict(r.texts)) for r in read] == [
        (id_, {"prompt": "i", "answer": "a"}) for id_ in ("x", "3")
    ]
    assert [(r.line, r.reason) for r in rejects] == [
        (2, "the answer is empty"),
        (4, "the id 'x' was there before"),
        (5, "the answer is empty"),
        (6, "the answer was cut before its end"),
    ]
    lines = [
        good | {"id": i, "language": c} for i, c in (("x", DEU), (3, LIN), ("y", DEU), ("x", ENG))
    ]
    lines += [good | {"id": "x", "language": LIN, "answer": ""}]
    path = write(tmp_path / "t.jsonl", lines)
    joined, bad = read_translations(path, read, ["answer"], TARGETS)
    assert [sorted(row.translations) for row in joined] == [[DEU], [LIN]]
    assert [(r.line, r.reason) for r in bad] == [
        (3, "no row has the id 'y'"),
        (5, "the answer is empty"),
    ]
    config = WHOLE.of("t_sft")
    made = make(dataclasses.replace(config, answers="answer"), Inputs(joined, rejects=rejects))
    assert made.dropped_counts["the answer is empty"] == {"row": 2}
    for rows, words in (
        (
            [{"prompt": "i", "answr": "a"}],
            r"line 1: there is no column 'answer'.*nearest: 'answr'",
        ),
        (
            [good | {"answer": ""}],
            "holds no row that can be used; the first, line 1: the answer is",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            read_rows(write(tmp_path / "bad.jsonl", rows), ["answer"])
    bad = write(tmp_path / "bad.jsonl", [good | {"id": "x", "language": "german"}])
    with pytest.raises(ValueError, match=r"line 1: language 'german' .* the nearest are deu_Latn"):
        read_translations(bad, read, ["answer"], TARGETS)


@pytest.mark.parametrize(
    ("changes", "inputs", "words"),
    [
        ({}, {"lexicons": {}}, "there is no lexicon of eng_Latn and deu_Latn"),
        (
            {},
            {"lexicons": {(ENG, c): LEXICONS[ENG, LIN] for c in TARGETS}},
            "lexicon lin_Latn.tsv is",
        ),
        ({}, {"parallel": {}}, "translation is 1.0, and there are no parallel sentences in deu"),
        ({}, {"rows": ()}, "there are no rows of instructions"),
        ({"answers": "rewritten"}, {}, "no row has a text 'rewritten'"),
        ({"answer_filter": "exact"}, {}, "'exact', and none was given"),
        (
            {"targets": ("deu",)},
            {},
            "config.transfer.targets: language 'deu' .* nearest are deu_Latn",
        ),
        ({"targets": (DEU, DEU)}, {}, "none twice"),
        ({"tt": -1.0}, {}, "config.transfer.tt is -1.0; it must be 0"),
        ({"answers": "reference", "answer_filter": "exact"}, {}, "'none' where answers are not"),
        ({"prefix": (0.9, 0.1)}, {}, "the lower first"),
        ({"crossed_prompt": "in {language}"}, {}, r"crossed_prompt is .* a text with \{prompt\}"),
        ({"translation_prompt": "{text}"}, {}, r"translation_prompt is .* a text with \{source\}"),
        ({"completion_prompt": "{"}, {}, "completion_prompt"),
        ({"switched_from": ("XX",)}, {}, "some of LL, LT, TL, TT"),
        ({"switch_rate": 0.0}, {}, "above 0, to 1"),
    ],
)
def test_mistakes_are_one_sentence_each(changes, inputs, words):
    config = dataclasses.replace(WHOLE, **changes)
    with pytest.raises(ValueError, match=words):
        make(config, dataclasses.replace(INPUTS, **inputs))


def test_a_folder_is_whole_says_what_it_is_and_is_opened_again(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_SHARD", 20)
    folder = tmp_path / "set"
    found = build.build(folder, WHOLE, INPUTS)
    assert list(found) == make(WHOLE, INPUTS).examples == list(Transfer(folder))
    manifest = found.manifest
    assert sum(shard["rows"] for shard in manifest["shards"]) == len(found) == manifest["examples"]
    assert len(manifest["shards"]) > 2 and manifest["counts"] == make(WHOLE, INPUTS).counts
    assert manifest["made_from"]["config"]["targets"] == list(TARGETS)
    page = (folder / "sample.html").read_text()
    assert "haus-deu_Latn" in page and "2 words by deu_Latn.tsv" in page and "Lingala" in page
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    build.build(tmp_path / "again", WHOLE, INPUTS)
    assert {p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()} == before
    monkeypatch.setattr(build, "make", None)  # is not made twice
    assert list(build.build(folder, WHOLE, INPUTS)) == list(found)
    for config, inputs, words in (
        (dataclasses.replace(WHOLE, seed=1), INPUTS, "holds another transfer set .*seed"),
        (WHOLE, dataclasses.replace(INPUTS, rows=ROWS[1:]), "holds another transfer set .*rows"),
    ):
        with pytest.raises(ValueError, match=words):
            build.build(folder, config, inputs)
    min(folder.glob("rows-*")).unlink()
    with pytest.raises(ValueError, match="missing or cut off"):
        Transfer(folder)
    with pytest.raises(ValueError, match="holds no transfer set"):
        Transfer(tmp_path)


def test_the_page_shows_each_kind_where_not_all_examples_have_room(monkeypatch):
    made = make(WHOLE, INPUTS)
    kinds = {(e["kind"], e["combination"], e["target"]) for e in made.examples}
    monkeypatch.setattr(build, "_MOST_SHOWN", len(kinds))
    config = dataclasses.asdict(WHOLE)
    manifest = {"examples": 1, "counts": {}, "dropped": {}, "made_from": {"config": config}}
    page = build.sample_page(made, manifest)
    assert page.count("<article>") == len(kinds)
    assert all(f"<p>{kind}" in page for kind, _, _ in kinds)


def test_nothing_is_left_of_a_set_that_cannot_be_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build, "sample_page", full)
    with pytest.raises(ValueError, match="cannot be written: No space left"):
        build.build(tmp_path / "set", WHOLE, INPUTS)
    assert not (tmp_path / "set").exists()


PROGRAM = """
import sys
sys.path[:0] = sys.argv[1:]
import test_transfer
from mtllm_jax import distributed
from mtllm_jax.data.transfer import build
distributed.start()
found = build.build("set", test_transfer.WHOLE, test_transfer.INPUTS)
print(len(found), found.manifest["digest"])
distributed.finish()
"""


@pytest.mark.slow
def test_two_processes_make_one_set(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    root = Path(__file__).parent
    paths = (root, root.parent, root.parent.parent)
    with Processes(2, "program.py", *paths, cwd=tmp_path, devices=2) as two:
        codes, printed, errors = two.ended()
        assert codes == [0, 0], errors
    assert printed[0] == printed[1]
    alone = build.build(tmp_path / "alone", WHOLE, INPUTS)
    for path in (tmp_path / "alone").iterdir():
        assert (tmp_path / "set" / path.name).read_bytes() == path.read_bytes()
    assert printed[0].split() == [str(len(alone)), alone.manifest["digest"]]


@pytest.mark.real
def test_real_lexicons_and_corpora(mtllm_data):
    """Every lexicon that has a code; Seed and NTREX; nothing of FLORES is in them."""
    lexicon = read_lexicon(mtllm_data / "gatitos", ENG, LIN)
    assert isinstance(lexicon, Lexicon) and lexicon.entries["house"] and not lexicon.skipped
    text = "The house of my father has two doors. Visit https://house.org today!"
    made = switched(text, lexicon)
    assert "https://house.org" in made and made != text and "house of" not in made.lower()
    assert len(read_parallel("seed", mtllm_data / "nllb_seed", ENG, "tzm_Tfng")) == 6193
    pairs = read_parallel("ntrex", mtllm_data / "ntrex128", "fra_Latn", "swh_Latn")
    assert len(pairs) == 1997 and not any("\r" in p.source + p.target for p in pairs)
    flores = mtllm_data / "flores_nllb600m" / "evaluation" / "af-en"
    held = HeldOut(read_texts(flores))
    config = TransferSet(ENG, ("swh_Latn",)).of("sft")
    config = dataclasses.replace(config, ll=0.0, translation=1.0)
    seen = [Pair("f:1", (flores / "flores-dev.en").read_text().split("\n")[3], "x y")]
    made = make(config, Inputs(parallel={"swh_Latn": pairs[:50] + seen}, held_out=held))
    assert made.counts == {"translation": 100}
    assert made.dropped_counts == {"held out for evaluation": {"translation": 2}}
