"""launch/plan.py: its numbers against closed forms and real arrays, its answers, its JSON."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import reduced
from flax import nnx

from configs.mtllm import RECIPES, llama3_8b, llama3_8b_24gb, mini
from mtllm_jax import chips, sharding
from mtllm_jax import config as c
from mtllm_jax.models.llama import Llama
from mtllm_jax.plan import adaptation, compiled, report, search, sizes
from mtllm_jax.plan.estimate import estimate
from mtllm_jax.plan.plan import make_plan, numbers

with_training = adaptation.Adaptation.with_training
ROOT = Path(__file__).parents[1]


@functools.cache
def step(**changes):
    config = dataclasses.replace(llama3_8b(), **changes)
    encoder, llm = sizes.encoder_sizes(config, "nllb-600m"), sizes.llm_sizes(config, "llama3-8b")
    return adaptation.stage_1(config, encoder, llm)


def with_rows(rows, **values):
    return step().under(with_training(step().config, batch_rows=rows, **values))


# ---------------------------------------------------------------- machines and models


@pytest.mark.parametrize(
    ("name", "num_chips", "gbps"),
    [
        ("v5e:4x4", 16, 2 * 50),  # a corner has a neighbour in each direction
        ("v5e:16x16", 256, 4 * 50),  # both dims close to rings
        ("v6e:2x4", 8, 2 * 100),
        ("v5p:4x4x4", 64, 6 * 100),
        ("v5p:2x2x1", 4, 2 * 100),
        ("h100:8", 8, 450),
        ("h100:1", 1, 0),
    ],
)
def test_topologies(name, num_chips, gbps):
    machine = chips.topology(name)
    assert (machine.num_chips, machine.network) == (num_chips, gbps)


@pytest.mark.parametrize(
    ("make", "given", "message"),
    [
        (chips.topology, "v5e", r"--topology is 'v5e'; it must be one of v5e, v6e, .*v5p:4x4x4"),
        (chips.topology, "v9:4x4", r"--topology is 'v9:4x4'; it must be one of v5e"),
        (chips.topology, "v5e:4", r"--topology is 'v5e:4'; v5e has 2 positive sizes"),
        (chips.topology, "v5p:4x0x4", r"--topology is 'v5p:4x0x4'; v5p has 3 positive sizes"),
        (chips.one_gpu, 32, r"--gpu is 32; it must be one of 24, 48, 80, 141"),
    ],
)
def test_machines_that_are_none_are_refused(make, given, message):
    with pytest.raises(ValueError, match=message):
        make(given)


@pytest.mark.parametrize(
    ("name", "millions"),  # as published, of the LLM all of them
    [
        ("llama3-8b", 8030.26),
        ("llama3-70b", 70553.71),
        ("llama2-7b", 6738.42),
        ("mistral-7b", 7241.73),
        ("qwen3-8b", 8190.74),
        ("smollm2-135m", 134.52),
    ],
)
def test_published_llms_have_their_number_of_weights(name, millions):
    config = dataclasses.replace(mini(), mini_llama=None)
    llm = sizes.llm_sizes(config, name)
    shapes = jax.tree.leaves(nnx.state(nnx.eval_shape(lambda: Llama(llm, nnx.Rngs(0)))))
    assert sum(x.size for x in shapes) / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize("recipe", [name for name in RECIPES if "mini" not in name])
def test_a_recipe_is_planned_with_the_llm_it_is_named_for(recipe):
    found = sizes.llm_sizes(RECIPES[recipe](), "")
    assert found == next(sizes.LLMS[n] for n in sizes.LLMS if n.split("-")[0] in recipe)
    encoder = "e5-small" if recipe.startswith("e5-") else "nllb-600m"
    assert sizes.encoder_sizes(RECIPES[recipe](), "") == sizes.ENCODERS[encoder]


@pytest.mark.real
def test_the_sizes_of_e5_are_those_of_its_folder(mtllm_models):
    folder = str(mtllm_models / "multilingual-e5-small")
    config = dataclasses.replace(llama3_8b(), encoder=folder)
    found = sizes.encoder_sizes(config, "")
    assert found.eps == pytest.approx(1e-12)
    assert dataclasses.replace(found, eps=1e-12) == sizes.ENCODERS["e5-small"]


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(llama3_8b(), stage1="runs/xnli"),
        with_training(llama3_8b(), steps=0),
    ],
)
def test_a_run_without_stage_1_has_no_plan(config):
    with pytest.raises(ValueError, match="as a plan is of stage 1"):
        report.run(config, None, None)


def test_sizes_come_from_folders_and_from_the_recipe(tmp_path):
    values = {"model_type": "llama", "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 3,
              "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 80,
              "rms_norm_eps": 1e-5, "architectures": ["LlamaForCausalLM"]}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    folder = sizes.llm_sizes(dataclasses.replace(llama3_8b(), llm=str(tmp_path)), "unread")
    assert (folder.width, folder.num_layers, folder.ffn_width) == (64, 3, 80)
    assert sizes.llm_sizes(mini(), "unread").width == mini().mini_llama.width
    assert sizes.encoder_sizes(mini(), "unread").encoder_ffn == mini().mini_nllb.ffn_width
    for of, flag in ((sizes.encoder_sizes, "encoder"), (sizes.llm_sizes, "llm")):
        with pytest.raises(ValueError, match=rf"--{flag} is 'huge'; it must be one of"):
            of(llama3_8b(), "huge")


def test_the_stages_of_the_task_cost_what_their_matrices_ask_for():
    """Forward, back to the activations, and again where remat asks for it: 6 FLOPs a weight."""
    found = step().beside(chips.topology("h100:8"))["task_stages"]
    weights = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336)
    training = llama3_8b().teacher
    tokens = training.batch_rows * training.target_length
    # LoRA and attention add some 5 %, the layers' last product is not computed again.
    assert found["teacher"]["flops_per_step"] == pytest.approx(6 * weights * tokens, rel=0.1)
    hours = found["teacher"]["flops_per_step"] * training.steps / 989e12 / 3600
    assert found["teacher"]["chip_hours"] == pytest.approx(hours)
    encoder = 2 * 12 * (4 * 1024**2 + 2 * 1024 * 4096) * 32 * 256
    added = found["distillation"]["flops_per_step"] - found["teacher"]["flops_per_step"]
    assert added == pytest.approx(encoder, rel=0.2)  # and the bridge's, and attention's


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_what_lies_on_a_chip_is_what_placing_arrays_puts_there(dtype):
    """Frozen, trained and optimizer state on eight devices, some arrays cut and some whole."""
    sizes_ = dataclasses.replace(sizes.LLMS["llama3-8b"], width=256, ffn_width=512, num_layers=2)
    llm = dataclasses.replace(sizes_, num_heads=8, head_width=32, vocab_size=1001)
    encoder = dataclasses.replace(sizes.ENCODERS["nllb-600m"], width=128, vocab_size=1001)
    mesh = c.Mesh(data=2, fsdp=2, tensor=2)
    config = dataclasses.replace(llama3_8b(), mesh=mesh, frozen_dtype=dtype)
    small = adaptation.stage_1(with_training(config, batch_rows=8), encoder, llm)
    machine = chips.topology("h100:8")
    found = estimate(small, machine).memory
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:8])

    def placed(tree):
        arrays = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
        leaves = jax.tree.leaves(sharding.place(arrays, mesh))
        return sum(x.addressable_shards[0].data.nbytes for x in leaves)

    assert found.frozen == placed(small.frozen)
    assert found.trainable == placed(small.state.trainable)
    assert found.optimizer == placed(small.state.opt_state)


def test_the_llm_lies_there_once_with_adapters_and_twice_without():
    machine = chips.topology("v5p:4x4x4")
    lora, all_ = (estimate(step(trained=t), machine).memory for t in ("lora", "all"))
    weights = 2 * 8.03e9 / 64
    assert lora.frozen == pytest.approx(weights, rel=0.06)  # and the encoder's 0.4e9
    assert lora.trainable * 64 == pytest.approx(4 * (41_943_040 + 1025 * 4096), rel=0.01)
    assert lora.optimizer == pytest.approx(2 * lora.trainable, rel=0.01)
    # The student's layers in float32 with two moments, the teacher's in bfloat16.
    layers = 4 * 6.98e9 / 64
    assert all_.trainable == pytest.approx(layers, rel=0.01)
    assert all_.optimizer == pytest.approx(2 * layers, rel=0.01)


def test_the_recipe_for_24_gb_fits_them():
    config = llama3_8b_24gb()
    whole, training = llama3_8b().adaptation.training, config.adaptation.training
    assert training == dataclasses.replace(whole, accumulation=training.accumulation)
    encoder, llm = sizes.ENCODERS["nllb-600m"], sizes.LLMS["llama3-8b"]
    plan = make_plan(adaptation.stage_1(config, encoder, llm), chips.one_gpu(24), by_compiler=False)
    assert plan.fits and plan.largest_batch >= whole.batch_rows
    # A byte for each weight of the LLM's maps (32 layers: two of D × D, two of D × 1024, three of
    # D × F) and four for each output; two for each of the embeddings' and the output's.
    D, F, V = 4096, 14_336, 128_256
    weights = 32 * (2 * D * D + 2 * D * 1024 + 3 * D * F)
    outputs = 32 * (D + 2 * 1024 + D + 2 * F + D)
    # NLLB's 12 layers: four maps of E × E, two of E × 4 E.
    E = 1024
    weights += 12 * 12 * E * E
    outputs += 12 * (4 * E + 4 * E + E)
    rest = 2 * V * D + 256_206 * E
    norms_and_biases = 65 * D + 12 * (9 * E + 4 * E + 2 * E) + 2 * E
    wanted = weights + 4 * outputs + 2 * (rest + norms_and_biases)
    assert plan.memory.frozen == pytest.approx(wanted, rel=1e-4)


def test_weights_in_int8_are_gathered_and_read_as_they_lie():
    machine = chips.topology("h100:8")
    floats, int8 = (estimate(step(frozen_dtype=t), machine) for t in ("bfloat16", "int8"))
    gathered = [one.traffic["all-gather"] for one in (floats, int8)]
    # Three times the LLM's maps and once the encoder's, of which a chip has an eighth.
    assert gathered[0] - gathered[1] == pytest.approx((3 * 6.98e9 + 0.15e9) * 7 / 8, rel=0.01)
    assert int8.memory_traffic < floats.memory_traffic
    assert int8.memory.activations == floats.memory.activations
    alone = chips.one_gpu(141)
    floats, int8 = (estimate(step(frozen_dtype=t), alone).memory for t in ("bfloat16", "int8"))
    # Of a layer two matrices are widened at a time.
    assert int8.activations - floats.activations == 2 * 2 * 4096 * 14_336


def test_activations_grow_with_rows_and_shrink_with_micro_batches():
    machine = chips.topology("v5e:4x4")

    def activations(rows, accumulation=1):
        return estimate(with_rows(rows, accumulation=accumulation), machine).memory.activations

    one, two, four = (activations(rows) for rows in (64, 128, 256))
    assert two - one == pytest.approx((four - two) / 2)
    assert activations(256, 4) == pytest.approx(one, rel=0.02)  # gradients lie there twice


# ---------------------------------------------------------------- search


@pytest.mark.parametrize("machine", [chips.topology("v5e:4x4"), chips.one_gpu(24)])
def test_the_largest_batch_fits_and_a_larger_one_does_not(machine):
    rows = search.largest_batch(step(), machine)
    assert rows > 0 and rows % machine.num_chips == 0
    assert search.fits(estimate(with_rows(rows), machine).memory, machine)
    larger = estimate(with_rows(rows + machine.num_chips), machine).memory
    assert not search.fits(larger, machine)


def test_what_does_not_fit_is_answered_with_what_would():
    plan = make_plan(step(), chips.one_gpu(24), by_compiler=False)
    assert not plan.fits and plan.changes[0].fits
    flag, _, times = plan.changes[0].flags.rpartition("=")
    assert flag == "--config.adaptation.training.accumulation"
    assert search.fits(estimate(with_rows(256, accumulation=int(times)), plan.machine).memory,
                       plan.machine)  # fmt: skip
    fewer = estimate(with_rows(256, accumulation=int(times) // 2), plan.machine).memory
    assert not search.fits(fewer, plan.machine)


def test_where_nothing_fits_alone_all_changes_are_tried_together():
    everything = step(trained="all", remat="none", frozen_dtype="float32")
    plan = make_plan(everything, chips.one_gpu(80), by_compiler=False)
    assert not any(change.fits for change in plan.changes[:-1])
    last = plan.changes[-1]
    assert last.fits and last.flags.split() == [
        "--config.remat=full",
        "--config.frozen_dtype=bfloat16",
        "--config.trained=lora",
        "--config.adaptation.training.accumulation=256",
    ]
    plan = make_plan(step(), chips.one_gpu(24), by_compiler=False)
    assert "--config.frozen_dtype=int8" in [change.flags for change in plan.changes]


def test_what_the_compiler_could_not_fit_is_not_said_to_fit(monkeypatch):
    """Whether or not its sentence names the bytes that were wanted."""
    machine = chips.topology("v5e:4x4")
    said = "Ran out of memory: HLO temporaries ({}) exceeds available HBM (15.75G)."
    batches = []
    for size in ("22.38G", "some"):
        too_large = compiled.TooLarge("", compiled._needed(said.format(size)), 1.0)
        monkeypatch.setattr(compiled, "compile_for", lambda *_, found=too_large: found)
        plan = make_plan(step(), machine, by_compiler=True)
        assert not plan.fits and 0 < plan.largest_batch < 256
        batches.append(plan.largest_batch)
        for change in plan.changes:
            assert change.fits == (change.peak <= machine.chip.memory_gb * 1e9)
    assert batches[0] < batches[1]


def test_a_mesh_that_is_suggested_is_the_one_that_its_flags_give():
    mesh = c.Mesh(data=4, fsdp=1, tensor=-1, context=2)
    changes = search._smaller(step(mesh=mesh), chips.topology("v5e:4x4"))
    flags, make = changes[0]
    assert flags.split() == [
        "--config.mesh.data=1", "--config.mesh.fsdp=-1", "--config.mesh.tensor=2"
    ]  # fmt: skip
    assert make(step().config).mesh == c.Mesh(data=1, fsdp=-1, tensor=2, context=2)
    whole = step(mesh=c.Mesh(data=1, fsdp=-1, context=2))
    flags = [flags for flags, _ in search._smaller(whole, chips.topology("v5e:4x4"))]
    assert not any("mesh" in flag for flag in flags)


def test_a_sweep_holds_what_fits_the_fastest_first():
    machine = chips.topology("v5e:4x4")
    found = search.sweep(step(), machine)
    times = [one.estimate.seconds.roofline for one in found]
    assert times == sorted(times)
    meshes = set()
    for one in found:
        mesh, training = one.step.config.mesh, one.step.training
        assert mesh.data * mesh.fsdp * mesh.tensor == 16
        assert training.batch_rows % (mesh.data * mesh.fsdp * training.accumulation) == 0
        assert search.fits(one.estimate.memory, machine)
        meshes.add((mesh.data, mesh.fsdp, mesh.tensor))
    assert (1, 16, 1) in meshes and (16, 1, 1) not in meshes  # 17 GB of weights on each chip


# ---------------------------------------------------------------- the numbers, and the command


def test_times_are_those_of_the_data_sheet():
    plan = make_plan(step(), chips.topology("v5e:4x4"), by_compiler=False)
    values = numbers(plan)
    assert values["step_seconds"]["compute"] == values["flops_per_step"] / (16 * 197e12)
    received = sum(values["collective_gb_per_chip"].values())
    assert values["step_seconds"]["network"] == pytest.approx(received / 100, rel=1e-3)
    assert values["bound_by"] == "compute"
    seconds = values["step_seconds_roofline"]
    assert values["tokens_per_second_per_chip"] == pytest.approx(256 * 512 / 16 / seconds)
    assert values["chip_hours"] == pytest.approx(10_000 * 16 * seconds / 3600)
    assert values["mfu_at_roofline"] == pytest.approx(
        values["model_flops_per_step"] / values["flops_per_step"]
    )


def test_the_command_prints_and_writes_the_same_numbers(tmp_path):
    config = f"--config={ROOT}/configs/mtllm.py:llama3-8b"
    done = reduced.plan(config, "--gpu=24", f"--json={tmp_path}/plan.json")
    assert (done.returncode, done.stderr) == (0, "")
    values = json.loads((tmp_path / "plan.json").read_text())
    assert values["source"] == "analytic" and not values["fits"]
    assert f"{values['step_seconds_roofline']:.3f} s a step at best" in done.stdout
    assert f"has {values['largest_batch']} rows" in done.stdout
    assert values["suggestions"][0]["flags"] in done.stdout
    assert math.isclose(sum(values["hbm_gb_by_kind"].values()), values["hbm_gb_per_chip"],
                        abs_tol=1e-3)  # fmt: skip
    assert f"{values['hbm_gb_per_chip']:.2f}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of --topology=v5e:4x4 and --gpu=24 is needed"),
        (["--gpu=24", "--topology=v5e:4x4"], "and only one"),
        (["--topology=v5e:4x5", "--analytic"], "batch_rows is 256; it must be a multiple of 20"),
        (["--topology=v5e:4x4", "--config.mesh.fsdp=3"], "must multiply to the 16 devices"),
        (["--gpu=24", "--texts=0"], "--texts is 0; it must be at least 1"),
    ],
)
@pytest.mark.slow
def test_mistakes_are_answered_in_a_sentence(arguments, message):
    done = reduced.plan(f"--config={ROOT}/configs/mtllm.py:llama3-8b", *arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert message in done.stderr


@pytest.mark.skipif(not compiled.is_there(), reason="libtpu is in the extra 'plan'")
@pytest.mark.slow
def test_the_compiler_of_tpus_agrees_on_a_small_model():
    llm = dataclasses.replace(sizes.LLMS["llama3-8b"], width=1024, ffn_width=2048, num_layers=3)
    llm = dataclasses.replace(llm, num_heads=8, vocab_size=1024)
    encoder = dataclasses.replace(sizes.ENCODERS["nllb-600m"], encoder_layers=3, vocab_size=1024)
    small = adaptation.stage_1(with_training(llama3_8b(), batch_rows=16), encoder, llm)
    plan = make_plan(small, chips.topology("v5e:4x4"), by_compiler=True)
    assert isinstance(plan.found, compiled.Compiled) and plan.fits
    gathered = plan.found.traffic["all-gather"] + plan.found.traffic.get("collective-permute", 0)
    assert gathered == pytest.approx(plan.estimate.traffic["all-gather"], rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gpu=24", "--json=nowhere/plan.json"], "--json is nowhere/plan.json; it must be"),
        (["--gpu=24", "--json=/"], "--json is /; it must be a file"),
        (["--gpu=24", "--config.mesh.slices=2"], "mesh.slices is 2; a plan is for one slice"),
        (["--gpu=80", "--config.attention=splash"], "config.attention: attention is 'splash'"),
        (["--topology=v5e:4x4", "--config.adaptation.training.accumulation=32"],
         "batch_rows is 256; it must be a multiple of 512, data × fsdp × accumulation, 32"),
    ],
)  # fmt: skip
def test_what_a_run_would_refuse_is_refused(arguments, sentence):
    done = reduced.plan(f"--config={ROOT}/configs/mtllm.py:llama3-8b", "--analytic", *arguments)
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr
