"""Benchmarks come back as pandas reads their files; the same items everywhere; errors at the door.

Data sets that are at hand are read where MTLLM_DATA names them, others from small files in the
layout that they are published in.
"""

import collections
import json

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtllm_jax.data.benchmarks import (
    codes,
    read_benchmark,
    read_bitext,
    read_own,
    source_language,
)
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


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=7), limit=st.integers(1, 120))
def test_a_sample_is_as_near_to_the_proportions_as_whole_rows_are(counts, limit):
    labels = [label for label, count in zip("abcdefg", counts, strict=False) for _ in range(count)]
    rows = [{"id": str(i), "language": "deu_Latn", "label": x} for i, x in enumerate(labels)]
    kept = collections.Counter(row["label"] for row in sample(rows, limit))
    size = min(limit, len(rows))
    assert kept.total() == size
    for label, count in zip("abcdefg", counts, strict=False):
        assert abs(kept[label] - count * size / len(rows)) < 1


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
        f"F/no is not a folder; it must be one with {source}."
    )
    assert message(say, "sib200", tmp_path) == (
        f"F holds no test rows of sib200: these lie in {patterns} of {source}."
    )
    write_sib(tmp_path)
    said = message(say, "sib200", tmp_path, languages=("deu_Latn", "zho_hans"))
    assert said.startswith("F: language 'zho_hans' is not one of the 3 ")
    assert "zho_Hans, " in said
    (tmp_path / "data/eng_Latn/train.tsv").unlink()
    assert message(say, "sib200", tmp_path) == (
        "F: there are no train rows of sib200 in eng_Latn; these lie in"
        " data/<language>/<split>.tsv."
    )
    assert len(read_benchmark("sib200", tmp_path, splits=("dev", "test")).test) == 42
    assert message(say, "sib200", tmp_path, english_data=tmp_path) == (
        "english_data is F; sib200 has eng_Latn rows of its own, it must be empty."
    )
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
        "F: the test rows in deu_Latn have no label 'geography'; they must have each of"
        " 'entertainment', 'geography', 'health', 'politics', 'science/technology', 'sports',"
        " 'travel'."
    )
    assert said(lines[2].replace("travel", "sports"), *lines[:2], *lines[3:]) == (
        "F: the row '202' has the label 'travel' in eng_Latn and 'sports' in deu_Latn; they must"
        " be the same."
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
    for row, as_given in zip(read.test, CHOICES, strict=True):
        assert (row["context"], row["question"]) == (as_given["text"], "So?")
        assert (row["choices"], row["label"]) == (as_given["choices"], as_given["label"])


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


# ---- layouts that are not at hand ----

NLI = ("entailment", "neutral", "contradiction")
XNLI_LANGUAGES = "ar bg de el en es fr hi ru sw th tr ur vi zh".split()
XNLI_HEADER = (
    "language gold_label sentence1_binary_parse sentence2_binary_parse sentence1_parse"
    " sentence2_parse sentence1 sentence2 promptID pairID genre label1 label2 label3 label4 label5"
    " sentence1_tokenized sentence2_tokenized match"
).split()


def tsv(header, rows):
    return "".join("\t".join(map(str, row)) + "\n" for row in (header, *rows))


def xnli_file(split):
    """The rows of all languages, by language, with quotes that are letters."""
    rows = []
    for language in XNLI_LANGUAGES:
        for number, label in enumerate(NLI):
            cells = dict.fromkeys(XNLI_HEADER, "") | {
                "language": language,
                "gold_label": label,
                "sentence1": f'{language} "{split} premise {number}',
                "sentence2": f'{language} hypothesis {number}"',
                "pairID": number + 1,
            }
            rows.append(list(cells.values()))
    return tsv(XNLI_HEADER, rows)


def write_hub_nli(folder, codes, split, labels=(0, 1, 2)):
    for code in codes:
        table = pd.DataFrame({
            "premise": [f"{code} {split} premise {i}" for i in range(len(labels))],
            "hypothesis": [f"{code} hypothesis {i}" for i in range(len(labels))],
            "label": labels,
        })  # fmt: skip
        path = folder / code / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(path)


def mnli_rows(split):
    return [
        {
            "annotator_labels": [label],
            "genre": "fiction",
            "gold_label": label,
            "pairID": f"{number}n",
            "sentence1": f"{split} {number}",
            "sentence2": f"hypothesis {number}",
        }
        for number, label in enumerate((*NLI, "-"))
    ]


def test_xnli_of_the_zip_with_mnli(tmp_path):
    for split in ("dev", "test"):
        write(tmp_path / f"XNLI-1.0/xnli.{split}.tsv", xnli_file(split))
    for split in ("train", "dev_matched"):
        content = jsonl(mnli_rows(split))
        write(tmp_path / f"mnli/multinli_1.0_{split}.jsonl", content)
    for folder in (tmp_path, tmp_path / "XNLI-1.0"):
        read = read_benchmark("xnli", folder, english_data=tmp_path / "mnli")
        assert (read.kind, read.labels) == ("pair", tuple(sorted(NLI)))
        assert len(read.languages) == 15
        assert "arb_Arab" in read.languages and "swh_Latn" in read.languages
        assert read.notes == (
            "Left out, without a label or with a blank text: 1 of the train rows.",
        )
        assert [row["label"] for row in read.train] == list(NLI)
        assert [row["text"] for row in read.train] == ["train 0", "train 1", "train 2"]
        assert [row["text"] for row in read.dev] == [f'en "dev premise {i}' for i in range(3)]
    assert of_language(read.test, "zho_Hans")[1] == {
        "id": "2",
        "language": "zho_Hans",
        "label": "neutral",
        "text": 'zh "test premise 1',
        "text_pair": 'zh hypothesis 1"',
    }
    # Without MNLI it says where English lies; what is not asked for is not missed.
    said = message(tmp_path, "xnli", tmp_path)
    assert said.startswith(
        "F: there are no train rows of xnli in eng_Latn; these lie in multinli_1.0_"
    )
    assert said.endswith("of MNLI or XNLI, the folder english_data.")
    assert len(read_benchmark("xnli", tmp_path, splits=("dev", "test")).test) == 45
    # A file that lacks a language is an error, not fourteen languages.
    path = tmp_path / "XNLI-1.0/xnli.test.tsv"
    rows = [line for line in path.read_text().split("\n") if not line.startswith("ur\t")]
    path.write_text("\n".join(rows))
    assert message(tmp_path, "xnli", tmp_path, splits=("test",)) == (
        "F/XNLI-1.0/xnli.test.tsv holds no test rows in urd_Arab."
    )
    path.write_text("\n".join(rows).replace("\tneutral\t", "\tmaybe\t", 1))
    assert message(tmp_path, "xnli", tmp_path, splits=("test",)).startswith(
        "F/XNLI-1.0/xnli.test.tsv, line 3: the gold_label is 'maybe', it must be one of"
    )


def test_nli_of_the_hub(tmp_path):
    write_hub_nli(tmp_path, ["en", "de", "all_languages"], "test")
    for split in ("train", "validation"):
        write_hub_nli(tmp_path, ["en"], split)
    read = read_benchmark("xnli", tmp_path)
    assert read.languages == ("deu_Latn", "eng_Latn")
    assert [row["label"] for row in read.train] == list(NLI)
    assert [row["id"] for row in read.test] == ["0", "1", "2"] * 2
    assert read.dev[2]["text"] == "en validation premise 2"
    # The same folder has the English of AmericasNLI, whose rows have no ids there either.
    write_hub_nli(tmp_path / "americas", ["aym", "nah"], "test")
    write_hub_nli(tmp_path / "americas", ["aym", "nah"], "validation")
    other = read_benchmark("americasnli", tmp_path / "americas", english_data=tmp_path)
    assert other.languages == ("ayr_Latn", "nah_Latn")
    assert (other.train, other.dev) == (read.train, read.dev)
    (tmp_path / "de/test-00000-of-00001.parquet").rename(
        tmp_path / "de/test-00000-of-00002.parquet"
    )
    assert message(tmp_path, "xnli", tmp_path) == (
        "F/de: there must be 2 of files like test-00000-of-00002.parquet, 1 were found."
    )


@pytest.mark.parametrize("form", ["glue", "glue of the hub", "hub", "machine translation"])
def test_other_forms_of_mnli(tmp_path, form):
    write_hub_nli(tmp_path, ["aym"], "test")
    english = tmp_path / "english"
    table = pd.DataFrame(mnli_rows("train")[:3])
    if form == "glue":
        table = table[["genre", "sentence1", "sentence2", "gold_label"]]
        table["sentence1"] = '"' + table["sentence1"]
        write(english / "MNLI/train.tsv", tsv(table.columns, table.to_numpy()))
    elif form == "machine translation":
        rows = [(f"train {i}", f"hypothesis {i}", label) for i, label in enumerate(NLI)]
        rows = [(*row[:2], row[2].replace("tion", "tory")) for row in rows]
        write(english / "multinli/multinli.train.en.tsv", tsv(("premise", "hypo", "label"), rows))
    else:
        write_hub_nli(english, ["mnli" if form.startswith("glue") else "data"], "train", [0, 1, 2])
    read = read_benchmark("americasnli", tmp_path, english_data=english, splits=("train", "test"))
    assert [row["label"] for row in read.train] == list(NLI)
    assert read.train[0]["text"].endswith(("train 0", "train premise 0"))
    assert {row["language"] for row in read.train} == {"eng_Latn"}


KARDES = {"azeri": "az", "kazakh": "kk", "kyrgyz": "ky", "uyghur": "ug", "uzbek": "uz"}


def test_kardes_nlu(tmp_path):
    """The unnamed first column of some files is called otherwise in others."""
    for language, code in KARDES.items():
        for split in ("dev", "test"):
            first = "Unnamed: 0" if code == "az" else ""
            table = pd.DataFrame({
                first: [5, 7, 11],
                "gold_label": NLI,
                "sentence1": ["one, two"] * 3,
                "sentence2": [f"{split} {i}" for i in range(3)],
                "s1_translation": [f"{code} \"bir\", iki"] * 3,
                "s2_translation": [f"{code} {split} {i}" for i in range(3)],
            })  # fmt: skip
            path = write(tmp_path / f"Data/{language}/xnli.{split}.{code}.csv", "")
            table.to_csv(path, index=False)
            table = pd.DataFrame({
                "id": [501, 502],
                "asks-for": ["cause", "effect"],
                "most-plausible-alternative": [1, 2],
                **{name: [f"{name} {split} {i}" for i in range(2)] for name in ("p", "a1", "a2")},
                **{f"{name}_translation": [f"{code} {name}"] * 2 for name in ("p", "a1", "a2")},
            })  # fmt: skip
            table.to_csv(path.with_name(f"xcopa.{split}.{code}.csv"), index=code == "ky")
    codes = ("azj_Latn", "eng_Latn", "kaz_Cyrl", "kir_Cyrl", "uig_Cyrl", "uzn_Latn")
    read = read_benchmark("kardes_nli", tmp_path, splits=("dev", "test"))
    assert read.languages == codes
    assert read.dev[1]["text"] == "one, two" and read.dev[1]["text_pair"] == "dev 1"
    assert of_language(read.test, "uig_Cyrl")[2]["text"] == 'ug "bir", iki'
    assert "An encoder without the code uig_Cyrl is told kaz_Cyrl in its place." in read.notes
    read = read_benchmark("kardes_copa", tmp_path, splits=("dev", "test"))
    assert read.languages == codes
    assert of_language(read.test, "kir_Cyrl")[1] == {
        "id": "502",
        "language": "kir_Cyrl",
        "label": "2",
        "context": "ky p",
        "question": "What happened as a result?",
        "choices": ["ky a1", "ky a2"],
    }
    assert of_language(read.test, "eng_Latn")[0]["choices"] == ["a1 test 0", "a2 test 0"]
    assert "COPA, the folder english_data" in message(tmp_path, "kardes_copa", tmp_path)


def belebele_rows(code):
    """Out of order: languages are joined by link and question_number."""
    rows = [
        {
            "link": f"https://en.wikibooks.org/{i // 2}",
            "question_number": i % 2 + 1,
            "flores_passage": f"{code} passage {i // 2}",
            "question": f"{code} question {i}?",
            **{f"mc_answer{n}": f"{code} answer {n} of {i}" for n in range(1, 5)},
            "correct_answer_num": str(i + 1),
            "dialect": code,
            "ds": "2023-05-03",
        }
        for i in range(4)
    ]
    return rows if code == "eng_Latn" else rows[::-1]


@pytest.mark.parametrize("folder", ["", "Belebele", "data"])
def test_belebele(tmp_path, folder):
    for code in ("eng_Latn", "acm_Arab", "hin_Latn"):
        write(tmp_path / folder / f"{code}.jsonl", jsonl(belebele_rows(code)))
    read = read_benchmark("belebele", tmp_path, splits=("test",), limit=4)
    assert (read.kind, read.labels) == ("choice", ("1", "2", "3", "4"))
    assert read.languages == ("acm_Arab", "eng_Latn", "hin_Latn")
    ids = [{row["id"] for row in of_language(read.test, code)} for code in read.languages]
    assert ids[0] == ids[1] == ids[2] and len(ids[0]) == 4
    assert of_language(read.test, "hin_Latn")[3] == {
        "id": "https://en.wikibooks.org/0 1",
        "language": "hin_Latn",
        "label": "1",
        "context": "hin_Latn passage 0",
        "question": "hin_Latn question 0?",
        "choices": [f"hin_Latn answer {n} of 0" for n in range(1, 5)],
    }
    rows = belebele_rows("acm_Arab")
    rows[2]["mc_answer3"] = ""
    write(tmp_path / folder / "acm_Arab.jsonl", jsonl(rows))
    assert message(tmp_path, "belebele", tmp_path, splits=("test",)).endswith(
        "acm_Arab.jsonl, line 3: the mc_answer3 is empty."
    )


def test_training_set_of_belebele(tmp_path):
    """As pandas writes it: an unnamed first column, line breaks and quotes in cells, blanks."""
    write(tmp_path / "eng_Latn.jsonl", jsonl(belebele_rows("eng_Latn")))
    columns = "dataset split passage_id question_id passage question answer1 answer2 answer3 answer4 correct_answer correct_answer_num".split()  # fmt: skip # noqa: E501
    rows = [
        ["RACE", "train", "high1.txt", n, 'He said:\n"No."\tThen', "Who?", *"abcd", "a", n]
        for n in range(1, 5)
    ]
    rows += [["SciQ", "dev", 7, n, "One.", "Two?", *"abcd", "b", n] for n in range(1, 5)]
    rows += [
        ["RACE", "train", 1, 9, "Text.", "Q?", "a", None, "c", "d", "a", 1],
        ["MCTest_500", "train", 1, 9, "Text.", "Q?", *"abcd", None, None],
    ]
    table = pd.DataFrame(rows, columns=columns)
    english = tmp_path / "training"
    english.mkdir()
    table.to_csv(english / "belebele_training_set.tsv", sep="\t")
    assert "4.0" in (english / "belebele_training_set.tsv").read_text()
    read = read_benchmark("belebele", tmp_path, english_data=english)
    assert [row["label"] for row in read.train] == [row["label"] for row in read.dev] == [*"1234"]
    assert read.train[0]["context"] == 'He said:\n"No."\tThen'
    assert read.train[0]["choices"] == [*"abcd"]
    assert read.notes == ("Left out, without a label or with a blank text: 2 of the train rows.",)
    assert message(tmp_path, "belebele", tmp_path).endswith(
        "these lie in belebele_training_set.tsv of assemble_training_set.py of"
        " github.com/facebookresearch/belebele, the folder english_data."
    )


def copa_file(split):
    rows = [(f"{split} premise {i}", "cause", "a", "b, c", i % 2) for i in range(4)]
    header = ["premise", "question", "choice1", "choice2", "label"]
    return pd.DataFrame(rows, columns=header).to_csv(index=False)


def test_xcopa_of_the_hub(tmp_path):
    for split in ("train", "dev", "test"):
        write(tmp_path / f"copa/data/copa/en_{split}.csv", copa_file(split))
    table = pd.DataFrame({
        "premise": [f"p{i}" for i in range(4)], "choice1": ["x"] * 4, "choice2": ["y"] * 4,
        "question": ["effect"] * 4, "label": [0, 1, 0, 1], "idx": range(4), "changed": [False] * 4,
    })  # fmt: skip
    for code in ("th", "et"):
        path = tmp_path / f"xcopa/{code}/test-00000-of-00001.parquet"
        path.parent.mkdir(parents=True)
        table.to_parquet(path)
    read = read_benchmark("xcopa", tmp_path / "xcopa", english_data=tmp_path / "copa")
    assert read.languages == ("eng_Latn", "est_Latn", "tha_Thai")
    assert {row["question"] for row in read.test} == {"What was the cause of this?"}
    assert of_language(read.test, "tha_Thai")[3]["choices"] == ["x", "y"]
    assert [row["label"] for row in of_language(read.test, "tha_Thai")] == ["1", "2", "1", "2"]
    said = message(tmp_path, "xcopa", tmp_path / "xcopa", splits=("test",))
    assert said.endswith("data/copa/en_<split>.csv of COPA, the folder english_data.")
    table["label"] = [1, 0, 1, 0]
    table.to_parquet(path)
    assert message(
        tmp_path, "xcopa", tmp_path / "xcopa", english_data=tmp_path / "copa", splits=("test",)
    ).startswith("F/xcopa: the row '0' has the label '2' in est_Latn and '1' in eng_Latn;")


def test_bitexts_that_do_not_fit(tmp_path):
    def said(**options):
        return message(tmp_path, "tatoeba", tmp_path, read=read_bitext, **options)

    base = "data/tatoeba/v1/tatoeba.deu-eng"
    assert said() == (
        "F holds no tatoeba: that is data/tatoeba/v1/tatoeba.<code>-eng.<code> of"
        " github.com/facebookresearch/LASER."
    )
    write(tmp_path / f"{base}.deu", "eins\r\nzwei\n")
    write(tmp_path / f"{base}.eng", "one\n")
    assert said() == (
        f"F/{base}.eng has 1 lines and tatoeba.deu-eng.deu has 2; they must be as many."
    )
    write(tmp_path / f"{base}.eng", "one\n\n")
    assert said() == f"F/{base}.eng, line 2: the line is blank."
    write(tmp_path / f"{base}.eng", b"one\nzw\xff\n")
    assert said() == f"F/{base}.eng, line 2: byte 3 of the line (0xff) is not UTF-8."
    assert said(languages=("deu_Latin",)).startswith("F: language 'deu_Latin' is not one of the 1 ")
    assert said(limit=0) == "limit is 0; it must be at least 1."
    assert message(tmp_path, "flores", tmp_path, read=read_bitext) == (
        "bitext 'flores' is not one of tatoeba, ntrex, seed."
    )
    write(tmp_path / f"{base}.eng", "one\ntwo")
    pairs = read_bitext("tatoeba", tmp_path).pairs
    assert pairs == {"deu_Latn": (["one", "two"], ["eins", "zwei"])}


# ---- the real ones ----


def crosswalk(folder, column):
    """The folder's own table: FLORES-200 codes by what a set calls them."""
    table = pd.read_csv(folder / "language_codes.tsv", sep="\t", dtype=str)
    table = table.dropna(subset=column)
    return dict(zip(table[column], table["sib200"], strict=True))


def test_codes_are_those_of_the_crosswalk(mtllm_data):
    assert (
        crosswalk(mtllm_data, "tatoeba").items() ^ codes.TATOEBA.items()
        == {("eng", "eng_Latn")} & crosswalk(mtllm_data, "tatoeba").items()
    )
    ntrex = {k: v for k, v in crosswalk(mtllm_data, "ntrex128").items() if v != "eng_Latn"}
    assert codes.NTREX == ntrex
    for column in ("xcopa", "flores_nllb600m"):
        assert crosswalk(mtllm_data, column).items() <= codes.TWO_LETTER.items()
    assert crosswalk(mtllm_data, "nusax").items() <= codes.NUSAX.items()
    assert crosswalk(mtllm_data, "americasnli").items() <= codes.AMERICAS_NLI.items()


def test_americasnli(mtllm_data, tmp_path):
    for split in ("train", "dev_matched"):
        write(tmp_path / f"multinli_1.0_{split}.jsonl", jsonl(mnli_rows(split)))
    folder = mtllm_data / "americasnli"
    read = read_benchmark(
        "americasnli",
        folder,
        english_data=tmp_path,
        translations=mtllm_data / "americasnli_translated_nllb600m",
    )
    # Not the concatenation of all beside them: 750 rows in eight languages, 738 and 748.
    assert (len(read.languages), len(read.test)) == (10, 8 * 750 + 738 + 748)
    assert (len(read.train), len(read.dev)) == (3, 3)
    for code, name in (("nah_Latn", "nah"), ("quy_Latn", "quy")):
        path = folder / f"data/anli_final/test/{name}.tsv"
        table = pd.read_csv(path, sep="\t", quoting=3, keep_default_na=False, dtype=str)
        rows = of_language(read.test, code)
        assert [row["text"] for row in rows] == table["premise"].to_list()
        assert [row["text_pair"] for row in rows] == table["hypothesis"].to_list()
        assert [row["id"] for row in rows] == table["id"].to_list()
    blank = {row["id"] for row in read.test if not row["text"].strip()}
    assert blank == {"25576", "25577", "25578"}
    note = "Kept and scored, though a text is blank in the published files: 3 of the test rows in"
    assert f"{note} nah_Latn." in read.notes
    # Translations by row, against pandas.
    name = "data/translations/nllb-200-distilled-600M/americas_nli/gn_test.parquet"
    table = pd.read_parquet(mtllm_data / "americasnli_translated_nllb600m" / name)
    rows = of_language(read.translated, "grn_Latn")
    assert [row["text_pair"] for row in rows] == table["hypothesis"].to_list()
    assert [row["id"] for row in rows] == [r["id"] for r in of_language(read.test, "grn_Latn")]
    assert len(read.translated) == 2250
    assert any("published translations by NLLB" in note for note in read.notes)
    few = read_benchmark(
        "americasnli",
        folder,
        translations=mtllm_data / "americasnli_translated_nllb600m",
        splits=("test",),
        limit=30,
    )
    assert len(few.test) == 300
    assert len(few.translated) == 90
    assert all(row in read.translated for row in few.translated)
    # One item is drawn in every language that has it.
    items = {code: {row["id"] for row in of_language(few.test, code)} for code in few.languages}
    assert items["ayr_Latn"] == items["quy_Latn"] == items["tar_Latn"]
    assert message(tmp_path, "americasnli", folder, translations=tmp_path, splits=("test",)) == (
        "F holds no translations of AmericasNLI, data/translations/nllb-200-distilled-600M/"
        "americas_nli/<language>_<split>.parquet."
    )


def test_xcopa(mtllm_data):
    """What is asked is COPA's, though 52 of val and 250 of test say otherwise in Thai."""
    read = read_benchmark("xcopa", mtllm_data / "xcopa", english_data=mtllm_data / "copa_en")
    assert [len(rows) for rows in (read.train, read.dev, read.test)] == [400, 100, 12 * 500]
    copa = pd.read_csv(mtllm_data / "copa_en/data/copa/en_test.csv")
    said = {"cause": "What was the cause of this?", "effect": "What happened as a result?"}
    questions = [said[question] for question in copa["question"]]
    changed = {}
    for name, code in crosswalk(mtllm_data, "xcopa").items():
        rows = of_language(read.test, code)
        assert [row["question"] for row in rows] == questions
        table = pd.read_json(mtllm_data / f"xcopa/data/{name}/test.{name}.jsonl", lines=True)
        assert [row["choices"][1] for row in rows] == table["choice2"].to_list()
        assert [int(row["label"]) - 1 for row in rows] == table["label"].to_list()
        changed[name] = sum(said[q] != asked for q, asked in zip(table["question"], questions, strict=True))  # fmt: skip # noqa: E501
    assert {name: n for name, n in changed.items() if n} == {
        "th": 250, "tr": 51, "sw": 37, "id": 4, "it": 4
    }  # fmt: skip


def test_translations_of_sib200(mtllm_data, tmp_path):
    """Each sentence's source line in FLORES is the row's text, as its README has it."""
    folder = mtllm_data / "flores_nllb600m"
    read = read_benchmark("sib200", mtllm_data / "sib200", translations=folder, splits=("test",))
    assert any("noisy ones" in note for note in read.notes)
    assert len(read.translated) == 40 * 204
    for name, code in (("cy", "cym_Latn"), ("zh", "zho_Hans")):
        lines = {}
        for kind in (name, "nllb.en"):
            texts = [(folder / f"evaluation/{name}-en/flores-{split}.{kind}").read_text("utf-8") for
                     split in ("dev", "test")]  # fmt: skip
            lines[kind] = "".join(texts).split("\n")
        rows = zip(of_language(read.test, code), of_language(read.translated, code), strict=True)
        for original, english in rows:
            assert original["text"].strip() == lines[name][int(original["id"])].strip()
            assert english["text"] == lines["nllb.en"][int(original["id"])]
            assert original["label"] == english["label"]
    path = write(tmp_path / "evaluation/cy-en/flores-dev.nllb.en", "One.\n")
    options = {"translations": tmp_path, "splits": ("test",), "languages": ("cym_Latn",)}
    assert message(tmp_path, "sib200", mtllm_data / "sib200", **options) == (
        "F/evaluation/cy-en/flores-dev.nllb.en has 1 lines, it must have 997."
    )
    path.unlink()
    path.parent.rmdir()
    assert message(tmp_path, "sib200", mtllm_data / "sib200", **options) == (
        "F holds no translations of FLORES, evaluation/<xx>-en/flores-dev.nllb.en."
    )


def test_bitexts(mtllm_data):
    tatoeba = read_bitext("tatoeba", mtllm_data / "tatoeba")
    ntrex = read_bitext("ntrex", mtllm_data / "ntrex128")
    # The counts of the folder's README.
    for bitext, languages, lines in ((tatoeba, 81, 67_645), (ntrex, 110, 219_670)):
        assert len(bitext.pairs) == languages
        assert sum(len(english) for english, _ in bitext.pairs.values()) == lines
        assert all(len(english) == len(other) for english, other in bitext.pairs.values())
        texts = [text for pair in bitext.pairs.values() for side in pair for text in side]
        assert not any(text.endswith(("\r", "\n")) for text in texts)
    german = (mtllm_data / "ntrex128/NTREX-128/newstest2019-ref.deu.txt").read_text("utf-8")
    assert ntrex.pairs["deu_Latn"][1] == german.splitlines()
    few = read_bitext("ntrex", mtllm_data / "ntrex128", languages=("deu_Latn", "fra_Latn"), limit=9)
    assert [*few.pairs] == ["deu_Latn", "fra_Latn"]
    assert few.pairs["deu_Latn"][0] == few.pairs["fra_Latn"][0]
    aligned = dict(zip(*ntrex.pairs["deu_Latn"], strict=True))
    assert [aligned[english] for english in few.pairs["deu_Latn"][0]] == few.pairs["deu_Latn"][1]


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
