"""launch/evaluate.py: its numbers against pandas and a run's own, its files, what it refuses."""

import functools
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import reduced
import sklearn.metrics

from mtllm_jax import api, evaluate
from mtllm_jax.languages import LANGUAGES
from mtllm_jax.metrics import Console
from mtllm_jax.resource_classes import REST, resource_class

LABELS = ("a", "b", "c")
CODES = ("eng_Latn", "deu_Latn", "rus_Cyrl", "ukr_Cyrl", "mad_Latn")


class Made(api.Model):
    """A model without weights that reads the answer from the text: "3 a" is a, with "?" c."""

    def __init__(self):
        self.kind = "classification"
        self.labels = LABELS
        self.languages = (*CODES[:4], "ind_Latn")  # of Madurese it knows the stand-in
        self.calls = 0

    def shares(self, texts, lang, pairs=None):
        self.calls += 1
        words = [
            "c" if "?" in (pair or text) else text[-1] for text, pair in self.zipped(texts, pairs)
        ]
        return np.array([[0.8 if label == word else 0.1 for label in LABELS] for word in words])

    def choose(self, contexts, questions, choices, lang):
        """Of each row the choice that its context says."""
        self.calls += 1
        chosen = zip(contexts, choices, strict=True)
        return [[0.7 if one == context else 0.1 for one in each] for context, each in chosen]

    def zipped(self, texts, pairs):
        return zip(texts, pairs or [None] * len(texts), strict=True)


def table():
    """Ten rows in each language; the one that the model has wrong has another label."""
    rng = np.random.default_rng(0)
    rows = [
        {"id": str(i), "text": f"{i} {LABELS[i % 3]}", "language": code, "label": LABELS[i % 3]}
        for code in CODES
        for i in range(10)
    ]
    for row in rows:
        if row["language"] != "eng_Latn" and rng.random() < 0.4:
            row["text"] = f"{row['id']} {LABELS[rng.integers(3)]}"
    return pd.DataFrame(rows)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """The model in the place of what --model=M names, rows in r.jsonl, windows of eight rows."""
    (tmp_path / "M").mkdir()
    (tmp_path / "M" / "config.json").write_text('{"seed": 3}')
    monkeypatch.chdir(tmp_path)
    table().to_json("r.jsonl", orient="records", lines=True)
    model = Made()
    monkeypatch.setattr(evaluate, "open_model", lambda folder, **_: model)
    monkeypatch.setattr(api, "WINDOW", 8)
    return model


def evaluated(against="", to="E", **source):
    """results.json, and what is printed."""
    fields = {"task": "", "data": "", "english_data": "", "test": "r.jsonl", "languages": ()}
    file = io.StringIO()
    results = evaluate.evaluate(
        "M",
        evaluate.Source(**fields | {"limit": None} | source),
        against=against,
        to=to,
        batch_rows=8,
        fsdp=1,
        console=Console(file),
    )
    assert results == json.loads(Path(to, "results.json").read_text())
    return results, file.getvalue()


def predictions(folder="E"):
    return pd.read_json(f"{folder}/predictions/mt_llm.jsonl", lines=True, dtype={"id": str})


def test_numbers_are_those_of_pandas(made):
    results, printed = evaluated()
    found = predictions()
    assert found.drop(columns="prediction").equals(table()[["id", "language", "text", "label"]])
    assert found["prediction"].tolist() == table()["text"].str[-1].tolist()
    right = (found["label"] == found["prediction"]).groupby(found["language"]).mean()
    entry = results["systems"]["mt_llm"]
    assert entry["english"] == 1.0 and entry["languages"] == right.drop("eng_Latn").to_dict()
    assert entry["mean"] == pytest.approx(right.drop("eng_Latn").mean())
    f1 = {
        code: sklearn.metrics.f1_score(rows["label"], rows["prediction"], average="macro")
        for code, rows in found.groupby("language")
    }
    assert entry["macro_f1"]["languages"] == pytest.approx(
        {code: value for code, value in f1.items() if code != "eng_Latn"}
    )
    cyrillic = results["scripts"]["Cyrillic"]
    assert cyrillic["languages"] == 2
    assert cyrillic["mean"] == pytest.approx(right[["rus_Cyrl", "ukr_Cyrl"]].mean())
    assert cyrillic["macro_f1"] == pytest.approx((f1["rus_Cyrl"] + f1["ukr_Cyrl"]) / 2)
    assert cyrillic["interval"][0] < cyrillic["mean"] < cyrillic["interval"][1]
    classes = {name: one["mean"] for name, one in results["resource_classes"].items()}
    wanted = {"5": "deu_Latn", "4": "rus_Cyrl", "3": "ukr_Cyrl", REST: "mad_Latn"}
    assert classes == pytest.approx({name: right[code] for name, code in wanted.items()})
    foreign = found[found["language"] != "eng_Latn"]
    counts = pd.crosstab(foreign["label"], foreign["prediction"])
    assert results["confusion"] == {"labels": list(LABELS), "counts": counts.to_numpy().tolist()}
    assert results["majority"] == 0.4 and results["seeds"] == [3]
    assert "50/50 rows" in printed and "By resource class" in printed and "Ukrainian" in printed


def test_what_is_written_is_read_alike_everywhere(made):
    results, _ = evaluated()
    text = Path("E/results.md").read_text()
    mean = f"{100 * results['systems']['mt_llm']['mean']:.1f}"
    assert f"Accuracy in %: {mean} (" in text and "| German | deu_Latn | 5 | 10 |" in text
    page = Path("E/report.html").read_text()
    for words in (
        mean,
        "By resource class",
        "Confusion: label by prediction",
        "seed 3",
        "mad_Latn",
    ):
        assert words in page, words
    assert "against the others" not in page
    names = {"evaluation.json", "predictions", "report.html", "results.json", "results.md"}
    assert {path.name for path in Path("E").iterdir()} == names


def test_another_system_is_compared_row_by_row_without_answering_again(made):
    evaluated()
    ours, calls = predictions(), made.calls
    theirs = ours.assign(prediction="a", test="seen")
    extra = theirs.assign(text="another text")  # the same id and language in another test
    pd.concat([theirs[theirs["language"] != "rus_Cyrl"], extra]).to_json(
        "other.jsonl", orient="records", lines=True
    )
    results, printed = evaluated(against="other.jsonl")
    assert made.calls == calls and "the answers are those in E" in printed
    test = results["against"]["tests"]["all languages but English"]
    both = ours[~ours["language"].isin(["eng_Latn", "rus_Cyrl"])]
    right, other = both["label"] == both["prediction"], both["label"] == "a"
    assert (test["rows"], test["only_ours"], test["only_theirs"]) == (
        30,
        (right & ~other).sum(),
        (~right & other).sum(),
    )
    assert test["difference"] == pytest.approx(right.mean() - other.mean())
    assert results["against"]["tests"]["English"]["rows"] == 10
    assert results["systems"]["other"]["languages"].keys() == {"deu_Latn", "ukr_Cyrl", "mad_Latn"}
    assert "other has answered 40 of the 50 rows" in Path("E/results.md").read_text()
    # An evaluation's folder, and a run's, are named by themselves.
    shutil.copytree("E", "F")
    results, _ = evaluated(against="F")
    assert results["against"]["tests"]["English"]["p"] == 1.0 and "F" in results["systems"]
    results, _ = evaluated(against="F/predictions/mt_llm.jsonl")
    assert "MT-LLM (stacked) of F" in results["systems"]


def test_languages_and_a_limit(made):
    results, _ = evaluated(languages=("rus_Cyrl", "eng_Latn"), limit=4)
    assert results["rows"] == {"eng_Latn": 4, "rus_Cyrl": 4}
    found = predictions()
    ids = found.groupby("language")["id"].apply(list)
    assert ids["eng_Latn"] == ids["rus_Cyrl"]  # the same items in each
    results, _ = evaluated(languages=("eng_Latn",), to="G")
    assert results["systems"]["mt_llm"]["mean"] == 1.0


def test_a_language_that_the_model_does_not_know_is_left_out_unless_it_was_asked_for(made):
    made.languages = CODES[:3]
    results, _ = evaluated()
    assert results["rows"].keys() == set(CODES[:3])
    assert results["notes"] == ["Left out, as the encoder does not know them: ukr_Cyrl, mad_Latn."]
    with pytest.raises(ValueError, match="--languages: language 'ukr_Cyrl' is not one of the 3"):
        evaluated(languages=("ukr_Cyrl",), to="G")


def test_pairs_of_texts(made):
    table().assign(text_pair="?").to_json("r.jsonl", orient="records", lines=True)
    evaluated()
    assert set(predictions()["prediction"]) == {"c"} and set(predictions()["text_pair"]) == {"?"}


def test_multiple_choice(made):
    """A file of one's own, a benchmark, another system's answers."""
    rows = [
        {
            **{"id": str(i), "language": code, "text": "xyz"[i % 3], "question": "?"},
            **{"choices": ["x", "y", "z"], "label": str(1 + (i % 3 if i else 2))},
        }
        for code in CODES[:2]
        for i in range(6)
    ]
    pd.DataFrame(rows).to_json("c.jsonl", orient="records", lines=True)
    with pytest.raises(ValueError, match=r"c.jsonl is multiple choice, and --model=M was not tr"):
        evaluated(test="c.jsonl")
    made.kind, made.labels = "multiple_choice", ()
    with pytest.raises(ValueError, match=r"r.jsonl is not multiple choice, and --model=M was tr"):
        evaluated(to="F")
    results, _ = evaluated(test="c.jsonl")
    assert results["systems"]["mt_llm"]["languages"] == {CODES[1]: pytest.approx(5 / 6)}
    assert results["confusion"] == {
        "labels": ["1", "2", "3"],
        "counts": [[1, 0, 0], [0, 2, 0], [1, 0, 2]],
    }
    lines = Path("E/predictions/mt_llm.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [row["choices"] for row in found] == [row["choices"] for row in rows]
    assert [row["prediction"] for row in found] == [str(1 + i % 3) for i in range(6)] * 2
    shutil.copytree("E", "F2")
    results, _ = evaluated(test="c.jsonl", against="F2")
    assert results["against"]["tests"]["English"]["rows"] == 6
    bad = pd.DataFrame(rows).assign(label="4")
    bad.to_json("bad.jsonl", orient="records", lines=True)
    with pytest.raises(ValueError, match=r"bad.jsonl, line 1: the label is '4', it must be one of"):
        evaluated(test="bad.jsonl", to="G")


def test_a_stopped_start_is_gone_on_from(made, monkeypatch):
    shares = made.shares

    def failing(*arguments):
        if made.calls == 3:
            raise ZeroDivisionError
        return shares(*arguments)

    made.shares = failing
    with pytest.raises(ZeroDivisionError):
        evaluated()
    made.shares = shares
    results, _ = evaluated()
    assert made.calls == 7 and len(predictions()) == 50
    assert results["systems"] == evaluated(to="G")[0]["systems"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"test": ""}, "neither is given of --task and --test"),
        ({"task": "sib200"}, "both are given of --task and --test"),
        (
            {"test": "", "task": "sib200"},
            "--data is missing; it must name the folder of --task=sib",
        ),
        ({"test": "", "task": "sib", "data": "M"}, "benchmark 'sib' is not one of sib200"),
        ({"data": "M"}, "--data has no effect with --test"),
        ({"limit": 0}, "--limit is 0"),
        ({"languages": ("fra_Latn",)}, "--languages names fra_Latn; r.jsonl has no rows in it"),
        ({"against": "M"}, "M/predictions/mt_llm.jsonl is not a file"),
        ({"against": "bad.jsonl"}, "bad.jsonl, line 1: there is no column 'prediction'"),
        ({"against": "r2.jsonl"}, "has no row in common"),
        ({"test": "r2.jsonl"}, "labels of r2.jsonl are 'a', 'd', and those of --model=M 'a', 'b'"),
        ({"to": "gs://b/E"}, "--to=gs://b/E is remote"),
        ({"to": "M"}, "--to=M is not an empty folder, nor an evaluation"),
    ],
)
def test_mistakes_are_one_sentence(change, words, made):
    row = {"id": "x", "text": "x a", "language": "deu_Latn", "label": "a"}
    Path("bad.jsonl").write_text(json.dumps(row))
    others = [row | {"prediction": "a"}, row | {"id": "y", "label": "d", "prediction": "a"}]
    Path("r2.jsonl").write_text("".join(json.dumps(other) + "\n" for other in others))
    with pytest.raises(ValueError, match=words) as error:
        evaluated(**change)
    assert "\n" not in str(error.value)
    assert not made.calls and not Path("E").exists()


def test_a_folder_belongs_to_one_evaluation(made):
    evaluated()
    with pytest.raises(ValueError, match=r"--to=E holds another evaluation \(rows .* → .*\)"):
        evaluated(limit=3)


def test_resource_classes():
    """Sizes of the classes are those that the paper gives."""
    codes = {code: resource_class(code) for code in LANGUAGES}
    assert {codes[code] for code in ("zho_Hans", "zho_Hant", "arb_Arab")} == {"5"}
    assert (codes["hin_Deva"], codes["arz_Arab"], codes["zul_Latn"]) == ("4", "3", "2")
    assert (codes["yue_Hant"], codes["ary_Arab"], resource_class("mad_Latn")) == ("1", REST, REST)
    # Its 7, 18, 28 and 19 languages, less Latin, Western Panjabi and Konkani, which are not there.
    of_class = {name: {code[:3] for code in codes if codes[code] == name} for name in "5432"}
    assert {name: len(those) for name, those in of_class.items()} == {
        "5": 7,
        "4": 18,
        "3": 27,
        "2": 17,
    }


# ---------------------------------------------------------------- a real model, a whole process


launch = functools.partial(reduced.launch, "evaluate.py")


@pytest.mark.slow
def test_a_run_is_scored_as_it_scored_itself(mini_run, tmp_path):
    own = pd.read_json(mini_run / "predictions" / "mt_llm.jsonl", lines=True, dtype={"id": str})
    own = own[own["test"] == "seen"]
    own.drop(columns=["prediction", "test"]).to_csv(tmp_path / "rows.csv", index=False)
    flags = [f"--model={mini_run}", "--test=rows.csv", f"--against={mini_run}"]
    code, printed, err = launch(*flags, cwd=tmp_path)
    assert (code, err) == (0, ""), err
    folder = tmp_path / "evaluations" / f"rows-{mini_run.name}"
    results = json.loads((folder / "results.json").read_text())
    wanted = json.loads((mini_run / "results.json").read_text())["systems"]["mt_llm"]
    assert results["systems"]["mt_llm"] == wanted
    test = results["against"]["tests"]["all languages but English"]
    assert test["only_ours"] == test["only_theirs"] == 0 and test["p"] == 1.0
    assert "rows/s" in printed and "By script" in printed


@pytest.mark.slow
def test_a_benchmark_of_other_labels_is_refused_in_one_sentence(mini_run, mtllm_data, tmp_path):
    flags = [f"--model={mini_run}", "--task=sib200", f"--data={mtllm_data / 'sib200'}"]
    code, _, err = launch(*flags, "--languages=deu_Latn", "--limit=20", cwd=tmp_path)
    assert code == 2 and err.count("\n") == 1
    assert "the labels of sib200 are 'entertainment'" in err and "'Africa', 'America'" in err


def test_a_missing_model_is_named_before_anything_is_imported(tmp_path):
    code, out, err = launch("--test=x", cwd=tmp_path)
    assert (code, out) == (2, "") and err.startswith("error: --model is missing")
