"""launch/predict.py: files in and out, what is refused or rejected, stopping, several processes."""

import contextlib
import functools
import gzip
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import reduced
from processes import Processes

import mtllm_jax
from mtllm_jax import api, predict
from mtllm_jax.data import unlabelled
from mtllm_jax.metrics import Console

ROWS = [
    {"id": "7", "text": "Kenia und Ghana", "language": "deu_Latn", "source": "a"},
    {"id": "7", "text": "ケニア", "language": "jpn_Jpan", "source": "b"},
    {"id": "8", "text": 'Peru, "Chile"\tand Cuba', "language": "eng_Latn", "source": ""},
] * 5


class Made(api.Model):
    """A model without weights: what it answers is drawn from a digest of all that it is given."""

    def __init__(self):
        self.kind = "classification"
        self.labels = ("a", "b", "c")
        self.languages = ("eng_Latn", "deu_Latn", "jpn_Jpan")
        self.width = 4
        self.calls = 0

    def encode(self, texts, lang, pairs=None):
        self.calls += 1
        return np.stack([vector(*row) for row in zip(texts, lang, pairs or [None] * len(texts))])  # noqa: B905

    def shares(self, texts, lang, pairs=None):
        h_MC = np.abs(self.encode(texts, lang, pairs)[:, :3])
        return h_MC / h_MC.sum(axis=1, keepdims=True)

    def choose(self, contexts, questions, choices, lang):
        self.calls += 1
        rows = zip(contexts, questions, choices, lang, strict=True)
        return [choice_shares(*row) for row in rows]

    def _choice_tokens(self, rows):
        if any("" in row["choices"] or "long" in row["choices"] for row in rows):
            raise ValueError("row '' in eng_Latn: question and choices are 600 tokens")


def choice_shares(context, question, choices, language):
    """Of two choices or more, from a digest of each with all else."""
    weights = [vector(context, f"{question}/{language}", choice)[0] for choice in choices]
    return [float(weight / sum(weights)) for weight in weights]


def vector(text, language, pair):
    digest = hashlib.sha256(repr((text, language, pair)).encode()).digest()
    return np.frombuffer(digest, np.uint8)[:4].astype(np.float32) / 7 + 1


def expected(row):
    h_C = vector(row["text"], row["language"], row.get("text_pair"))[:3]
    shares = dict(zip("abc", h_C / h_C.sum(), strict=True))
    best = max(shares, key=shares.get)
    return row | {"prediction": best, "probabilities": pytest.approx(shares, abs=1e-6)}


@pytest.fixture
def made(tmp_path, monkeypatch):
    """The model in the place of what --model=M names; windows of four rows."""
    (tmp_path / "M").mkdir()
    (tmp_path / "M" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    model = Made()
    monkeypatch.setattr(predict, "open_model", lambda folder, **_: model)
    monkeypatch.setattr(api, "WINDOW", 4)
    return model


def answered(rows, output="out.jsonl", **options):
    """What is printed."""
    settings = {"vectors": False, "language": "", "batch_rows": 8, "fsdp": 1} | options
    file = io.StringIO()
    predict.predict("M", str(rows), output, console=Console(file), **settings)
    return file.getvalue()


def read(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write(path, rows):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path = Path(path)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix in (".csv", ".tsv"):
        separator = {".csv": ",", ".tsv": "\t"}[path.suffix]
        pd.DataFrame(rows).to_csv(path, index=False, sep=separator)
    elif path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path, index=False)
    else:
        path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["r.jsonl", "r.jsonl.gz", "r.csv", "r.tsv", "r.parquet"])
def test_each_kind_of_file_gives_its_rows_in_order_with_answers(name, made):
    printed = answered(write(name, ROWS))
    assert read("out.jsonl") == [expected(row) for row in ROWS]
    assert "15/15 rows" in printed and "out.jsonl: 15 rows" in printed
    assert sorted(p.name for p in Path().iterdir()) == ["M", "out.jsonl", name]


def test_pairs_and_single_texts_and_the_language_of_rows_that_do_not_say_theirs(made):
    rows = [
        {"text": "a", "text_pair": "b", "language": "deu_Latn"},
        {"text": "a"},
        {"text": "a", "text_pair": "c", "language": None},
    ]
    answered(write("r.jsonl", rows), language="jpn_Jpan")
    told = ["deu_Latn", "jpn_Jpan", "jpn_Jpan"]
    filled = [row | {"language": code} for row, code in zip(rows, told, strict=True)]
    assert read("out.jsonl") == [expected(row) for row in filled]


def test_labels_as_parquet_keep_the_types_of_columns(made):
    more = {"n": 3, "x": 1.5, "yes": True, "big": 2**70, "mixed": None, "none": None, "inner": [1]}
    rows = [row | more | {"mixed": i if i % 2 else "é"} for i, row in enumerate(ROWS)]
    answered(write("r.jsonl", rows), "out.parquet")
    table = pq.read_table("out.parquet")
    types = {name: table.schema.field(name).type for name in ("n", "x", "yes", "big", "mixed")}
    assert types == {
        **{"n": pa.int64(), "x": pa.float64(), "yes": pa.bool_()},
        **{"big": pa.string(), "mixed": pa.string()},
    }
    found = table.to_pylist()
    assert [row["mixed"] for row in found[:2]] == ["é", "1"]
    assert found[0]["inner"] == "[1]" and found[0]["none"] is None
    for row, original in zip(found, rows, strict=True):
        both = {name: row[name] for name in ("text", "language", "prediction", "probabilities")}
        assert both == expected({name: original[name] for name in ("text", "language")})


@pytest.mark.parametrize("output", ["out.jsonl", "out.parquet"])
def test_vectors_are_the_models_float32_to_the_bit(output, made):
    answered(write("r.csv", ROWS), output, vectors=True)
    table = pd.read_parquet(output) if output.endswith("t") else pd.DataFrame(read(output))
    vectors = np.array(table["vector"].tolist(), np.float32)
    want = [vector(row["text"], row["language"], None) for row in ROWS]
    np.testing.assert_array_equal(vectors, want)
    assert table["id"].tolist() == [row["id"] for row in ROWS]


def test_standard_input(made, monkeypatch):
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    answered("-")
    assert read("out.jsonl") == [expected(row) for row in ROWS]
    assert sorted(path.name for path in Path().iterdir()) == ["M", "out.jsonl"]


def test_rows_without_an_answer_are_kept_apart_with_the_reason(made):
    bad = [
        ({"text": " ", "language": "deu_Latn"}, "the text is empty"),
        ({"text": "x"}, "there is no language"),
        ({"text": "x", "language": None}, "the language is empty"),
        ({"language": "deu_Latn"}, "there is no text"),
        ({"text": ["x"], "language": "deu_Latn"}, "the text is ['x'], it must be a string or"),
        ({"text": "x", "text_pair": "", "language": "deu_Latn"}, "the text_pair is empty"),
        ({"text": "x", "language": "de"}, "language 'de' is not one of the 3"),
        ({"text": "\ud800", "language": "deu_Latn"}, "half of a surrogate pair"),
    ]
    rows = [*ROWS, *(row for row, _ in bad)]
    Path("r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    printed = answered("r.jsonl")
    assert read("out.jsonl") == [expected(row) for row in ROWS]
    assert "warning: rows without an answer: 8; out.jsonl.rejects.jsonl says why" in printed
    assert "answering  23/23 rows" in printed
    rejects = read("out.jsonl.rejects.jsonl")
    assert [reject["line"] for reject in rejects] == list(range(16, 24))
    for (row, reason), reject in zip(bad, rejects, strict=True):
        assert reason in reject["reason"] and reject["row"] == row


def test_what_json_has_not_is_carried_through_as_near_as_can_be(made):
    table = pd.DataFrame(ROWS[:1]).assign(x=float("nan"), day=pd.Timestamp("2020-01-02"))
    table.to_parquet("r.parquet")
    answered("r.parquet")
    (row,) = read("out.jsonl")
    assert row["x"] is None and row["day"].startswith("2020-01-02")


@pytest.mark.parametrize(
    ("content", "output", "words"),
    [
        (None, "out.jsonl", r"r\.jsonl does not exist"),
        ("", "out.jsonl", r"r\.jsonl holds no rows"),
        ('{"texts": "a"}', "out.jsonl", r"line 1: there is no column 'text'.*nearest: 'texts'"),
        ('{"text": "a"}', "out.jsonl", r"line 1: there is no column 'language'"),
        ('{"text": "a", "language": "deu_Latn"}\n{', "out.jsonl", r"line 2: the line is not JSON"),
        (
            '{"text": "a", "language": "deu_Latn", "prediction": 1}',
            "out.jsonl",
            r"line 1: there is a column 'prediction', which is what answers are called",
        ),
        ('{"text": "a", "language": "de"}', "out.jsonl", r"none of the 1 rows .* first, line 1: l"),
        ('{"text": "a", "language": "deu_Latn"}', "out.csv", r"must end in \.jsonl or \.parquet"),
        ('{"text": "a", "language": "deu_Latn"}', "gs://b/out.jsonl", r"--output=gs.* is remote"),
        ('{"text": "a", "language": "deu_Latn"}', "M/config.jsonl", r"exists; choose another"),
    ],
)
def test_mistakes_are_one_sentence(content, output, words, made):
    Path("M/config.jsonl").write_text("")
    if content is not None:
        Path("r.jsonl").write_text(content)
    with pytest.raises(ValueError, match=words) as error:
        answered("r.jsonl", output)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
    assert not made.calls


def test_an_input_of_no_answers_is_mended_and_nothing_must_be_removed(made):
    Path("r.jsonl").write_text('{"text": "a", "language": "de"}')
    with pytest.raises(ValueError, match="none of the 1 rows can be answered"):
        answered("r.jsonl")
    write("r.jsonl", ROWS)
    answered("r.jsonl")
    assert read("out.jsonl") == [expected(row) for row in ROWS]
    assert sorted(p.name for p in Path().iterdir()) == ["M", "out.jsonl", "r.jsonl"]


@pytest.mark.parametrize("name", ["config.json", "weights.json", "distillation/done.json"])
def test_a_run_of_other_weights_is_another_model(name, made):
    """weights.json has the digests of the models that a run begins with."""
    before = predict.check_model("M")
    path = Path("M", name)
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"llm": "1"}')
    assert predict.check_model("M") != before


def test_a_column_of_vectors_is_refused_where_vectors_are_asked_for(made):
    rows = [row | {"vector": 1} for row in ROWS]
    answered(write("r.jsonl", rows))
    with pytest.raises(ValueError, match="a column 'vector'"):
        answered("r.jsonl", "v.jsonl", vectors=True)


def test_what_is_no_model(tmp_path):
    with pytest.raises(ValueError, match=r"--model=.* holds no config\.json"):
        predict.check_model(str(tmp_path))
    for options, words in (({"batch_rows": 0}, "--batch_rows is 0"), ({"fsdp": 3}, "--fsdp is 3")):
        with pytest.raises(ValueError, match=words):
            predict.open_model("M", **{"batch_rows": 8, "fsdp": 1} | options)


# ---------------------------------------------------------------- multiple choice


CHOICES = [
    {"id": "1", "text": "A rainy day.", "question": "Why?", "choices": ["x", "y", "z"]},
    {"id": "2", "context": "Sun", "question": None, "choices": ["long way", "y"]},
    {"id": "3", "context": "Sun", "choices": ["y", "x"]},
] * 3


def expected_choice(row):
    shares = choice_shares(
        row.get("context", row.get("text")), row.get("question") or "", row["choices"], "deu_Latn"
    )
    named = {str(i): share for i, share in enumerate(shares, 1)}
    best = max(named, key=named.get)
    return row | {
        **{"language": "deu_Latn", "prediction": best},
        "probabilities": pytest.approx(named, abs=1e-6),
    }


def test_rows_of_choices(made):
    """As many in each row as there are; in Parquet their probabilities stand in their order."""
    made.kind, made.labels = "multiple_choice", ()
    answered(write("r.jsonl", CHOICES), language="deu_Latn")
    found = read("out.jsonl")
    assert found == [expected_choice(row) for row in CHOICES]
    for row in found:
        shares = list(row["probabilities"].values())
        assert shares == sorted(shares, reverse=True)
    answered("r.jsonl", "out.parquet", language="deu_Latn")
    for row, one in zip(pq.read_table("out.parquet").to_pylist(), found, strict=True):
        assert row["prediction"] == one["prediction"]
        named = {str(i): share for i, share in enumerate(row["probabilities"], 1)}
        assert named == pytest.approx(one["probabilities"], abs=1e-6)
    rows = [row | {"language": "deu_Latn"} for row in CHOICES]
    assert list(made.predict(rows)) == [expected_choice(row) for row in rows]


@pytest.mark.parametrize("columns", ["json", "apart"])
def test_choices_in_tables(columns, made):
    made.kind = "multiple_choice"
    rows = [
        {"text": "a", "language": "deu_Latn", "question": "q", "choices": [str(i), "y"]}
        for i in range(5)
    ]
    apart = [{"choice1": row["choices"][0], "choice2": "y"} for row in rows]
    for row, cells in zip(rows, apart, strict=True):
        cells |= {name: row[name] for name in ("text", "language", "question")}
    packed = [row | {"choices": json.dumps(row["choices"])} for row in rows]
    answered(write("r.csv", packed if columns == "json" else apart))
    wanted = [expected_choice(row) for row in rows]
    for row, one in zip(read("out.jsonl"), wanted, strict=True):
        assert (row["prediction"], row["probabilities"]) == (
            one["prediction"],
            one["probabilities"],
        )


def test_rows_of_choices_without_an_answer(made):
    made.kind = "multiple_choice"
    bad = [
        ({"text": "x"}, "there are no choices"),
        ({"question": "x", "choices": ["a", "b"]}, "there is no column 'text'"),
        ({"text": "x", "choices": ["a"]}, "must be a list of two texts or more"),
        ({"text": "x", "choices": ["a", ""]}, "the choice 2 is empty"),
        ({"text": "x", "choices": ["a", "long"]}, "question and choices are 600 tokens"),
        ({"text": "x", "choice1": "a", "choice3": "b"}, "choices must be numbered from 1 on"),
    ]
    rows = [CHOICES[0], *(row for row, _ in bad)]
    Path("r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answered("r.jsonl", language="deu_Latn")
    assert read("out.jsonl") == [expected_choice(CHOICES[0])]
    rejects = read("out.jsonl.rejects.jsonl")
    for (row, reason), reject in zip(bad, rejects, strict=True):
        assert reason in reject["reason"] and reject["row"] == row | {"language": "deu_Latn"}
    # Vectors are of texts, whatever the head.
    answered(write("v.jsonl", ROWS), "v.out.jsonl", vectors=True)
    assert len(read("v.out.jsonl")) == len(ROWS)


# ---------------------------------------------------------------- stopped, and begun again


class Stopped(Exception):
    pass


@contextlib.contextmanager
def stopped(made, calls):
    """The model fails after so many calls in all, as a kill would come there."""
    encode = made.encode

    def failing(*arguments):
        if made.calls == calls:
            raise Stopped
        return encode(*arguments)

    made.encode = failing
    with pytest.raises(Stopped):
        yield
    made.encode = encode


@pytest.mark.parametrize("output", ["out.jsonl", "out.parquet"])
def test_a_stopped_start_is_gone_on_from(output, made):
    write("r.jsonl", ROWS)
    answered("r.jsonl", f"whole-{output}")
    with stopped(made, made.calls + 2):
        answered("r.jsonl", output)
    assert not Path(output).exists()
    before = made.calls
    answered("r.jsonl", output)
    assert made.calls == before + 2  # of four windows two were there
    assert Path(output).read_bytes() == Path(f"whole-{output}").read_bytes()
    assert not Path(f"{output}.parts").exists()


def test_a_start_that_was_stopped_while_it_wrote_is_gone_on_from(made, monkeypatch):
    write("r.jsonl", ROWS)
    remove = predict.Parts.remove
    monkeypatch.setattr(predict.Parts, "remove", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        answered("r.jsonl")
    monkeypatch.setattr(predict.Parts, "remove", remove)
    first, calls = Path("out.jsonl").read_bytes(), made.calls
    answered("r.jsonl")
    assert Path("out.jsonl").read_bytes() == first and made.calls == calls


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("rows", r"the rows have changed since .*parts was begun \(those of window 1 are others\)"),
        ("model", r"parts was begun with something else \(model .* → .*\); remove it"),
        ("answers", r"begun with something else \(answers \"probabilities\" → \"vectors\"\)"),
    ],
)
def test_other_rows_or_another_model_are_noticed(change, words, made):
    write("r.jsonl", ROWS)
    with stopped(made, 2):
        answered("r.jsonl")
    if change == "rows":
        write("r.jsonl", [ROWS[1], *ROWS[1:]])
    if change == "model":
        Path("M/config.json").write_text("[]")
    with pytest.raises(ValueError, match=words):
        answered("r.jsonl", vectors=change == "answers")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([ROWS[1], *ROWS[1:]], r"rows of window 1 have changed while they were worked on; remove"),
        (ROWS[:8], r"the rows have changed: they were 15"),
    ],
)
def test_rows_that_change_under_way_are_noticed(rows, words, made):
    write("r.jsonl", ROWS)
    encode = made.encode
    made.encode = lambda *given: write("new", rows).replace("r.jsonl") and encode(*given)
    with pytest.raises(ValueError, match=words):
        answered("r.jsonl")
    assert not Path("out.jsonl").exists()


@pytest.mark.parametrize("name", ["r.jsonl", "r.parquet"])
def test_a_file_is_not_read_whole(name, made):
    """Sixteen megabytes of text, of which a quarter at most is in memory at a time."""
    rows = [ROWS[0] | {"text": f"{i:02}" * 2000} for i in range(50)] * 80
    write(name, rows)
    tracemalloc.start()
    try:
        sizes = [
            len(window.rows)
            for window in unlabelled.windows(Path(name), 64, language="", readable=made.languages)
        ]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(sizes) == len(rows) and max(sizes) == 64
    assert peak < 8e6


def test_in_python_rows_come_with_answers_as_they_are_asked_for(made):
    seen = []
    rows = (seen.append(row) or row for row in ROWS)
    answers = made.predict(rows)
    assert next(answers) == expected(ROWS[0]) and len(seen) < 15
    assert list(answers) == [expected(row) for row in ROWS[1:]]


# ---------------------------------------------------------------- real models, whole processes


launch = functools.partial(reduced.launch, "predict.py")


def rows_of(run, count):
    """So many of the run's test rows, without labels, some of them several times, and its answers.

    They are shuffled, so that no window is of one language.
    """
    table = pd.read_json(run / "predictions" / "mt_llm.jsonl", lines=True, dtype={"id": str})
    table = table.sample(count, replace=True, random_state=0)
    rows = table[["id", "language", "text"]].to_dict("records")
    return rows, table["prediction"].tolist()


def test_labels_are_those_that_the_run_predicted(mini_run, tmp_path, monkeypatch):
    """Over four devices, in this process."""
    rows, wanted = rows_of(mini_run, 128)
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:4])
    settings = {"vectors": False, "language": "", "batch_rows": 63, "fsdp": 2}
    source, output = write(tmp_path / "r.jsonl", rows), tmp_path / "out.jsonl"
    console = Console(io.StringIO())
    predict.predict(str(mini_run), str(source), str(output), console=console, **settings)
    answers = read(output)
    assert [row.pop("prediction") for row in answers] == wanted
    assert all(abs(sum(row.pop("probabilities").values()) - 1) < 1e-4 for row in answers)
    assert answers == rows


def test_pairs_in_python(mini_run):
    """A text with None beside it is one that stands alone; a pair is another text."""
    model = mtllm_jax.load(mini_run)
    texts, codes = ["Kenia", "Kenia"], ["deu_Latn", "deu_Latn"]
    alone, paired = model.encode(texts, codes, [None, "Ghana"])
    np.testing.assert_allclose(alone, model.encode(texts[:1], "deu_Latn")[0], atol=1e-5)
    assert np.abs(alone - paired).max() > 1e-3
    tokens = model._tokenizer.encode(texts[:1], "deu_Latn", text_pairs=["Ghana"])
    np.testing.assert_allclose(paired, model._run(0)(tokens)[0], atol=1e-5)
    for function in (model.encode, model.classify):
        with pytest.raises(ValueError, match="2 texts, 1 pairs and 2 languages"):
            function(texts, codes, ["Ghana"])


@pytest.mark.slow
def test_killed_or_by_two_processes_the_output_is_the_same_to_the_byte(mini_run, tmp_path):
    rows, wanted = rows_of(mini_run, 1500)
    write(tmp_path / "r.jsonl", rows)
    flags = [f"--model={mini_run}", "--input=r.jsonl"]
    code, printed, err = launch(*flags, "--output=whole.jsonl", cwd=tmp_path)
    assert (code, err) == (0, "") and "rows/s" in printed
    assert [row["prediction"] for row in read(tmp_path / "whole.jsonl")] == wanted

    script = reduced.ROOT / "launch" / "predict.py"
    with Processes(2, script, *flags, "--output=two.jsonl", cwd=tmp_path, devices=2) as two:
        codes, _, errors = two.ended()
        assert codes == [0, 0], errors
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert (tmp_path / "two.jsonl").read_bytes() == whole

    parts = tmp_path / "killed.jsonl.parts"
    killed = [*flags, "--output=killed.jsonl"]
    with Processes(1, script, *killed, cwd=tmp_path, devices=1) as one:
        deadline = time.monotonic() + 240
        while not list(parts.glob("*.npy")) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(one.processes[0].pid, signal.SIGKILL)
        one.ended()
    there = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.npy")}
    assert there and not (tmp_path / "killed.jsonl").exists()
    code, _, err = launch(*killed, cwd=tmp_path)
    assert (code, err) == (0, "")
    assert (tmp_path / "killed.jsonl").read_bytes() == whole


@pytest.mark.slow
def test_an_export_gives_the_same_labels_from_standard_input(mini_run, tmp_path):
    export = [sys.executable, reduced.ROOT / "launch" / "export.py", f"--workdir={mini_run}"]
    environment = reduced.environment()
    subprocess.run(
        [*export, "--to=exported"], cwd=tmp_path, env=environment, check=True, timeout=300
    )
    rows, wanted = rows_of(mini_run, 1500)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    flags = ["--model=exported", "--input=-", "--output=out.parquet"]
    code, _, err = launch(*flags, cwd=tmp_path, stdin=lines)
    assert (code, err) == (0, "")
    assert pd.read_parquet(tmp_path / "out.parquet")["prediction"].tolist() == wanted


def test_missing_flags_are_named_before_anything_is_imported(tmp_path):
    for given, missing in (
        ([], "model"),
        (["--model=M"], "input"),
        (["--model=M", "--input=-"], "output"),
    ):
        code, out, err = launch(*given, cwd=tmp_path)
        assert (code, out) == (2, "") and err.startswith(f"error: --{missing} is missing")
