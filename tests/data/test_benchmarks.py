"""Benchmarks come back as pandas reads their files; the same items everywhere; errors at the door.

Data sets that are at hand are read where MTLLM_DATA names them, others from small files in the
layout that they are published in.
"""

import collections
import json

import pandas as pd
import pytest

from mtllm_jax.data.benchmarks import read_benchmark, read_own, source_language
from mtllm_jax.data.benchmarks.benchmark import sample
from mtllm_jax.languages import LANGUAGES

TOPICS = (
    "science/technology",
    "travel",
    "politics",
    "sports",
    "health",
    "entertainment",
    "geography",
)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def message(folder, *arguments, read=read_benchmark, **options):
    """What the error says, the folder left out."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read(*arguments, **options)
    said = str(caught.value)
    assert said.endswith(".")
    assert "\n" not in said
    return said.replace(str(folder), "F")


def of_language(rows, code):
    return [row for row in rows if row["language"] == code]


def sib_file(rows):
    table = pd.DataFrame(rows, columns=["index_id", "category", "text"])
    return table.to_csv(sep="\t", index=False)


def write_sib(folder, pattern="data/{}/{}.tsv", codes=("deu_Latn", "eng_Latn", "zho_Hans")):
    """Two rows of each topic, sorted by it, with a quote in each text."""
    for code in codes:
        for split, first in (("train", 0), ("dev", 100), ("test", 200)):
            rows = [(first + i, TOPICS[i // 2], f'{code} "{first + i}" here') for i in range(14)]
            write(folder / pattern.format(code, split), sib_file(rows))


# ---- what all of them share ----


def test_a_sample_keeps_proportions_order_and_items():
    """Against counting by hand: 60, 30 and 10 rows of a label are 6, 3 and 1 of ten."""
    labels = ["a"] * 60 + ["b"] * 30 + ["c"] * 10
    rows = [
        {"id": str(i), "language": code, "label": label}
        for code in ("deu_Latn", "eng_Latn")
        for i, label in enumerate(labels)
    ]
    ten = sample(rows, 10)
    counts = collections.Counter((row["language"], row["label"]) for row in ten)
    assert set(counts.values()) == {6, 3, 1}
    assert [row for row in rows if row in ten] == ten
    german, english = (of_language(ten, code) for code in ("deu_Latn", "eng_Latn"))
    assert [row["id"] for row in german] == [row["id"] for row in english]
    # Not the first rows, the same in another order of rows, and all where there are fewer.
    assert [row["id"] for row in german] != [str(i) for i in (*range(6), 60, 61, 62, 90)]
    assert sorted(map(str, sample(rows[::-1], 10))) == sorted(map(str, ten))
    assert sample(rows, 1000) == rows
    # A smaller sample is part of a larger one: runs of both share predictions.
    assert all(row in ten for row in sample(rows, 5))


def test_a_sample_where_a_language_lacks_items():
    rows = [
        {"id": str(i), "language": code, "label": "ab"[i % 2]}
        for code, number in (("deu_Latn", 40), ("nah_Latn", 30))
        for i in range(number)
    ]
    kept = {code: {r["id"] for r in of_language(sample(rows, 10), code)} for code in
            ("deu_Latn", "nah_Latn")}  # fmt: skip
    assert {i for i in kept["deu_Latn"] if int(i) < 30} <= kept["nah_Latn"]
    assert len(kept["nah_Latn"]) == 10
    assert message("nowhere", rows, 0, read=sample) == "limit is 0; it must be at least 1."


def test_languages_that_an_encoder_does_not_know():
    readable = tuple(LANGUAGES)
    assert source_language("deu_Latn", readable) == "deu_Latn"
    assert source_language("mad_Latn", readable) == "ind_Latn"
    assert source_language("arb_Latn", readable) == "arb_Latn"
    assert source_language("arb_Latn", ("arb_Arab", "eng_Latn")) == "arb_Arab"
    for code in ("mad_Latn", "deu_Latn"):
        with pytest.raises(ValueError, match="the nearest are"):
            source_language(code, ("eng_Latn", "fra_Latn"))


@pytest.mark.parametrize("pattern", ["data/{}/{}.tsv", "data/annotated/{}/{}.tsv"])
def test_layouts_of_repository_and_hub(tmp_path, pattern):
    write_sib(tmp_path, pattern)
    write(tmp_path / "data/README/test.tsv", "not a language\n")
    read = read_benchmark("sib200", tmp_path)
    assert (read.name, read.kind, read.labels) == ("sib200", "text", tuple(sorted(TOPICS)))
    assert read.languages == ("deu_Latn", "eng_Latn", "zho_Hans")
    assert [len(rows) for rows in (read.train, read.dev, read.test)] == [14, 14, 42]
    assert {row["language"] for row in [*read.train, *read.dev]} == {"eng_Latn"}
    assert read.test[0] == {
        "id": "200",
        "language": "deu_Latn",
        "label": "science/technology",
        "text": 'deu_Latn "200" here',
    }
    assert "CC BY-SA 4.0" in read.licence
    read = read_benchmark("sib200", tmp_path, languages=("zho_Hans",), splits=("test",), limit=7)
    assert read.languages == ("eng_Latn", "zho_Hans")
    assert collections.Counter(row["label"] for row in read.test) == dict.fromkeys(TOPICS, 2)
    assert not read.train and not read.dev
    read = read_benchmark("sib200", tmp_path, english="deu_Latn", splits=("train",))
    assert {row["language"] for row in read.train} == {"deu_Latn"}


def test_errors_at_the_door(tmp_path):
    say = f"{tmp_path}"
    patterns = "data/annotated/<language>/<split>.tsv or data/<language>/<split>.tsv"
    source = "github.com/dadelani/sib-200 or Davlan/sib200 on the hub"
    assert message(say, "sib-200", tmp_path).startswith("benchmark 'sib-200' is not one of sib200,")
    assert message(say, "sib200", tmp_path / "no") == (
        f"F/no is not a folder; sib200 is read from one with {source}."
    )
    assert message(say, "sib200", tmp_path) == (
        f"F holds no test rows of sib200, which lie in {patterns} of {source}."
    )
    write_sib(tmp_path)
    said = message(say, "sib200", tmp_path, languages=("deu_Latn", "zho_hans"))
    assert said.startswith("F: language 'zho_hans' is not one of the 3 ")
    assert "zho_Hans, " in said
    (tmp_path / "data/eng_Latn/train.tsv").unlink()
    assert message(say, "sib200", tmp_path) == (
        "F hold no train rows of sib200 in eng_Latn: these lie in data/<language>/<split>.tsv."
    )
    assert len(read_benchmark("sib200", tmp_path, splits=("dev", "test")).test) == 42
    assert message(say, "sib200", tmp_path, splits=("test",), limit=0) == (
        "limit is 0; it must be at least 1."
    )


def test_bad_rows_are_named_with_file_and_line(tmp_path):
    folder = tmp_path / "sib"
    write_sib(folder)
    path = folder / "data/deu_Latn/test.tsv"
    good = path.read_bytes()
    header, *lines = good.decode().split("\n")

    def said(*lines, header=header):
        write(path, "\n".join((header, *lines)))
        return message(folder, "sib200", folder)

    assert said("1\tsport\tx\n").startswith(
        "F/data/deu_Latn/test.tsv, line 2: the category is 'sport', it must be one of"
    )
    assert said(lines[0], "7\tsports\t\n") == "F/data/deu_Latn/test.tsv, line 3: the text is empty."
    assert said(lines[0], lines[0], "") == (
        "F/data/deu_Latn/test.tsv, line 3: the id '200' was already given in line 2."
    )
    assert said(*lines, header="index_id\tcategory\tsentence") == (
        "F/data/deu_Latn/test.tsv, line 1: there is no column 'text'; there is 'index_id',"
        " 'category', 'sentence'."
    )
    assert said(*lines[:-3], "") == (
        "the test rows in deu_Latn have no label 'geography', which others have."
    )
    assert said(lines[2].replace("travel", "sports"), *lines[:2], *lines[3:]) == (
        "row '202' has the label 'travel' in eng_Latn and 'sports' in deu_Latn; they must be the"
        " same."
    )
    path.write_bytes(good.replace(b"here", b"h\xe9re", 1))
    assert message(folder, "sib200", folder) == (
        "F/data/deu_Latn/test.tsv, line 2: byte 43 of the line (0xe9) is not UTF-8."
    )


# ---- a user's own ----

OWN = [
    {"text": "Warm.", "text_pair": "Cold.", "label": "no", "language": "eng_Latn"},
    {"text": "Warm.", "text_pair": "Hot.", "label": "yes", "language": "eng_Latn"},
    {"text": "Warm.", "text_pair": "Heiß.", "label": "yes", "language": "deu_Latn"},
]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_own_pairs_in_every_format(tmp_path, suffix):
    def own(name, rows):
        path = tmp_path / f"{name}{suffix}"
        table = pd.DataFrame(rows)
        if suffix == ".parquet":
            table.to_parquet(path)
        elif suffix == ".jsonl":
            write(path, jsonl(rows))
        else:
            table.to_csv(path, index=False, sep={".csv": ",", ".tsv": "\t"}[suffix])
        return path

    english = [{k: v for k, v in row.items() if k != "language"} for row in OWN[:2]]
    read = read_own(own("weather", english), own("test", OWN), dev=own("dev", OWN[:2]))
    assert (read.name, read.kind, read.labels) == ("weather", "pair", ("no", "yes"))
    assert read.test == [{"id": str(i), **row} for i, row in enumerate(OWN)]
    assert read.train == read.dev == read.test[:2]


CHOICES = [
    {"text": "It rained.", "question": "So?", "choices": ["wet", "dry", "x,y"], "label": "1"},
    {"text": "It shone.", "question": "So?", "choices": ["wet", "dry", 'a "b"'], "label": "2"},
]


@pytest.mark.parametrize(
    "form", ["jsonl", "parquet", "csv of lists", "tsv of columns", "parquet of columns"]
)
def test_own_choices_in_every_format(tmp_path, form):
    rows = [row | {"language": "deu_Latn"} for row in CHOICES]
    if form.endswith("lists"):
        rows = [row | {"choices": json.dumps(row["choices"])} for row in rows]
    if form.endswith("columns"):
        rows = [
            {k: v for k, v in row.items() if k != "choices"}
            | {f"choice{i}": choice for i, choice in enumerate(row["choices"], 1)}
            for row in rows
        ]
    suffix = form.split()[0]
    test, train = tmp_path / f"test.{suffix}", tmp_path / f"train.{suffix}"
    for path, code in ((test, "deu_Latn"), (train, "eng_Latn")):
        table = pd.DataFrame([row | {"language": code} for row in rows])
        if suffix == "parquet":
            table.to_parquet(path)
        elif suffix == "jsonl":
            write(path, table.to_json(orient="records", lines=True))
        else:
            table.to_csv(path, index=False, sep={"csv": ",", "tsv": "\t"}[suffix])
    read = read_own(train, test, name="weather")
    assert (read.name, read.kind, read.labels) == ("weather", "choice", ("1", "2", "3"))
    for row, given in zip(read.test, CHOICES, strict=True):
        assert (row["context"], row["question"]) == (given["text"], "So?")
        assert (row["choices"], row["label"]) == (given["choices"], given["label"])


def test_own_files_that_do_not_fit(tmp_path):
    def own(name, rows):
        return write(tmp_path / f"{name}.jsonl", jsonl(rows))

    def said(train, test):
        return message(tmp_path, own("a", train), own("b", test), read=read_own)

    choices = [row | {"language": "eng_Latn"} for row in CHOICES]
    german = [row | {"language": "deu_Latn"} for row in CHOICES]
    three = {"choices": ["a", "b"]}
    assert said(OWN[:2], choices) == (
        "F/b.jsonl, line 1: the label is '1', it must be one of 'no', 'yes'."
    )
    assert said(choices, [OWN[0] | {"label": "1"}]) == (
        "F/b.jsonl holds rows of the kind pair, and F/a.jsonl of choice."
    )
    assert said(OWN[:1], OWN) == "F/a.jsonl holds one label alone, 'no'."
    assert said(OWN[:2], OWN[:2]).startswith("F/b.jsonl holds rows in eng_Latn alone;")
    assert said(choices, [german[0] | {"label": "0"}]) == (
        "F/b.jsonl, line 1: the label is '0', it must be one of '1', '2', '3'."
    )
    assert said([*choices, choices[0] | three], german) == (
        "F/a.jsonl, line 3: there are 2 choices, and 3 in the first row; it must be as many in"
        " each."
    )
    assert said([choices[0] | {"choices": ["a"]}], german) == (
        "F/a.jsonl, line 1: the choices are ['a'], they must be a list of two texts or more."
    )
    assert said([choices[0] | {"choices": ["a", " "]}], german) == (
        "F/a.jsonl, line 1: the choice 2 is empty."
    )


# ---- the real ones ----


def test_sib200(mtllm_data):
    """Against pandas, which reads the quotes; all languages, labels and the same items in each."""
    read = read_benchmark("sib200", mtllm_data / "sib200")
    assert [len(rows) for rows in (read.train, read.dev, read.test)] == [701, 99, 205 * 204]
    assert read.languages == tuple(sorted(LANGUAGES))
    for code in ("eng_Latn", "nqo_Nkoo", "ydd_Hebr"):
        path = mtllm_data / f"sib200/data/annotated/{code}/test.tsv"
        table = pd.read_csv(path, sep="\t", keep_default_na=False, dtype=str)
        rows = of_language(read.test, code)
        assert [row["text"] for row in rows] == table["text"].to_list()
        assert [row["label"] for row in rows] == table["category"].to_list()
        assert [row["id"] for row in rows] == table["index_id"].to_list()
    hundred = read_benchmark("sib200", mtllm_data / "sib200", splits=("test",), limit=100).test
    # By largest remainder of 51, 40, 30, 25, 22, 19 and 17 of 204, worked out by hand.
    counts = {"science/technology": 25, "travel": 20, "politics": 15, "sports": 12, "health": 11,
              "entertainment": 9, "geography": 8}  # fmt: skip
    items = {code: [r["id"] for r in of_language(hundred, code)] for code in LANGUAGES}
    assert set(map(tuple, items.values())) == {tuple(items["eng_Latn"])}
    labels = [row["label"] for row in of_language(hundred, "eng_Latn")]
    assert collections.Counter(labels) == counts


def test_nusax(mtllm_data):
    read = read_benchmark("nusax", mtllm_data / "nusax")
    assert [len(rows) for rows in (read.train, read.dev, read.test)] == [500, 100, 12 * 400]
    assert {"mad_Latn", "nij_Latn", "bbc_Latn"} <= set(read.languages)
    assert sum("is told ind_Latn" in note for note in read.notes) == 3
    for code, name in (("bug_Latn", "buginese"), ("bbc_Latn", "toba_batak")):
        table = pd.read_csv(mtllm_data / f"nusax/datasets/sentiment/{name}/test.csv", dtype=str)
        assert [row["text"] for row in of_language(read.test, code)] == table["text"].to_list()
    assert any("\n" in row["text"] for row in read.test)
