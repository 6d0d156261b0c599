"""Training rows out of English: drawn languages, windows that are kept, and a run on them."""

import collections
import io
import json
import shutil
import types

import pytest
import reduced
from etils import epath

from mtllm_jax.hf.nllb import into_one_language
from mtllm_jax.metrics import Console
from mtllm_jax.recipes import systems, translating
from mtllm_jax.recipes.translating import drawn_languages, out_of_english

CODES = ("deu_Latn", "jpn_Jpan", "fra_Latn")
ROWS = [
    {"id": str(i), "language": "eng_Latn", "label": "a", "text": f"text {i}", "text_pair": "two"}
    for i in range(7)
]


class Spelling:
    """A translator that puts the language before a text; of "two" nothing comes in German."""

    def __init__(self, weights="these"):
        self.texts, self.weights = 0, weights

    def digests(self):
        return {"weights": self.weights, "settings": "all"}

    def __call__(self, texts, languages, into):
        assert set(languages) == {"eng_Latn"}
        self.texts += len(texts)
        pairs = zip(texts, into, strict=True)
        return ["" if pair == ("two", "deu_Latn") else f"{pair[1]} {pair[0]}" for pair in pairs]


def test_languages_are_drawn_alike():
    drawn = drawn_languages(6000, CODES, 3)
    assert drawn == drawn_languages(6000, CODES, 3) != drawn_languages(6000, CODES, 4)
    assert all(1800 < count < 2200 for count in collections.Counter(drawn).values())


def test_windows_are_kept_and_none_is_translated_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(translating, "_WINDOW", 3)
    languages = [CODES[i % 3] for i in range(7)]

    def translated(translator):
        folder, console = epath.Path(tmp_path), Console(io.StringIO())
        return out_of_english(ROWS, languages, lambda: translator, folder, console)

    made = translated(first := Spelling())
    assert first.texts == 14 and len(list(tmp_path.glob("*.jsonl"))) == 3
    for row, old, code in zip(made, ROWS, languages, strict=True):
        assert row["language"] == code and (row["id"], row["label"]) == (old["id"], old["label"])
        assert row["text"] == f"{code} {old['text']}"
        assert row["text_pair"] == ("two" if code == "deu_Latn" else f"{code} two")
    (tmp_path / "00001.jsonl").unlink()
    assert translated(again := Spelling()) == made and again.texts == 6
    assert translated(none := Spelling()) == made and none.texts == 0
    (tmp_path / "00002.jsonl").unlink()
    with pytest.raises(ValueError, match="the translator's weights are not those that"):
        translated(Spelling("others"))
    assert not (tmp_path / "00002.jsonl").exists()
    languages = languages[::-1]
    with pytest.raises(ValueError, match="the translator's languages are not those that"):
        translated(Spelling())


def test_languages_that_the_translator_lacks_are_named(monkeypatch):
    known = types.SimpleNamespace(languages=("eng_Latn", "deu_Latn"))
    monkeypatch.setattr(systems, "has_decoder", lambda folder: True)
    monkeypatch.setattr(systems, "into_one_language", lambda folder: False)
    monkeypatch.setattr(systems, "local_files", lambda folder: folder)
    monkeypatch.setattr(systems, "translation_tokenizer", lambda files: known)

    def told(*codes):
        said = io.StringIO()
        settings = types.SimpleNamespace(english="eng_Latn")
        job = types.SimpleNamespace(config=settings, console=Console(said))
        task = types.SimpleNamespace(tests={"test": [{"language": code} for code in codes]})
        return systems._targets(job, "NLLB", task), " ".join(said.getvalue().split())

    assert told("eng_Latn", "deu_Latn") == (("deu_Latn",), "")
    missing = "jpn_Jpan: NLLB does not know them."
    assert told("deu_Latn", "jpn_Jpan") == (
        ("deu_Latn",),
        f"Translate-train has no rows in {missing}",
    )
    assert told("eng_Latn", "jpn_Jpan") == ((), f"Translate-train is left out, for {missing}")


@pytest.mark.slow
def test_a_run_with_a_model_that_translates_out_of_english(mini_run, tmp_path):
    """And one that only translates into English is left out, in a line."""
    fields = reduced.own_fields(tmp_path, mini_run) | {
        "evaluation.systems": "mt_llm,translate_train",
        "adaptation.training.steps": 5,
        "distillation.training.steps": 5,
    }
    assert into_one_language(fields["encoder"])
    flags = (*reduced.flags(fields), "--workdir=none", "--dry_run")
    done = reduced.train(*reduced.ARGUMENTS, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "Translate-train is left out: " in said and "into one language alone" in said
    # Nothing but that word of the model's keeps it from being asked for other languages.
    told = tmp_path / "translator"
    shutil.copytree(mini_run / "mini_nllb" / "model", told)
    values = json.loads((told / "generation_config.json").read_text())
    del values["forced_bos_token_id"]
    (told / "generation_config.json").write_text(json.dumps(values))
    flags = (*reduced.flags(fields | {"translator": str(told)}), "--workdir=run")
    done = reduced.train(*reduced.ARGUMENTS, *flags, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    run = tmp_path / "run"
    results = json.loads((run / "results.json").read_text())
    assert list(results["systems"]) == list(results["cost"]) == ["mt_llm", "translate_train"]
    assert not (run / "mt_encoder").exists()
    lines = (run / "translate_train" / "translations" / "00000.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["label"] for row in rows] == [line.split("\t")[1] for line in reduced.TRAIN]
    assert {row["language"] for row in rows} == {"deu_Latn", "jpn_Jpan"}
