"""ROUGE of summaries, against figures worked out by hand; XL-Sum's layout; words of any script."""

import json

import pytest

from mtllm_jax.asking.measures import Resamples
from mtllm_jax.asking.summaries import summarised
from mtllm_jax.asking.words import plain, words
from mtllm_jax.data.benchmarks.questions import read_xlsum


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("The CAT, it sat.", ["the", "cat", "it", "sat"]),
        ("Über «Größe»", ["über", "größe"]),
        ("北京2008年。", ["北", "京", "2008", "年"]),
        ("ที่ดี BBC", ["ที่", "ดี", "bbc"]),
        ("မြန်မာ", ["မြ", "န်", "မာ"]),
        ("서울 시", ["서울", "시"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("", []),
    ],
)
def test_words(text, parts):
    assert words(plain(text)) == parts


def test_rouge_by_hand():
    rows = [
        {"id": "a", "language": "eng_Latn", "label": "The cat sat on a mat."},
        {"id": "b", "language": "zho_Hans", "label": "北京下雪"},
    ]
    # English: 3 of 4 words said and of 6 wanted, in their order: 2·3/10; one pair of 3 and 5, "the
    # cat": 2/8. Chinese: 3 of 3 and 4 letters, 2 of them in their order; no pair.
    answers = ["the cat mat slept\nand more", "雪下北"]
    found = {one.name: one for one in summarised(rows, answers, None)}
    draws = Resamples(["a", "b"], ["eng_Latn", "zho_Hans"], "eng_Latn")
    entries = {name: draws.entry(draws.of(one)) for name, one in found.items()}
    assert list(entries) == ["ROUGE-L", "ROUGE-1", "ROUGE-2", "off-target"]
    english = [entries[f"ROUGE-{kind}"]["english"] for kind in "L12"]
    assert english == pytest.approx([0.6, 0.6, 0.25])
    chinese = [entries[f"ROUGE-{kind}"]["languages"]["zho_Hans"] for kind in "L12"]
    assert chinese == pytest.approx([2 * 1 / 7, 2 * 3 / 7, 0])
    assert "no stemmer" in found["ROUGE-L"].about


def test_the_layout(tmp_path):
    for name in ("english", "chinese_simplified", "pidgin"):
        rows = [
            {"id": f"{name}-{i}", "url": "u", "title": "t", "summary": f"s{i}", "text": f"x {i}"}
            for i in range(3)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}_test.jsonl").write_text(text)
        (tmp_path / f"{name}_val.jsonl").write_text("{")
    found = read_xlsum(tmp_path)
    assert [row["language"] for row in found] == ["eng_Latn"] * 3 + ["pcm_Latn"] * 3 + [
        "zho_Hans"
    ] * 3
    assert found[0] == {"id": "english-0", "text": "x 0", "label": "s0", "language": "eng_Latn"}
    assert len(read_xlsum(tmp_path, ["zho_Hans"], 2)) == 2
    with pytest.raises(ValueError, match="language 'deu_Latn' is not one of the 3"):
        read_xlsum(tmp_path, ["deu_Latn"])
    with pytest.raises(ValueError, match=r"holds no <language>_test\.jsonl: that is where XL-Sum"):
        read_xlsum(tmp_path / "none")
