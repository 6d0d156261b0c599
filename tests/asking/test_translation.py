"""FLORES in its layouts; translations' measures against sacrebleu called directly."""

import io

import numpy as np
import pandas as pd
import pytest
import sacrebleu
import sentencepiece
from sacrebleu.tokenizers import tokenizer_spm

from mtllm_jax.asking.measures import Resamples
from mtllm_jax.asking.translation import Pieces, translated
from mtllm_jax.asking.words import first_line
from mtllm_jax.data.benchmarks.flores import read_flores

PLACES = [(i, j, k) for i in range(2) for j in range(2) for k in range(3)]


def sentences(form, *words):
    """One for each choice of words."""
    every = [part.split() for part in words]
    return [form.format(*(part[i] for part, i in zip(every, at, strict=True))) for at in PLACES]


ENGLISH = sentences("The {} is in the {}, and it is {}.", "cat dog", "house tree", "old new red")
GERMAN = sentences("Die {} ist im {}, und sie ist {}.", "Katze Maus", "Haus Baum", "alt neu rot")
CHINESE = sentences("那{}在{}里，它是{}的。", "猫 狗", "家 树", "老 新 红")


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")


def rows_and_answers():
    rng = np.random.default_rng(0)
    rows, answers = [], []
    for code, texts in (("deu_Latn", GERMAN), ("zho_Hans", CHINESE)):
        for way, source, target, labels in (
            ("from", "eng_Latn", code, texts),
            ("into", code, "eng_Latn", ENGLISH),
        ):
            for i, label in enumerate(labels):
                rows.append(
                    {"id": f"{way} {i}", "language": code, "label": label}
                    | {"source": source, "target": target}
                )
                other = labels[rng.integers(len(labels))] if rng.random() < 0.6 else label
                answers.append(f"\n {other} \nIt is so.")
    return rows, answers


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    file, content = tmp_path_factory.mktemp("spm") / "pieces.model", io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*ENGLISH, *GERMAN, *CHINESE]),
        model_writer=content,
        vocab_size=90,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    file.write_bytes(content.getvalue())
    return file


def test_scores_are_those_of_sacrebleu(model, monkeypatch, tmp_path):
    """With its own sentencepiece tokenizer where a model is given."""
    rows, answers = rows_and_answers()
    found = {one.name: one for one in translated(rows, answers, Pieces(model))}
    assert next(iter(found)) == "chrF++ from English" and len(found) == 8
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "flores200sacrebleuspm").write_bytes(model.read_bytes())
    monkeypatch.setattr(tokenizer_spm, "SACREBLEU_DIR", str(tmp_path))
    draws = Resamples([row["id"] for row in rows], [row["language"] for row in rows], "eng_Latn")
    frame = pd.DataFrame(rows).assign(answer=[answer.split("\n")[1].strip() for answer in answers])
    for way, end in (("from English", "source"), ("into English", "target")):
        entries = {
            name: draws.entry(draws.of(found[f"{name} {way}"]))
            for name in ("chrF++", "BLEU", "spBLEU")
        }
        for code, chosen in frame[frame[end] == "eng_Latn"].groupby("language"):
            hyps, refs = chosen["answer"].tolist(), [chosen["label"].tolist()]
            chinese = code == "zho_Hans" and end == "source"
            wanted = {
                "chrF++": sacrebleu.CHRF(word_order=2),
                "BLEU": sacrebleu.BLEU(tokenize="zh" if chinese else "13a"),
                "spBLEU": sacrebleu.BLEU(tokenize="flores200"),
            }
            for name, metric in wanted.items():
                score = metric.corpus_score(hyps, refs, n_bootstrap=1000)
                value = entries[name]["languages"][code]
                assert value == pytest.approx(score.score / 100, abs=1e-12) and 0.1 < value < 0.95
                assert entries[name]["rows"][code] == 12
                # sacrebleu has the mean of resamples ± half their middle 95 %. Both are of 1,000
                # draws, so that ends differ by some hundredths of the width.
                low, high = entries[name]["intervals"][code]
                assert high - low == pytest.approx(2 * score._ci / 100, rel=0.15)
    chinese = found["BLEU from English"].about
    assert "nrefs:1|case:mixed|eff:no|tok:13a" in chinese and "tok:zh" in chinese
    assert "tok:spm-pieces-" in found["spBLEU into English"].about
    assert "nw:2" in found["chrF++ from English"].about


def test_a_translation_in_another_language_is_off_target():
    rows, _ = rows_and_answers()
    every = {one.name: one for one in translated(rows, [ENGLISH[0]] * len(rows), None)}
    draws = Resamples([row["id"] for row in rows], [row["language"] for row in rows], "")
    out, into = (
        draws.entry(draws.of(every[f"off-target {way} English"])) for way in ("from", "into")
    )
    assert out["languages"] == {"deu_Latn": 1, "zho_Hans": 1}
    assert into["languages"] == {"deu_Latn": 0, "zho_Hans": 0}
    assert "spBLEU from English" not in every


def test_a_translation_is_looked_for_in_the_first_line():
    assert first_line("\n  a b \nc") == "a b" and first_line(" \n") == ""


def test_flores_in_its_layouts(tmp_path):
    texts = {"eng_Latn": ENGLISH, "deu_Latn": GERMAN, "zho_Hans": CHINESE}
    for code, lines in texts.items():
        write(tmp_path / f"200/devtest/{code}.devtest", "".join(f"{line}\n" for line in lines))
        plus = code.replace("zho", "cmn")
        rows = pd.DataFrame({"id": range(len(lines)), "text": lines, "topic": "t"})
        (tmp_path / "plus/devtest").mkdir(parents=True, exist_ok=True)
        rows[::-1].to_parquet(tmp_path / f"plus/devtest/{plus}.parquet")
    for two, lines in (("de", GERMAN), ("zh", CHINESE)):
        for end, each in ((two, lines), ("en", ENGLISH)):
            write(tmp_path / f"fx/evaluation/{two}-en/flores-test.{end}", "\n".join(each))
    wanted = {"deu_Latn": (ENGLISH, GERMAN), "zho_Hans": (ENGLISH, CHINESE)}
    for name in ("200", "plus", "fx"):
        assert read_flores(tmp_path / name).pairs == wanted
    (pair,) = read_flores(tmp_path / "200", ["zho_Hans"], 3).pairs.values()
    (other,) = read_flores(tmp_path / "fx", ["deu_Latn"], 3).pairs.values()
    assert pair[0] == other[0] and len(pair[1]) == 3
    with pytest.raises(ValueError, match="language 'fra_Latn' is not one of the 2"):
        read_flores(tmp_path / "200", ["fra_Latn"])
    with pytest.raises(ValueError, match=r"holds no devtest/<code>\.devtest, devtest/<code>\.par"):
        read_flores(tmp_path)
    write(tmp_path / "200/devtest/deu_Latn.devtest", "a\n")
    with pytest.raises(ValueError, match=r"deu_Latn\.devtest has 1 sentences and English 12"):
        read_flores(tmp_path / "200")


@pytest.mark.real
def test_the_real_files(mtllm_data):
    pairs = read_flores(mtllm_data / "flores_nllb600m").pairs
    assert len(pairs) == 40 and {len(side) for pair in pairs.values() for side in pair} == {1012}


@pytest.mark.parametrize("content", [b"no model", None])
def test_a_file_that_is_no_sentencepiece_model(content, tmp_path):
    if content is not None:
        (tmp_path / "x.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"--spm=.*x\.model cannot be read as a sentencepiece mod"):
        Pieces(tmp_path / "x.model")
