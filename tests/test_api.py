"""mtllm_jax.load: what a finished run computes, from its folder alone."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import reduced
from safetensors.numpy import load_file, save_file

import mtllm_jax
from mtllm_jax.config import MTLLM
from mtllm_jax.inference import Vectors
from mtllm_jax.metrics import Console
from mtllm_jax.recipes import stacking, systems
from mtllm_jax.recipes.inputs import read_inputs
from mtllm_jax.recipes.job import Job
from mtllm_jax.runfolder import RunFolder
from mtllm_jax.schema import resolve, to_dict

TEXTS = ["Kenia und Ghana", "ケニア", "Kenya and Ghana", "Peru"]
LANGUAGES = ["deu_Latn", "jpn_Jpan", "eng_Latn", "deu_Latn"]


@pytest.fixture(
    scope="module", params=["mini_run", pytest.param("own_run", marks=pytest.mark.slow)]
)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, all weights trained or adapters alone, in another place than it was made."""
    folder = tmp_path_factory.mktemp("moved") / "run"
    return Path(shutil.copytree(request.getfixturevalue(request.param), folder))


@pytest.fixture(scope="module")
def model(run: Path):
    return mtllm_jax.load(run)


def test_vectors_are_those_of_the_stages_that_made_the_run(run, model):
    """The stages, started again, build their models their own way and read their weights back."""
    config = resolve(MTLLM, json.loads((run / "config.json").read_text()))
    inputs = read_inputs(config)
    folder = RunFolder(run, to_dict(config))
    made = systems.train(Job(config, folder, Console(io.StringIO()), inputs.mesh, 0), inputs)
    folder.close()
    stack, dtype = made.tuned[0].student.stack, config.compute_dtype
    forward = stacking.stack_forward(stack, causal=False, dtype=dtype)
    pad_id = made.parts.source.pad_id
    vectors = Vectors(*forward, pad_id=pad_id, batch_rows=8, mesh=inputs.mesh)
    expected = vectors(made.parts.source.encode(TEXTS, LANGUAGES))
    encoded = model.encode(TEXTS, LANGUAGES)
    assert encoded.dtype == np.float32 and encoded.shape == (4, 32)
    np.testing.assert_allclose(encoded, expected, atol=1e-5)
    assert np.min(np.linalg.norm(encoded[:, None] - encoded[None], axis=-1) + np.eye(4)) > 1e-3


def test_labels_are_those_that_the_run_predicted(run, model):
    rows = [
        json.loads(line) for line in (run / "predictions" / "mt_llm.jsonl").read_text().splitlines()
    ]
    answers = model.classify([row["text"] for row in rows], [row["language"] for row in rows])
    assert [next(iter(answer)) for answer in answers] == [row["prediction"] for row in rows]
    for answer in answers:
        shares = list(answer.values())
        assert set(answer) == set(model.labels) and shares == sorted(shares, reverse=True)
        assert abs(sum(shares) - 1) < 1e-5


def test_labels_and_languages(run, model):
    own = (run / "text").exists() is False
    assert model.labels == (
        ("Africa", "America") if own else ("Africa", "America", "Asia", "Europe", "Oceania")
    )
    assert model.languages == ("eng_Latn", "deu_Latn", "jpn_Jpan")


def test_one_language_for_all_texts_and_no_texts(model):
    one = model.encode(["Kenia", "Peru"], "deu_Latn")
    np.testing.assert_array_equal(one, model.encode(["Kenia", "Peru"], ["deu_Latn"] * 2))
    assert model.encode([], "deu_Latn").shape == (0, 32)
    assert model.classify([], []) == []


@pytest.mark.parametrize(
    ("texts", "lang", "words"),
    [
        ("Kenia", "deu_Latn", "texts is 'Kenia'; it must be a list"),
        (["Kenia", None], "deu_Latn", r"texts\[1\] is None; it must be a str"),
        (["Kenia"], "de", "language 'de' is not one of the 3 .* nearest are deu_Latn"),
        (["Kenia"], ["deu_Latn"] * 2, "language has 2 codes; it must be one or 1"),
    ],
)
def test_wrong_texts_and_languages(model, texts, lang, words):
    for function in (model.encode, model.classify):
        with pytest.raises(ValueError, match=words):
            function(texts, lang)


def test_what_is_not_a_finished_run(tmp_path, mini_run):
    with pytest.raises(ValueError, match=r"nowhere is not a folder; .*\.$"):
        mtllm_jax.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no config.json, so it is not the folder of a run"):
        mtllm_jax.load(tmp_path)
    (tmp_path / "config.json").write_text('{"recipe": "soup"}')
    with pytest.raises(ValueError, match=r"config.json is not the config of a run of MT-LLM\.$"):
        mtllm_jax.load(tmp_path)
    shutil.copy(mini_run / "config.json", tmp_path)
    with pytest.raises(ValueError, match=r"has not finished its training; go on with it by python"):
        mtllm_jax.load(str(tmp_path))


def test_models_that_are_gone_and_weights_that_are_damaged(tmp_path, mini_run):
    run = Path(shutil.copytree(mini_run, tmp_path / "run"))
    weights = max(
        (run / "distillation" / "params").rglob("*"), key=lambda path: path.stat().st_size
    )
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"distillation/params cannot be read"):
        mtllm_jax.load(run)
    shutil.rmtree(run / "mini_llama")
    with pytest.raises(ValueError, match=r"mini_llama/model is not a folder"):
        mtllm_jax.load(run)


@pytest.mark.slow
def test_a_run_whose_encoder_is_another_now_is_refused(mini_run, tmp_path):
    """Finished stages no longer look at it, and their weights are of use with the old one alone."""
    run = Path(shutil.copytree(mini_run, tmp_path / "run"))
    path = run / "mini_nllb" / "model" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("encoder.layers.0.fc1.weight"))
    tensors[name][0, 0] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"weights of encoder are not those that .*run was trained"
    ):
        mtllm_jax.load(run)
    flags = [*reduced.ARGUMENTS, *reduced.flags({"stage1": run, "seeds": "3"})]
    done = reduced.train(*flags, "--workdir=new", cwd=tmp_path)
    assert done.returncode == 2 and "the weights of encoder are not those that" in done.stderr
