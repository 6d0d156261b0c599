"""English texts from each kind of source: as other libraries wrote them, and no others."""

import hashlib
import json
import math
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given
from hypothesis import strategies as st
from tensorflow_datasets.proto import tf_example_pb2

from mtllm_jax.data import formats
from mtllm_jax.data import texts as texts_module
from mtllm_jax.data.prepare import Maker, _order, draws_of
from mtllm_jax.data.sources import Source, parse
from mtllm_jax.data.texts import read_texts, texts_of

TEXTS = ["One line.", "  kept blanks ", "a\u2028b", "Ω", "naïve café"]


def example(**fields):
    made = tf_example_pb2.Example()
    for name, value in fields.items():
        made.features.feature[name].bytes_list.value.append(value.encode())
    return made.SerializeToString()


def write_records(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return path


def as_json(texts, field="text"):
    return "".join(json.dumps({field: text, "n": i}) + "\n" for i, text in enumerate(texts))


def compressed(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def refusal(*sources, **options):
    with pytest.raises(ValueError, match=r"[^.]\.$") as raised:
        read_texts(*map(str, sources), **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# ---------------------------------------------------------------- what a source is called


@pytest.mark.parametrize(
    ("given", "source"),
    [
        ("a/b.txt", ("files", "a/b.txt", "", "", "")),
        ("web/*.parquet#body", ("files", "web/*.parquet", "", "", "body")),
        ("tfds:lm/en:1.0.0@train[:5%]#text", ("tfds", "lm/en", "1.0.0", "train[:5%]", "text")),
        ("tfds:lm1b", ("tfds", "lm1b", "", "", "")),
        ("hf:o/n/c:v1.0@train[:9]#a#b", ("hf", "o/n/c", "v1.0", "train[:9]", "a#b")),
        ("hf:o/n@x", ("hf", "o/n", "", "x", "")),
    ],
)
def test_the_parts_of_a_source(given, source):
    assert parse(given) == Source(given, *source)


def test_a_sign_that_is_part_of_a_name(tmp_path):
    path = tmp_path / "a#b.txt"
    path.write_text("x\n")
    assert list(read_texts(path)) == ["x"]
    assert "tfds:@train must be tfds:NAME[/CONFIG]" in refusal("tfds:@train")


# ---------------------------------------------------------------- files


def test_zstandard_of_several_frames(tmp_path):
    content = as_json(TEXTS).encode()
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(compressed(content[:70]) + compressed(content[70:]))
    assert list(read_texts(path)) == TEXTS
    path.write_bytes(path.read_bytes()[:-5])
    assert refusal(path).startswith(f"{path} cannot be read (Truncated compressed stream")
    path.write_bytes(compressed(content + b"{\n"))
    assert refusal(path).startswith(f"{path}, line 6: the line is not JSON")


@pytest.mark.parametrize("kind", ["json", "example", "utf-8"])
def test_records_of_each_kind(kind, tmp_path):
    records = {
        "json": [json.dumps({"text": text, "n": 1}).encode() for text in TEXTS],
        "example": [example(text=text, title="t") for text in TEXTS],
        "utf-8": [text.encode() for text in TEXTS],
    }[kind]
    path = write_records(tmp_path / "a.arrayrecord", records)
    assert list(read_texts(path)) == TEXTS
    empty = {"json": b'{"text": ""}', "example": example(text=""), "utf-8": b" "}[kind]
    write_records(path, [*records, empty])
    assert refusal(path) == f"{path}, record 6: the text is empty."
    bad = {
        "json": (b"Kenya", "the record is not JSON, as the first one is"),
        "example": (b"Kenya", "the record is no tf.train.Example, as the first one is"),
        "utf-8": (b"\xff", "byte 1 of the text (0xff) is not UTF-8"),
    }[kind]
    write_records(path, [*records, bad[0]])
    assert refusal(path) == f"{path}, record 6: {bad[1]}."
    if kind != "utf-8":
        assert f"{path}, record 1: there is no column 'body'" in refusal(f"{path}#body")
    else:
        assert refusal(f"{path}#body") == f"{path} has no fields; leave #body out."


def test_more_records_than_are_read_at_a_time_and_none(tmp_path):
    many = [str(i) + "." for i in range(2500)]
    path = write_records(tmp_path / "a.arrayrecord", [text.encode() for text in many])
    assert list(read_texts(path)) == many
    assert refusal(write_records(path, [])).endswith("a.arrayrecord holds no text.")
    path.write_bytes(b"no such file")
    assert refusal(path).startswith(f"{path} cannot be read as ArrayRecord (")


def test_the_field_of_texts(tmp_path):
    (tmp_path / "a.jsonl").write_text(as_json(TEXTS, "body"))
    pq.write_table(pa.table({"body": TEXTS, "text": ["no"] * 5}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert list(read_texts(f"{tmp_path}/{name}#body")) == TEXTS
    assert "a.jsonl, line 1: there is no column 'text'" in refusal(tmp_path / "a.jsonl")
    assert "there is no column 'txt'; there is 'body', 'text'" in refusal(
        f"{tmp_path}/a.parquet#txt"
    )
    (tmp_path / "a.txt").write_text("x\n")
    assert "a.txt has no fields; leave #body out." in refusal(f"{tmp_path}/a.txt#body")


def test_parquet_errors_count_rows_of_the_file(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x"] * 3000 + [" "]}), path, row_group_size=700)
    assert refusal(path) == f"{path}, row 3001: the text is empty."
    text = pa.array([b"x"] * 2000 + [b"a\xff"])
    wrong = pa.Array.from_buffers(pa.string(), len(text), text.buffers())
    pq.write_table(pa.table({"text": wrong}), path)
    assert refusal(path) == f"{path}, row 2001: byte 2 of the text (0xff) is not UTF-8."


# ---------------------------------------------------------------- several sources, and what is kept


def test_sources_follow_each_other_and_the_tests_texts_are_dropped(tmp_path):
    (tmp_path / "a.txt").write_text("one\n two \nthree\n")
    (tmp_path / "b.jsonl").write_text(as_json(["two", "four"]))
    texts = read_texts(tmp_path / "a.txt", tmp_path / "b.jsonl", unwanted=["two ", "two thirds"])
    assert list(texts) == ["one", "three", "four"] and texts.sizes == (2, 1)
    assert [(read.name, read.texts, read.dropped) for read in texts.reads] == [
        ("a.txt", 2, 1),
        ("b.jsonl", 1, 1),
    ]
    assert texts.dropped == 2 and texts[1:] == ["three", "four"]
    assert list(texts.first(1)) == ["one", "four"] and texts.first(1).sizes == (1, 1)
    kept = refusal(tmp_path / "a.txt", tmp_path / "b.jsonl", unwanted=["two", "four"])
    told = "holds no text that is not one of the test's or of a probe's."
    assert kept == f"{tmp_path}/b.jsonl {told}"


def test_the_digest_is_of_the_texts_however_they_come(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("\n".join(["drop", *TEXTS]).replace("\u2028", ""))
    (tmp_path / "a.jsonl").write_text(as_json([text.replace("\u2028", "") for text in TEXTS]))
    lengths = [len(text.replace("\u2028", "").encode()) for text in TEXTS]
    wanted = hashlib.sha256(
        hashlib.sha256(np.array(lengths, "<i8").tobytes()).digest()
        + hashlib.sha256("".join(TEXTS).replace("\u2028", "").encode()).digest()
    ).hexdigest()
    for name in ("a.txt", "a.jsonl"):
        (read,) = read_texts(tmp_path / name, unwanted=["drop"]).reads
        assert read.sha256 == wanted
    (tmp_path / "a.txt").write_text("".join(TEXTS))  # the same bytes, cut otherwise
    assert read_texts(tmp_path / "a.txt").reads[0].sha256 != wanted


@pytest.mark.parametrize("most", [0, 3000, 1 << 30])
def test_more_texts_than_stay_in_memory(most, tmp_path, monkeypatch):
    """In a file of which no name is left, and the same."""
    wanted = [f"text {i} " * (i % 5 + 1) + "." for i in range(3000)]
    pq.write_table(pa.table({"text": wanted}), tmp_path / "a.parquet", row_group_size=500)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(texts_module, "_IN_MEMORY", most)
    monkeypatch.setattr(texts_module, "scratch", lambda: tmp_path / "scratch")
    texts = read_texts(tmp_path / "a.parquet", tmp_path / "a.parquet")
    assert list(texts) == wanted + wanted and texts.sizes == (3000, 3000)
    assert not list((tmp_path / "scratch").iterdir())


def test_parquet_is_read_a_piece_at_a_time(tmp_path):
    """What Arrow holds stays far below the 16 MB of texts, also of a single row group."""
    rng = np.random.default_rng(0)
    letters = rng.integers(97, 123, (8000, 2000), np.uint8)
    texts = [row.tobytes().decode() for row in letters]
    for rows in (500, 8000):
        path = tmp_path / f"{rows}.parquet"
        pq.write_table(pa.table({"text": texts}), path, row_group_size=rows)
        before = pa.total_allocated_bytes()
        held = [pa.total_allocated_bytes() - before for _ in parse(str(path)).pieces()]
        assert len(held) >= 8 and max(held) < 8e6
        held = [pa.total_allocated_bytes() - before for _ in formats.stream(path)]
        assert len(held) == 8000 and max(held) < 8e6


# ---------------------------------------------------------------- mixtures


def maker(mixture, samplings=1, seed=3):
    made = Maker.__new__(Maker)
    for name, value in (("mixture", mixture), ("samplings", samplings), ("seed", seed)):
        object.__setattr__(made, name, value)
    return made


@given(
    st.lists(st.tuples(st.integers(1, 30), st.floats(0.01, 100)), min_size=1, max_size=4),
    st.integers(1, 3),
)
def test_what_is_drawn_of_a_mixture(sources, samplings):
    """Exact in number, near the weights, even within a source, and the same each time."""
    sizes, weights = zip(*sources, strict=True)
    texts = texts_of(str(i) for i in range(sum(sizes)))
    texts.sizes = sizes
    order = _order(maker(weights, samplings), texts)
    draws = draws_of(texts, weights, samplings)
    total = sum(sizes) * samplings
    assert len(order) == sum(draws) == total
    counts = Counter(order.tolist())
    begin = 0
    for size, weight, drawn in zip(sizes, weights, draws, strict=True):
        each = [counts[i] for i in range(begin, begin + size)]
        assert sum(each) == drawn and max(each) - min(each) <= 1
        assert abs(drawn - total * weight / math.fsum(weights)) < 1 + 1e-6
        begin += size
    np.testing.assert_array_equal(order, _order(maker(weights, samplings), texts))


def test_without_weights_each_text_is_drawn_once_in_the_order_of_old():
    texts = texts_of(map(str, range(50)))
    texts.sizes = (20, 30)
    old = np.random.default_rng(3).permutation(100) % 50
    np.testing.assert_array_equal(_order(maker((), 2), texts), old)
    assert draws_of(texts, (), 2) == [40, 60]
    assert draws_of(texts, (1, 3), 1) == [12, 38] or draws_of(texts, (1, 3), 1) == [13, 37]


# ---------------------------------------------------------------- data sets by name


class OwnNews(tfds.core.GeneratorBasedBuilder):
    """Texts, one of them empty."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"text": tfds.features.Text(), "n": np.int64}
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, manager):
        return {"train": self._generate_examples(TEXTS), "more": self._generate_examples(["x"])}

    def _generate_examples(self, texts):
        for i, text in enumerate([*texts[:2], "", *texts[2:]]):
            yield i, {"text": text, "n": i}


def test_tensorflow_datasets_on_disk(tmp_path, monkeypatch):
    builder = OwnNews(data_dir=tmp_path, file_format="array_record")
    tfds.disable_progress_bar()
    builder.download_and_prepare()
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    for name in ("tfds:own_news", "tfds:own_news:1.0.0@train#text"):
        texts = read_texts(name)
        assert list(texts) == TEXTS and texts.reads[0].name == name and not texts.reads[0].files
    assert list(read_texts("tfds:own_news@train[:2]")) == TEXTS[:2]
    assert list(read_texts("tfds:own_news@more")) == ["x"]
    missing = "tfds:own_news#txt, row 1: there is no column 'txt'"
    assert refusal("tfds:own_news#txt").startswith(missing)
    for name in ("tfds:no_news", "tfds:own_news:2.0.0", "tfds:own_news@test"):
        assert refusal(name).startswith(f"{name} cannot be read (")


def test_hugging_face_datasets_on_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = [*TEXTS[:2], "", None, *TEXTS[2:]]
    one = datasets.Dataset.from_dict({"text": rows, "n": list(range(len(rows)))})
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "more": one.select([0])}).save_to_disk(tmp_path / "both")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.jsonl").write_text(as_json(TEXTS))
    for name in ("one", "both", "files"):
        assert list(read_texts(f"hf:{tmp_path}/{name}")) == TEXTS
        assert list(read_texts(f"hf:{tmp_path}/{name}@train[:2]#text")) == TEXTS[:2]
    assert list(read_texts(f"hf:{tmp_path}/both@more")) == TEXTS[:1]
    assert "there is no column 'txt'" in refusal(f"hf:{tmp_path}/one#txt")
    assert "the column 'n' is int64, it must be string" in refusal(f"hf:{tmp_path}/one#n")
    for name in ("both@test", "files@test", "nothing"):
        source = f"hf:{tmp_path}/{name}"
        assert refusal(source).startswith(f"{source} cannot be read (")
    assert "its split must be a name, or NAME[:N]" in refusal(f"hf:{tmp_path}/one@train[1:]")
