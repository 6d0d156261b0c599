"""The second recipe: what it answers at the door, and how it counts."""

import dataclasses
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import sacrebleu
import tiny_folders
from etils import epath
from rich.console import Console

from configs.sdrrl import mini
from mtllm_jax.cli import of_mtllm
from mtllm_jax.config import LoRA
from mtllm_jax.recipes import sdrrl, transferring
from mtllm_jax.recipes.sdrrl_inputs import idle_fields, read_inputs
from mtllm_jax.recipes.transferring import Material
from mtllm_jax.results import chrf_tables, next_steps, results_table
from mtllm_jax.runfolder import write_jsonl
from mtllm_jax.sampling import Sampling
from mtllm_jax.schema import to_dict

# ---------------------------------------------------------------- the door


def with_transfer(**changes):
    return dataclasses.replace(mini(), transfer=dataclasses.replace(mini().transfer, **changes))


def with_answering(**changes):
    return dataclasses.replace(mini(), answering=dataclasses.replace(mini().answering, **changes))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (lambda: with_transfer(targets=("deu_Latn", "ger_Latn")), "the nearest are"),
        (lambda: with_transfer(targets=("deu_Latn", "ace_Latn")), "config.transfer.targets"),
        (lambda: with_transfer(source="fra_Latn"), "config.transfer.source is 'fra_Latn'"),
        (lambda: with_transfer(answer_filter="similarity"), "config.transfer.answer_filter"),
        (lambda: with_answering(template="chat"), "no chat template"),
        (lambda: with_answering(system="Be brief."), "config.answering.system"),
        (lambda: with_answering(top_p=0.0), "config.answering.top_p is 0.0"),
        (lambda: dataclasses.replace(mini(), systems=("base", "mt_llm")), "config.systems"),
        (lambda: dataclasses.replace(mini(), mini_llama=None), "config.llm is ''"),
        (lambda: dataclasses.replace(mini(), mini_nllb=None), "config.translator is ''"),
        (
            lambda: dataclasses.replace(mini(), lora=LoRA(4, 8, 0.0, ("all",), start="DIR")),
            "config.lora.start",
        ),
        (
            lambda: dataclasses.replace(
                mini(), trained="lora", lora=LoRA(4, 8, 0.0, ("q", "qroj"))
            ),
            "config.lora.targets",
        ),
        (lambda: dataclasses.replace(mini(), train_instructions=-1), "train_instructions is -1"),
    ],
)
def test_what_cannot_be_is_one_sentence_before_anything_is_trained(changed, told):
    with pytest.raises(ValueError, match=r"\.$") as error:
        read_inputs(changed())
    assert told in str(error.value) and "\n" not in str(error.value)


def test_an_llm_of_ones_own_is_looked_at_before_it_is_used(tmp_path):
    folder = tmp_path / "llm"
    tiny_folders.llama(folder, ["Japan <currency> Japanese Yen"] * 20)
    given = dataclasses.replace(mini(), llm=str(folder))
    assert read_inputs(given).config.llm == str(folder)
    answering = dataclasses.replace(mini().answering, template="chat")
    with pytest.raises(ValueError, match="tokenizer has no chat template"):
        read_inputs(dataclasses.replace(given, answering=answering))
    answering = dataclasses.replace(mini().answering, max_new_tokens=10**6)
    with pytest.raises(ValueError, match=r"answering\.max_new_tokens is 1000000"):
        read_inputs(dataclasses.replace(given, answering=answering))
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match=r"config\.llm"):
        read_inputs(given)


def test_fields_without_effect_are_named():
    told = idle_fields(mini(), ["lora.rank", "answering.top_k", "transfer.prefix", "seed"])
    assert all(name in told for name in ("lora.rank", "answering.top_k", "transfer.prefix"))
    assert "config.seed" not in told
    assert idle_fields(mini(), ["seed", "training.steps"]) == ""


def test_tools_of_the_other_recipe_say_so():
    with pytest.raises(ValueError, match=r"config\.recipe is 'sdrrl'"):
        of_mtllm(to_dict(mini()))


# ---------------------------------------------------------------- results


def answers(*rows):
    return pd.DataFrame(rows, columns=["id", "language", "reference", "answer"])


def test_answers_are_counted_by_language_and_measured_by_sacrebleu():
    said = {
        "base": answers(
            ("a", "eng_Latn", "Yen", "Yen"),
            ("b", "eng_Latn", "Euro", "Pound"),
            ("a", "deu_Latn", "Japanischer Yen", "Yen"),
            ("b", "deu_Latn", "Euro", "Euro"),
            ("b", "fin_Latn", "euro", ""),
        ),
        "sdrrl": answers(
            ("a", "eng_Latn", "Yen", "Yen"),
            ("b", "eng_Latn", "Euro", "Euro"),
            ("a", "deu_Latn", "Japanischer Yen", "japanischer  Yen"),
            ("b", "deu_Latn", "Euro", "Euro"),
            ("b", "fin_Latn", "euro", "euro"),
        ),
    }
    results = sdrrl._results(mini(), said)
    base, ours = results["systems"]["base"], results["systems"]["sdrrl"]
    assert (base["english"], base["languages"]) == (0.5, {"deu_Latn": 0.5, "fin_Latn": 0.0})
    assert base["mean"] == 0.25
    # Case and blanks are no difference.
    assert (ours["english"], ours["mean"]) == (1.0, 1.0)
    assert ours["interval"] == [1.0, 1.0]
    low, high = base["intervals"]["eng_Latn"]
    assert 0 <= low < 0.5 < high <= 1
    wanted = sacrebleu.sentence_chrf("Yen", ["Japanischer Yen"]).score / 100
    assert base["chrf"]["languages"]["deu_Latn"] == pytest.approx((wanted + 1) / 2)
    assert base["chrf"]["english"] < 1 and "nc:6" in results["chrf"]
    told = "English: +50.0 points against LLM as it is, 95 % +0.0 to +100.0."
    assert told in results["gains"]
    json.dumps(results, allow_nan=False)
    foreign = {name: rows[rows["language"] != "eng_Latn"] for name, rows in said.items()}
    found = sdrrl._results(mini(), foreign)
    assert found["gains"] and not any("English" in note for note in found["gains"])


def test_the_table_has_both_measures_and_says_what_is_not_gained():
    rows = [(str(i), code, "x", "x" if i % 2 else "y") for i in range(8) for code in
            ("eng_Latn", "deu_Latn", "fin_Latn")]  # fmt: skip
    said = dict.fromkeys(("base", "t_sft", "sdrrl"), answers(*rows))
    results = sdrrl._results(mini(), said) | {"seconds": {"sdrrl": 1.0}}
    ((title, columns, lines),) = chrf_tables(results)
    assert title.startswith("chrF") and columns[1:] == ["LLM as it is", "T-SFT", "SDRRL"]
    assert [line[0] for line in lines[:2]] == ["English", "mean of 2 languages"]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(results_table(results, width=120))
    text = console.export_text()
    assert "SDRRL is not told apart from T-SFT in the targets, row by row: +0.0 points" in text
    assert "launch/generate.py --model=RUN/sdrrl/model" in text
    assert "predict.py" not in text
    steps = dict(next_steps(Path("RUN"), "sdrrl", ("base", "sft", "t_sft")))
    assert "RUN/t_sft/model" in steps["ask"] and "RUN/transfer/t_sft/" in steps["trained on"]


def test_test_rows_are_answered_by_the_likeliest_tokens(monkeypatch, tmp_path):
    asked = {}

    def answered(job, folder, prompts, file, *, sampling):
        asked[folder] = sampling
        write_jsonl(epath.Path(file), [row | {"answer": "Yen"}])
        return file

    row = {"id": "a", "language": "deu_Latn", "prompt": "Japan", "reference": "Yen"}
    monkeypatch.setattr(transferring, "answered", answered)
    config = with_answering(temperature=0.9, repetition_penalty=1.1)
    (tmp_path / "predictions").mkdir()
    job = SimpleNamespace(config=config, run=SimpleNamespace(path=tmp_path))
    models = {name: name for name in config.systems}
    results = sdrrl._asked(job, None, Material((), [row], {}, {}), models)
    assert set(asked) == set(config.systems) == set(results["systems"])
    assert set(asked.values()) == {Sampling(temperature=0.0, repetition_penalty=1.1)}
