"""SDRRL on a user's own text: what is read and refused, and how likely texts are."""

import dataclasses
import io
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import reduced
import tiny_folders
from etils import epath
from rich.console import Console as Terminal

from configs.sdrrl import llama2_7b, mini, smollm2
from mtllm_jax.config import SDRRL, OwnText
from mtllm_jax.metrics import Console
from mtllm_jax.recipes import sdrrl
from mtllm_jax.recipes.job import Job
from mtllm_jax.recipes.likelihood import bits
from mtllm_jax.recipes.sdrrl_inputs import idle_fields, read_inputs
from mtllm_jax.results import bits_tables, results_table
from mtllm_jax.runfolder import RunFolder
from mtllm_jax.schema import resolve, to_dict
from mtllm_jax.scores import ratios
from mtllm_jax.sharding import make_mesh

ENG, FRA, WOL = "eng_Latn", "fra_Latn", "wol_Latn"
WORDS = ("dog", "cat", "house", "river", "bread", "moon", "road", "tree")
SIDES = {"eng": "The {} and the {} number {}.", "fra": "Le {} et la {} nombre {}.",
         "wol": "{} ak {} bu {}."}  # fmt: skip


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny LLM, twelve instructions, two word lists, forty sentences in three languages."""
    folder = tmp_path_factory.mktemp("own")
    rng = random.Random(0)
    pairs = [(rng.choice(WORDS), rng.choice(WORDS), number) for number in range(40)]
    corpus = folder / "ntrex" / "NTREX-128"
    corpus.mkdir(parents=True)
    sentences = {name: [form.format(*pair) for pair in pairs] for name, form in SIDES.items()}
    for name, lines in sentences.items():
        place = "src.eng" if name == "eng" else f"ref.{name}"
        (corpus / f"newstest2019-{place}.txt").write_text("\n".join(lines) + "\n")
    (folder / "lexicons").mkdir()
    for name in ("fr", "wo"):
        lines = "".join(f"{word}{name}\t{word}\n" for word in WORDS)
        (folder / "lexicons" / f"{name}_en.tsv").write_text(lines)
    prompts = [f"Say something of the {a} and the {b}." for a in WORDS[:4] for b in WORDS[:3]]
    write_rows(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    tiny_folders.llama(folder / "llm", [line for lines in sentences.values() for line in lines])
    # A model of random weights ends an answer by one token of eight, not by one of hundreds.
    stops = {"eos_token_id": list(range(2, 400, 8))}
    (folder / "llm" / "generation_config.json").write_text(json.dumps(stops))
    return folder


def fields(folder: Path) -> dict[str, str]:
    return {
        "prompts": str(folder / "prompts.jsonl"),
        "lexicons": str(folder / "lexicons"),
        "parallel": "ntrex",
        "parallel_data": str(folder / "ntrex"),
    }


def config(folder: Path, own=None, transfer=None, **changes):
    """`smollm2` on what the fixture wrote."""
    whole = smollm2()
    return dataclasses.replace(
        whole,
        **{"llm": str(folder / "llm")}
        | {"answering": dataclasses.replace(whole.answering, template="none")}
        | {"training": dataclasses.replace(whole.training, batch_rows=8)}  # as many devices
        | changes,
        transfer=dataclasses.replace(whole.transfer, targets=(FRA, WOL), **(transfer or {})),
        own=OwnText(**{**fields(folder), "held_out_pairs": 10} | (own or {})),
    )


# ---------------------------------------------------------------- what is read


def test_a_sentence_is_held_out_in_all_languages_or_in_none(folder):
    own = read_inputs(config(folder)).own
    assert [row["id"] for row in own.prompts] == [str(i) for i in range(1, 13)]
    assert set(own.lexicons) == {(ENG, FRA), (FRA, ENG), (ENG, WOL), (WOL, ENG)}
    held = {}
    for line in own.lines:
        held.setdefault(line["language"], {})[line["id"]] = line["text"]
    assert set(held) == {ENG, FRA, WOL}
    assert held[ENG].keys() == held[FRA].keys() == held[WOL].keys() and len(held[ENG]) == 10
    for code in (FRA, WOL):
        assert len(own.parallel[code]) == 30
        assert not held[code].keys() & {pair.id for pair in own.parallel[code]}
    english = (folder / "ntrex/NTREX-128/newstest2019-src.eng.txt").read_text().splitlines()
    assert all(english[int(id_.split(":")[1]) - 1] == text for id_, text in held[ENG].items())
    other = read_inputs(config(folder, text_seed=1)).own
    assert {line["id"] for line in other.lines} != set(held[ENG])


def test_nothing_of_a_document_that_is_held_out_is_trained_on(folder, tmp_path):
    corpus = shutil.copytree(folder / "ntrex", tmp_path / "ntrex")
    documents = [f"paper.{i // 8}" for i in range(40)]
    (corpus / "DOCUMENT_IDS.tsv").write_text("\n".join(documents) + "\n")

    def own(**changes):
        return read_inputs(config(folder, {"parallel_data": str(corpus)} | changes)).own

    read = own(held_out_pairs=8)
    held = {line["id"]: line["document"] for line in read.lines}
    assert all(documents[int(id_.split(":")[1]) - 1] == held[id_] for id_ in held)
    # Five of one document, three of another, each from its beginning.
    assert sorted(int(id_.split(":")[1]) % 8 for id_ in held) == [1, 1, 2, 2, 3, 3, 4, 5]
    for code in (FRA, WOL):
        learnt = [documents[int(pair.id.split(":")[1]) - 1] for pair in read.parallel[code]]
        assert set(learnt) == set(documents) - set(held.values()) and len(learnt) == 24
    with pytest.raises(ValueError, match="21; it must be so few that some of the 40 pairs of fra"):
        own(held_out_pairs=21)
    (corpus / "DOCUMENT_IDS.tsv").write_text("paper.1\n")
    with pytest.raises(ValueError, match=r"DOCUMENT_IDS\.tsv has 1 lines; there are 40 sentences"):
        own()


def test_rows_that_cannot_be_used_are_told(folder, tmp_path):
    rows = [{"prompt": "Greet."}, {"prompt": " "}, {"prompt": "Count.", "id": "1"}, {"prompt": "A"}]
    prompts = write_rows(tmp_path / "prompts.jsonl", rows)
    own = read_inputs(config(folder, {"prompts": prompts})).own
    assert [row["prompt"] for row in own.prompts] == ["Greet.", "A"]
    assert [row["line"] for row in own.rejects] == [2, 3]
    assert "empty" in own.rejects[0]["reason"] and "there before" in own.rejects[1]["reason"]
    few = read_inputs(config(folder, train_instructions=3)).own
    assert len(few.prompts) == 3


def test_tests_take_the_place_of_held_out_sentences(folder, tmp_path):
    rows = [
        {"id": i, "language": code, "prompt": f"What is {i}?", "reference": str(i)}
        for code in (FRA, WOL, ENG)
        for i in range(5)
    ]
    tests = write_rows(tmp_path / "tests.jsonl", rows)
    own = read_inputs(config(folder, {"tests": tests}, test_instructions=2)).own
    assert [row["language"] for row in own.tests] == [ENG, ENG, FRA, FRA, WOL, WOL]
    assert len({row["id"] for row in own.tests}) == 2
    assert not own.lines and len(own.parallel[FRA]) == 40


def test_texts_of_evaluations_are_held_out(folder, tmp_path):
    first, second, third, *_ = (row["prompt"] for row in read_inputs(config(folder)).own.prompts)
    (tmp_path / "flores.dev").write_text(f"{first.upper()}\n")
    write_rows(tmp_path / "rows.jsonl", [{"question": second, "choices": ["yes"]}])
    own = read_inputs(config(folder, {"evaluations": (str(tmp_path),)})).own
    held_out = own.held_out()
    assert held_out.holds(first) and held_out.holds(second) and not held_out.holds(third)
    assert held_out.holds(own.lines[0]["text"])


# ---------------------------------------------------------------- the door


def refused(given):
    """The one sentence that is told."""
    with pytest.raises(ValueError, match=r"[^.]\.$") as error:
        read_inputs(given() if callable(given) else given)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("own", "told"),
    [
        ({"prompts": ""}, "config.own.prompts is ''"),
        ({"parallel_data": ""}, "config.own.parallel_data is ''"),
        ({"parallel": "", "parallel_data": ""}, "config.own.tests is ''"),
        (
            {"held_out_pairs": 40},
            "config.own.held_out_pairs is 40; it must be so few that some of the 40 pairs of fra",
        ),
        ({"held_out_pairs": 0}, "config.own.held_out_pairs is 0"),
        ({"evaluations": ("NO",)}, "config.own.evaluations: NO does not exist"),
        ({"lexicons": ""}, "config.transfer.switched is 1.0; it must be 0 where"),
    ],
)
def test_a_combination_without_a_part_is_refused(folder, own, told):
    assert told in refused(lambda: config(folder, own))


def test_translation_tasks_need_a_corpus(folder, tmp_path):
    row = {"id": "1", "prompt": "Hi", "reference": "Hi"}
    rows = [row | {"language": code} for code in (FRA, WOL)]
    own = {"parallel": "", "parallel_data": "", "tests": write_rows(tmp_path / "t.jsonl", rows)}
    assert "config.transfer.translation is 1.0; it must be 0" in refused(config(folder, own))
    weights = {"translation": 0.0, "completion": 0.0}
    assert read_inputs(config(folder, own, weights)).own.tests


def test_real_settings_ask_for_models_and_instructions(folder):
    assert "config.llm is ''" in refused(smollm2())
    assert "config.own.prompts is ''" in refused(dataclasses.replace(smollm2(), llm="DIR"))
    given = dataclasses.replace(llama2_7b(), llm="DIR", own=OwnText(**fields(folder)))
    assert "config.translator is ''" in refused(given)
    own = OwnText(**fields(folder))
    assert "mini models know nothing" in refused(dataclasses.replace(mini(), own=own))
    given = config(folder, answering=smollm2().answering)
    assert "config.answering.template" in refused(given) and "chat template" in refused(given)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"text": "Greet."}], "there is no column 'prompt'"),
        ([{"prompt": ""}], "line 1: the prompt is empty"),
    ],
)
def test_instructions_that_are_none_are_refused(folder, tmp_path, rows, told):
    own = {"prompts": write_rows(tmp_path / "prompts.jsonl", rows)}
    assert refused(config(folder, own)).startswith("config.own.prompts: ")
    assert told in refused(config(folder, own))


def test_references_are_asked_for_where_they_are_learnt(folder):
    both = ("base", "sft", "sdrrl")
    assert "reference, which sft of config.systems" in refused(config(folder, systems=both))
    given = config(folder, transfer={"answer_filter": "exact"})
    assert "reference, which sdrrl of config.systems" in refused(given)


ROW = {"id": "1", "language": FRA, "prompt": "Bonjour", "reference": "Salut"}


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"id": "1", "language": FRA, "prompt": "Bonjour"}], "there is no column 'reference'"),
        ([ROW | {"language": "fre_Latn"}], "the nearest are fra_Latn"),
        ([ROW | {"reference": None}], "line 1: the reference is empty"),
        ([ROW, ROW], "line 2: the id '1' was there before, in fra_Latn"),
        ([ROW], "holds no rows in wol_Latn"),
    ],
)
def test_tests_that_are_none_are_refused(folder, tmp_path, rows, told):
    said = refused(config(folder, {"tests": write_rows(tmp_path / "tests.jsonl", rows)}))
    assert said.startswith("config.own.tests: ") and told in said


def test_word_lists_and_corpora_of_other_languages_are_refused(folder, tmp_path):
    of_one = {"lexicons": str(folder / "lexicons" / "fr_en.tsv")}
    said = refused(config(folder, of_one))
    assert "config.own.lexicons: " in said and f"it must be one of {ENG} and {WOL}" in said
    of_others = dataclasses.replace(config(folder).transfer, targets=(FRA, "hin_Deva"))
    given = dataclasses.replace(config(folder), transfer=of_others)
    assert "config.own.lexicons: " in refused(given) and "hin_Deva" in refused(given)
    (tmp_path / "hi_en.tsv").write_text("kutta\tdog\n")
    (tmp_path / "fr_en.tsv").write_text("chien\tdog\n")
    own = dataclasses.replace(given.own, lexicons=str(tmp_path))
    said = refused(dataclasses.replace(given, own=own))
    assert "config.own.parallel_data: " in said and "the nearest are" in said


def test_evaluation_text_is_no_parallel_corpus():
    values = to_dict(smollm2())
    values["own"]["parallel"] = "flores"
    with pytest.raises(ValueError, match=r"config\.own\.parallel.*ntrex"):
        resolve(SDRRL, values)


def test_what_own_text_leaves_without_effect_is_told(folder):
    given = ["own.held_out_pairs", "translating.num_beams", "test_instructions"]
    told = idle_fields(config(folder), given)
    assert "translating" in told and "test_instructions" in told and "held_out" not in told
    assert "own.held_out_pairs" in idle_fields(config(folder, {"tests": "FILE"}), given)


# ---------------------------------------------------------------- likelihood


def test_bits_are_those_of_the_same_model_in_torch(folder, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    given = config(folder)
    console = Console()
    job = Job(given, RunFolder(epath.Path(tmp_path), {}), console, make_mesh(given.mesh), 0)
    texts = ["The dog and the cat number 1.", "Le", "bread ak moon bu 3. " * 4, "Ĝis!"]
    found = bits(job, given.llm, texts)
    model = transformers.AutoModelForCausalLM.from_pretrained(given.llm).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(given.llm)
    for text, ours in zip(texts, found, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            log_p = torch.log_softmax(model(ids).logits[0, :-1].double(), dim=-1)
        wanted = -log_p.gather(1, ids[0, 1:, None]).sum().item() / np.log(2)
        assert ours == pytest.approx(wanted, rel=1e-5)  # float32 sums of some tens of terms


def test_ratios_weigh_rows_by_their_size():
    rows = pd.DataFrame(
        [("a", ENG, 2.0, 1), ("a", FRA, 6.0, 2), ("b", FRA, 2.0, 6), ("b", WOL, 5.0, 5)],
        columns=["id", "language", "value", "size"],
    )
    found = ratios(rows, ENG)
    assert found["english"] == 2.0 and found["languages"] == {FRA: 1.0, WOL: 1.0}
    assert found["mean"] == 1.0 and found["intervals"][ENG] == [2.0, 2.0]
    # Of two rows a quarter of all draws are the first alone, as many the second alone.
    assert found["intervals"][FRA] == pytest.approx([2 / 6, 3.0])
    assert ratios(rows[rows["language"] == ENG], ENG)["interval"] is None


def read_rows(scale):
    return pd.DataFrame(
        [
            {
                "id": str(i),
                "document": str(i),
                "language": code,
                "text": "ab" * (i + 1),
                "bits": scale[code] * (i + 1),
            }
            for i in range(6)
            for code in (ENG, FRA, WOL)
        ]
    )


def test_what_is_gained_and_what_is_not_is_told():
    base = read_rows({ENG: 2.0, FRA: 4.0, WOL: 6.0})
    ours = read_rows({ENG: 2.1, FRA: 3.0, WOL: 6.0})
    found = sdrrl._likelihoods(smollm2(), {"base": base, "sdrrl": ours})
    about = found["bits_per_character"]
    assert about["systems"]["base"]["languages"] == {FRA: 2.0, WOL: 3.0}
    assert about["systems"]["base"]["english"] == 1.0
    assert about["changes"]["sdrrl"]["languages"] == pytest.approx({FRA: -0.5, WOL: 0.0})
    # Nothing is known of how documents differ where all is of one.
    one = [rows.assign(document="a") for rows in (base, ours)]
    about_one = sdrrl._likelihoods(smollm2(), dict(zip(("base", "sdrrl"), one, strict=True)))
    change = about_one["bits_per_character"]["systems"]["sdrrl"]
    assert change["interval"] == pytest.approx([change["mean"]] * 2)
    # Every row changes by as much.
    assert about["changes"]["sdrrl"]["interval"] == pytest.approx([-0.25, -0.25])
    assert found["systems"]["base"]["languages"] == pytest.approx({FRA: 0.25, WOL: 0.125})
    told = " ".join(found["gains"])
    assert "are likelier than to LLM as it is: -0.250 bits per character" in told
    assert "No gain is told in wol_Latn" in told and "English: +0.050" in told
    ((title, columns, lines),) = bits_tables(found)
    assert title.startswith("Bits per character")
    assert columns == ["", "LLM as it is", "SDRRL", "SDRRL, change, 95 %"]
    assert lines[0][1:3] == ["1.000", "1.050"] and lines[1][0] == "mean of 2 languages"
    assert lines[2][3] == "-0.500 (-0.500 to -0.500)"
    terminal = Terminal(width=120, record=True, file=io.StringIO())
    terminal.print(results_table(found | {"seconds": {"sdrrl": 1.0}}, width=120))
    assert "Bits per character" in terminal.export_text()
    json.dumps(found, allow_nan=False)


# ---------------------------------------------------------------- a whole run


@pytest.mark.slow
def test_a_whole_run_on_own_text(folder, tmp_path):
    small = {
        "llm": folder / "llm",
        **{f"own.{name}": value for name, value in fields(folder).items()},
        "own.held_out_pairs": 10,
        "transfer.targets": f"{FRA},{WOL}",
        "transfer.parallel_pairs": 20,
        "answering.template": "none",
        "answering.max_new_tokens": 32,
        "answering.temperature": 1.0,
        "answering.top_k": 0,
        "answering.top_p": 1.0,
        "trained": "all",
        "training.steps": 40,
        "training.learning_rate": 3e-3,
        "training.target_length": 128,
    }
    arguments = (f"--config={reduced.ROOT}/configs/sdrrl.py:smollm2", *reduced.flags(small))
    done = reduced.train(*arguments, "--workdir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "run"
    results = json.loads((run / "results.json").read_text())
    changes = results["bits_per_character"]["changes"]["sdrrl"]
    # A model of random weights learns from translations into the language.
    assert changes["interval"][1] < 0 and set(changes["languages"]) == {FRA, WOL}
    assert (
        "Bits per character" in done.stdout
        and "Bits per character" in (run / "report.html").read_text()
    )
    assert not (run / "translations").exists()
    trained = json.loads((run / "transfer" / "sdrrl" / "manifest.json").read_text())["counts"]
    assert {"translation", "completion"} <= trained.keys()
    held = [json.loads(line) for line in (run / "predictions/sdrrl.jsonl").read_text().splitlines()]
    assert len(held) == 30 and all(row["bits"] > 0 for row in held)
    again = reduced.train(*arguments, "--workdir=run", cwd=tmp_path)
    assert again.returncode == 0 and "Bits per character" in again.stdout
