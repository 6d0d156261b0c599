"""Runs of other tasks than the embedded one: pairs of texts, a published benchmark."""

import json

import pandas as pd
import pytest
import reduced

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


def predictions(run, system):
    return pd.read_json(run / "predictions" / f"{system}.jsonl", lines=True, dtype={"id": str})


@pytest.mark.slow
def test_pairs_of_texts(mini_run, tmp_path):
    pd.DataFrame(PAIRS, columns=["text", "text_pair", "label"]).to_csv(
        tmp_path / "a.csv", index=False
    )
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TEST))
    own = {"task.train": tmp_path / "a.csv", "task.test": tmp_path / "b.jsonl"}
    run, results = finished(mini_run, tmp_path, own)
    assert results["task"] == "mine"
    for system in ("mt_llm", "llm_zero_shot", "mt_encoder", "translate_test"):
        frame = predictions(run, system)
        wanted = [{name: row[name] for name in row} for row in TEST]
        assert frame.drop(columns=["prediction", "test"]).to_dict("records") == wanted
        right = [row.label == row.prediction for row in frame.itertuples()]
        assert results["systems"][system]["languages"] == {"deu_Latn": sum(right[1:]) / 2}


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
        "translate_test": {"jpn_Jpan"},  # there are no translations of German
        "llm_zero_shot": {"jpn_Jpan"},
    }
    assert {name: set(entry["languages"]) for name, entry in results["systems"].items()} == covered
    for system, languages in covered.items():
        frame = predictions(run, system)
        sizes = frame.groupby("language").size().to_dict()
        assert sizes == dict.fromkeys(languages | {"eng_Latn"}, 12)
        assert frame.groupby("id").size().eq(len(languages) + 1).all()  # the same items
    assert "translate_test" not in results["cost"] and "mt_llm" in results["cost"]
