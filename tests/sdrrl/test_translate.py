"""launch/translate.py: what is kept, dropped and rejected, stops, several processes."""

import functools
import io
import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import reduced
from processes import Processes
from safetensors.numpy import load_file, save_file
from tiny_folders import m2m100

from mtllm_jax import translate
from mtllm_jax.data.benchmarks import read_bitext
from mtllm_jax.data.identify import KNOWN, is_in
from mtllm_jax.data.translation_filters import (
    REASONS,
    Filters,
    is_untranslatable,
    reason_against,
    repeats,
)
from mtllm_jax.languages import LANGUAGES
from mtllm_jax.metrics import Console

FREE = Filters(least_length=0.0, most_length=99.0, most_copied=1.0, language=False, tasks=False)
WORDS = {"The": "Das", "house": "Haus", "is": "ist", "big": "groß", "and": "und", "red": "rot"}


class Dictionary:
    """A translator word by word; "lost" it forgets, "nothing" it makes nothing of."""

    def __init__(self):
        self.asked = []

    def __call__(self, sentences, target):
        self.asked += sentences
        return [
            ""
            if "nothing" in text
            else " ".join(WORDS.get(w, w) for w in text.split() if w != "{lost}")
            for text in sentences
        ]

    def reads(self, sentences):
        return [len(text) < 100 for text in sentences]


def in_german(*texts, filters=FREE, translator=None):
    rows = [{"text": text} for text in texts]
    answers = translate.in_language(
        rows, translator or Dictionary(), "eng_Latn", "deu_Latn", ["text"], filters
    )
    return [(answer["cells"].get("text"), answer["reason"]) for answer in answers]


def test_sentences_are_translated_once_and_what_is_lost_comes_back():
    translator = Dictionary()
    text = "- The house is big.\n\n`The big`: The house and {lost} is red. The house is big."
    made = "- Das Haus ist big.\n\n`The big`: Das Haus und {lost} ist red. Das Haus ist big."
    assert in_german(text, text, translator=translator) == [(made, "")] * 2
    assert len(translator.asked) == len(set(translator.asked))
    assert translator.asked == [
        *("The house is big.", "`The big`: The house and {lost} is red."),
        *("The house and", "is red."),
    ]


def test_reasons():
    assert in_german("nothing here.", "x" * 100, "", "42", "```\nThe\n```\n") == [
        (None, "empty"),
        (None, "long"),
        *(("", ""), ("42", ""), ("```\nThe\n```\n", "")),
    ]
    source = "The house is big and red, and I like to live in it."
    told = {
        "": "Das Haus ist groß und rot, und ich wohne gerne darin.",
        "length": "Das Haus",
        "copy": "The house is big und red, and I like to live in it.",
        "repetition": "Das Haus ist groß groß groß groß groß groß und rot.",
        "language": "La maison est grande et rouge, et j'aime y vivre.",
    }
    for reason, translation in told.items():
        found, _ = reason_against(source, translation, "deu_Latn", Filters())
        assert found == reason and (not reason or reason in REASONS)
        assert reason_against(source, translation, "deu_Latn", FREE)[0] in ("", "repetition")
    assert reason_against("Go! " * 9, "Los! " * 9, "deu_Latn", FREE) == ("", False)
    assert not repeats("…" * 20 + "0" * 30 + "ha ha ha ha ha") and repeats("我们去" * 5)


def test_tasks_that_a_translation_spoils_are_not_translated():
    translator = Dictionary()
    tasks = ["Write a poem that rhymes.", "The house", "Fix the grammar: he go."]
    found = in_german(*tasks, filters=Filters(language=False), translator=translator)
    assert [reason for _, reason in found] == ["untranslatable", "", "untranslatable"]
    assert translator.asked == ["The house"]
    assert is_untranslatable("Écris une fonction qui additionne", "fra_Latn")
    assert not is_untranslatable("Quelle est la fonction du cœur ?", "fra_Latn")
    assert is_untranslatable("Reimt sich das?", "deu_Latn") is None


def test_the_language_is_told_of_known_ones_and_long_texts_alone():
    text = "Das Haus ist groß und rot, und ich wohne gerne darin."
    assert is_in(text, "deu_Latn") is True and is_in(text, "swh_Latn") is False
    assert is_in(text, "lua_Latn") is None and is_in("Das Haus", "deu_Latn") is None
    assert set(KNOWN) <= set(LANGUAGES) and all(all(labels) for labels in KNOWN.values())


# ---------------------------------------------------------------- files

ROWS = [
    {"id": "a", "text": "The house is big.", "note": 1},
    {"id": None, "text": "The house\r\n1. is red.", "note": {"x": None}},
    {"id": 7, "text": " "},
    {"id": "c", "text": "nothing"},
    {"text": "The big `house`", "language": "deu_Latn"},
]


@pytest.fixture
def made(tmp_path, monkeypatch):
    """The dictionary in the place of what --model=M names."""
    (tmp_path / "M").mkdir()
    (tmp_path / "M" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    translator = Dictionary()
    monkeypatch.setattr(translate, "check_nllb", lambda folder: None)
    tokenizer = SimpleNamespace(languages=tuple(LANGUAGES))
    monkeypatch.setattr(translate, "translation_tokenizer", lambda folder: tokenizer)
    monkeypatch.setattr(translate, "open_translator", lambda *_: translator)
    monkeypatch.setattr(translate, "_WINDOW", 2)
    return translator


def translated(rows="r.jsonl", output="out.jsonl", **options):
    settings = {
        "source": "eng_Latn",
        "targets": ["deu_Latn", "fra_Latn"],
        "columns": ["text"],
        "filters": FREE,
        "decoding": translate.Decoding(),
    }
    file = io.StringIO()
    translate.translate("M", rows, output, console=Console(file), **settings | options)
    return file.getvalue()


def write(path, rows):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    Path(path).write_text(text, encoding="utf-8")


def read(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_rows_come_out_once_for_each_target_and_what_is_left_out_lies_beside(made):
    write("r.jsonl", ROWS)
    printed = translated()
    wanted = [
        {"id": "a", "text": "Das Haus ist big.", "note": 1},
        {"id": "2", "text": "Das Haus\r\n1. ist red.", "note": {"x": None}},
    ]
    rows = read("out.jsonl")
    assert [row.pop("language") for row in rows] == ["deu_Latn", "fra_Latn"] * 2
    assert rows == [row for row in wanted for _ in range(2)]
    dropped = read("out.jsonl.dropped.jsonl")
    assert [(d["line"], d["reason"], d["row"]["language"]) for d in dropped] == [
        (4, "empty", "deu_Latn"),
        (4, "empty", "fra_Latn"),
    ]
    rejects = read("out.jsonl.rejects.jsonl")
    assert [r["line"] for r in rejects] == [3, 5]
    assert "text is empty" in rejects[0]["reason"] and "'deu_Latn'" in rejects[1]["reason"]
    about = json.loads(Path("out.jsonl.about.json").read_text())
    assert about["languages"]["fra_Latn"] == {
        "kept": 2,
        "dropped": {"empty": 1},
        "language_not_told": 2,
    }
    assert about["rejects"] == 2 and about["source"] == "eng_Latn" and "warning" in printed
    assert not Path("out.jsonl.parts").exists()


def test_a_stopped_start_goes_on(made):
    write("r.jsonl", ROWS)
    translated(output="whole.jsonl")
    calls = []

    class Stopped(Exception):
        """As a kill would."""

    def stopping(sentences, target):
        calls.append(sentences)
        if len(calls) == 3:
            raise Stopped
        return Dictionary()(sentences, target)

    stopping.reads = made.reads
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(translate, "open_translator", lambda *_: stopping)
        with pytest.raises(Stopped):
            translated()
    assert not Path("out.jsonl").exists()
    made.asked = []
    translated()
    assert not any("house" in text for text in made.asked)
    for ending in ("", ".dropped.jsonl", ".rejects.jsonl", ".about.json"):
        whole = Path(f"whole.jsonl{ending}").read_bytes()
        assert Path(f"out.jsonl{ending}").read_bytes() == whole


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"targets": ["swh"]},
            r"--target: language 'swh' is not one of .*: the nearest are swh_Latn",
        ),
        ({"source": "en"}, r"--source: language 'en' is not one of .* eng_Latn"),
        ({"targets": ["eng_Latn"]}, "must name each language once, and not the source's"),
        ({"columns": ["txt"]}, r"r.jsonl, line 1: there is no column 'txt'.*nearest: 'text'"),
        ({"rows": "no.jsonl"}, "no.jsonl does not exist"),
        ({"output": "out.csv"}, "--output=out.csv must end in .jsonl"),
        ({"output": "r.jsonl"}, "--output=r.jsonl exists"),
        ({"filters": Filters(least_length=2.0)}, "--least_length is 2.0; it must be from 0"),
        ({"filters": Filters(most_copied=0.0)}, "--most_copied is 0.0; it must be above 0"),
    ],
)
def test_mistakes_are_one_sentence_each(options, words, made):
    write("r.jsonl", ROWS)
    with pytest.raises(ValueError, match=words):
        translated(**options)
    assert not list(Path().glob("*.parts")) and not made.asked


def test_limits_are_at_least_one():
    with pytest.raises(ValueError, match="--num_beams is 0; it must be at least 1"):
        translate.Decoding(num_beams=0)


def test_where_nothing_is_kept_nothing_is_written(made):
    write("r.jsonl", [{"text": "nothing"}])
    with pytest.raises(ValueError, match=r"no translation is kept; of 1 rows: .*'empty': 2"):
        translated()
    assert not [path for path in Path().glob("out.jsonl*") if path.is_file()]


def random_translator(folder):
    """A model whose weights are random, but which says words alone: no language, no end."""
    m2m100(folder, ["The house is big and red"] * 9)
    words = len(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    for name, rows in weights.items():
        if rows.ndim == 2 and len(rows) > words:
            rows[:4] = rows[words:] = 0
            weights[name] = rows
    save_file(weights, file, metadata={"format": "pt"})


launch = functools.partial(reduced.launch, "translate.py")


def test_missing_flags_are_named_before_anything_is_imported(tmp_path):
    code, out, err = launch("--model=M", "--target=deu_Latn", cwd=tmp_path)
    assert (code, out) == (2, "") and err.startswith("error: --input is missing")


@pytest.mark.slow
def test_killed_or_by_two_processes_the_output_is_the_same_to_the_byte(tmp_path):
    random_translator(tmp_path / "M")
    write(tmp_path / "r.jsonl", [{"text": f"The {word} house"} for word in [*WORDS] * 30])
    flags = ["--model=M", "--input=r.jsonl", "--target=deu_Latn", "--num_beams=1"]
    flags += ["--nocheck_language", "--max_new_tokens=3", "--least_length=0", "--most_length=99"]
    script = reduced.ROOT / "launch" / "translate.py"
    with Processes(2, script, *flags, "--output=two.jsonl", cwd=tmp_path, devices=2) as two:
        codes, _, errors = two.ended()
        assert codes == [0, 0], errors

    parts = tmp_path / "killed.jsonl.parts"
    killed = [*flags, "--output=killed.jsonl"]
    with Processes(1, script, *killed, cwd=tmp_path, devices=1) as one:
        deadline = time.monotonic() + 240
        while not list(parts.glob("*.npy")) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(one.processes[0].pid, signal.SIGKILL)
        one.ended()
    assert list(parts.glob("*.npy")) and not (tmp_path / "killed.jsonl").exists()
    code, printed, err = launch(*killed, cwd=tmp_path)
    assert (code, err) == (0, "") and "180/180 rows" in printed
    assert len(read(tmp_path / "killed.jsonl")) == 180
    for ending in ("", ".about.json"):
        one_file, other = (tmp_path / f"{name}.jsonl{ending}" for name in ("two", "killed"))
        assert one_file.read_bytes() == other.read_bytes()


@pytest.mark.real
def test_the_identifier_knows_what_it_is_said_to_know(mtllm_data):
    """SIB-200's test split, of which nothing was used to choose the languages."""
    import pandas as pd

    folder = mtllm_data / "sib200" / "data" / "annotated"
    for code in KNOWN:
        texts = pd.read_csv(folder / code / "test.tsv", sep="\t")["text"]
        told = [answer for text in texts if (answer := is_in(text, code)) is not None]
        assert len(told) > 150 and sum(told) / len(told) > 0.9, code


@pytest.mark.real
def test_few_human_translations_are_dropped(mtllm_data):
    """NTREX-128 in 110 languages: of 31,460 pairs 60 were, 42 of these for their language."""
    found = []
    for code, (english, other) in read_bitext("ntrex", mtllm_data / "ntrex128").pairs.items():
        for source, translation in list(zip(english, other, strict=True))[::35]:
            found.append(reason_against(source, translation, code, Filters())[0])
    assert len(found) > 6000 and sum(map(bool, found)) < 0.005 * len(found)
