"""What MT-LLM answers to wrong input before any training, and what a user's own input gives."""

import dataclasses
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reduced
from etils import epath
from flax import nnx
from safetensors.numpy import load_file, save_file

import mtllm_jax
from mtllm_jax import sharding
from mtllm_jax.cli import load_config
from mtllm_jax.config import MTLLM
from mtllm_jax.data.benchmarks import Bitext
from mtllm_jax.hf.llama import load_llama
from mtllm_jax.hf.locate import Checkpoint
from mtllm_jax.hf.peft import save_peft
from mtllm_jax.metrics import Console, read_metrics
from mtllm_jax.models import lora
from mtllm_jax.recipes import inputs as recipe_inputs
from mtllm_jax.recipes import stacking
from mtllm_jax.recipes.dry_run import first_of_each
from mtllm_jax.recipes.inputs import idle_fields, read_inputs, read_task, unseen_texts
from mtllm_jax.recipes.job import Job
from mtllm_jax.runfolder import RunFolder
from mtllm_jax.schema import resolve, to_dict
from mtllm_jax.tasks.task import Task


@pytest.fixture
def own(tmp_path: Path, mini_run: Path) -> dict[str, str]:
    """The fields of a run on nothing but one's own: models, task and text."""
    fields: dict[str, Any] = reduced.own_fields(tmp_path, mini_run)
    (text,) = fields["adaptation_text"]  # one file, whose name the tests below look for
    return fields | {"adaptation_text": text}


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def config(fields: dict[str, Any], name: str = "mini") -> MTLLM:
    """The shipped settings with some fields changed, by dotted name."""
    values = load_config(f"{reduced.ROOT}/configs/mtllm.py:{name}")
    for path, value in fields.items():
        *groups, last = path.split(".")
        group = values
        for part in groups:
            group = group[part]
        group[last] = (value,) if path == "adaptation_text" else value
    return resolve(MTLLM, values)


def refusal(fields: dict[str, Any], name: str = "mini") -> str:
    """The one sentence that these fields are answered with."""
    with pytest.raises(ValueError, match=r"[^.]\.$") as raised:
        read_inputs(config(fields, name))
    message = str(raised.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------- what a user brings is taken


@pytest.mark.slow
def test_ones_own_models_task_and_text_need_no_embedded_text(own_run):
    assert {path.name for path in own_run.iterdir() if path.is_dir()} == {
        *("adaptation", "teacher", "distillation", "mt_encoder", "evaluation", "predictions"),
        "compiled",
    }
    assert (own_run / "report.html").exists()
    results = json.loads((own_run / "results.json").read_text())
    assert results["task"] == "continents"
    assert "systems_unseen" not in results and results["majority"] == 0.75
    assert 0.1 < results["peak_memory_gb"] < 10
    assert set(results["systems"]) == {
        "mt_llm", "llm_zero_shot", "mt_encoder", "translate_test", "llm_prompted", "encoder_linear",
    }  # fmt: skip
    for entry in results["systems"].values():
        assert set(entry["languages"]) == {"deu_Latn", "jpn_Jpan"}
    predictions = (own_run / "predictions" / "mt_llm.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in predictions] == [row[0] for row in reduced.TEST]


def test_the_inputs_are_what_the_files_say(own):
    inputs = read_inputs(config(own))
    assert inputs.task is not None and inputs.adaptation_text is not None
    assert inputs.task.name == "a" and inputs.task.labels == ("Africa", "America")
    assert {row["language"] for row in inputs.task.train} == {"eng_Latn"}
    assert [row["language"] for row in inputs.task.tests["test"]] == [
        row[2] for row in reduced.TEST
    ]
    assert len(inputs.adaptation_text) == 40
    nothing = read_inputs(config({}))
    assert nothing.task is None and nothing.adaptation_text is None


# ---------------------------------------------------------------- what is refused


def test_a_refusal_is_one_sentence_and_leaves_nothing(tmp_path, own):
    write_jsonl(Path(own["task.test"]), [{"text": "Kenia", "label": "Afrika"}])
    before = sorted(tmp_path.rglob("*"))
    arguments = (reduced.ARGUMENTS[0], *reduced.flags(own), f"--workdir={tmp_path}/new")
    done = reduced.train(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: config.task: ") and done.stderr.count("\n") == 1
    assert "b.jsonl, line 1" in done.stderr and "'language'" in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["encoder", "llm", "adaptation_text", "task"])
def test_real_settings_ask_for_what_is_real(own, name):
    fields = {field: value for field, value in own.items() if not field.startswith(name)}
    fields |= {"evaluation.batch_rows": 64}
    message = refusal(fields, "llama3-8b")
    field = "task.train" if name == "task" else name
    empty = () if field == "adaptation_text" else ""
    assert message.startswith(f"config.{field} is {empty!r}; the settings llama3-8b")


@pytest.mark.parametrize(
    ("field", "make", "words"),
    [
        ("encoder", None, "is not a folder"),
        ("llm", None, "is not a folder"),
        ("encoder", {}, "has no config.json"),
        ("llm", {}, "has no config.json"),
        (
            "encoder",
            {"config.json": '{"model_type": "t5"}'},
            "is 't5'; it may be m2m_100 or bert or xlm-roberta or roberta",
        ),
        ("llm", {"config.json": '{"model_type": "m2m_100"}'}, "model_type is 'm2m_100'"),
        ("llm", {"config.json": "{"}, "is not JSON"),
    ],
)
def test_model_folders(tmp_path, field, make, words):
    folder = tmp_path / "model"
    if make is not None:
        folder.mkdir()
        for name, text in make.items():
            (folder / name).write_text(text)
    message = refusal({field: str(folder)})
    assert message.startswith(f"config.{field}: {folder}") and words in message


@pytest.mark.parametrize("field", ["encoder", "llm"])
@pytest.mark.parametrize("absent", ["model.safetensors", "tokenizer.json"])
def test_a_model_folder_without_one_of_its_files(tmp_path, own, field, absent):
    folder = copy(Path(own[field]), tmp_path / "copy", without=absent)
    if absent == "tokenizer.json":
        for name in ("sentencepiece.bpe.model", "tokenizer.model", "tokenizer_config.json"):
            (folder / name).unlink(missing_ok=True)
    message = refusal(own | {field: str(folder)})
    assert message.startswith(f"config.{field}: {folder}")
    assert ("tokenizer" if absent == "tokenizer.json" else absent) in message


def test_tokenizers_that_cannot_be_read(tmp_path, own):
    folder = copy(Path(own["llm"]), tmp_path / "damaged", without="tokenizer.json")
    (folder / "tokenizer.json").write_text('{"model": 1}')
    message = refusal(own | {"llm": str(folder)})
    assert message.startswith(f"config.llm: {folder} has no tokenizer that transformers can read")
    # One that is written in Python: M2M100 had such a one before NLLB.
    folder = copy(Path(own["llm"]), tmp_path / "python", without="tokenizer.json")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    message = refusal(own | {"llm": str(folder)})
    assert message.startswith(f"config.llm: {folder} has a ByT5Tokenizer")


def test_weights_of_a_dtype_that_is_not_read(tmp_path, own):
    folder = copy(Path(own["llm"]), tmp_path / "copy", without="model.safetensors")
    tensors = load_file(Path(own["llm"]) / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype("int8")
    save_file(tensors, folder / "model.safetensors")
    assert "model.norm.weight is stored as I8" in refusal(own | {"llm": str(folder)})


def test_an_encoder_whose_decoder_is_missing_is_refused_though_only_the_last_stage_reads_it(
    tmp_path, own
):
    folder = copy(Path(own["encoder"]), tmp_path / "copy", without="model.safetensors")
    tensors = load_file(Path(own["encoder"]) / "model.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if ".decoder." not in k}, folder / "model.safetensors"
    )
    assert "missing: model.decoder" in refusal(own | {"encoder": str(folder)})


def test_a_tokenizer_larger_than_its_model(tmp_path, own):
    folder = copy(Path(own["llm"]), tmp_path / "copy", without="tokenizer.json")
    for name in ("tokenizer.json", "tokenizer_config.json", "sentencepiece.bpe.model"):
        (folder / name).write_bytes((Path(own["encoder"]) / name).read_bytes())
    assert "its tokenizer has" in refusal(own | {"llm": str(folder)})


def copy(folder: Path, to: Path, without: str) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        if path.name != without:
            (to / path.name).write_bytes(path.read_bytes())
    return to


def test_languages(own):
    message = refusal({"languages": ["deu_Latn", "ace_Latn"]})
    assert message.startswith("config.languages: language 'ace_Latn'") and "nearest" in message
    # The mini encoder of the reduced run reads German and Japanese.
    message = refusal({"encoder": own["encoder"], "languages": ["deu_Latn", "fra_Latn"]})
    assert message.startswith("config.languages: language 'fra_Latn' is not one of the 3")
    message = refusal({"english": "fra_Latn", "languages": ["deu_Latn"]})
    assert message.startswith("config.english is 'fra_Latn'")
    message = refusal(own | {"english": "fra_Latn", "languages": ["deu_Latn"]})
    assert message.startswith("config.english: language 'fra_Latn' is not one of the 3")


@pytest.mark.parametrize(
    ("field", "content", "words"),
    [
        ("task.train", b"text\nKenya\n", "line 1: there is no column 'label'"),
        ("task.train", b"text\tlabel\n\tAfrica\n", "line 2: the text is empty"),
        ("task.train", b"text\tlabel\nKenya\tAfrica\n", "holds one label alone, 'Africa'"),
        (
            "task.train",
            b"text\tlabel\tlanguage\nKenia\tAfrica\tdeu_Latn\n",
            "line 2: the language is 'deu_Latn', it must be eng_Latn",
        ),
        (
            "task.train",
            b"text\ttext_pair\tlabel\nKenya\tTogo\tAfrica\nPeru\tCuba\tAmerica\n",
            "b.jsonl holds rows of the kind text, and ",
        ),
        (
            "task.test",
            b'{"text": "x", "label": "Africa"}\n',
            "line 1: there is no column 'language'",
        ),
        (
            "task.test",
            b'{"text": "x", "label": "Afrika", "language": "deu_Latn"}\n',
            "line 1: the label is 'Afrika', it must be one of 'Africa', 'America'",
        ),
        (
            "task.test",
            b'{"text": "x", "label": "Africa", "language": "fra_Latn"}\n',
            "line 1: language 'fra_Latn' is not one of the 3",
        ),
        (
            "task.test",
            b'{"text": "x", "label": "Africa", "language": "eng_Latn"}\n',
            "holds rows in eng_Latn alone",
        ),
        ("task.test", b"\xff\xfe\n", "line 1"),
        ("task.test", b"", "holds no rows"),
        ("adaptation_text", b"Kenya\n\xff\n", "line 2"),
        ("adaptation_text", b"\n\n", "holds no text"),
    ],
)
def test_data_files(own, field, content, words):
    Path(own[field]).write_bytes(content)
    message = refusal(own)
    assert message.startswith(f"config.{field.split('.')[0]}: ") and words in message
    assert own[field] in message


def test_a_data_file_that_is_not_there(own):
    for field in ("task.train", "task.test", "adaptation_text"):
        message = refusal(own | {field: "nowhere.jsonl"})
        assert message.startswith(f"config.{field.split('.')[0]}: nowhere.jsonl")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task.benchmark": "sib200", "task.data": "D"}, "task.train is '.*a.tsv'; it must be em"),
        ({"task.data": "D"}, "task.data is 'D'; it must be the folder of task.benchmark, and emp"),
        ({"task.translations": "D"}, "task.translations is 'D'; it must be empty where task.benc"),
        ({"task.test": ""}, "task is .* both files or neither"),
        ({"task.limit": -1}, r"task.limit is -1; it must be 0 \(all rows\) or above"),
    ],
)
def test_a_task_is_a_benchmark_or_own_files(own, changes, words):
    with pytest.raises(ValueError, match=f"config.{words}"):
        config(own | changes)


def own_task(folder: Path) -> dict[str, str]:
    """The fields of a task in two files, whose test is in English and German."""
    train, test = folder / "train.jsonl", folder / "test.jsonl"
    texts = {"Kenya": "Africa", "Ghana": "Africa", "Peru": "America", "Cuba": "America"}
    write_jsonl(train, [{"text": text, "label": label} for text, label in texts.items()])
    rows = [("Peru", "America", "eng_Latn"), ("Kenia", "Africa", "deu_Latn")]
    names = ("text", "label", "language")
    write_jsonl(test, [dict(zip(names, row, strict=True)) for row in rows])
    return {"task.train": str(train), "task.test": str(test)}


def test_languages_of_ones_own_test_are_those_that_it_has(tmp_path):
    fields, known = own_task(tmp_path), ["eng_Latn", "deu_Latn", "fra_Latn"]
    for codes, unknown in (("deu_Latin", "deu_Latin"), ("deu_Latn,fra_Latn", "fra_Latn")):
        settings = config(fields | {"task.languages": tuple(codes.split(","))})
        with pytest.raises(ValueError, match=f"^config.task: languages: .*{unknown}' .*deu_Latn"):
            read_task(settings, known)
    task = read_task(config(fields | {"task.languages": ("deu_Latn",)}), known)
    assert {row["language"] for row in task.tests["test"]} == {"eng_Latn", "deu_Latn"}


def test_the_language_of_training_is_tested_whatever_it_is(tmp_path):
    fields, known = own_task(tmp_path), ["eng_Latn", "deu_Latn"]
    settings = config(fields | {"english": "deu_Latn", "languages": ("eng_Latn",)})
    assert len(read_task(settings, known).tests["test"]) == 2
    few = dataclasses.replace(settings.task, languages=("eng_Latn",))
    assert len(read_task(dataclasses.replace(settings, task=few), known).tests["test"]) == 2


def test_rows_of_the_test_among_those_of_training_are_counted(tmp_path):
    fields, known = own_task(tmp_path), ["eng_Latn", "deu_Latn"]
    dev = tmp_path / "dev.jsonl"
    write_jsonl(dev, [{"text": "Mali", "label": "Africa"}])
    settings = config(fields | {"task.dev": str(dev), "teacher.evaluate_every": 1})
    assert read_task(settings, known).notes == (
        "Not held out: 1 of the 4 training rows have the texts of rows of the test.",
    )


def test_a_benchmark_that_is_not_there(own, tmp_path):
    fields = {name: value for name, value in own.items() if not name.startswith("task")}
    message = refusal(fields | {"task.benchmark": "sib20", "task.data": str(tmp_path)})
    assert message.startswith("config.task: benchmark 'sib20' is not one of sib200, nusax")
    message = refusal(fields | {"task.benchmark": "sib200", "task.data": str(tmp_path)})
    assert message.startswith(f"config.task: {tmp_path} holds no test rows of sib200")


def test_texts_of_the_test_are_no_texts_of_stage_1(own):
    Path(own["adaptation_text"]).write_text("Ghana und Togo \nKenya is in Africa\n ケニア\n")
    inputs = read_inputs(config(own))
    assert list(inputs.adaptation_text) == ["Kenya is in Africa"]
    assert inputs.notes == ["2 of 3 texts are left out of stage 1: they are the test's."]
    Path(own["adaptation_text"]).write_text("Kenya\n")
    assert "holds no text that is not one of the test's" in refusal(own)


def test_sentences_of_a_probe_are_no_texts_of_stage_1(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Kenya\nGhana\nGana\nPeru\n")
    bitext = Bitext("mine", {"deu_Latn": (["Kenya ", "Ghana"], ["Kenia", "Gana"])}, "none")
    rows = [{"id": "1", "language": "eng_Latn", "label": "a", "text": "Togo"}]
    settings, task = config({"adaptation_text": str(path)}), Task("one", ("a",), rows, {"t": rows})
    told = "3 of 4 texts are left out of stage 1: they are the"
    texts, note = unseen_texts(settings, None, bitext)
    assert list(texts) == ["Peru"] and note == f"{told} probe's."
    assert unseen_texts(settings, task, bitext)[1] == f"{told} test's or the probe's."


def test_no_text_is_asked_for_where_nothing_learns_from_it():
    own = {"encoder": "a", "llm": "b", "task.train": "c", "task.test": "d"}
    assert config(own | {"adaptation.training.steps": 5}).uses_embedded_text()
    idle = config(own | {"adaptation.training.steps": 0})
    assert not idle.reads_english and not idle.uses_embedded_text()
    assert config(own | {"adaptation.training.steps": 0, "mntp.training.steps": 5}).reads_english
    # The models are missed, and no text.
    fields = own | {"adaptation.training.steps": 0}
    assert "adaptation_text" not in refusal(fields, "smollm2")


def test_rows_that_the_devices_cannot_share():
    # Eight simulated devices, by conftest.
    for field in ("adaptation.training.batch_rows", "evaluation.batch_rows"):
        message = refusal({field: 12})
        assert message == f"config.{field} is 12; it must be a multiple of 8, data × fsdp."
    assert "must multiply to the 8 devices" in refusal({"mesh.data": 3})


def test_adapter_targets_that_are_none(own):
    message = refusal({"trained": "lora", "lora.targets": ["q", "query"]})
    assert message.startswith("config.lora.targets: ") and "'query'" in message
    assert read_inputs(config({"trained": "lora", "lora.targets": ["q", "down"]})).task is None


def test_lengths_that_a_stage_needs():
    with pytest.raises(ValueError, match=r"^config\.teacher\.target_length is 0; it must be at"):
        config({"teacher.target_length": 0})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("teacher.adam_b2", 1.0),
        ("teacher.final_rate", 1.5),
        ("teacher.weight_decay", -0.1),
        ("adaptation.samplings", 0),
        ("adaptation.subword_sampling", 1.1),
        ("adaptation.noise_text", -1.0),
        ("distillation.noise_position", -1.0),
        ("mini_nllb.memory_dropout", 1.1),
        ("mini_nllb.negatives", -1),
        ("mini_nllb.decoder_layers", 0),
        ("mini_nllb.num_heads", 3),
        ("mini_llama.num_heads", 0),
        ("mini_llama.num_kv_heads", 3),
        ("mini_llama.width", 100),
    ],
)
def test_values_that_would_stop_a_later_stage(field, value):
    with pytest.raises(ValueError, match=rf"^config\.{field} is {value}; it must be .*[^.]\.$"):
        config({field: value})


def test_what_the_llm_reads_are_languages():
    message = refusal({"evaluation.llm_languages": ("deu_Latn", "fra_Latin")})
    assert message.startswith("config.evaluation.llm_languages: language 'fra_Latin' is not one")
    assert read_inputs(config({"evaluation.llm_languages": ("deu_Latn", "min_Arab")}))


def test_unknown_languages_are_named_with_their_field():
    for field, value in (("languages", ["deu_Latn", "german"]), ("english", "english")):
        with pytest.raises(ValueError, match=rf"^config\.{field}: .* the nearest are \w+, \w+, "):
            config({field: value})


# ---------------------------------------------------------------- adapters of the LLM


def adapter(folder: Path, llm: str, *, seed: int = 0, rank: int = 4, alpha: float = 8.0) -> str:
    """A folder with a random adapter for the maps q and v of a model."""
    base = load_llama(llm)
    tuned, rng = nnx.clone(base), np.random.default_rng(seed)
    attach = {"rank": rank, "alpha": alpha, "dropout": 0.1, "targets": ("q", "v")}
    lora.attach(tuned, **attach, rngs=nnx.Rngs(jax.random.key(seed, impl="rbg")))
    for linear in (tuned.layers.q, tuned.layers.v):
        b_LRO = rng.normal(size=linear.lora_b.shape)
        linear.lora_b.set_value(jnp.asarray(b_LRO, jnp.float32))
    save_peft(folder, base, tuned, base_name=llm)
    return str(folder)


@pytest.fixture
def started(own, tmp_path) -> dict[str, Any]:
    """The fields of a run whose student's adapter begins as one of the user's."""
    start = adapter(tmp_path / "start", own["llm"])
    sizes = {"lora.rank": 4, "lora.alpha": 8, "lora.targets": ["q", "v"], "trained": "lora"}
    return own | sizes | {"lora.start": start}


def test_adapters_that_do_not_fit_the_llm(tmp_path, own):
    message = refusal(own | {"llm_adapters": [str(tmp_path / "none")]})
    assert message.startswith("config.llm_adapters: ") and "none is not a folder" in message
    message = refusal(own | {"llm_adapters": [own["llm"]]})
    assert message.startswith(f"config.llm_adapters: {own['llm']} has no adapter_config.json")
    folder = adapter(tmp_path / "adapter", own["llm"])
    path = Path(folder) / "adapter_config.json"
    settings = json.loads(path.read_text())
    for changes, words in (
        ({"r": 5}, "of another shape: base_model.model.model.layers.0.self_attn.q_proj.lora_A"),
        ({"use_dora": True}, "adapter_config.json: use_dora is True"),
    ):
        path.write_text(json.dumps(settings | changes))
        message = refusal(own | {"llm_adapters": [folder]})
        assert message.startswith(f"config.llm_adapters: {folder}") and words in message
    message = refusal({"llm_adapters": [folder]})
    assert message == (
        f"config.llm_adapters is ('{folder}',); it must be empty where config.llm names no LLM."
    )


def test_the_adapter_that_the_student_starts_from_has_the_configs_sizes(tmp_path, started):
    read_inputs(config(started))
    for changes, words in (
        ({"lora.rank": 8}, "has rank 4 for q, and config.lora.rank is 8; they must be the same."),
        (
            {"lora.alpha": 4},
            "has alpha 8 for q, and config.lora.alpha is 4; they must be the same.",
        ),
        (
            {"lora.targets": ["q", "o"]},
            "has the targets q, v, by config.lora.targets they are o, q; they must be the same.",
        ),
        ({"lora.start": "nowhere"}, "nowhere is not a folder"),
    ):
        message = refusal(started | changes)
        assert message.startswith("config.lora.start: ") and words in message
    everything = config(started | {"trained": "all", "lora.start": "nowhere"})
    read_inputs(everything)
    assert idle_fields(everything, ["lora.start"]) == (
        "without effect here: config.lora.start (config.trained is 'all')."
    )


def test_adapters_are_merged_into_the_llm_in_their_order(tmp_path, own):
    folders = [adapter(tmp_path / f"{i}", own["llm"], seed=i, alpha=4.0 + i) for i in range(2)]
    settings = config(own | {"llm_adapters": folders, "frozen_dtype": "bfloat16"})
    merged = stacking.load_parts(settings, own["encoder"], own["llm"], None).llm
    base = load_llama(own["llm"], jnp.bfloat16)
    kernel_LIO = np.asarray(base.layers.v.kernel[...], np.float32)
    for i, folder in enumerate(folders):
        tensors = load_file(f"{folder}/adapter_model.safetensors")
        stem = "base_model.model.model.layers.0.self_attn.v_proj.lora_"
        update_IO = (tensors[f"{stem}B.weight"] @ tensors[f"{stem}A.weight"]).T
        # Rounded after each, as two merges of a model in bfloat16 are.
        kernel_LIO = np.asarray(kernel_LIO + (4 + i) / 4 * update_IO, ml_dtypes.bfloat16)
        kernel_LIO = kernel_LIO.astype(np.float32)
    np.testing.assert_array_equal(merged.layers.v.kernel[...].astype(jnp.float32), kernel_LIO)
    np.testing.assert_array_equal(merged.layers.up.kernel[...], base.layers.up.kernel[...])


# ---------------------------------------------------------------- frozen weights in int8

INT8 = {"frozen_dtype": "int8", "trained": "lora", "distillation.start": "stage1"}


def test_int8_is_for_what_stays_frozen(own, monkeypatch):
    assert read_inputs(config(own | INT8)).config.frozen_dtype == "int8"
    assert refusal(own | INT8 | {"trained": "all"}) == (
        "config.trained is 'all'; it must be 'lora' or 'bridge' with frozen_dtype 'int8'."
    )
    assert refusal(own | INT8 | {"distillation.start": "stage1+teacher"}) == (
        "config.distillation.start is 'stage1+teacher'; it must be 'stage1' with frozen_dtype"
        " 'int8'."
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert refusal(own | INT8) == (
        "config.frozen_dtype: weights in int8 take qwix, which is missing; pip install -e"
        " '.[int8]'."
    )


def test_adapters_are_merged_before_the_llm_is_quantised(tmp_path, own):
    """What most weights get from an adapter is less than half a step, and is not lost."""
    folders = [adapter(tmp_path / f"{i}", own["llm"], seed=i, alpha=0.01) for i in range(2)]
    settings = config(own | INT8 | {"llm_adapters": folders})
    quantised = stacking.load_parts(settings, own["encoder"], own["llm"], None).llm
    floats = dataclasses.replace(settings, frozen_dtype="float32")
    merged = stacking.load_parts(floats, own["encoder"], own["llm"], None).llm
    for name in ("q", "v", "up"):
        wanted_LIO = np.asarray(getattr(merged.layers, name).kernel[...])
        linear = getattr(quantised.layers, name)
        step_LIO = np.max(np.abs(wanted_LIO), axis=1, keepdims=True) / 127.5
        error_LIO = np.asarray(linear.kernel[...]) * step_LIO - wanted_LIO
        assert np.max(np.abs(error_LIO) / step_LIO) < 0.5 + 1e-3  # and float32's roundings
        np.testing.assert_allclose(linear.kernel_scale[...], step_LIO[:, 0], rtol=1e-6)


@pytest.mark.slow
def test_stage_1_over_int8(own, tmp_path):
    """From folders to what was trained, on two devices; what is held is counted."""
    settings = config(own | INT8 | {"adaptation.training.steps": 2, "compute_dtype": "bfloat16"})
    mesh = sharding.make_mesh(settings.mesh, jax.devices()[:2])
    run = RunFolder(tmp_path / "run", to_dict(settings))
    job = Job(settings, run, Console(io.StringIO()), mesh, 0)
    parts = stacking.load_parts(settings, own["encoder"], own["llm"], mesh)
    stacking.general_adaptation(job, parts, ["Kenya is in Africa", "Peru and Chile"] * 20)
    losses = read_metrics(tmp_path / "run" / "adaptation" / "metrics.jsonl")["loss"]
    assert len(losses) == 2 and np.all(np.isfinite(losses))

    def held(model):
        """A byte a weight and four an output in linear maps, two for what else there is."""
        arrays = {path: v[...] for path, v in nnx.to_flat_state(nnx.state(model))}
        kernels = [x for path, x in arrays.items() if path[-1] == "kernel"]
        outputs = sum(x.shape[0] * x.shape[2] for x in kernels)
        weights = sum(x.size for x in kernels)
        rest = sum(
            x.size for path, x in arrays.items() if path[-1] not in ("kernel", "kernel_scale")
        )
        return weights + 4 * outputs + 2 * rest

    # The arrays of the student's LLM are those of the teacher.
    frozen = job.stages["adaptation"]["bytes"]["frozen"]
    assert frozen == held(parts.encoder) + held(parts.llm)


def test_the_student_starts_from_an_adapter_and_the_teacher_afresh(started):
    settings = config(started)
    parts = stacking.load_parts(settings, started["encoder"], started["llm"], None)
    stack = stacking.build_stack(settings, parts, 0, settings.lora.start)
    query = stack.llm.layers.q
    tensors = load_file(f"{started['lora.start']}/adapter_model.safetensors")
    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    np.testing.assert_array_equal(query.lora_a[...][0], tensors[f"{stem}A.weight"].T)
    np.testing.assert_array_equal(query.lora_b[...][0], tensors[f"{stem}B.weight"].T)
    fresh = stacking.build_stack(settings, parts, 0)
    assert nnx.graphdef(stack) == nnx.graphdef(fresh) and not np.any(fresh.llm.layers.q.lora_b[...])
    teacher = stacking.new_teacher(settings, parts, 2, 0)
    assert not np.any(teacher.llm.layers.q.lora_b[...])


def test_adapters_on_the_hub_keep_their_commits(started, monkeypatch):
    folder = started["lora.start"]
    asked = {}

    def found(name: str, revision: str | None = None, *, weights: bool = True) -> Checkpoint:
        asked[name] = revision
        if name.startswith("org/"):
            return Checkpoint(name, epath.Path(folder), revision or "c0ffee")
        return Checkpoint(name, epath.Path(name))

    monkeypatch.setattr(recipe_inputs, "locate", found)
    named = config(started | {"llm_adapters": ["org/one", "org/two"], "lora.start": "org/three"})
    inputs = read_inputs(named, {"llm_adapters.1": "abc"})
    assert inputs.config.llm_adapters == (folder, folder) and inputs.config.lora.start == folder
    assert asked["org/one"] is None and asked["org/two"] == "abc"
    assert inputs.revisions == {
        "llm_adapters.0": "c0ffee",
        "llm_adapters.1": "abc",
        "lora.start": "c0ffee",
    }


@pytest.mark.slow
def test_a_run_with_adapters_is_opened_from_anywhere(tmp_path, own, started, monkeypatch):
    adapter(tmp_path / "merged", own["llm"], seed=1)
    fields = started | {"llm_adapters": "merged", "lora.start": "start", "lora.targets": "q,v"}
    arguments = (*reduced.ARGUMENTS, *reduced.flags(fields))
    done = reduced.train(*arguments, "--workdir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    about = json.loads((tmp_path / "run" / "model.json").read_text())
    assert about["llm_adapters"] == [str(tmp_path / "merged")]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "start").rename(tmp_path / "gone")
    model = mtllm_jax.load(tmp_path / "run")
    lines = (tmp_path / "run" / "predictions" / "mt_llm.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    answers = model.classify([row["text"] for row in rows], [row["language"] for row in rows])
    assert [next(iter(answer)) for answer in answers] == [row["prediction"] for row in rows]


# ---------------------------------------------------------------- what has no effect


def test_fields_without_effect_are_named(own):
    default = config({})
    assert idle_fields(default, ["seed", "mini_nllb.width", "languages", "lora.rank"]) == ""
    assert idle_fields(default, ["teacher.source_length"]) == (
        "without effect here: config.teacher.source_length (this stage reads no source side)."
    )
    with_encoder = dataclasses.replace(default, encoder="DIR")
    given = ["mini_nllb.width", "seed", "task.name", "mini_llama.width", "mini_nllb.ffn_width"]
    assert idle_fields(with_encoder, given) == (
        "without effect here: config.mini_nllb.width, config.mini_nllb.ffn_width"
        " (config.encoder names the model); config.task.name (neither config.task.benchmark nor"
        " task.train is given)."
    )
    everything = config(own)
    given = ["text.english", "text_seed", "evaluation.split", "languages", "mini_llama.width"]
    assert all(f"config.{name}" in idle_fields(everything, given) for name in given)


def test_fields_of_systems_that_are_not_asked_for():
    given = ["evaluation.num_beams", "evaluation.max_new_tokens", "evaluation.llm_languages"]
    told = idle_fields(config({"evaluation.systems": ["mt_llm"]}), [*given, "probe.limit"])
    assert all(f"config.{name}" in told for name in [*given, "probe.limit"])
    given_too = ["task.translations", "adaptation.bridge_batches"]
    sib = {"task.benchmark": "sib200", "task.data": "D", "evaluation.systems": ["mt_llm"]}
    assert all(f"config.{name}" in idle_fields(config(sib), given_too) for name in given_too)
    assert idle_fields(config({"evaluation.systems": ["translate_train"]}), given) == ""


# ---------------------------------------------------------------- the dry run


def test_the_dry_run_takes_a_part_of_a_large_task():
    rows = [{"label": label, "id": str(i)} for i, label in enumerate("aabab" * 3)]
    assert [row["id"] for row in first_of_each("label", rows, 2)] == ["0", "1", "2", "4"]


@pytest.mark.slow
def test_the_dry_run_shows_rows_and_costs_and_leaves_nothing(tmp_path, own):
    before = sorted(tmp_path.rglob("*"))
    done = reduced.train(*reduced.ARGUMENTS, *reduced.flags(own), "--dry_run", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(tmp_path.rglob("*")) == before
    # Fields that this run does not read are named, in one line.
    (warning,) = [line for line in done.stdout.splitlines() if line.startswith("warning: ")]
    assert "config.languages" in warning and "config.mini_nllb.width" in warning
    for words in ("segments  1 1", "<s>", "eng_Latn", "optimizer, MB", "peak so far", "jpn_Jpan"):
        assert words in done.stdout
    assert "1/1 steps" in done.stdout and "What next" not in done.stdout
