"""The embedded text: labels against CLDR, and no dev or test list in any training text."""

import contextlib
import io
import itertools
import json
import pickle
import re
import time

import grain
import pytest
from babel import Locale
from babel.core import get_global
from babel.lists import format_list

from mtllm_jax.config import TextSizes
from mtllm_jax.data.babel import DEV_AND_TEST, REGIONS
from mtllm_jax.data.babel_tfds import LABELLED, SPLITS, build_text

LOCALES = {
    "deu_Latn": "de",
    "arb_Arab": "ar",
    "heb_Hebr": "he",
    "tha_Thai": "th",
    "zho_Hans": "zh",
    "jpn_Jpan": "ja",
}
SIZES = TextSizes(
    train_pairs=800,
    test_pairs=120,
    dev_pairs=60,
    lists_per_language=300,
    english=4000,
    adaptation=1000,
)
TRAINING = ("parallel", "english", "adaptation", "task_train")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    return build_text(folder, languages=tuple(LOCALES), seed=3, sizes=SIZES)


@pytest.fixture(scope="module")
def rows(dataset):
    return {split: list(dataset[split]) for split in SPLITS}


def names_in(text: str) -> list[str]:
    """The names in an English list, by its separators; no English name holds one of these."""
    text = re.sub(r" (are|lie|are found) in \w+$", "", text)
    return re.split(r", and | and |, ", text)


def test_labels_follow_cldrs_zones(rows):
    region_of_name = {}
    for row in rows["task_train"]:
        if row["kind"] == "name":
            region_of_name[row["text"]] = REGIONS[row["label"]]
    known = {
        "Kenya": "Africa", "Japan": "Asia", "Peru": "America", "Poland": "Europe",
        "Fiji": "Oceania", "Australia": "Oceania", "Thai Baht": "Asia",
        "Kenyan Shilling": "Africa", "Egypt": "Africa",
        "Brazilian Real": "America", "Polish Zloty": "Europe", "Samoan Tala": "Oceania",
    }  # fmt: skip
    common = known.keys() & region_of_name.keys()
    assert len(common) >= 6
    assert {name: region_of_name[name] for name in common} == {n: known[n] for n in common}

    areas = {"Pacific": "Oceania", "Australia": "Oceania"}
    for code, name in Locale("en").territories.items():
        if name in region_of_name:
            zones = [z.split("/")[0] for z in get_global("territory_zones")[code]]
            assert region_of_name[name] in {areas.get(z, z) for z in zones}
    for ambiguous in ("Spain", "Ecuador", "Iceland", "Euro", "US Dollar"):
        assert ambiguous not in region_of_name


def test_both_names_of_an_item_have_its_region(rows):
    labels = {r["text"]: r["label"] for r in rows["task_train"] if r["kind"] == "name"}
    pairs = [r for r in rows["task_train"] if r["kind"] == "list"]
    assert len(pairs) == SIZES.train_pairs
    for row in (*pairs, *(r for r in rows["test_seen"] if r["language"] == "eng_Latn")):
        assert [labels[name] for name in names_in(row["text"])] == [row["label"]] * 2


def test_no_item_is_in_a_training_text(rows):
    """In no language and neither order, alone or in a longer list or sentence."""
    texts = {row["text"] for split in TRAINING for row in rows[split]}
    english = texts | {row["english"] for row in rows["parallel"]}
    written = {frozenset(p) for t in english for p in itertools.combinations(names_in(t), 2)}
    parallel = {
        code: [r for r in rows["parallel"] if r["language"] == code and r["kind"] == "list"]
        for code in LOCALES
    }
    name_of = {
        (r["language"], r["english"]): r["text"] for r in rows["parallel"] if r["kind"] == "name"
    }
    for split in DEV_AND_TEST:
        for row in rows[split]:
            a, b = names_in(row["english"])
            assert row["text"] not in texts
            assert frozenset((a, b)) not in written
            if row["language"] == "eng_Latn":
                assert f"{b} and {a}" not in english
            else:
                code = row["language"]
                a, b = name_of[code, a], name_of[code, b]
                for pair in ([a, b], [b, a]):
                    assert format_list(pair, locale=LOCALES[code]) not in texts
    for code, lists in parallel.items():
        items = [
            {name_of[code, n] for n in names_in(r["english"])}
            for split in DEV_AND_TEST
            for r in rows[split]
            if r["language"] == code
        ]
        for row in lists:
            names = {name_of[code, n] for n in names_in(row["english"])}
            assert not any(item <= names for item in items)


def test_unseen_names_are_in_no_labelled_text(rows, dataset):
    def names(split):
        return {n for r in rows[split] for n in names_in(r["english"])}

    labelled, dev, test = names("task_train"), names("dev_unseen"), names("test_unseen")
    assert not labelled & dev and not labelled & test and not dev & test
    assert names("test_seen") | names("dev_seen") <= labelled
    assert dev <= set(dataset.describe()["dev_unseen_concepts"])
    said = {n for r in rows["english"] if r["kind"] == "name" for n in names_in(r["text"])}
    assert test <= said  # the LLM has read them

    pairs = {s: {frozenset(names_in(r["english"])) for r in rows[s]} for s in DEV_AND_TEST}
    assert not pairs["dev_seen"] & pairs["test_seen"]


def test_shares_and_sizes(rows, dataset):
    kinds = [r["kind"] for r in rows["adaptation"]]
    assert [kinds.count(k) for k in ("name", "list", "fact")] == [150, 650, 200]
    assert len(rows["english"]) == SIZES.english
    about = dataset.describe()
    assert about["rows"] == {split: len(rows[split]) for split in SPLITS}
    part = about["concepts_of_part"]
    assert sum(part.values()) == about["concepts"] > 300
    assert part["seen"] / about["concepts"] == pytest.approx(0.75, abs=0.01)
    assert part["dev_unseen"] * 2 == pytest.approx(part["test_unseen"], abs=5)
    assert about["cldr"] and len(about["scripts"]) == 6
    assert len(about["dev_pairs"]["dev_seen"]) == SIZES.dev_pairs
    assert json.loads(json.dumps(about)) == about


def test_ids_are_shared_by_the_languages(rows):
    for split in DEV_AND_TEST:
        english = {r["id"]: r for r in rows[split] if r["language"] == "eng_Latn"}
        for code in LOCALES:
            of_code = [r for r in rows[split] if r["language"] == code]
            assert len(of_code) == len(english)
            for row in of_code:
                same = english[row["id"]]
                assert (row["label"], row["english"]) == (same["label"], same["text"])


def test_lists_follow_the_languages_patterns(rows):
    lists = {c: [r["text"] for r in rows["test_seen"] if r["language"] == c] for c in LOCALES}
    assert all("、" in text for text in lists["jpn_Jpan"])
    assert all("和" in text for text in lists["zho_Hans"])
    assert all("และ" in text for text in lists["tha_Thai"])
    assert all(" و" in text for text in lists["arb_Arab"])


def test_rows_are_a_source_for_grain(dataset):
    source = dataset["parallel"]
    assert source[-1] == source[len(source) - 1]
    assert source.__getitems__([5, 2]) == [source[5], source[2]]
    assert pickle.loads(pickle.dumps(source))[7] == source[7]
    shuffled = list(grain.MapDataset.source(source).seed(1).shuffle())
    key = lambda row: tuple(row.values())  # noqa: E731
    assert sorted(map(key, shuffled)) == sorted(map(key, source))
    with pytest.raises(IndexError):
        source[len(source)]
    with pytest.raises(ValueError, match=r"split is 'train'; it may be parallel"):
        dataset["train"]


def test_seed_and_languages(tmp_path, rows):
    """The same arguments give the same rows; another language changes no other's test rows."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        again = build_text(tmp_path, languages=tuple(LOCALES), seed=3, sizes=SIZES)
    assert out.getvalue() == ""
    assert all(list(again[split]) == rows[split] for split in SPLITS)

    start = time.perf_counter()
    build_text(tmp_path, languages=tuple(LOCALES), seed=3, sizes=SIZES)
    assert time.perf_counter() - start < 0.5

    few = TextSizes(800, 120, 60, 1, 10, 10)
    german = build_text(tmp_path, languages=["deu_Latn"], seed=3, sizes=few)
    for split in LABELLED:
        kept = [r for r in rows[split] if r["language"] in ("eng_Latn", "deu_Latn")]
        assert list(german[split]) == kept
    other = build_text(tmp_path, languages=["deu_Latn"], seed=4, sizes=few)
    assert list(other["test_seen"]) != list(german["test_seen"])
    assert not (tmp_path / "downloads").exists()


def test_every_language_with_a_locale_gives_rows(tmp_path):
    """Also where CLDR has few names: what is missing is left out, nothing is made up."""
    languages = ["mlt_Latn", "bod_Tibt", "sat_Olck", "prs_Arab", "zho_Hant", "szl_Latn"]
    sizes = TextSizes(200, 100, 30, 20, 20, 20)
    dataset = build_text(tmp_path, languages=languages, seed=0, sizes=sizes)
    named = dataset.describe()["named_concepts"]
    assert named["zho_Hant"] > 300 > named["bod_Tibt"] > 100
    rows = list(dataset["test_seen"])
    for code in languages:
        count = sum(row["language"] == code for row in rows)
        assert 0 < count <= 100


@pytest.mark.parametrize(
    ("languages", "message"),
    [
        (["deu_Latin"], r"'deu_Latin' is not one of .* nearest are deu_Latn, "),
        (["ace_Arab"], r"'ace_Arab' is not one of"),
        (["eng_Latn"], r"'eng_Latn' is not one of"),
        (["deu_Latn", "deu_Latn"], r"it must name one or more, each once"),
        ([], r"it must name one or more, each once"),
    ],
)
def test_bad_languages(tmp_path, languages, message):
    with pytest.raises(ValueError, match=message):
        build_text(tmp_path, languages=languages, seed=0)
    assert not any(tmp_path.iterdir())
