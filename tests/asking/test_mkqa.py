"""MKQA: its scores against cases worked out by hand from the official rules, its layout."""

import gzip
import json

import pytest

from mtllm_jax.asking.mkqa import exact_match, f1, mended_tokens, official_tokens
from mtllm_jax.data.benchmarks.questions import read_mkqa


@pytest.mark.parametrize(
    ("language", "answer", "labels", "official", "mended"),
    [
        # The article and the full stop go: 3 tokens of 3.
        ("en", "The Old Man Said.", ["old man said"], 1, 1),
        # 2 tokens in common, 3 said, 2 wanted: 2·2/5. The second label is worse.
        ("en", "Lake Geneva Switzerland", ["lake geneva", "rhone"], 0.8, 0.8),
        ("en", "", ["no"], 0, 0),
        # Guillemets are no ASCII punctuation: «faust» is not faust.
        ("de", "«Faust»", ["Faust"], 0, 1),
        # Officially "le" is cut from the front of "lemon".
        ("fr", "lemon", ["mon"], 1, 0),
        ("fr", "l'Europe", ["Europe"], 0, 1),
        ("fr", "L’Europe", ["l'Europe"], 0, 1),
        # Officially the answer becomes "unisola" and then "isola", and the label "sola".
        ("it", "un'isola", ["isola"], 0, 1),
        # Spanish has whole words in both: "laguna" stays.
        ("es", "la laguna", ["laguna"], 1, 1),
        # Arabic's article is cut from the front, officially from inside as well.
        ("ar", "الكتاب", ["كتاب"], 1, 1),
        ("ar", "سالم", ["س م"], 1, 0),
        # All characters, of Latin names too: a, n, n against a, n, a: 2 of 3.
        ("ja", "Ann", ["Ana"], 2 / 3, 0),
        ("zh_cn", "北京2008", ["北京 2008"], 1, 1),
        # Officially 7 characters, 5 in common with 5: 10/12. Mended: 北 京 2008 against 北 京 208.
        ("zh_tw", "北京2008年", ["北京208"], 10 / 12, 2 * 2 / 7),
        # Thai: ที่ is one consonant with two marks on it.
        ("th", "ที่", ["ท"], 2 / 4, 0),
        ("km", "ក ខ", ["កខ"], 1, 1),
        ("ko", "서울 시", ["서울시"], 0, 0),
    ],
)
def test_f1_by_hand(language, answer, labels, official, mended):
    for wanted, tokens in ((official, official_tokens), (mended, mended_tokens)):
        assert f1(answer, labels, language, tokens) == pytest.approx(wanted)
        assert exact_match(answer, labels, language, tokens) == float(wanted == 1)


def test_marks_stay_on_their_letters():
    assert mended_tokens("ที่ดี", "th") == ["ที่", "ดี"]
    assert official_tokens("ที่", "th") == list("ที่") and len("ที่") == 3


def test_the_official_layout(tmp_path):
    def answers(kind, text, **more):
        return {
            "en": [{"type": kind, "text": text, **more}],
            "zh_hk": [{"type": kind, "text": text}],
        }

    rows = [
        ("entity", "Bern", {"aliases": ["Berne", "Bern"], "entity": "Q70"}),
        ("unanswerable", None, {}),
        ("long_answer", None, {}),
        ("binary", "yes", {}),
        ("number", "7.0", {}),
    ]
    (tmp_path / "dataset").mkdir()
    with gzip.open(tmp_path / "dataset/mkqa.jsonl.gz", "wt") as file:
        for i, (kind, text, more) in enumerate(rows):
            row = {
                "query": "q",
                "example_id": -(10**17) - i,
                "queries": {"en": f"q{i}", "zh_hk": "問"},
            }
            file.write(json.dumps(row | {"answers": answers(kind, text, **more)}) + "\n")
    found = read_mkqa(tmp_path, ["eng_Latn", "yue_Hant"])
    assert [row["language"] for row in found] == ["eng_Latn"] * 3 + ["yue_Hant"] * 3
    assert found[0] == {
        **{"id": "-100000000000000000", "language": "eng_Latn", "question": "q0"},
        **{"lang": "en", "label": ["Bern", "Berne"]},
    }
    assert found[3]["lang"] == "zh_hk" and [row["label"] for row in found[4:]] == [["yes"], ["7.0"]]
    few = read_mkqa(tmp_path, ["eng_Latn", "yue_Hant"], limit=2)
    assert [row["id"] for row in few[:2]] == [row["id"] for row in few[2:]]
    with pytest.raises(
        ValueError, match=r"mkqa\.jsonl\.gz, line 1: there is no question or no answ"
    ):
        read_mkqa(tmp_path, ["deu_Latn"])
    with pytest.raises(ValueError, match="language 'swh_Latn' is not one of the 26"):
        read_mkqa(tmp_path, ["swh_Latn"])
    with pytest.raises(ValueError, match=r"holds no dataset/mkqa\.jsonl\.gz or mkqa\.jsonl\.gz"):
        read_mkqa(tmp_path / "dataset" / "x")
