"""A finished run: every file of it, whole and true to the others, and its models in torch."""

import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import reduced
import tiny
from flax import nnx

from mtllm_jax.config import TextSizes
from mtllm_jax.data.babel_tfds import build_text
from mtllm_jax.data.packing import padded
from mtllm_jax.data.tokenise import TargetTokenizer, translation_tokenizer
from mtllm_jax.decode import greedy_translate
from mtllm_jax.goodput import KINDS
from mtllm_jax.hf.llama import load_llama
from mtllm_jax.hf.nllb import load_nllb
from mtllm_jax.metrics import read_metrics

SYSTEMS = {
    *("mt_llm", "llm_zero_shot", "mt_encoder", "translate_test", "llm_prompted", "encoder_linear")
}
TRAINED = ("mini_nllb", "mini_llama", "adaptation", "teacher", "distillation", "mt_encoder")
TESTS = {"systems": "seen", "systems_unseen": "unseen"}
CODES = {"deu_Latn", "jpn_Jpan"}
FIELDS = dict(  # of the reduced config, by dotted name, as text
    argument.removeprefix("--config.").split("=", 1)
    for argument in reduced.ARGUMENTS
    if argument.startswith("--config.")
)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def predictions(run, system):
    return pd.read_json(run / "predictions" / f"{system}.jsonl", lines=True, dtype={"id": str})


def read_text(run):
    """The data set that the run built for itself."""
    config = read(run / "config.json")
    return build_text(
        run / "text",
        languages=config["languages"],
        seed=read(run / "text.json")["seed"],
        sizes=TextSizes(**config["text"]),
    )


def files(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


# ---------------------------------------------------------------- what lies in the folder


def test_every_file_is_there_and_none_was_left_behind(mini_run):
    for name in ("config.json", "results.json", "report.html", "text.json"):
        assert (mini_run / name).stat().st_size > 0
    for stage in (*TRAINED, "text", "evaluation"):
        assert read(mini_run / stage / "done.json")["seconds"] >= 0
    for stage in TRAINED:
        assert any((mini_run / stage / "checkpoints").iterdir())
        packing = read(mini_run / stage / "done.json")["packing"]
        assert packing["rows"] > 0 and all(0 < share <= 1 for share in packing["fill"].values())
    assert {path.stem for path in (mini_run / "predictions").iterdir()} == SYSTEMS
    marks = (".unfinished", ".part", ".partial", "orbax-checkpoint-tmp")
    assert [p for p in mini_run.rglob("*") if any(mark in p.name for mark in marks)] == []


@pytest.mark.parametrize("stage", TRAINED)
def test_metrics_of_every_step(mini_run, stage):
    frame = read_metrics(mini_run / stage / "metrics.jsonl")
    assert list(frame["step"]) == list(range(1, reduced.STEPS + 1))
    assert np.all(np.isfinite(frame[["loss", "grad_norm"]])) and not frame["skipped"].any()
    assert frame["time"].is_monotonic_increasing
    names = {"adaptation": "fvu", "distillation": "fvu", "teacher": "accuracy"}
    assert stage not in names or np.all(np.isfinite(frame[names[stage]]))
    if stage.startswith("mini_"):
        assert frame["loss"].iloc[-3:].mean() < frame["loss"].iloc[:3].mean()


def test_config_is_the_resolved_one(mini_run):
    config = read(mini_run / "config.json")
    assert set(config["languages"]) == CODES and config["seed"] == 0
    assert len(FIELDS) > 10
    for field, value in FIELDS.items():
        inner = functools.reduce(lambda group, name: group[name], field.split("."), config)
        assert (",".join(inner) if field == "languages" else str(inner)) == value, field


def test_results_are_of_their_form(mini_run):
    results = read(mini_run / "results.json")
    assert results["task"] and results["metric"] == "accuracy" and results["seeds"] == [0]
    for key in TESTS:
        assert set(results[key]) == SYSTEMS
        for entry in results[key].values():
            assert {"english", "mean", "languages", "interval", "macro_f1"} <= set(entry)
            assert set(entry["intervals"]) == CODES | {"eng_Latn"} and "std" not in entry
            assert set(entry["languages"]) == CODES
            values = [entry["english"], entry["mean"], *entry["languages"].values()]
            assert all(isinstance(value, float) and 0 <= value <= 1 for value in values)
    assert set(results["seconds"]) == {*TRAINED, "text", "evaluation"}
    assert all(value >= 0 for value in results["seconds"].values())
    kinds = set(results["time"]) - {"goodput"}
    assert kinds == {*KINDS, "evaluation"} and 0 < results["time"]["goodput"] < 1
    whole = sum(results["seconds"].values())
    assert sum(results["time"][kind] for kind in kinds) == pytest.approx(whole, abs=0.1)
    assert results["time"]["evaluation"] == results["seconds"]["evaluation"]
    assert set(results["cost"]) == SYSTEMS
    for name in ("sequences_per_second", "flops_per_example"):
        assert all(cost[name] > 0 for cost in results["cost"].values())


def test_predictions_are_of_all_rows_and_give_the_table(mini_run):
    results = read(mini_run / "results.json")
    rows_of = {}
    for system in SYSTEMS:
        frame = predictions(mini_run, system)
        assert {"id", "language", "text", "label", "prediction"} <= set(frame.columns)
        assert not frame.isna().any(axis=None)
        assert not frame.duplicated(["test", "language", "id"]).any()
        assert set(frame["language"]) == CODES | {"eng_Latn"}
        sizes = frame.groupby(["test", "language"]).size()
        assert len(sizes) == 2 * 3 and set(sizes) == {int(FIELDS["text.test_pairs"])}
        assert set(frame["prediction"]) <= set(read_text(mini_run).labels)
        rows_of[system] = frame.drop(columns="prediction")

        right = frame["label"] == frame["prediction"]
        accuracy = right.groupby([frame["test"], frame["language"]]).mean()
        for key, test in TESTS.items():
            entry = results[key][system]
            assert entry["english"] == pytest.approx(accuracy[test, "eng_Latn"], abs=1e-12)
            wanted = accuracy[test].drop("eng_Latn")
            assert entry["languages"] == pytest.approx(wanted.to_dict(), abs=1e-12)
            assert entry["mean"] == pytest.approx(wanted.mean(), abs=1e-12)
    for frame in rows_of.values():
        pd.testing.assert_frame_equal(frame, rows_of["mt_llm"])
    # The same item is the same question in every language.
    frame = rows_of["mt_llm"]
    assert (frame.groupby(["test", "id"])["label"].nunique() == 1).all()
    for key, test in {"majority": "seen", "majority_unseen": "unseen"}.items():
        labels = frame[frame["test"] == test]["label"]
        assert results[key] == pytest.approx(labels.value_counts().max() / len(labels))


def test_tests_and_training_text_do_not_meet(mini_run):
    """No list of a test is a training text, and no name of test B is in any of these."""
    trained = {row["text"] for row in read_text(mini_run)["task_train"]}
    tested = predictions(mini_run, "mt_llm").query("language == 'eng_Latn'")
    assert len(trained) > 50 and not trained & set(tested["text"])
    unseen = names_in(tested.query("test == 'unseen'")["text"])
    assert len(unseen) > 5 and not unseen & names_in(trained)


def names_in(lists):
    return {name for text in lists for name in re.split(r",? and |, ", text)}


def test_the_same_command_prints_the_table_and_touches_nothing(mini_run, tmp_path):
    """Also by the run's own config.json. Nothing is trained, nor even compiled."""
    before = files(mini_run)
    for arguments in (reduced.ARGUMENTS, (f"--config={mini_run}/config.json",)):
        done = reduced.train(*arguments, f"--workdir={mini_run}", cwd=tmp_path)
        assert done.returncode == 0 and done.stderr == ""
        for shown in ("German", "Japanese", "zero-shot", "accuracy in %", "report.html"):
            assert shown in done.stdout
        assert "▶" not in done.stdout
    assert files(mini_run) == before


def test_another_config_is_refused_and_touches_nothing(mini_run, tmp_path):
    before = files(mini_run)
    done = reduced.train(
        *reduced.ARGUMENTS, "--config.seed=1", f"--workdir={mini_run}", cwd=tmp_path
    )
    assert done.returncode != 0 and "seed 0 → 1" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    assert files(mini_run) == before


# ---------------------------------------------------------------- its models in torch


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip(
        "torch", reason="torch is installed by the test extra on Python 3.11 alone"
    )


@pytest.fixture(scope="module")
def test_rows(mini_run):
    """Some texts in each language."""
    frame = predictions(mini_run, "mt_llm")
    return frame.groupby("language").head(6).reset_index(drop=True)


def jitted(function, module, *arguments):
    """function(module, *arguments), compiled."""
    graph, state = nnx.split(module)

    def run(state, *arguments):
        return function(nnx.merge(graph, state), *arguments)

    return jax.jit(run, compiler_options=tiny.QUICK)(state, *arguments)


def one_text_a_row(tokens, pad_id):
    arrays = padded(tokens, "text", pad_id, rows=len(tokens))
    return arrays["text_ids"], arrays["text_segments"]


@pytest.mark.slow
def test_mini_nllb(mini_run, test_rows, torch):
    """Tokens, encoder states, decoder logits and greedy translations, in every language."""
    import transformers

    folder = mini_run / "mini_nllb" / "model"
    model, tokenizer = load_nllb(folder), translation_tokenizer(folder)
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    english, new_tokens = tokenizer.language_id("eng_Latn"), 12
    for code, rows in test_rows.groupby("language"):
        texts = list(rows["text"])
        their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder, src_lang=code)
        given = their_tokenizer(texts, return_tensors="pt", padding=True)
        ids, segments = one_text_a_row(tokenizer.encode(texts, code), tokenizer.pad_id)
        width = given["input_ids"].shape[1]
        np.testing.assert_array_equal(given["input_ids"].numpy(), ids[:, :width])
        np.testing.assert_array_equal(given["attention_mask"].numpy(), segments[:, :width])
        assert their_tokenizer.convert_tokens_to_ids("eng_Latn") == english

        with torch.no_grad():
            generated = theirs.generate(
                **given,
                num_beams=1,
                do_sample=False,
                forced_bos_token_id=english,
                max_new_tokens=new_tokens + 1,  # they count the language's token
            )
            said = theirs(**given, decoder_input_ids=generated)
        memory = jitted(lambda m, *x: m.encode(*x), model, ids, segments)
        is_token = segments[:, :width] > 0
        np.testing.assert_allclose(
            np.asarray(memory)[:, :width][is_token],
            said.encoder_last_hidden_state.numpy()[is_token],
            atol=1e-4,
        )
        inputs = generated.numpy().astype(np.int32)
        logits = jitted(
            lambda m, x, seen, *memory: m.logits(m.decode(x, seen, *memory)),
            model,
            inputs,
            np.ones_like(inputs),
            memory,
            segments,
        )
        np.testing.assert_allclose(logits, said.logits.numpy(), atol=1e-4)

        ours = jitted(
            lambda m, *x: greedy_translate(m, *x, english, new_tokens), model, ids, segments
        )
        assert np.all(inputs[:, :2] == [model.config.eos_id, english])
        short = new_tokens - (inputs.shape[1] - 2)
        wanted = np.pad(inputs[:, 2:], ((0, 0), (0, short)), constant_values=tokenizer.pad_id)
        np.testing.assert_array_equal(ours, wanted)


@pytest.mark.parametrize("causal", [True, False])
def test_mini_llama(mini_run, test_rows, torch, causal):
    """Tokens and logits: as it was trained, and as the stack and the teacher read it."""
    import transformers

    folder = mini_run / "mini_llama" / "model"
    model, tokenizer = load_llama(folder), TargetTokenizer(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager"
    ).eval()
    texts = list(test_rows["text"])
    tokens = tokenizer.encode(texts)
    their_tokens = transformers.AutoTokenizer.from_pretrained(folder)(texts)["input_ids"]
    assert [list(one) for one in tokens] == their_tokens

    ids, segments = one_text_a_row(tokens, tokenizer.pad_id)
    ours = jitted(
        lambda m, x, seen: m.logits(m.hidden(m.embed(x), seen, causal=causal)), model, ids, segments
    )
    mask = torch.tensor(segments > 0)
    if not causal:  # a ready 4-D mask is used as it is: every position sees all tokens of its row
        lowest = torch.finfo(torch.float32).min
        mask = torch.where(mask[:, None, None, :], 0.0, lowest).expand(-1, 1, ids.shape[1], -1)
    with torch.no_grad():
        said = theirs(input_ids=torch.tensor(ids, dtype=torch.long), attention_mask=mask).logits
    is_token = segments > 0
    np.testing.assert_allclose(
        np.asarray(ours)[is_token], said.numpy()[is_token], atol=1e-4, rtol=1e-4
    )


def test_what_was_trained_is_what_was_saved(mini_run):
    """The folder's mini Llama has the loss on English text that its training ended with."""
    folder = mini_run / "mini_llama" / "model"
    model, tokenizer = load_llama(folder), TargetTokenizer(folder)
    text = [row["text"] for row in read_text(mini_run)["english"]]
    tokens = [np.append(one, tokenizer.eos_id) for one in tokenizer.encode(text, max_length=63)]
    ids, segments = one_text_a_row(tokens, tokenizer.pad_id)
    logits = jitted(
        lambda m, x, seen: m.logits(m.hidden(m.embed(x), seen, causal=True)), model, ids, segments
    )
    log_p = np.asarray(jax.nn.log_softmax(logits[:, :-1]))
    picked = np.take_along_axis(log_p, ids[:, 1:, None], axis=2)[:, :, 0]
    loss = -picked[segments[:, 1:] > 0].mean()
    frame = read_metrics(mini_run / "mini_llama" / "metrics.jsonl")
    assert abs(loss - frame["loss"].iloc[-3:].mean()) < 0.15
    assert loss < math.log(tokenizer.vocab_size) - 0.3 and jnp.isfinite(loss)
