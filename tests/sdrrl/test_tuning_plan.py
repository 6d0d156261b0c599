"""The plan of SDRRL against closed forms, traced and compiled programs; what it answers."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import pytest
import reduced
from traced import products

from configs.sdrrl import RECIPES, llama2_7b, mini
from mtllm_jax import chips, sharding
from mtllm_jax import config as c
from mtllm_jax.models.llama import LlamaConfig
from mtllm_jax.plan import hlo, sizes
from mtllm_jax.plan.abstract import abstract_mesh
from mtllm_jax.plan.estimate import estimate
from mtllm_jax.plan.plan import make_plan, numbers
from mtllm_jax.plan.tuning import Tuning, tuning_step

ROOT = Path(__file__).parents[2]
# Of Llama-2-7B: 32 layers of four maps of D × D and three of D × F, two norms each; and the ends.
D, F, V = 4096, 11_008, 32_000
MAPS = 32 * (4 * D * D + 3 * D * F)
WEIGHTS = MAPS + 2 * V * D + 65 * D
ADAPTERS = 32 * 2 * 8 * 2 * D  # of rank 8, on q and v


@functools.cache
def step(trained="all", llm="llama2-7b", **changes):
    config = dataclasses.replace(llama2_7b(), trained=trained)
    return tuning_step(Tuning.with_training(config, **changes), sizes.LLMS[llm])


# ---------------------------------------------------------------- FLOPs


@pytest.mark.parametrize(
    ("trained", "llm", "in_pieces"),
    [("all", "llama2-7b", False), ("lora", "llama3-8b", True), ("all", "smollm2-135m", False)],
)
def test_flops_are_those_of_the_traced_program(trained, llm, in_pieces):
    """Of as many rows as have all scores of attention at once."""
    one = step(trained, llm, batch_rows=4)
    traced = products(jax.make_jaxpr(one.run)(one.state, one.frozen, one.batch).jaxpr)
    found = one.flops(abstract_mesh(c.Mesh(), 1, "tpu"))
    assert ("vocabulary, again" in found.hardware) == in_pieces
    # The last piece has some positions more than there are.
    assert found.hardware_total == pytest.approx(traced, rel=0.01)


@pytest.mark.parametrize("trained", ["all", "lora"])
def test_weights_are_counted_by_what_is_asked_of_them(trained):
    found = step(trained).flops(abstract_mesh(c.Mesh(), 1, "tpu"))
    tokens = 128 * 1024
    frozen, learnt = (0, MAPS) if trained == "all" else (MAPS, ADAPTERS)
    assert found.model["LLM"] == tokens * (4 * frozen + 6 * learnt)
    assert found.model["vocabulary"] == tokens * (6 if trained == "all" else 4) * V * D
    assert found.model["LLM's attention"] == 3 * tokens * 32 * 4 * D * 1024
    # Full remat: the layers once more, but for the products that end them.
    again = found.hardware_total - found.model_total - found.hardware.get("vocabulary, again", 0)
    more = 2 * tokens * (MAPS - 32 * D * F + (learnt if frozen else 0)) + tokens * 32 * 4 * D * 1024
    assert again == pytest.approx(more)


# ---------------------------------------------------------------- memory and traffic


def test_full_fine_tuning_holds_all_weights_three_times_in_float32():
    machine = chips.topology("v5e:4x4")
    memory = estimate(step(), machine).memory
    assert memory.frozen == 0
    assert memory.trainable * 16 == pytest.approx(4 * WEIGHTS, rel=1e-3)  # norms are on each chip
    assert memory.optimizer == pytest.approx(2 * memory.trainable, rel=1e-6)
    lora = estimate(step("lora"), machine).memory
    assert lora.frozen * 16 == pytest.approx(2 * WEIGHTS, rel=1e-3)
    assert lora.trainable <= 4 * ADAPTERS


@pytest.mark.slow
def test_a_compiled_step_of_eight_devices_holds_and_gathers_what_is_planned():
    llm = LlamaConfig(
        vocab_size=4096,
        width=256,
        num_layers=3,
        num_heads=8,
        num_kv_heads=8,
        head_width=32,
        ffn_width=768,
    )
    # The CPU's compiler would change bfloat16 on its own.
    exact = {"compute_dtype": "float32", "frozen_dtype": "float32"}
    config = Tuning.with_training(
        dataclasses.replace(llama2_7b(), **exact), batch_rows=64, target_length=256
    )
    one = tuning_step(config, llm)
    compiled = one.lower(sharding.make_mesh(config.mesh, jax.devices()[:8])).compile()
    found, planned = compiled.memory_analysis(), estimate(one, chips.topology("h100:8"))
    memory = planned.memory
    rows = 8 * (2 * 256 + 2) * 4
    # Beside them the number of the step, that of the optimizer and the key.
    lies = memory.trainable + memory.optimizer + rows
    assert found.argument_size_in_bytes == pytest.approx(lies, abs=100)
    # 1 % apart. This compiler need not save memory, and another release may order things anew.
    assert found.temp_size_in_bytes == pytest.approx(memory.activations, rel=0.15)
    sent = hlo.by_kind(hlo.collectives(compiled.as_text()))
    assert sent["all-gather"] == pytest.approx(planned.traffic["all-gather"], rel=0.01)
    assert sent["all-to-all"] == pytest.approx(planned.traffic["all-to-all"], rel=0.01)
    # It sums where others would scatter the sums: twice the bytes.
    assert sent["all-reduce"] == pytest.approx(2 * planned.traffic["reduce-scatter"], rel=0.02)


def test_logits_are_planned_for():
    """Those of 16 rows or 128 lie on a GPU piece by piece, those of 4 all at once."""
    machine = chips.topology("h100:1")
    one, other = (step("lora", batch_rows=rows) for rows in (16, 128))
    mesh = one.mesh(machine)
    matrix = 2 * V * D
    # 2²⁸ logits at most, in float32 twice and once in bfloat16.
    for each in (one, other):
        assert each.loss_bytes(mesh) == pytest.approx(10 * 2**28 + matrix, rel=0.01)
    few = step("all", batch_rows=4)
    assert few.loss_bytes(mesh) == 10 * 4 * 1024 * V + 2 * matrix


# ---------------------------------------------------------------- the plan, and the command


def test_generating_is_told_apart():
    """32 answers at a time: all weights but the table, and the cache half full, for each token."""
    plan = make_plan(step(), chips.topology("v5e:4x4"), by_compiler=False)
    values = numbers(plan)
    answers = values["answers"]
    cached = 32 * 512 * 2 * 32 * D * 2
    seconds = 512 * (2 * (WEIGHTS - V * D) + cached / 2) / 819e9
    assert answers["chip_hours_per_1000"] == pytest.approx(1000 / 32 * seconds / 3600)
    assert answers["hbm_gb_per_chip"] == pytest.approx((2 * WEIGHTS + cached) / 1e9, abs=1e-3)
    assert not answers["fits"]  # 16.9 GB
    assert values["systems"] == 3
    assert values["chip_hours"] == pytest.approx(1200 * 16 * values["step_seconds_roofline"] / 3600)
    assert "task_stages" not in values


def test_what_does_not_fit_is_answered_with_this_recipes_fields():
    plan = make_plan(step(), chips.one_gpu(80), by_compiler=False)
    flags = [change.flags for change in plan.changes]
    assert not plan.fits and "--config.trained=lora" in flags
    assert flags[-1] == "--config.trained=lora --config.training.accumulation=128"
    assert plan.changes[-1].fits
    assert not any("int8" in flag for flag in flags)


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "mini"])
def test_a_recipe_is_planned_with_the_llm_it_is_named_for(recipe):
    found = sizes.llm_sizes(RECIPES[recipe](), "")
    assert found == next(sizes.LLMS[name] for name in sizes.LLMS if name.startswith(recipe))


def test_the_command_prints_and_writes_the_same_numbers(tmp_path):
    config = f"--config={ROOT}/configs/sdrrl.py:llama2-7b"
    done = reduced.plan(
        config, "--topology=v5e:4x4", "--analytic", "--sweep", f"--json={tmp_path}/p"
    )
    assert (done.returncode, done.stderr) == (0, "")
    values = json.loads((tmp_path / "p").read_text())
    assert values["fits"] and values["recipe"] == "llama2-7b"
    best = values["sweep"][0]
    assert values["step_seconds_roofline"] == max(best[x] for x in ("compute", "memory", "network"))
    assert "Tuning, a step of 128 rows of 1024 tokens" in done.stdout
    assert f"remat {best['remat']}; mesh" in done.stdout
    assert f"{values['step_seconds_roofline']:.3f} s a step at best" in done.stdout
    assert "Not planned: translation" in " ".join(done.stdout.split())


def test_an_encoder_is_not_of_this_recipe():
    with pytest.raises(ValueError, match="--encoder is 'nllb-600m'; SDRRL tunes an LLM alone"):
        Tuning.of_names(mini(), "nllb-600m", "", 1)
