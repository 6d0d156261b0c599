"""Texts cut into sentences and what stays: whatever the text, joined it is the same again."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtllm_jax.data.formatting import around, joined, lost, pieces, prose

PAGE = """# A title

1. First item. Second one!
   - sub item: see https://a.b/c?d=1. Ok
> A quote. (a) Not a mark.

```python
x = "Dr. No. Yes."
```
| a word | 3 |
|--------|---|
Use `foo(x.y)` for {name}, it costs $5 and 3.5 kg. He is 3rd.\r

    return x == 1;
"""
SNIPPETS = [
    *(
        "Dr. Who is here. ",
        "He left! ",
        "e.g. this",
        "我去了。你呢？",
        "नमस्ते। ",
        "สวัสดี",
        "3.5",
        "1,000 ",
    ),
    *(
        "\n",
        "\r\n",
        "\r",
        " ",
        "  \n\n",
        "\t",
        "```\n",
        "~~~",
        "    x = 1;\n",
        "- ",
        "1. ",
        "| a | b |\n",
    ),
    *(
        "|---|\n",
        "https://a.b/c.",
        "`x y`",
        "{name}",
        "%s",
        "<b>",
        "$x$",
        "___",
        "(a) ",
        "\u2028",
        "\x85",
    ),
]
TEXTS = st.one_of(
    st.lists(st.sampled_from(SNIPPETS), max_size=12).map("".join),
    st.text(st.characters(codec="utf-8"), max_size=60),
)
LANGUAGES = st.sampled_from(["eng_Latn", "fra_Latn", "zho_Hans", "tha_Thai", "lua_Latn"])


def sentences(text, language="eng_Latn"):
    return [piece.text for piece in pieces(text, language) if piece.is_sentence]


def by(translate, text, source="eng_Latn", target="deu_Latn"):
    parts = pieces(text, source)
    return joined(
        parts, {p.text: translate(p.text) for p in parts if p.is_sentence}, source, target
    )


@settings(max_examples=80, deadline=None)
@given(TEXTS, LANGUAGES)
def test_any_text_comes_back_byte_for_byte_from_a_translator_that_changes_nothing(text, language):
    parts = pieces(text, language)
    assert "".join(piece.text for piece in parts) == text
    assert by(str, text, language, language) == text
    for sentence in sentences(text, language):
        assert sentence == sentence.strip() and any(map(str.isalpha, sentence))
        assert "".join(piece.text for piece in around(sentence)) == sentence
        assert not lost(sentence, sentence)
    assert "".join(part for part, _ in prose(text)) == text


@settings(max_examples=40, deadline=None)
@given(TEXTS, LANGUAGES, LANGUAGES)
def test_lines_and_their_ends_stay_whatever_comes_back(text, language, target):
    made = by(lambda sentence: f"<{sentence.upper()}>\nand more", text, language, target)
    assert re.findall(r"\r\n|\r|\n", made) == re.findall(r"\r\n|\r|\n", text)


def test_what_is_said_and_what_stays_of_a_page():
    assert sentences(PAGE) == [
        *("A title", "First item.", "Second one!", "sub item: see https://a.b/c?d=1.", "Ok"),
        *("A quote.", "(a) Not a mark.", "a word"),
        *("Use `foo(x.y)` for {name}, it costs $5 and 3.5 kg.", "He is 3rd."),
    ]
    assert sentences("A. Paris\nB) Rome\n(iv) Oslo\n[x] done\n* * one") == [
        *("Paris", "Rome", "Oslo", "done", "one"),
    ]
    assert sentences("text\n\n    Indented prose. More.") == ["text", "Indented prose.", "More."]
    assert sentences("~~~\na. b.\n~~~\nc d") == ["c d"] and sentences("```\nnever closed") == []


def test_blanks_between_sentences_are_those_of_the_target():
    text = "One. Two `x` three.\nFour."
    assert (
        by(lambda s: s.replace(".", "。"), text, target="zho_Hans")
        == "One。Two `x` three。\nFour。"
    )
    assert by(str, "我去了。你呢？\n好。", "zho_Hans", "eng_Latn") == "我去了。 你呢？\n好。"
    assert by(str, "One. Two.", target="tha_Thai") == "One. Two."


@pytest.mark.parametrize(
    ("source", "translation", "is_lost"),
    [
        ("It is 3.5 kg", "Es sind 3,5 kg", False),
        ("It is 3.5 kg", "यह ३.५ किलो है", False),
        ("It is 3.5 kg", "Es sind drei Kilo", True),
        ("In 1999 and 1999", "Im Jahr 1999", True),
        ("The 3rd", "Der dritte", False),
        ("See {name} here", "Siehe {Name} hier", True),
        ("See https://a.b/c.", "Siehe https://a.b/c hier.", False),
        ("Mail a.b@c.de now", "Schreib jetzt", True),
        ("It costs $5 and $10", "Es kostet 5 $ und 10 $", False),
        ("Use `x` and $y$", "Nimm `x` und $y$", False),
    ],
)
def test_what_is_lost(source, translation, is_lost):
    assert lost(source, translation) is is_lost


def test_a_sentence_is_cut_around_what_must_come_back():
    parts = around("Use `a b` for {name}, it costs 3.5 kg.")
    assert [p.text for p in parts if p.is_sentence] == ["Use", "for", "it costs", "kg."]


def test_code_urls_and_placeholders_are_no_prose():
    text = "访问https://a.b/c?d=1。联系a.b@c.de吧（www.x.y/z）"
    kept = [part for part, is_prose in prose(text) if not is_prose]
    assert kept == ["https://a.b/c?d=1", "a.b@c.de", "www.x.y/z"]
    kept = [part for part, is_prose in prose(PAGE) if not is_prose]
    assert kept == [
        *(
            "https://a.b/c?d=1",
            "```python\n",
            'x = "Dr. No. Yes."\n',
            "```\n",
            "`foo(x.y)`",
            "{name}",
        ),
        "    return x == 1;\n",
    ]
