"""Tokenizers of encoders other than NLLB, against transformers' own output."""

import json
import pickle

import numpy as np
import pytest
import sentencepiece
import tiny_folders
from babel import Locale
from transformers import AutoTokenizer
from transformers.models.m2m_100 import tokenization_m2m_100

from mtllm_jax.data.tokenise import (
    M2M100Tokenizer,
    SourceTokenizer,
    source_tokenizer,
    translation_tokenizer,
)
from mtllm_jax.decode import translate
from mtllm_jax.hf.nllb import load_nllb
from mtllm_jax.languages import LANGUAGES

CODES = ["eng_Latn", "deu_Latn", "heb_Hebr", "jpn_Jpan", "nob_Latn", "tgl_Latn"]


def texts_in(code):
    names = Locale.parse(LANGUAGES[code].locale).territories
    return [name.strip("\u200f\u200e ") for key, name in names.items() if len(key) == 2][:120]


TEXTS = {code: texts_in(code) for code in CODES}
ALL = [text for texts in TEXTS.values() for text in texts]
KINDS = ("bert", "xlmr", "roberta", "tokenizer.json")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    for kind in ("bert", "xlmr", "roberta", "m2m100"):
        getattr(tiny_folders, f"{kind}_tokenizer")(root / kind, ALL)
    # One file alone, as multilingual-e5 has it.
    AutoTokenizer.from_pretrained(root / "xlmr").save_pretrained(root / "saved")
    (root / "tokenizer.json").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (root / "tokenizer.json" / name).write_bytes((root / "saved" / name).read_bytes())
    return root


@pytest.fixture(params=KINDS)
def plain(request, folders):
    """(transformers' tokenizer, ours) of an encoder that is told no language."""
    folder = folders / request.param
    return AutoTokenizer.from_pretrained(folder), source_tokenizer(folder)


@pytest.fixture(scope="module")
def m2m100(folders):
    return source_tokenizer(folders / "m2m100")


def as_lists(rows):
    assert all(row.dtype == np.int32 for row in rows)
    return [row.tolist() for row in rows]


# --- without languages ----------------------------------------------------------------------------


def test_texts_and_pairs_of_encoders_without_languages(plain):
    reference, source = plain
    assert type(source) is SourceTokenizer
    assert source.languages == tuple(LANGUAGES)
    assert source.vocab_size == len(reference)
    assert source.pad_id == reference.pad_token_id
    texts, others = TEXTS["deu_Latn"], TEXTS["jpn_Jpan"]
    rows = as_lists(source.encode(texts, "deu_Latn"))
    assert rows == reference(texts).input_ids
    assert rows == as_lists(source.encode(texts, ["jpn_Jpan"] * len(texts)))
    ends = [reference.cls_token_id, reference.sep_token_id]
    assert all([row[0], row[-1]] == ends for row in rows)
    for max_length in (5, 9, None):
        options = {"truncation": max_length is not None, "max_length": max_length}
        cut = source.encode(texts, "deu_Latn", max_length=max_length)
        assert as_lists(cut) == reference(texts, **options).input_ids
        pairs = source.encode(texts, "deu_Latn", text_pairs=others, max_length=max_length)
        assert as_lists(pairs) == reference(texts, others, **options).input_ids
    assert source.decode(rows) == reference.batch_decode(rows, skip_special_tokens=True)
    assert source.pieces(rows[0]) == reference.convert_ids_to_tokens(rows[0])
    again = pickle.loads(pickle.dumps(source))
    assert as_lists(again.encode(texts, "deu_Latn")) == rows


def test_a_language_must_be_one(plain):
    with pytest.raises(ValueError, match=r"'de' is not one of the .* the nearest are deu_Latn"):
        plain[1].encode(["a"], "de")
    with pytest.raises(ValueError, match="language has 2 codes; it must be one or 1"):
        plain[1].encode(["a"], ["deu_Latn", "eng_Latn"])


def test_they_do_not_translate(folders):
    with pytest.raises(ValueError, match="xlmr has no tokenizer of NLLB or M2M100"):
        translation_tokenizer(folders / "xlmr")


def test_sampling_of_a_unigram_model(folders):
    source, texts = source_tokenizer(folders / "xlmr"), TEXTS["deu_Latn"]
    model = sentencepiece.SentencePieceProcessor(
        model_file=str(folders / "xlmr" / "sentencepiece.bpe.model")
    )
    best = as_lists(source.encode(texts, "deu_Latn"))
    drawn = as_lists(source.encode(texts, "deu_Latn", sampling_alpha=0.2, seed=5))
    assert drawn == as_lists(source.encode(texts, "deu_Latn", sampling_alpha=0.2, seed=5))
    assert sum(a != b for a, b in zip(drawn, best, strict=True)) > len(texts) / 2
    # Its ids are sentencepiece's plus one.
    assert [model.decode([i - 1 for i in row[1:-1]]) for row in drawn] == texts
    assert all((row[0], row[-1]) == (0, 2) for row in drawn)
    cut = source.encode(texts, "deu_Latn", sampling_alpha=0.2, max_length=4)
    assert max(map(len, cut)) == 4 and all(row[-1] == 2 for row in cut)
    with pytest.raises(ValueError, match=r"sampling_alpha is 0.1, but .*bert has no sentencepiece"):
        source_tokenizer(folders / "bert").encode(["a"], "deu_Latn", sampling_alpha=0.1)


# --- M2M100 ---------------------------------------------------------------------------------------


def test_m2m100_knows_its_hundred_languages_by_their_flores_codes(folders, m2m100):
    assert type(m2m100) is M2M100Tokenizer
    reference = AutoTokenizer.from_pretrained(folders / "m2m100")
    names = {}
    for code in m2m100.languages:
        (token,) = m2m100.pieces([m2m100.language_id(code)])
        names[token.strip("_")] = code
    theirs = set(tokenization_m2m_100.FAIRSEQ_LANGUAGE_CODES["m2m100"])
    assert theirs - names.keys() == {"br", "fy"} and len(m2m100.languages) == 98
    assert {name: reference.get_lang_id(name) for name in names} == {
        name: m2m100.language_id(code) for name, code in names.items()
    }
    expected = {
        "en": "eng_Latn", "no": "nob_Latn", "tl": "tgl_Latn", "ns": "nso_Latn", "zh": "zho_Hans",
        "fa": "pes_Arab", "sw": "swh_Latn", "sq": "als_Latn", "lv": "lvs_Latn", "ms": "zsm_Latn",
        "mg": "plt_Latn", "ps": "pbt_Arab", "ff": "fuv_Latn", "az": "azj_Latn", "ba": "bak_Cyrl",
    }  # fmt: skip
    assert {name: names[name] for name in expected} == expected
    with pytest.raises(ValueError, match=r"'quy_Latn' is not one of the 98 .* the nearest are "):
        m2m100.encode(["a"], "quy_Latn")


def test_m2m100_equals_transformers_and_sentencepiece(folders, m2m100):
    folder = folders / "m2m100"
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "sentencepiece.bpe.model"))
    vocab = json.loads((folder / "vocab.json").read_text())
    reference = AutoTokenizer.from_pretrained(folder)
    for code, name in (("deu_Latn", "de"), ("nob_Latn", "no"), ("jpn_Jpan", "ja")):
        reference.src_lang = name
        rows = as_lists(m2m100.encode(TEXTS[code], code))
        assert rows == reference(TEXTS[code]).input_ids
        pieces = [
            [vocab[piece] for piece in row] for row in model.encode(TEXTS[code], out_type=str)
        ]
        assert rows == [[reference.get_lang_id(name), *row, 2] for row in pieces]
        assert m2m100.decode(rows) == TEXTS[code]
        reference.tgt_lang = name
        labels = as_lists(m2m100.encode_target(TEXTS[code], code, max_length=7))
        assert labels == reference(text_target=TEXTS[code], truncation=True, max_length=7).input_ids
    first, second = TEXTS["deu_Latn"], TEXTS["nob_Latn"]
    reference.src_lang = "de"
    for max_length in (3, 6, None):
        options = {"truncation": max_length is not None, "max_length": max_length}
        pairs = m2m100.encode(first, "deu_Latn", text_pairs=second, max_length=max_length)
        assert as_lists(pairs) == reference(first, second, **options).input_ids
    codes = ["deu_Latn", "jpn_Jpan"]
    rows = m2m100.encode(["Kenia", "ケニア"], codes)
    assert [row[0] for row in rows] == [m2m100.language_id(code) for code in codes]
    assert m2m100.encode([], "deu_Latn") == []
    with pytest.raises(ValueError, match="max_length is 2; it must be at least 3"):
        m2m100.encode(["a"], "deu_Latn", max_length=2)


def test_m2m100_says_nothing_samples_and_can_be_sent_to_workers(m2m100, capfd):
    texts = TEXTS["deu_Latn"]
    again = pickle.loads(pickle.dumps(m2m100))
    pairs = {"text_pairs": texts, "max_length": 5}
    assert as_lists(again.encode(texts, "deu_Latn", **pairs)) == as_lists(
        m2m100.encode(texts, "deu_Latn", **pairs)
    )
    drawn = m2m100.encode(texts, "deu_Latn", sampling_alpha=0.3)
    assert as_lists(drawn) != as_lists(m2m100.encode(texts, "deu_Latn"))
    assert m2m100.decode(drawn) == texts
    assert all(row[0] == m2m100.language_id("deu_Latn") and row[-1] == 2 for row in drawn)
    assert capfd.readouterr() == ("", "")


def test_m2m100_translates_as_transformers_does(tmp_path):
    torch = pytest.importorskip("torch", reason="the reference needs torch (pip install '.[test]')")
    transformers = pytest.importorskip("transformers")
    tiny_folders.m2m100(tmp_path / "model", ALL)
    tokenizer = translation_tokenizer(tmp_path / "model")
    texts, limits = TEXTS["deu_Latn"][:12], {"max_length": 12, "max_new_tokens": 6}
    ours = translate(
        load_nllb(tmp_path / "model"), tokenizer, texts, "deu_Latn", "eng_Latn", **limits
    )
    reference = AutoTokenizer.from_pretrained(tmp_path / "model", src_lang="de")
    model = transformers.M2M100ForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        ids = model.generate(
            **reference(texts, padding=True, truncation=True, max_length=12, return_tensors="pt"),
            num_beams=1,
            do_sample=False,
            forced_bos_token_id=reference.get_lang_id("en"),
            max_new_tokens=7,
        )
    assert (ids[:, 1] == tokenizer.language_id("eng_Latn")).all()
    assert ours == reference.batch_decode(ids[:, 2:], skip_special_tokens=True)
    assert any(ours)
