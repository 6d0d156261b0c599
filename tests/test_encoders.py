"""A run on an encoder that does not translate, and what the door says to such encoders."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import reduced
import tiny_folders

import mtllm_jax
from mtllm_jax.cli import load_config
from mtllm_jax.config import MTLLM
from mtllm_jax.hf.encoder import check_encoder, has_decoder, load_encoder
from mtllm_jax.models.bert import Bert, BertConfig
from mtllm_jax.models.nllb import NLLB, NLLBConfig
from mtllm_jax.recipes.inputs import read_inputs
from mtllm_jax.recipes.systems import in_english, linear_classifier, translator
from mtllm_jax.schema import resolve
from mtllm_jax.sharding import make_mesh

TEXTS = [line.split("\t")[0] for line in reduced.TRAIN] + [row[0] for row in reduced.TEST]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Random models: "xlmr", "m2m100", "llama"."""
    root = tmp_path_factory.mktemp("models")
    for name in ("xlmr", "m2m100", "llama"):
        getattr(tiny_folders, name)(root / name, TEXTS)
    return root


@pytest.fixture(scope="module")
def own(folders, tmp_path_factory) -> dict[str, str]:
    """The fields of a run on an encoder that does not translate."""
    fields = reduced.own_fields(tmp_path_factory.mktemp("own"), folders)
    fields |= {"encoder": str(folders / "xlmr"), "llm": str(folders / "llama")}
    return fields | {"trained": "lora", "lora.rank": 4}


def read(fields):
    values = load_config(f"{reduced.ROOT}/configs/mtllm.py")
    for path, value in fields.items():
        *groups, last = path.split(".")
        group = values
        for part in groups:
            group = group[part]
        group[last] = value
    config = resolve(MTLLM, values)
    read_inputs(config)
    return config


def test_encoders_by_what_their_folder_is(folders):
    assert [has_decoder(folders / name) for name in ("xlmr", "m2m100")] == [False, True]
    for name, kind, sizes in (("xlmr", Bert, BertConfig), ("m2m100", NLLB, NLLBConfig)):
        encoder = load_encoder(folders / name, unroll_layers=True)
        assert type(encoder) is kind and encoder.config.unroll_layers
        assert type(check_encoder(folders / name)) is sizes
    assert load_encoder(folders / "m2m100").decoder is None
    with pytest.raises(ValueError, match="'llama'; it may be m2m_100 or bert or xlm-roberta or"):
        load_encoder(folders / "llama")


@pytest.mark.parametrize("rows", [1, 2, 20])
def test_a_linear_map_on_few_rows_of_a_label(rows):
    labels = ["a", "b", "c"] * rows
    x_MD = np.eye(3)[[0, 1, 2] * rows] + np.random.default_rng(0).normal(0, 0.1, (3 * rows, 3))
    assert list(linear_classifier(x_MD, labels).predict(x_MD)) == labels


@pytest.mark.slow
def test_a_run_without_a_translation_model(own, tmp_path):
    """All stages, all systems but one, and the answers in Python."""
    few = {f"{stage}.steps": 5 for stage in ("adaptation.training", "teacher", "mt_encoder")}
    few |= {"distillation.training.steps": 5, "evaluation.batch_rows": 8}
    flags = reduced.flags(own | few)
    done = reduced.train(*reduced.ARGUMENTS, *flags, "--workdir=run", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("Translate-test is left out: config.encoder cannot translate") == 1
    run = tmp_path / "run"
    results = json.loads((run / "results.json").read_text())
    systems = ["mt_llm", "llm_zero_shot", "mt_encoder", "llm_prompted", "encoder_linear"]
    assert list(results["systems"]) == list(results["cost"]) == systems
    assert {path.stem for path in (run / "predictions").iterdir()} == set(systems)
    page = (run / "report.html").read_text()
    assert "Translate-test" not in page
    assert results["encoder"] == "text" and "text encoder, frozen" in page

    model = mtllm_jax.load(run)
    rows = [json.loads(line) for line in (run / "predictions" / "mt_llm.jsonl").open()]
    answers = model.classify([row["text"] for row in rows], [row["language"] for row in rows])
    assert [next(iter(answer)) for answer in answers] == [row["prediction"] for row in rows]
    assert "quy_Latn" in model.languages


def test_a_translator_of_its_own(own, folders):
    config = read(own | {"translator": str(folders / "m2m100")})
    rows = [dict(zip(("text", "label", "language"), row, strict=True)) for row in reduced.TEST]
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    translate = translator(config, folders / "m2m100", mesh)

    def into_english(rows):
        return [row["text"] for row in in_english(rows, "eng_Latn", translate)]

    texts = into_english(rows)
    assert texts[0] == "Kenya"  # English is left as it is
    assert len(texts) == 4 and texts[2:] != [row["text"] for row in rows[2:]]
    (nothing,) = translate(["Ghana und Togo"], ["deu_Latn"])
    assert nothing == "" and texts[1] == "Ghana und Togo"  # nothing is no translation
    alone = [into_english([row])[0] for row in rows]
    assert texts == alone
    pairs = [
        row | {"text_pair": other["text"]} for row, other in zip(rows, rows[::-1], strict=True)
    ]
    both = in_english(pairs, "eng_Latn", translate)
    assert [pair["text"] for pair in both] == texts
    assert both[0] == pairs[0]
    assert both[3]["text_pair"] == into_english([rows[3] | {"text": rows[0]["text"]}])[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"english": "en"}, "config.english: language 'en' is not one of the .* eng_Latn"),
        ({"evaluation.max_length": 131}, r"config.evaluation.max_length is 131; .* at most 130, "),
        ({"adaptation.training.source_length": 500}, "config.adaptation.training.source_length"),
        ({"mt_encoder.source_length": 500}, "config.mt_encoder.source_length is 500; .* 130"),
        (
            {"translator": "xlmr"},
            "config.translator: .* model_type is 'xlm-roberta'; it may be m2m",
        ),
        ({"translator": "nowhere"}, "config.translator: .*nowhere is not a folder"),
        ({"legacy_source_order": True}, "config.legacy_source_order is True; it must be False wh"),
    ],
)
def test_what_is_refused(own, folders, changes, message):
    if "translator" in changes:
        changes = {"translator": str(folders / changes["translator"])}
    with pytest.raises(ValueError, match=message) as raised:
        read(own | changes)
    assert "\n" not in str(raised.value)


def test_languages_that_the_translator_does_not_know(own, folders, tmp_path):
    path = tmp_path / "b.jsonl"
    path.write_text('{"text": "Kenya", "label": "Africa", "language": "quy_Latn"}\n')
    read(own | {"task.test": str(path)})
    with pytest.raises(ValueError, match=r"config.translator: language 'quy_Latn' is not one of"):
        read(own | {"task.test": str(path), "translator": str(folders / "m2m100")})


def test_an_encoder_with_a_tokenizer_that_is_not_its_own(own, folders, tmp_path):
    """A translation model is not read with a tokenizer that knows no languages."""
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for folder, names in (
        ("m2m100", ("config.json", "model.safetensors")),
        ("xlmr", ("sentencepiece.bpe.model",)),
    ):
        for name in names:
            (mixed / name).write_bytes((folders / folder / name).read_bytes())
    (mixed / "tokenizer_config.json").write_text('{"tokenizer_class": "XLMRobertaTokenizer"}')
    with pytest.raises(
        ValueError, match=r"config.encoder: .*mixed has no tokenizer of NLLB or M2M"
    ):
        read(own | {"encoder": str(mixed)})
