"""Runs of other tasks than the embedded one: pairs, multiple choice, a published benchmark."""

import io
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import reduced

import mtllm_jax
from mtllm_jax import evaluate
from mtllm_jax.config import SYSTEMS
from mtllm_jax.metrics import Console

# The mini NLLB translates into English alone.
COMPARED = set(SYSTEMS) - {"translate_train"}
PAIRS = [("Kenya", "Ghana", "same"), ("Peru", "Togo", "other"), ("Cuba", "Chile", "same")] * 6
TEST = [
    {"id": "0", "text": "Kenya", "text_pair": "Togo", "label": "same", "language": "eng_Latn"},
    {"id": "0", "text": "Kenia", "text_pair": "Togo", "label": "same", "language": "deu_Latn"},
    {"id": "1", "text": "Peru", "text_pair": "Kenia", "label": "other", "language": "deu_Latn"},
]


def finished(mini_run, tmp_path, fields):
    fields = {"stage1": mini_run, "task.name": "mine"} | fields
    done = reduced.train(*reduced.ARGUMENTS, *reduced.flags(fields), "--workdir=run", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return tmp_path / "run", json.loads((tmp_path / "run" / "results.json").read_text())


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def predictions(run, system):
    return pd.read_json(run / "predictions" / f"{system}.jsonl", lines=True, dtype={"id": str})


@pytest.mark.slow
def test_pairs_of_texts_and_their_export(mini_run, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch", reason="the reference is torch")
    pd.DataFrame(PAIRS, columns=["text", "text_pair", "label"]).to_csv(
        tmp_path / "a.csv", index=False
    )
    write_jsonl(tmp_path / "b.jsonl", TEST)
    own = {"task.train": tmp_path / "a.csv", "task.test": tmp_path / "b.jsonl"}
    run, results = finished(mini_run, tmp_path, own)
    assert results["task"] == "mine"
    for system in COMPARED:
        frame = predictions(run, system)
        wanted = [{name: row[name] for name in row} for row in TEST]
        assert frame.drop(columns=["prediction", "test"]).to_dict("records") == wanted
        right = [row.label == row.prediction for row in frame.itertuples()]
        assert results["systems"][system]["languages"] == {"deu_Latn": sum(right[1:]) / 2}
    model = exported(tmp_path, transformers.AutoModelForSequenceClassification)
    columns = ("text", "language", "text_pair")
    texts, languages, pairs = ([row[name] for row in TEST] for name in columns)
    shares = model.classify(texts, languages, pairs=pairs)
    said = predictions(run, "mt_llm")["prediction"].tolist()
    assert [next(iter(share)) for share in shares] == said


def exported(tmp_path, auto):
    """The run in `tmp_path` in PyTorch."""
    done = subprocess.run(
        [sys.executable, reduced.ROOT / "launch" / "export.py", "--workdir=run", "--to=out"],
        cwd=tmp_path,
        env=reduced.environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0 and auto.__name__ in done.stdout, done.stderr
    return auto.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()


CHOICES = [
    {"text": "Africa", "question": "Which is in it?", "choices": ["Kenya", "Peru"], "label": 1},
    {"text": "America", "question": "Which is in it?", "choices": ["Togo", "Cuba"], "label": 2},
    {"text": "Africa", "question": "Which is in it?", "choices": ["Chile", "Ghana"], "label": 2},
]


@pytest.mark.slow
def test_multiple_choice_and_its_export(mini_run, tmp_path):
    """What is exported of it chooses in PyTorch as the run did."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch", reason="the reference is torch")
    write_jsonl(tmp_path / "a.jsonl", CHOICES * 6)
    foreign = [
        row | {"choices": row["choices"][::-1], "label": 3 - row["label"]} for row in CHOICES
    ]
    rows = [row | {"language": "eng_Latn", "id": i} for i, row in enumerate(CHOICES)]
    rows += [row | {"language": "deu_Latn", "id": i} for i, row in enumerate(foreign)]
    write_jsonl(tmp_path / "b.jsonl", rows)
    fields = {"task.train": tmp_path / "a.jsonl", "task.test": tmp_path / "b.jsonl"}
    run, results = finished(mini_run, tmp_path, fields)
    assert set(results["systems"]) == COMPARED - {"encoder_linear"}
    frame = predictions(run, "mt_llm")
    assert frame["label"].tolist() == [row["label"] for row in rows]
    assert set(frame["prediction"]) <= {1, 2}
    model = exported(tmp_path, transformers.AutoModelForMultipleChoice)
    shares = model.choose(
        frame["context"].tolist(),
        frame["question"].tolist(),
        frame["choices"].tolist(),
        frame["language"].tolist(),
    )
    assert [1 + row.index(max(row)) for row in shares] == frame["prediction"].tolist()
    # The run and its export, loaded here, say so too; the export's weights are the run's bits.
    columns = [frame[name].tolist() for name in ("context", "question", "choices", "language")]
    for folder in ("run", "out"):
        loaded = mtllm_jax.load(tmp_path / folder)
        np.testing.assert_allclose(loaded.choose(*columns), shares, atol=1e-5)
        answers = list(loaded.predict(rows))
        assert [int(row["prediction"]) for row in answers] == frame["prediction"].tolist()
        assert [row["id"] for row in answers] == [row["id"] for row in rows]
        with pytest.raises(ValueError, match="no classification head; there is `choose`"):
            loaded.classify(["a"], "deu_Latn")
        again = evaluate.evaluate(
            str(tmp_path / folder),
            evaluate.Source("", "", "", str(tmp_path / "b.jsonl"), (), None),
            against=str(run),
            to=str(tmp_path / f"scores-{folder}"),
            batch_rows=4,
            fsdp=1,
            console=Console(io.StringIO()),
        )
        assert again["systems"]["mt_llm"] == results["systems"]["mt_llm"]
        tests = again["against"]["tests"].values()
        assert [test["only_ours"] + test["only_theirs"] for test in tests] == [0, 0]


@pytest.mark.slow
def test_a_benchmark_with_given_translations(mini_run, mtllm_data, tmp_path):
    """Each system answers the rows it covers, of each language as many, labels in proportion."""
    fields = {
        "task.benchmark": "sib200",
        "task.data": mtllm_data / "sib200",
        "task.translations": mtllm_data / "flores_nllb600m",
        "task.languages": "deu_Latn,jpn_Jpan",
        "task.limit": 12,
        "evaluation.llm_languages": "jpn_Jpan",
    }
    run, results = finished(mini_run, tmp_path, fields)
    covered = {
        "mt_llm": {"deu_Latn", "jpn_Jpan"},
        "mt_encoder": {"deu_Latn", "jpn_Jpan"},
        "encoder_linear": {"deu_Latn", "jpn_Jpan"},
        "translate_test": {"jpn_Jpan"},  # there are no translations of German
        "llm_zero_shot": {"jpn_Jpan"},
        "llm_prompted": {"jpn_Jpan"},
    }
    assert {name: set(entry["languages"]) for name, entry in results["systems"].items()} == covered
    for system, languages in covered.items():
        frame = predictions(run, system)
        sizes = frame.groupby("language").size().to_dict()
        assert sizes == dict.fromkeys(languages | {"eng_Latn"}, 12)
        assert frame.groupby("id").size().eq(len(languages) + 1).all()  # the same items
    assert "translate_test" not in results["cost"] and "mt_llm" in results["cost"]
