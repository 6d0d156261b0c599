"""launch/export.py on finished runs: what it writes is loaded by other programs, and agrees."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reduced

import mtllm_jax

torch = pytest.importorskip("torch", reason="exports are loaded with torch (the `test` extra)")
import transformers  # noqa: E402
from huggingface_hub import ModelCard  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

TEXTS = ["Kenia und Ghana", "ケニア", "Kenya and Ghana", "Peru"]
LANGUAGES = ["deu_Latn", "jpn_Jpan", "eng_Latn", "deu_Latn"]


def export(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """launch/export.py with these arguments, run to its end."""
    return subprocess.run(
        [sys.executable, reduced.ROOT / "launch" / "export.py", *map(str, arguments)],
        cwd=cwd,
        env=reduced.environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(run, format, other flags) → the folder exported, each made once."""
    made = {}

    def make(run: Path, *flags: str) -> Path:
        if (run, *flags) not in made:
            folder = tmp_path_factory.mktemp("export") / "out"
            done = export(f"--workdir={run}", f"--to={folder}", *flags, cwd=folder.parent)
            assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
            made[(run, *flags)] = folder
        return made[(run, *flags)]

    return make


def rows_of(run: Path) -> list[dict]:
    lines = (run / "predictions" / "mt_llm.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def classifier(folder: Path):
    auto = transformers.AutoModelForSequenceClassification
    model, loading = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(loading.values()), loading
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("mini_run", []),
        ("own_run", []),
        ("own_run", ["--adapters=kept"]),
    ],
    ids=["all trained", "merged", "kept"],
)
def test_torch_predicts_what_the_run_predicted(name, flags, exported, request):
    """All labels of the test, and the same vectors, from the folder alone."""
    run = request.getfixturevalue(name)
    folder = exported(run, "--format=hf", *flags)
    model, rows = classifier(folder), rows_of(run)
    answers = model.classify([row["text"] for row in rows], [row["language"] for row in rows])
    assert [next(iter(answer)) for answer in answers] == [row["prediction"] for row in rows]
    ours = mtllm_jax.load(run)
    expected = ours.encode(TEXTS, LANGUAGES)
    np.testing.assert_allclose(model.encode(TEXTS, LANGUAGES).numpy(), expected, atol=1e-4)
    again = mtllm_jax.load(folder)
    np.testing.assert_allclose(again.encode(TEXTS, LANGUAGES), expected, atol=1e-4)
    assert again.labels == ours.labels and again.languages == ours.languages
    assert again.classify(TEXTS, LANGUAGES)[0].keys() == answers[0].keys()


@pytest.mark.slow
def test_a_run_over_int8_is_written_with_the_weights_that_were_quantised(
    tmp_path, mini_run, exported
):
    """Those of the folders that it started from, in bfloat16, beside what it learnt."""
    fields = reduced.own_fields(tmp_path, mini_run) | {
        **{"trained": "lora", "distillation.start": "stage1", "frozen_dtype": "int8"},
        **{"compute_dtype": "bfloat16", "lora.rank": "4"},
    }
    arguments = (*reduced.ARGUMENTS, *reduced.flags(fields), "--workdir=run")
    done = reduced.train(*arguments, cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    run = tmp_path / "run"
    folder = exported(run, "--format=hf", "--adapters=kept")
    written = load_file(folder / "model.safetensors")
    for part, started_from in (("encoder", "mini_nllb"), ("llm", "mini_llama")):
        original = load_file(mini_run / started_from / "model" / "model.safetensors")
        compared = 0
        for name, tensor in written.items():
            stem = f"model.{part}." if part == "encoder" else "model."
            plain = name.replace(".base_layer", "").replace(f"{part}.", stem, 1)
            if name.startswith(f"{part}.layers") and plain in original:
                assert torch.equal(tensor, original[plain].to(torch.bfloat16)), name
                compared += 1
        assert compared > 8
    assert "over weights in int8" in (folder / "README.md").read_text(encoding="utf-8")
    # The run computes with what is within half a step of them, in bfloat16.
    over_int8 = mtllm_jax.load(run).encode(TEXTS, LANGUAGES)
    floats = mtllm_jax.load(folder).encode(TEXTS, LANGUAGES)
    cosines = np.sum(over_int8 * floats, axis=1) / (
        np.linalg.norm(over_int8, axis=1) * np.linalg.norm(floats, axis=1)
    )
    assert np.all(cosines > 0.995) and not np.allclose(over_int8, floats, atol=1e-4)


def test_both_tokenizers_and_the_card(exported, mini_run):
    folder = exported(mini_run, "--format=hf")
    source = transformers.AutoTokenizer.from_pretrained(
        folder, trust_remote_code=True, src_lang="deu_Latn"
    )
    assert source.convert_ids_to_tokens(source("Kenia").input_ids)[0] == "deu_Latn"
    target = transformers.AutoTokenizer.from_pretrained(folder / "llm_tokenizer")
    assert target.decode(target("Kenya").input_ids, skip_special_tokens=True) == "Kenya"
    card = ModelCard.load(folder / "README.md")
    results = json.loads((mini_run / "results.json").read_text(encoding="utf-8"))
    (first, _) = card.data.eval_results
    assert first.metric_value == round(results["systems"]["mt_llm"]["mean"], 4)
    assert "deu" in card.data.language and str(mini_run) not in card.content
    words = ("trained in the same run", "German", "LLM zero-shot", "Africa")
    assert all(word in card.text for word in words)


def test_opening_an_export_does_not_ask_to_run_its_code(exported, mini_run, monkeypatch):
    folder = exported(mini_run, "--format=hf")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    assert mtllm_jax.load(folder).labels


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mini_run", "own_run"])
def test_the_adapter_on_the_original_llm_is_the_students_llm(name, exported, request):
    """PEFT on the LLM that the run started from = the LLM inside the exported stack."""
    peft = pytest.importorskip("peft")
    run = request.getfixturevalue(name)
    folder = exported(run, "--format=peft")
    about = json.loads((run / "model.json").read_text(encoding="utf-8"))
    base = transformers.AutoModelForCausalLM.from_pretrained(run / about["llm"])
    adapted = peft.PeftModel.from_pretrained(base, folder).eval()
    stack = classifier(exported(run, "--format=hf"))
    h = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 5, 32)).astype(np.float32))
    mask = torch.zeros(2, 1, 5, 5)  # every position sees all others
    with torch.no_grad():
        states = stack.llm(inputs_embeds=h, attention_mask=mask).last_hidden_state
        inner = adapted.get_base_model().model
        found = inner(inputs_embeds=h, attention_mask=mask).last_hidden_state
        with adapted.disable_adapter():
            before = inner(inputs_embeds=h, attention_mask=mask).last_hidden_state
    np.testing.assert_allclose(found.numpy(), states.numpy(), atol=1e-4)
    assert float((before - states).abs().max()) > 1e-3


@pytest.mark.slow
def test_a_truncated_adapter_is_smaller(exported, mini_run):
    sizes = [
        (exported(mini_run, "--format=peft", *rank) / "adapter_model.safetensors").stat().st_size
        for rank in (["--rank=2"], [])
    ]
    assert sizes[0] < sizes[1] / 3


@pytest.mark.parametrize(
    ("kind", "auto", "part"),
    [
        pytest.param("llama", "AutoModelForCausalLM", "llm", marks=pytest.mark.slow),
        ("nllb", "AutoModelForSeq2SeqLM", "encoder"),
    ],
)
def test_the_models_that_the_run_started_from(kind, auto, part, exported, mini_run):
    folder = exported(mini_run, f"--format={kind}")
    about = json.loads((mini_run / "model.json").read_text(encoding="utf-8"))
    origin = getattr(transformers, auto).from_pretrained(mini_run / about[part])
    model, loading = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    expected = origin.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert len(transformers.AutoTokenizer.from_pretrained(folder)) == len(
        transformers.AutoTokenizer.from_pretrained(mini_run / about[part])
    )


@pytest.mark.slow
def test_dtype(exported, mini_run):
    folder = exported(mini_run, "--format=llama", "--dtype=bfloat16")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--workdir is missing"),
        (["--workdir={run}"], "--to is missing"),
        (["--workdir={run}", "--to={run}"], "exists and is not empty"),
        (["--workdir={run}/text", "--to=new"], "holds no config.json"),
        (["--workdir={run}", "--to=gs://b/new"], "is remote; it must be a local folder"),
        (["--workdir={run}", "--to=new", "--format=onnx"], "must be one of hf, peft, llama, nllb"),
        (["--workdir={run}", "--to=new", "--adapters=kept"], "trained all layers and has none"),
        (["--workdir={run}", "--to=new", "--rank=4"], "--rank has no effect with --format=hf."),
        (["--workdir={run}", "--to=new", "--format=peft", "--rank=0"], "rank is 0"),
    ],
)
def test_mistakes_are_answered_in_one_sentence(flags, words, mini_run, tmp_path):
    done = export(*(flag.format(run=mini_run) for flag in flags), cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert words in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_adapters_have_the_rank_they_have(own_run, tmp_path):
    flags = (f"--workdir={own_run}", "--to=new", "--format=peft", "--rank=4")
    done = export(*flags, cwd=tmp_path)
    assert done.returncode == 2 and "which are written as they are" in done.stderr
    assert not list(tmp_path.iterdir())
