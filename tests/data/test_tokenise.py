"""Tokenizers against transformers' and sentencepiece's own output."""

import contextlib
import io
import json
import pickle
import shutil

import numpy as np
import pytest
import sentencepiece
from babel import Locale
from transformers import AutoTokenizer, BatchEncoding

from mtllm_jax.data.tokenise import TargetTokenizer, source_tokenizer, translation_tokenizer
from mtllm_jax.data.train_tokenizer import train_llama_tokenizer, train_nllb_tokenizer
from mtllm_jax.languages import LANGUAGES
from mtllm_jax.tasks.multiple_choice import choice_text

CODES = ["eng_Latn", "deu_Latn", "heb_Hebr", "pes_Arab", "hin_Deva", "tha_Thai", "jpn_Jpan"]
VOCAB_SIZE = 2000


def texts_in(code: str) -> list[str]:
    names = Locale.parse(LANGUAGES[code].locale).territories
    return [name.strip("\u200f\u200e ") for key, name in names.items() if len(key) == 2]


TEXTS = {code: texts_in(code) for code in CODES}
ALL = [text for texts in TEXTS.values() for text in texts]


@pytest.fixture(scope="module")
def nllb(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nllb")
    train_nllb_tokenizer(ALL, CODES, VOCAB_SIZE, folder)
    # As it lies beside a model: transformers chooses a class by model_type too.
    (folder / "config.json").write_text(json.dumps({"model_type": "m2m_100"}))
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    train_llama_tokenizer(TEXTS["eng_Latn"], 600, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


@pytest.fixture(scope="module")
def source(nllb):
    return source_tokenizer(nllb)


@pytest.fixture(scope="module")
def target(llama):
    return TargetTokenizer(llama)


def as_lists(rows) -> list[list[int]]:
    assert all(row.dtype == np.int32 for row in rows)
    return [row.tolist() for row in rows]


def ids(encoding: BatchEncoding) -> list[list[int]]:
    return encoding["input_ids"]


def test_nllb_layout(nllb, source):
    reference = AutoTokenizer.from_pretrained(nllb, src_lang="deu_Latn")
    assert type(reference).__name__ == "NllbTokenizer"
    assert len(reference) == source.vocab_size == VOCAB_SIZE
    assert reference.convert_ids_to_tokens([0, 1, 2, 3]) == ["<s>", "<pad>", "</s>", "<unk>"]
    first = VOCAB_SIZE - len(CODES) - 1
    assert reference.convert_tokens_to_ids([*CODES, "<mask>"]) == list(range(first, VOCAB_SIZE))
    assert (source.pad_id, source.eos_id, source.languages) == (1, 2, tuple(CODES))
    tokens = reference.convert_ids_to_tokens(reference("Kenia").input_ids)
    assert tokens[0] == "deu_Latn" and tokens[-1] == "</s>" and "<unk>" not in tokens

    model = sentencepiece.SentencePieceProcessor(model_file=str(nllb / "sentencepiece.bpe.model"))
    assert len(model) == VOCAB_SIZE - len(CODES) - 2
    pieces = [model.id_to_piece(i) for i in range(3, len(model))]
    assert reference.convert_tokens_to_ids(pieces) == list(range(4, len(model) + 1))


@pytest.mark.parametrize("code", CODES)
def test_source_equals_transformers_and_sentencepiece(nllb, source, code):
    rows = as_lists(source.encode(TEXTS[code], code))
    reference = AutoTokenizer.from_pretrained(nllb, src_lang=code)
    assert rows == ids(reference(TEXTS[code]))
    model = sentencepiece.SentencePieceProcessor(model_file=str(nllb / "sentencepiece.bpe.model"))
    pieces = [[i + 1 for i in row] for row in model.encode(TEXTS[code])]
    assert rows == [[source.language_id(code), *row, 2] for row in pieces]
    assert 3 not in np.concatenate(rows)
    assert source.decode(rows) == [model.decode(model.encode(text)) for text in TEXTS[code]]


def test_source_languages_by_text(source):
    texts = [TEXTS[code][0] for code in CODES]
    together = as_lists(source.encode(texts, CODES))
    alone = [as_lists(source.encode([t], c))[0] for t, c in zip(texts, CODES, strict=True)]
    assert together == alone
    assert source.encode([], "deu_Latn") == source.decode([]) == []
    with pytest.raises(ValueError, match="language has 2 codes; it must be one or 7"):
        source.encode(texts, CODES[:2])


def test_target_language_of_the_decoder(nllb, source):
    reference = AutoTokenizer.from_pretrained(nllb, src_lang="deu_Latn", tgt_lang="jpn_Jpan")
    texts = TEXTS["jpn_Jpan"][:20]
    labels = ids(reference(text_target=texts))
    assert as_lists(source.encode_target(texts, "jpn_Jpan")) == labels
    assert labels[0][0] == source.language_id("jpn_Jpan")


@pytest.mark.parametrize("stored", [False, True])
def test_the_legacy_order_of_sources(nllb, source, tmp_path, stored):
    """`text </s> [language]` where it is asked for, whatever the folder itself says."""
    folder = tmp_path / "nllb"
    shutil.copytree(nllb, folder)
    about = json.loads((nllb / "tokenizer_config.json").read_text())
    about["legacy_behaviour"] = stored
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    reference = AutoTokenizer.from_pretrained(folder, src_lang="deu_Latn", legacy_behaviour=True)
    legacy = source_tokenizer(folder, legacy_source_order=True)
    first, second = TEXTS["deu_Latn"][:60], TEXTS["deu_Latn"][60:120]
    for max_length in (3, 9, None):
        options = {"truncation": max_length is not None, "max_length": max_length}
        rows = as_lists(legacy.encode(first, "deu_Latn", max_length=max_length))
        assert rows == ids(reference(first, **options))
        assert all(row[-2:] == [2, source.language_id("deu_Latn")] for row in rows)
        pairs = legacy.encode(first, "deu_Latn", text_pairs=second, max_length=max_length)
        assert as_lists(pairs) == ids(reference(first, second, **options))
    drawn = as_lists(legacy.encode(first, "deu_Latn", sampling_alpha=0.3, seed=5))
    usual = as_lists(source.encode(first, "deu_Latn", sampling_alpha=0.3, seed=5))
    assert drawn == [[*row[1:], row[0]] for row in usual]
    # What the decoder says has always begun with its language.
    assert as_lists(legacy.encode_target(first, "deu_Latn")) == as_lists(
        source.encode(first, "deu_Latn")
    )
    again = pickle.loads(pickle.dumps(legacy))
    assert as_lists(again.encode(first, "deu_Latn")) == as_lists(legacy.encode(first, "deu_Latn"))
    usual = source_tokenizer(folder).encode(first, "deu_Latn")
    assert as_lists(usual) == as_lists(source.encode(first, "deu_Latn"))


@pytest.mark.parametrize("max_length", [3, 5, 9])
def test_truncation_and_pairs_equal_transformers(nllb, llama, source, target, max_length):
    first, second = TEXTS["deu_Latn"][:60], TEXTS["deu_Latn"][60:120]
    options = {"truncation": True, "max_length": max_length}
    reference = AutoTokenizer.from_pretrained(nllb, src_lang="deu_Latn")
    cut = as_lists(source.encode(first, "deu_Latn", max_length=max_length))
    assert cut == ids(reference(first, **options))
    assert all(row[-1] == 2 and len(row) <= max_length for row in cut)
    pairs = source.encode(first, "deu_Latn", text_pairs=second, max_length=max_length)
    assert as_lists(pairs) == ids(reference(first, second, **options))

    reference = AutoTokenizer.from_pretrained(llama)
    cut = as_lists(target.encode(first, max_length=max_length))
    assert cut == ids(reference(first, **options))
    pairs = target.encode(first, text_pairs=second, max_length=max_length)
    assert as_lists(pairs) == ids(reference(first, second, **options))
    assert as_lists(target.encode(first)) == ids(reference(first))  # no state is left behind


def test_sampling(source):
    texts = TEXTS["deu_Latn"]
    best = as_lists(source.encode(texts, "deu_Latn"))
    drawn = as_lists(source.encode(texts, "deu_Latn", sampling_alpha=0.3, seed=5))
    assert drawn == as_lists(source.encode(texts, "deu_Latn", sampling_alpha=0.3, seed=5))
    assert drawn != as_lists(source.encode(texts, "deu_Latn", sampling_alpha=0.3, seed=6))
    assert sum(a != b for a, b in zip(drawn, best, strict=True)) > len(texts) / 2
    assert source.decode(drawn) == source.decode(best)
    assert all(row[0] == source.language_id("deu_Latn") and row[-1] == 2 for row in drawn)
    assert as_lists(source.encode(texts, "deu_Latn", sampling_alpha=0.0)) == best
    cut = source.encode(texts, "deu_Latn", sampling_alpha=0.3, max_length=4)
    assert max(len(row) for row in cut) == 4 and all(row[-1] == 2 for row in cut)


def test_llama_layout_and_byte_fallback(llama, target):
    reference = AutoTokenizer.from_pretrained(llama)
    assert type(reference).__name__ == "LlamaTokenizer"
    assert reference.convert_ids_to_tokens([0, 1, 2, 3, 258]) == [
        "<unk>", "<s>", "</s>", "<0x00>", "<0xFF>",
    ]  # fmt: skip
    assert len(reference) == target.vocab_size == 600
    assert (target.bos_id, target.eos_id, target.pad_id) == (1, 2, 2)
    model = sentencepiece.SentencePieceProcessor(model_file=str(llama / "tokenizer.model"))
    others = [*ALL, "two  spaces", "ลาว 🙂 እንግሊዝኛ", "x\ty"]
    rows = as_lists(target.encode(others))
    assert rows == ids(reference(others))
    assert rows == [[1, *row] for row in model.encode(others)]
    assert 0 not in np.concatenate(rows)
    assert target.decode(rows) == others


def test_training_is_repeatable_and_replaces_what_was_there(nllb, tmp_path):
    train_nllb_tokenizer(TEXTS["eng_Latn"], ["eng_Latn"], 500, tmp_path)
    assert source_tokenizer(tmp_path).vocab_size == 500
    train_nllb_tokenizer(ALL, CODES, VOCAB_SIZE, tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (nllb / file.name).read_bytes()


def test_a_vocabulary_beyond_what_the_texts_give_is_all_that_they_give(tmp_path):
    texts, word = ["ab ab", "abc"], "▁abc"
    every = {word[i:j] for i in range(len(word)) for j in range(i + 1, len(word) + 1)}
    train_nllb_tokenizer(texts, ["eng_Latn"], 9000, tmp_path / "source")
    source = source_tokenizer(tmp_path / "source")
    pieces = source.pieces(range(source.vocab_size))
    assert pieces[:4] == ["<s>", "<pad>", "</s>", "<unk>"]
    assert sorted(pieces[4:-2]) == sorted(every)
    assert pieces[-2:] == ["eng_Latn", "<mask>"]
    train_llama_tokenizer(texts, 9000, tmp_path / "target")
    assert TargetTokenizer(tmp_path / "target").vocab_size == 3 + 256 + len(every)


def test_nothing_is_printed_and_workers_can_have_it(nllb, llama, tmp_path):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        train_llama_tokenizer(TEXTS["eng_Latn"], 500, tmp_path)
        for tokenizer in (source_tokenizer(nllb), TargetTokenizer(llama)):
            assert pickle.loads(pickle.dumps(tokenizer)).vocab_size == tokenizer.vocab_size
    assert out.getvalue() == ""


def test_bad_input(nllb, llama, source, tmp_path):
    with pytest.raises(ValueError, match=r"'deu_Latin' .* the nearest are deu_Latn, eng_Latn, "):
        source.encode(["a"], "deu_Latin")
    with pytest.raises(ValueError, match=r"'fra_Latn' is not one of the 7 allowed"):
        source.language_id("fra_Latn")
    with pytest.raises(ValueError, match="max_length is 2; it must be at least 3"):
        source.encode(["a"], "deu_Latn", max_length=2)
    with pytest.raises(ValueError, match="sampling_alpha is 2"):
        source.encode(["a"], "deu_Latn", sampling_alpha=2)
    with pytest.raises(ValueError, match="sampling_alpha is set"):
        source.encode(["a"], "deu_Latn", text_pairs=["b"], sampling_alpha=0.1)
    with pytest.raises(ValueError, match="text_pairs has 2 texts; it must have 1"):
        source.encode(["a"], "deu_Latn", text_pairs=["b", "c"])
    with pytest.raises(ValueError, match="no tokenizer of NLLB or M2M100: it knows no languages"):
        translation_tokenizer(llama)
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        TargetTokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no tokenizer that transformers can read"):
        TargetTokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"vocab_size is 60; it must be \d+ or more"):
        train_nllb_tokenizer(ALL, CODES, 60, tmp_path / "small")
    assert not any(tmp_path.iterdir())
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).write_bytes((nllb / name).read_bytes())
    with pytest.raises(ValueError, match=r"sampling_alpha is 0.1, but .*bare has no sentencepiece"):
        source_tokenizer(bare).encode(["a"], "deu_Latn", sampling_alpha=0.1)


# ---------------------------------------------------------------- multiple choice


def choice_row(context, choices):
    question = "Which?"
    cells = {"context": context, "question": question, "choices": choices}
    return {"id": "7", "language": "deu_Latn", "label": "1"} | cells


@pytest.mark.parametrize("legacy", [False, True])
def test_the_tokens_of_a_choice_spell_it(nllb, legacy):
    tokenizer = source_tokenizer(nllb, legacy_source_order=legacy)
    rows = [
        choice_row("Kenia und Togo", ["Kenia", "Ghana", "Burkina Faso"]),
        choice_row("ケニア", ["ガーナ", "トーゴ"]),
    ]
    found, marks = tokenizer.encode_choices(rows, ["deu_Latn", "jpn_Jpan"])
    for row, code, of_row, marked in zip(rows, ("deu_Latn", "jpn_Jpan"), found, marks, strict=True):
        text, _ = choice_text(row["context"], row["question"], row["choices"])
        (whole,) = tokenizer.encode([text], code)
        assert of_row.tolist() == whole.tolist() and marked.dtype == np.int32
        for number, choice in enumerate(row["choices"], 1):
            (said,) = tokenizer.decode([of_row[marked == 1 + number]])
            assert said.split() == choice.split()
        assert marked[of_row == tokenizer.language_id(code)] == [1]


def test_the_llm_reads_choices_as_one_text(target):
    row = choice_row("Kenya and Togo", ["Kenya", "Ghana"])
    (found,), (marked,) = target.encode_choices([row])
    (whole,) = target.encode(["Kenya and Togo Which?\n1 Kenya\n2 Ghana"])
    assert found.tolist() == whole.tolist()
    assert [target.decode([found[marked == n]])[0].strip() for n in (2, 3)] == ["Kenya", "Ghana"]


def test_a_long_row_of_choices_loses_the_end_of_its_context(source):
    row = choice_row("Kenia und Togo und Ghana und Peru", ["Kenia", "Peru"])
    (whole,), (whole_marks,) = source.encode_choices([row], "deu_Latn")
    (cut,), (marks,) = source.encode_choices([row], "deu_Latn", max_length=len(whole) - 3)
    assert len(cut) == len(whole) - 3 and cut[0] == whole[0]
    for number in (2, 3):
        assert cut[marks == number].tolist() == whole[whole_marks == number].tolist()
    with pytest.raises(ValueError, match=r"row '7' in deu_Latn: question and choices are \d+ tok"):
        source.encode_choices([row], "deu_Latn", max_length=4)
