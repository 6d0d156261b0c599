"""The systems that a run of SDRRL may compare: which there are, what each needs, a whole run."""

import dataclasses
import io
import json
import shutil

import pytest
import reduced
from rich.console import Console

from configs.sdrrl import RECIPES, mini
from mtllm_jax.config import SDRRL_SYSTEMS, OnPolicy
from mtllm_jax.recipes.sdrrl_inputs import idle_fields, read_inputs
from mtllm_jax.recipes.transferring import Material
from mtllm_jax.report import SYSTEM_NOTES
from mtllm_jax.results import SYSTEM_NAMES, chrf_tables, results_table


def with_transfer(**changes):
    return dataclasses.replace(mini(), transfer=dataclasses.replace(mini().transfer, **changes))


def with_systems(*names, **changes):
    return dataclasses.replace(mini(), systems=names, **changes)


def with_on_policy(**changes):
    how = dataclasses.replace(mini().on_policy, **changes)
    return with_systems("base", "sdrrl", "on_policy", on_policy=how)


def test_every_system_has_a_name_and_a_note_and_the_default_compares_four():
    assert mini().systems == ("base", "sft", "t_sft", "sdrrl")
    assert set(SDRRL_SYSTEMS) <= SYSTEM_NAMES.keys() and set(SDRRL_SYSTEMS) <= SYSTEM_NOTES.keys()
    assert len({SYSTEM_NAMES[name] for name in SDRRL_SYSTEMS}) == len(SDRRL_SYSTEMS)
    for make in RECIPES.values():
        settings = make()
        how = settings.on_policy
        assert isinstance(how, OnPolicy) and "on_policy" not in settings.systems
        assert how.training.target_length <= settings.training.target_length < how.teacher_length


def test_all_systems_together_are_let_in():
    whole = [name for name in SDRRL_SYSTEMS if name != "sdrrl_without_completion"]
    config = with_systems(*whole)
    assert read_inputs(config).config.sets.keys() == {*whole} - {"base", "on_policy"}
    assert config.sets["sdrrl"] == config.transfer
    assert "on_policy.training" in config.stages() and "on_policy.training" not in mini().stages()
    assert config.steps()["on_policy/2"] == config.on_policy.training.steps
    assert "training" not in config.steps() and "on_policy" not in config.steps()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (
            lambda: with_systems("base", "sdrrl", "sdrrl_without_completion"),
            "config.systems is ('base', 'sdrrl', 'sdrrl_without_completion'); it must be without"
            " sdrrl_without_completion, as config.transfer has nothing of that part.",
        ),
        (
            lambda: dataclasses.replace(
                with_transfer(lt=0.0, tl=0.0, tt=0.0, switched=0.0, translation=0.0),
                systems=("sdrrl", "sdrrl_without_ll"),
            ),
            "without sdrrl_without_ll, as config.transfer has nothing but that part",
        ),
        (lambda: with_systems("base", "on_policy"), "a list with 'sdrrl'"),
        (lambda: with_systems("sdrrl_without_mt"), "some of base, sft, t_sft, cross_lingual"),
        (lambda: with_on_policy(rounds=0), "config.on_policy.rounds is 0"),
        (lambda: with_on_policy(teacher_length=0), "config.on_policy.teacher_length is 0"),
        (lambda: with_on_policy(temperature=-1.0), "config.on_policy.temperature is -1.0"),
        (lambda: with_on_policy(instructions=-1), "config.on_policy.instructions is -1"),
        (lambda: with_on_policy(context="{prompt}"), "config.on_policy.context is '{prompt}'"),
        (
            lambda: with_on_policy(
                training=dataclasses.replace(mini().on_policy.training, steps=0)
            ),
            "config.on_policy.training.steps is 0",
        ),
        (lambda: with_transfer(rewriting_prompt="{prompt}"), "config.transfer.rewriting_prompt"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(changed, told):
    with pytest.raises(ValueError, match=r"\.$") as error:
        read_inputs(changed())
    assert told in str(error.value) and "\n" not in str(error.value)


def test_what_a_system_alone_reads_is_idle_without_it():
    given = ["on_policy.rounds", "transfer.rewriting_prompt"]
    assert all(f"config.{name}" in idle_fields(mini(), given) for name in given)
    asked = with_systems("sdft", "sdrrl", "on_policy")
    assert idle_fields(asked, given) == ""
    without = with_systems("base", "sft", "sdft")
    assert not without.translates and "mini_nllb.training" not in without.stages()
    assert "config.mini_nllb.width" in idle_fields(without, ["mini_nllb.width"])
    assert with_systems("base", "cross_lingual").translates
    given = ["transfer.translation_prompt", "transfer.parallel_pairs"]
    untaught = with_transfer(translation=0.0)
    assert all(f"config.{name}" in idle_fields(untaught, given) for name in given)
    asked = dataclasses.replace(untaught, systems=("cross_lingual", "sdrrl"))
    assert idle_fields(asked, given) == ""


def test_what_is_translated_is_what_some_system_learns():
    def columns(*systems):
        return Material((), (), {}, {}).columns(with_systems(*systems).sets.values())

    assert columns(*mini().systems) == ("prompt", "answer", "reference")
    assert columns("base", "sft", "sdrrl", "on_policy") == ("prompt", "answer")
    assert columns("base", "t_sft") == ("prompt", "reference")


def test_tables_of_many_systems_are_cut_to_the_width():
    systems = {
        name: {
            "english": 0.5,
            "mean": 0.25,
            "languages": {"deu_Latn": 0.25},
            "interval": [0.2, 0.3],
            "intervals": {},
        }
        for name in SDRRL_SYSTEMS
    }
    for entry in systems.values():
        entry["chrf"] = dict(entry)
    results = {
        "recipe": "sdrrl",
        "task": "t",
        "metric": "accuracy",
        "seeds": [0],
        "systems": systems,
        "chrf": "signature",
        "gains": [],
        "seconds": {"sdrrl": 1.0},
    }
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(results_table(results, None, 100))
    text = console.export_text()
    assert "…" not in text and all(len(line) <= 100 for line in text.splitlines())
    ((_, columns, _),) = chrf_tables(results)
    words = {word for name in columns for word in name.split()}
    below = text[text.index("chrF (signature)") :]
    assert all(word in below for word in words) and below.count("chrF (signature)") > 1


# ---------------------------------------------------------------- a whole run

_SMALL = reduced.SDRRL | {
    "transfer.targets": "deu_Latn",
    "mini_llama.training.steps": 80,  # so many that most answers end
    "training.steps": 5,
    "answering.max_new_tokens": 16,
    "on_policy.training.steps": 3,
    "on_policy.training.checkpoint_every": 2,
    "on_policy.instructions": 12,
    "systems": "base,sdft,sdrrl,sdrrl_without_own_answers,on_policy",
}


def train(folder):
    config = f"--config={reduced.ROOT}/configs/sdrrl.py"
    return reduced.train(config, *reduced.flags(_SMALL), "--workdir=run", cwd=folder)


@pytest.mark.slow
def test_a_run_of_one_system_of_each_kind_and_one_that_goes_on(tmp_path):
    done = train(tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    run = tmp_path / "run"
    results = json.loads((run / "results.json").read_text())
    assert list(results["systems"]) == _SMALL["systems"].split(",")
    for name in ("SDFT", "SDRRL without own answers", "On-policy SDRRL"):
        assert name in (run / "report.html").read_text()
    counts = json.loads((run / "transfer" / "sdft" / "manifest.json").read_text())["counts"]
    assert counts.keys() == {"LL"} and counts["LL"] > 0
    prompts = (run / "answers" / "rewriting.jsonl").read_text().splitlines()
    assert len(prompts) == len((run / "answers" / "prompts.jsonl").read_text().splitlines())
    asked = [(run / "on_policy" / n / "prompts.jsonl").read_text() for n in "12"]
    assert asked[0] != asked[1] and asked[0].count("\n") <= 12
    for row in map(json.loads, asked[0].splitlines()):
        assert row["language"] == "deu_Latn" and row["source"]
    # Having lost the end of its last round, it goes on to the same model.
    model = run / "on_policy" / "2" / "model" / "model.safetensors"
    before = model.read_bytes()
    assert before != (run / "on_policy" / "1" / "model" / "model.safetensors").read_bytes()
    for path in (run / "on_policy" / "2" / "done.json", run / "results.json"):
        path.unlink()
    shutil.rmtree(model.parent)
    shutil.rmtree(run / "on_policy" / "2" / "params")
    done = train(tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert model.read_bytes() == before
