"""Rows and texts come back as csv, json and pyarrow wrote them; what is wrong is named."""

import csv
import gzip
import io
import json
import pickle
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtllm_jax.data.files import label_names, read_rows
from mtllm_jax.data.texts import read_texts

COLUMNS = {"text": str, "label": str, "language": str}
LABELS = ("negative", "neutral", "positive")
GOOD = "text,label,language\nwarm,positive,deu_Latn\nkalt,negative,deu_Latn\n"

words = st.text(min_size=1, max_size=12).filter(str.strip)
word_or_number = st.one_of(words, st.integers(-5, 10**12))
row_lists = st.lists(
    st.fixed_dictionaries(
        {
            "text": words,
            "text_pair": words,
            "label": word_or_number,
            "language": st.sampled_from(["deu_Latn", "eng_Latn", "zho_Hans"]),
        }
    ),
    min_size=1,
    max_size=6,
)
quick = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def error(path, columns=COLUMNS, read=read_rows, **options):
    """The one sentence; it starts with the file and ends with the only full stop."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read(path, columns=columns, **options) if read is read_rows else read(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert message.endswith(".")
    assert not re.search(r"[.]\s", message)
    assert "\n" not in message
    return message.removeprefix(str(path)).lstrip(",: ")


def as_read(rows):
    return [
        {"id": str(i)} | {name: str(cell) for name, cell in row.items()}
        for i, row in enumerate(rows)
    ]


# ---- rows come back equal ----


@quick
@given(rows=row_lists, kind=st.sampled_from([".csv", ".tsv"]), bom=st.booleans())
def test_csv_module_round_trip(tmp_path, rows, kind, bom):
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter={".csv": ",", ".tsv": "\t"}[kind])
    writer.writeheader()
    writer.writerows(rows)
    path = write(tmp_path, f"rows{kind}", ("\ufeff" if bom else "") + out.getvalue())
    assert read_rows(path, columns=COLUMNS) == as_read(rows)


@quick
@given(rows=row_lists, ascii_only=st.booleans(), end=st.sampled_from(["\n", "\r\n"]))
def test_json_module_round_trip(tmp_path, rows, ascii_only, end):
    content = "".join(json.dumps(row, ensure_ascii=ascii_only) + end for row in rows)
    plain = write(tmp_path, "rows.jsonl", content)
    packed = write(tmp_path, "rows.jsonl.gz", gzip.compress(content.encode()))
    assert read_rows(plain, columns=COLUMNS) == as_read(rows)
    assert read_rows(packed, columns=COLUMNS) == as_read(rows)


@quick
@given(rows=row_lists)
def test_parquet_round_trip(tmp_path, rows):
    rows = [row | {"label": str(row["label"])} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=2)
    assert read_rows(tmp_path / "rows.parquet", columns=COLUMNS) == as_read(rows)


def test_labels_may_be_numbers_in_every_format(tmp_path):
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "r.parquet")
    paths = [
        write(tmp_path, "r.csv", "text,label\na,1\nb,0\n"),
        write(tmp_path, "r.jsonl", "".join(json.dumps(row) + "\n" for row in rows)),
        tmp_path / "r.parquet",
    ]
    for path in paths:
        read = read_rows(path, columns={"text": str, "label": str}, labels=("0", "1"))
        assert read == as_read(rows)
        assert label_names(read) == ("0", "1")
        (first, second) = read_rows(path, columns={"text": str, "label": int})
        assert (first["label"], second["label"]) == (1, 0)


def test_columns_ids_and_defaults(tmp_path):
    path = write(tmp_path, "r.csv", "id,extra,text,label\nx7,?,a,p\n08,,b,q\n")
    rows = read_rows(path, columns=COLUMNS, defaults={"language": "eng_Latn"})
    assert rows == [
        {"id": "x7", "text": "a", "label": "p", "language": "eng_Latn"},
        {"id": "08", "text": "b", "label": "q", "language": "eng_Latn"},
    ]
    rows = read_rows(path, columns={"text": str}, optional=())
    assert rows == [{"id": "0", "text": "a"}, {"id": "1", "text": "b"}]
    # What the file says goes before the default.
    rows = read_rows(
        write(tmp_path, "g.csv", GOOD), columns=COLUMNS, defaults={"language": "eng_Latn"}
    )
    assert {row["language"] for row in rows} == {"deu_Latn"}


def test_parallel_rows_share_an_id_across_languages(tmp_path):
    path = write(
        tmp_path,
        "r.csv",
        "id,text,label,language\n1,a,p,deu_Latn\n1,b,p,fra_Latn\n1,c,p,deu_Latn\n",
    )
    assert error(path) == "line 4: the id '1' was already given in line 2."
    path.write_text(path.read_text().replace("1,c,p,deu", "1,c,p,spa"))
    assert [row["id"] for row in read_rows(path, columns=COLUMNS)] == ["1", "1", "1"]


def test_files_in_a_form_of_their_own(tmp_path):
    """Other names, a column of two, labels in words, blanks, and quotes that are letters."""
    path = write(
        tmp_path,
        "r.tsv",
        'doc\tnumber\tgold\tpremise\thypothesis\na\t1\t+\t"open\t\na\t2\t-\tb"\t  \n',
    )
    options = {
        "columns": {"id": str, "label": str, "text": str, "text_pair": str},
        "names": {"id": ("doc", "number"), "label": "gold", "text": "premise",
                  "text_pair": "hypothesis"},
        "values": {"label": {"+": "yes", "-": "no"}},
        "blank": ("text_pair",),
        "quoting": False,
    }  # fmt: skip
    assert read_rows(path, **options) == [
        {"id": "a 1", "label": "yes", "text": '"open', "text_pair": ""},
        {"id": "a 2", "label": "no", "text": 'b"', "text_pair": "  "},
    ]
    assert error(path, **options | {"blank": ()}) == "line 2: the hypothesis is empty."
    (swallowed,) = read_rows(path, **options | {"quoting": True})
    assert swallowed["text"] == "open\t\na\t2\t-\tb"
    assert error(path, **options | {"values": {"label": {"+": "yes"}}}) == (
        "line 3: the gold is '-', it must be one of '+'."
    )
    assert error(path, **options | {"names": options["names"] | {"id": ("doc", "page")}}) == (
        "line 1: there is no column 'page'; there is 'doc', 'number', 'gold', 'premise',"
        " 'hypothesis'."
    )
    path.write_text(path.read_text().replace("a\t2", "a\t1"))
    assert error(path, **options) == "line 3: the id 'a 1' was already given in line 2."


CHOICES_ERRORS = {
    "choices\nx\n": "line 2: the choices are 'x', they must be a list of two texts or more.",
    'choices\n"[""a"", 1.5]"\n': "line 2: the choice 2 is 1.5, it must be a string or a whole"
    " number.",
    "choice1,choice3\na,b\n": "line 1: there are the columns 'choice1', 'choice3'; choices must be"
    " numbered from 1 on.",
    "choice1,choice2\na,\n": "line 2: the choice2 is empty.",
    "choice,choice_2\na,b\n": "line 1: there is no column 'choices'; there is 'choice', 'choice_2'"
    " (nearest: 'choice').",
    'choices\n"[""a"", ""b""]"\n"[""a""]"\n': "line 3: the choices are '[\"a\"]', they must be a"
    " list of two texts or more.",
}


@pytest.mark.parametrize("content", CHOICES_ERRORS)
def test_choices_that_are_none(tmp_path, content):
    path = write(tmp_path, "r.csv", content)
    assert error(path, {"choices": list}) == CHOICES_ERRORS[content]


# ---- what is wrong is named ----

CSV_ERRORS = {
    "": "holds no rows.",
    "text,label,language\n": "holds no rows.",
    "text,lable,language\na,b,c\n": "line 1: there is no column 'label'; there is 'text', 'lable',"
    " 'language' (nearest: 'lable').",
    "text,label,text\na,b,c\n": "line 1: the header names the column 'text' twice.",
    GOOD + "so,neutral\n": "line 4: the row has 2 cells and the header has 3.",
    GOOD + "so, so,neutral,deu_Latn\n": "line 4: the row has 4 cells and the header has 3.",
    GOOD + "\n": "line 4: the line is empty.",
    GOOD + ",,\n": "line 4: the text is empty.",
    GOOD + '" \u3000\n",neutral,deu_Latn\n': "line 4: the text is empty.",
    GOOD + "so,,deu_Latn\n": "line 4: the label is empty.",
    GOOD + "so,Positiv,deu_Latn\n": "line 4: the label is 'Positiv', it must be one of 'negative',"
    " 'neutral', 'positive' (nearest: 'positive').",
    GOOD + 'so,neutral,deu_Latn\n"so,neutral,deu_Latn\nso,neutral,deu_Latn\n': "line 5: the quoting"
    " of this row is broken (unexpected end of data).",
    # The row starts in line 4, the line that csv has read last is 6.
    GOOD + '"a\nb\nc",good,deu_Latn\n': "line 4: the label is 'good', it must be one of 'negative',"
    " 'neutral', 'positive'.",
    GOOD + '"a\nb\nc",neutral,deu_Latn\nso,good,deu_Latn\n': "line 7: the label is 'good', it must"
    " be one of 'negative', 'neutral', 'positive'.",
}


@pytest.mark.parametrize("content", CSV_ERRORS)
def test_csv_errors(tmp_path, content):
    assert error(write(tmp_path, "r.csv", content), labels=LABELS) == CSV_ERRORS[content]
    if '"' not in content and ", " not in content:
        path = write(tmp_path, "r.tsv", content.replace(",", "\t"))
        assert error(path, labels=LABELS) == CSV_ERRORS[content]


JSON_ROW = '{"text": "a", "label": "positive", "language": "deu_Latn"}\n'
JSON_ERRORS = {
    "": "holds no rows.",
    '{"text": "a", "language": "deu_Latn"}\n': "line 1: there is no column 'label'; there is"
    " 'text', 'language'.",
    JSON_ROW + '{"text": "a", "label": "positive"}\n': "line 2: there is no column 'language';"
    " there is 'text', 'label'.",
    JSON_ROW + JSON_ROW.replace("{", '{"id": "x", '): "line 2 has the field 'id' and line 1 has"
    " not.",
    JSON_ROW.replace("{", '{"id": "x", ') + JSON_ROW: "line 1 has the field 'id' and line 2 has"
    " not.",
    JSON_ROW + "\n" + JSON_ROW: "line 2: the line is empty.",
    JSON_ROW + JSON_ROW[:-3]: "line 2: the line is not JSON (Unterminated string"
    " starting at, column 48).",
    JSON_ROW + '["a"]\n': "line 2: the line is ['a'], it must be a JSON object.",
    JSON_ROW.replace('"a"', "null"): "line 1: the text is None, it must be a string or a whole"
    " number.",
    JSON_ROW.replace('"a"', r'"\ud800"'): "line 1: the text holds half of a surrogate pair,"
    r" '\ud800'.",
    JSON_ROW.replace('"positive"', "1.5"): "line 1: the label is 1.5, it must be a string or a"
    " whole number.",
    JSON_ROW.replace('"positive"', "true"): "line 1: the label is True, it must be a string or a"
    " whole number.",
}


@pytest.mark.parametrize("content", JSON_ERRORS)
def test_json_errors(tmp_path, content):
    assert error(write(tmp_path, "r.jsonl", content)) == JSON_ERRORS[content]


@pytest.mark.parametrize("bad", ["[" * 100_000, '{"text": ' + "1" * 5000 + "}"])
def test_json_beyond_pythons_limits(tmp_path, bad):
    message = error(write(tmp_path, "r.jsonl", JSON_ROW + bad))
    assert message.startswith("line 2: the line is not JSON that can be read")


def test_unknown_language_names_the_nearest(tmp_path):
    path = write(tmp_path, "r.csv", GOOD + "so,neutral,de\n")
    message = error(path)
    assert message.startswith("line 4: language 'de' is not one of")
    assert "deu_Latn" in message
    path.write_text(GOOD)
    assert "fra_Latn" in error(path, languages=["fra_Latn", "eng_Latn"])
    assert len(read_rows(path, columns=COLUMNS, languages=["deu_Latn"])) == 2


@pytest.mark.parametrize("name", ["r.csv", "r.jsonl", "r.txt"])
def test_bad_utf8_names_line_and_byte(tmp_path, name):
    path = write(tmp_path, name, b'\xef\xbb\xbf"text"\nab\xe9t\xe9\n')
    if name == "r.jsonl":
        path.write_bytes(JSON_ROW.encode() + b"ab\xe9t\xe9\n")
    read = read_texts if name == "r.txt" else read_rows
    message = error(path, columns={"text": str}, read=read)
    assert message == "line 2: byte 3 of the line (0xe9) is not UTF-8."


def test_bad_utf8_in_parquet_names_the_row(tmp_path):
    offsets, cells = pa.py_buffer(np.array([0, 1, 3], np.int32).tobytes()), pa.py_buffer(b"ab\xe9")
    column = pa.Array.from_buffers(pa.string(), 2, [None, offsets, cells])
    pq.write_table(pa.table({"text": column}), tmp_path / "r.parquet")
    for read in (read_rows, read_texts):
        message = error(tmp_path / "r.parquet", columns={"text": str}, read=read)
        assert message == "row 2: byte 2 of the text (0xe9) is not UTF-8."


def test_files_that_cannot_be_read(tmp_path):
    assert error(tmp_path / "none.csv") == "does not exist."
    assert error(tmp_path) == "is not a file."
    message = error(write(tmp_path, "r.xlsx", GOOD))
    assert message == (
        "ends in '.xlsx'; the kinds that are read: .jsonl, .jsonl.gz, .csv, .tsv, .parquet."
    )
    message = error(write(tmp_path, "r.txt.gz", GOOD), read=read_texts)
    assert message == (
        "ends in '.txt.gz'; the kinds that are read: .txt, .jsonl, .jsonl.gz, .jsonl.zst, .parquet,"
        " .arrayrecord."
    )
    assert error(write(tmp_path, "r.jsonl.gz", GOOD)).startswith("cannot be read (Not a gzipped")
    cut = gzip.compress(JSON_ROW.encode() * 100)[:-20]
    assert error(write(tmp_path, "c.jsonl.gz", cut)).startswith("cannot be read (")
    for content in (b"", b"PAR1 but not really PAR1"):
        message = error(write(tmp_path, "r.parquet", content))
        assert message.startswith("cannot be read as Parquet (")


def test_parquet_errors(tmp_path):
    path = tmp_path / "r.parquet"

    def message(columns, **options):
        pq.write_table(pa.table(columns), path)
        return error(path, columns={"text": str}, **options)

    missing = "there is no column 'text'; there is 'test' (nearest: 'test')."
    assert message({"test": ["a"]}) == missing
    assert error(path, read=read_texts) == missing
    assert message({"text": pa.array([], pa.string())}) == "holds no rows."
    assert error(path, read=read_texts) == "holds no text."
    for blank in ("\u2003\n", None):
        assert message({"text": ["a", "b", blank]}).startswith("row 3: the text is ")
        assert error(path, read=read_texts) == "row 3: the text is empty."
    duplicates = {"text": ["a", "b"], "id": [7, 7]}
    assert message(duplicates) == "row 2: the id '7' was already given in row 1."
    assert message({"text": [1.5]}).startswith("row 1: the text is 1.5, it must be a string")
    assert error(path, read=read_texts) == "the column 'text' is double, it must be string."


def test_a_whole_number_column(tmp_path):
    path = write(tmp_path, "r.csv", "text,label\na,1\nb,x\n")
    message = error(path, columns={"text": str, "label": int})
    assert message == "line 3: the label is 'x', it must be a whole number."


# ---- texts ----


def test_texts_of_each_kind(tmp_path):
    texts = ["One line.", "  kept blanks ", "a\u2028b", "Ω"]
    write(tmp_path, "a.txt", "\ufeff" + "\r\n\n \n".join(texts))
    write(tmp_path, "a.jsonl", "".join(json.dumps({"text": t, "x": 1}) + "\n" for t in texts))
    table = pa.table({"url": ["u"] * 4, "text": texts})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    for name in ("a.txt", "a.jsonl", "a.parquet"):
        read = read_texts(tmp_path / name)
        assert list(read) == texts
        assert (len(read), read[np.int64(2)], read[-1]) == (4, texts[2], "Ω")
        assert list(pickle.loads(pickle.dumps(read))) == texts
        with pytest.raises(IndexError):
            read[4]


def test_folders_and_globs_in_sorted_order(tmp_path):
    for name in ("b/2.parquet", "b/10.parquet", "a/9.parquet", ".cache/0.parquet"):
        path = tmp_path / "web" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"text": [name]}), path)
    write(tmp_path, "web/README.md", "not a text")
    wanted = ["a/9.parquet", "b/10.parquet", "b/2.parquet"]
    assert list(read_texts(tmp_path / "web")) == wanted
    assert list(read_texts(f"{tmp_path}/web/**/*.parquet")) == wanted
    assert list(read_texts(f"{tmp_path}/web/b/?.parquet")) == ["b/2.parquet"]
    (read,) = read_texts(tmp_path / "web").reads
    assert (read.name, read.files) == ("web", ("9.parquet", "10.parquet", "2.parquet"))

    # A name that holds a glob's sign, and is there, is that file.
    assert list(read_texts(write(tmp_path, "a[1].txt", "x\n"))) == ["x"]

    write(tmp_path, "web/LICENSE.txt", "All rights")
    hint = error(tmp_path / "web", read=read_texts)
    assert (
        hint
        == f"holds .parquet and .txt files; name one kind, such as {tmp_path}/web/**/*.parquet."
    )
    assert error(tmp_path / "web" / "*.arrow", read=read_texts).startswith("names no file; .txt,")
    (tmp_path / "empty").mkdir()
    assert error(tmp_path / "empty", read=read_texts).startswith("names no file; .txt,")


def test_text_errors(tmp_path):
    assert error(write(tmp_path, "a.txt", "\n \n"), read=read_texts) == "holds no text."
    assert error(write(tmp_path, "a.jsonl", ""), read=read_texts) == "holds no text."
    path = write(tmp_path, "a.jsonl", '{"text": "a"}\n{"text": " "}\n')
    assert error(path, read=read_texts) == "line 2: the text is empty."
    path = write(tmp_path, "a.jsonl", '{"text": "a"}\n{"txt": "b"}\n')
    message = "line 2: there is no column 'text'; there is 'txt' (nearest: 'txt')."
    assert error(path, read=read_texts) == message


# ---- real layouts ----


def test_sib200_needs_its_quotes(mtllm_data):
    """A plain split on tabs gives 7,688 wrong texts over all languages; a csv reader none."""
    wrong = total = 0
    labels = (mtllm_data / "sib200/data/annotated/eng_Latn/labels.txt").read_text().split("\n")
    columns = {"index_id": int, "category": str, "text": str}
    for path in sorted((mtllm_data / "sib200/data/annotated").glob("*/*.tsv")):
        rows = read_rows(path, columns=columns)
        naive = [line.split("\t") for line in path.read_text("utf-8").split("\n")[1:-1]]
        assert {row["category"] for row in rows} <= set(labels)
        assert [row["index_id"] for row in rows] == [int(cells[0]) for cells in naive]
        wrong += sum(row["text"] != cells[2] for row, cells in zip(rows, naive, strict=True))
        total += len(rows)
    assert (wrong, total) == (7688, 205820)


def test_nusax_line_breaks_in_cells(mtllm_data, tmp_path):
    columns = {"id": str, "text": str, "label": str}
    counts = {"train": 500, "valid": 100, "test": 400}
    broken = 0
    paths = sorted((mtllm_data / "nusax/datasets/sentiment").glob("*/*.csv"))
    for path in paths:
        rows = read_rows(path, columns=columns, labels=LABELS)
        assert len(rows) == counts[path.stem]
        broken += any("\n" in row["text"] for row in rows)
    assert (len(paths), broken) == (36, 10)

    # Rows 97 and 98 of this file start in lines 98 and 100: one line break lies in between.
    lines = (
        (mtllm_data / "nusax/datasets/sentiment/buginese/test.csv").read_text("utf-8").split("\n")
    )
    assert lines[97].startswith("96,")
    lines[99] = re.sub(r",(positive|neutral|negative)$", ",happy", lines[99])
    path = write(tmp_path, "test.csv", "\n".join(lines))
    assert error(path, columns, labels=LABELS).startswith("line 100: the label is 'happy'")


def test_translated_americasnli(mtllm_data):
    folder = mtllm_data / "americasnli_translated_nllb600m/data/translations"
    path = folder / "nllb-200-distilled-600M/americas_nli/aym_test.parquet"
    columns = {"premise": str, "hypothesis": str, "label": str}
    rows = read_rows(path, columns=columns, labels=("0", "1", "2"))
    assert len(rows) == 750
    assert label_names(rows) == ("0", "1", "2")
    assert rows[749]["id"] == "749"


def test_blank_premise_is_found(mtllm_data):
    path = mtllm_data / "americasnli/data/anli_final/test/nah.tsv"
    message = error(path, {"premise": str, "hypothesis": str, "label": str})
    blank = [
        i for i, line in enumerate(path.read_text("utf-8").split("\n"), 1) if "25576\t" in line
    ]
    assert message == f"line {blank[0]}: the premise is empty."
