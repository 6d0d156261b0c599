"""LoRA folders against PEFT itself: what it writes we read, what we write it loads.

B rows, T positions, I input width, O output width, R rank.
"""

import dataclasses
import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtllm_jax import sharding
from mtllm_jax.config import Mesh
from mtllm_jax.hf.llama import load_llama
from mtllm_jax.hf.peft import attach_peft, check_peft, difference_as_lora, merge_peft, save_peft
from mtllm_jax.models import lora
from mtllm_jax.models.layers import LoRAParam

peft = pytest.importorskip("peft", reason="parity needs peft (the `test` extra)")
import torch_models  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402
from torch_models import QUICK, SEGMENTS, assert_close, torch, transformers  # noqa: E402

RNGS = nnx.Rngs(jax.random.key(0, impl="rbg"))  # compiles fastest
IDS = np.random.default_rng(0).integers(0, 50, SEGMENTS.shape).astype(np.int32)
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LINEARS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
PLAIN = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}
# What PEFT is told when it makes an adapter; the first four are also kept and trained further.
VARIANTS = {
    "plain": {},
    "subset": {"target_modules": ["q_proj", "mlp.down_proj"], "lora_dropout": 0.25},
    "rslora": {"use_rslora": True},
    "layers": {"target_modules": ["v_proj", "up_proj"], "layers_to_transform": [1]},
    "by module": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"(q|v)_proj": 3.5}},
    "by layer": {
        "rank_pattern": {r"layers\.1\.mlp\.up_proj": 7, "up_proj": 2, r"^model.*\.0\..*k_proj": 1},
        "alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 20},
        "use_rslora": True,
    },
    "pattern": {"target_modules": r".*\.1\.(mlp|self_attn)\.(gate|q)_proj"},
    "excluded": {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["0.self_attn.k_proj"]},
    "norms": {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm", "model.norm"]},
}
KEPT = ("plain", "subset", "rslora", "layers", "by module")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """family → the folder of a tiny model of it, made once."""
    made = {}

    def make(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            # All families of the same shapes, so that programs can be shared.
            changes = {"head_dim": 8} if family == "qwen3" else {}
            torch_models.llm(family, **changes).save_pretrained(made[family])
        return made[family]

    return make


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, bases):
    """(family, variant) → the folder of a random adapter, as PEFT writes it, made once."""
    made = {}

    def make(family, variant="plain", *, auto="AutoModelForCausalLM", seed=0):
        key = family, variant, auto, seed
        if key not in made:
            made[key] = tmp_path_factory.mktemp("adapter")
            write_adapter(made[key], bases(family), auto, seed, **VARIANTS.get(variant, {}))
        return made[key]

    return make


def torch_base(folder, auto="AutoModelForCausalLM"):
    model = getattr(transformers, auto).from_pretrained(folder, attn_implementation="eager")
    return model.eval()


def write_adapter(folder, base, auto="AutoModelForCausalLM", seed=0, **settings):
    """An adapter all of whose factors and copies are random."""
    config = peft.LoraConfig(**PLAIN | {"task_type": "CAUSAL_LM"} | settings)
    if auto == "AutoModel":
        config.task_type = None
    model = peft.get_peft_model(torch_base(base, auto), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
            elif weight.requires_grad:  # copies of norms and biases
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(folder)


def with_peft(base, *folders, auto="AutoModelForCausalLM"):
    """PEFT's adapters on the torch model, those before the last merged."""
    model = torch_base(base, auto)
    for folder in folders:
        model = model.merge_and_unload() if isinstance(model, peft.PeftModel) else model
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            model = peft.PeftModel.from_pretrained(model, folder)
    return model.eval()


def run(graph, state):
    model = nnx.merge(graph, state)
    h_BTD = model.hidden(model.embed(IDS), SEGMENTS, causal=True)
    return h_BTD, model.logits(h_BTD)


run = jax.jit(run, static_argnums=0, compiler_options=QUICK)


def our_logits(llm):
    return np.asarray(run(*nnx.split(llm))[1])


def merged_logits(llm):
    """Those of the LLM with its adapters merged: no program of its own is to be compiled."""
    llm = nnx.clone(llm)
    lora.merge(llm)
    return our_logits(llm)


def torch_logits(model):
    return torch_models.llm_logits(model, IDS, SEGMENTS, causal=True).numpy()


def assert_same(ours, theirs, tolerance=1e-4):
    assert_close(ours[SEGMENTS > 0], theirs[SEGMENTS > 0], tolerance)


# ---------------------------------------------------------------- in


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        *(("llama", variant) for variant in VARIANTS),
        *((family, "plain") for family in FAMILIES[1:]),
    ],
)
def test_merged_and_attached(bases, adapters, family, variant):
    folder = adapters(family, variant)
    expected = torch_logits(with_peft(bases(family), folder))
    llm = load_llama(bases(family))
    before = our_logits(llm)
    assert np.abs(expected - before)[SEGMENTS > 0].max() > 0.1
    if variant in KEPT:
        attached = nnx.clone(llm)
        attach_peft(attached, folder, rngs=RNGS)
        assert_same(merged_logits(attached), expected)
        if (family, variant) in (("llama", "plain"), ("llama", "by module")):
            assert_same(our_logits(attached), expected)
    merge_peft(llm, folder)
    assert_same(our_logits(llm), expected)
    assert not jax.tree.leaves(nnx.state(llm, LoRAParam))


def test_adapters_one_on_top_of_the_other(bases, adapters):
    """As LLM2Vec ships them: the second was trained on what the first had made of the model."""
    folders = adapters("llama"), adapters("llama", "subset", seed=1)
    llm = load_llama(bases("llama"))
    for folder in folders:
        merge_peft(llm, folder)
    merged = with_peft(bases("llama"), *folders).merge_and_unload()
    assert_same(our_logits(llm), torch_logits(merged))
    for ours, theirs in LINEARS.items():
        kernel_LIO = getattr(llm.layers, ours).kernel[...]
        weights = [layer.get_submodule(theirs).weight.detach().T for layer in merged.model.layers]
        assert_close(kernel_LIO, torch.stack(weights).numpy(), 1e-6)


@pytest.mark.parametrize("variant", ["plain", "layers"])
def test_adapters_of_a_model_without_output_layer(bases, adapters, variant):
    """LLM2Vec's adapters are of such a one, and lack a `model.` in their names."""
    settings = {"layers_pattern": "layers"} | VARIANTS["layers"] if variant == "layers" else {}
    VARIANTS["bare " + variant] = settings
    folder = adapters("mistral", "bare " + variant, auto="AutoModel")
    names = load_file(folder / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.layers.") for name in names)
    theirs = with_peft(bases("mistral"), folder, auto="AutoModel")
    positions = torch.arange(9)[None].expand(5, 9)
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(IDS).long(), position_ids=positions)
    llm = load_llama(bases("mistral"))
    merge_peft(llm, folder)
    h_BTD = run(*nnx.split(llm))[0]
    assert_close(h_BTD[0], expected.last_hidden_state[0], 1e-4)


def test_names_with_the_adapters_name_in_them(bases, adapters, tmp_path):
    folder = shutil.copytree(adapters("llama"), tmp_path / "named")
    tensors = load_file(folder / "adapter_model.safetensors")
    named = {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    one, other = (load_llama(bases("llama")) for _ in range(2))
    merge_peft(one, folder)
    merge_peft(other, adapters("llama"))
    np.testing.assert_array_equal(our_logits(one), our_logits(other))


def test_biases_are_taken_over(bases, adapters):
    VARIANTS["biases"] = {"target_modules": ["q_proj", "up_proj"], "bias": "lora_only"}
    folder = adapters("qwen2", "biases")
    llm = load_llama(bases("qwen2"))
    merge_peft(llm, folder)
    assert_same(our_logits(llm), torch_logits(with_peft(bases("qwen2"), folder)))


def test_layers_without_factors_begin_afresh(bases, adapters):
    """B zero, so that nothing changes, and A not, so that something may."""
    llm = load_llama(bases("llama"))
    attach_peft(llm, adapters("llama", "layers"), rngs=RNGS)
    for name in ("v", "up"):
        linear = getattr(llm.layers, name)
        assert not np.any(linear.lora_b[...][0]) and np.all(linear.lora_b[...][1])
        assert np.all(linear.lora_a[...])
    assert llm.layers.q.lora_a is None


def test_rank_alpha_and_dropout_come_from_the_folder(bases, adapters):
    llm = load_llama(bases("llama"), jnp.bfloat16)
    attach_peft(llm, adapters("llama", "subset"), rngs=RNGS)
    linear = llm.layers.q
    assert linear.lora_a.shape == (2, 32, 4) and linear.lora_b.shape == (2, 4, 32)
    assert linear.lora_scale == 1.5 and linear.lora_dropout == 0.25
    assert linear.lora_a.dtype == linear.lora_b.dtype == jnp.float32
    assert linear.lora_a.dims == ("layers", "embed", "rank")
    other = load_llama(bases("llama"))
    attach_peft(other, adapters("llama", "subset"), rngs=RNGS, dropout=0.5)
    assert other.layers.q.lora_dropout == 0.5
    for function in (merge_peft, lambda *a: attach_peft(*a, rngs=RNGS)):
        with pytest.raises(ValueError, match="the LLM has adapters already; merge them first"):
            function(other, adapters("llama"))


def test_merged_in_float32_and_stored_as_it_was_where_it_was(bases, adapters, monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 0)
    folder, mesh = adapters("llama", "norms"), sharding.make_mesh(Mesh(1, 2, 4))
    llm = load_llama(bases("llama"), jnp.bfloat16, mesh=mesh)
    place = llm.layers.q.kernel[...].sharding
    before = np.asarray(llm.layers.q.kernel[...], np.float32)
    merge_peft(llm, folder)
    after = llm.layers.q.kernel[...]
    assert len(after.sharding.device_set) == 8 and after.sharding.is_equivalent_to(place, 3)
    assert after.dtype == llm.norm.scale.dtype == jnp.bfloat16
    tensors = load_file(folder / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
    a_RI, b_OR = (tensors[f"{stem}{x}.weight"] for x in "AB")
    expected = jnp.asarray(before[1] + 1.5 * (b_OR @ a_RI).T, jnp.bfloat16)
    np.testing.assert_array_equal(after[1], expected)
    norm = jnp.asarray(tensors["base_model.model.model.norm.weight"], jnp.bfloat16)
    np.testing.assert_array_equal(llm.norm.scale[...], norm)


def test_a_remote_folder(bases, adapters):
    import fsspec

    memory = fsspec.filesystem("memory")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        memory.pipe(f"/adapter/{name}", (adapters("llama") / name).read_bytes())
    one, other = (load_llama(bases("llama")) for _ in range(2))
    merge_peft(one, "memory://adapter")
    merge_peft(other, adapters("llama"))
    np.testing.assert_array_equal(one.layers.up.kernel[...], other.layers.up.kernel[...])


# ---------------------------------------------------------------- refused


def changed(folder, to, settings=(), tensors=()):
    """A copy of an adapter with some fields and tensors changed; None takes a tensor out."""
    shutil.copytree(folder, to)
    config = json.loads((to / "adapter_config.json").read_text()) | dict(settings)
    (to / "adapter_config.json").write_text(json.dumps(config))
    stored = load_file(to / "adapter_model.safetensors") | dict(tensors)
    stored = {name: tensor for name, tensor in stored.items() if tensor is not None}
    save_file(stored, to / "adapter_model.safetensors")
    return to


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; it must be 'LORA'"),
        ({"use_dora": True}, "use_dora is True; adapters with it are not supported"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices is"),
        ({"a_field_to_come": 1}, "a_field_to_come is 1; adapters with it are not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]; .* a list of norms"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'; it must be .*_conversion="),
        ({"bias": "some"}, "bias is 'some'; it must be none, lora_only or all"),
        ({"r": 0}, "r is 0; it must be a whole number above 0"),
        ({"r": True}, "r is True"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'; it must be a number"),
        ({"lora_dropout": 1}, "lora_dropout is 1; it must be at least 0 and below 1"),
        ({"rank_pattern": {"q_proj": 1.5}}, "rank_pattern is"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern is"),
        ({"target_modules": "(q_proj"}, "target_modules is '.q_proj'; it must be a list of names"),
        ({"target_modules": 3}, "target_modules is 3"),
        ({"layers_to_transform": "1"}, "layers_to_transform is '1'"),
        ({"target_modules": ["q_proj"]}, "unexpected: .*layers.0.mlp.down_proj.lora_A.weight"),
        ({"layers_to_transform": [0]}, "unexpected: .*layers.1.mlp.down_proj.lora_A.weight"),
        ({"r": 5}, rf"{Q}A.weight is \[4, 32\], by the configs \[5, 32\]"),
        ({"modules_to_save": ["norm"]}, "missing: base_model.model.model.norm.weight"),
    ],
)
def test_settings_that_are_not_supported_or_do_not_fit(bases, adapters, tmp_path, settings, words):
    folder = changed(adapters("llama"), tmp_path / "changed", settings)
    with pytest.raises(ValueError, match=words) as raised:
        check_peft(folder, load_llama(bases("llama")).config)
    assert str(folder) in str(raised.value)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({f"{Q}A.weight": None}, f"missing: {Q}A.weight$"),
        ({f"{Q}A.weight": None, f"{Q}B.weight": None}, f"missing: {Q}A.weight, {Q}B.weight$"),
        ({f"{Q}B.weight": np.ones((32, 3), "f4")}, rf"{Q}B.weight is \[32, 3\], by .* \[32, 4\]"),
        ({"base_model.model.lm_head.lora_A.weight": np.ones((4, 32), "f4")}, "unexpected: .*head"),
        ({f"{Q}A.weight": np.ones((4, 32), "i1")}, "lora_A.weight is stored as I8; it may be"),
    ],
)
def test_tensors_that_do_not_fit(bases, adapters, tmp_path, tensors, words):
    folder = changed(adapters("llama"), tmp_path / "changed", tensors=tensors)
    with pytest.raises(ValueError, match=words):
        check_peft(folder, load_llama(bases("llama")).config)


def test_what_can_be_merged_but_not_kept(bases, adapters):
    config = load_llama(bases("llama")).config
    for variant, words in (
        ("norms", "takes the place of the model's own, base_model.*norm.weight; .* be merged, but"),
        ("by layer", r"\(rank, alpha\) of q differs from layer to layer, \[\(4, 12.0\), \(4, 40.0"),
    ):
        check_peft(adapters("llama", variant), config)
        with pytest.raises(ValueError, match=words):
            check_peft(adapters("llama", variant), config, to_be_kept=True)


def test_folders_that_are_none(bases, adapters, tmp_path):
    config = load_llama(bases("llama")).config
    with pytest.raises(ValueError, match="nowhere is not a folder; expected the folder of a PEFT"):
        check_peft(tmp_path / "nowhere", config)
    with pytest.raises(ValueError, match=r"has no adapter_config\.json; expected the folder"):
        check_peft(bases("llama"), config)
    folder = shutil.copytree(adapters("llama"), tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is truncated"):
        check_peft(folder, config)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"adapter_config\.json is not a JSON object"):
        check_peft(folder, config)
    other = dataclasses.replace(load_llama(bases("llama")).config, head_width=16)
    with pytest.raises(ValueError, match=r"q_proj.lora_B.weight is \[32, 4\], by the configs"):
        check_peft(adapters("llama"), other)


def test_pickled_weights_are_refused_with_what_converts_them(bases, adapters, tmp_path):
    import subprocess
    import sys

    folder = shutil.copytree(adapters("llama"), tmp_path / "adapter")
    weights = folder / "adapter_model.safetensors"
    tensors = {name: torch.tensor(tensor) for name, tensor in load_file(weights).items()}
    torch.save(tensors, folder / "adapter_model.bin")
    weights.unlink()
    with pytest.raises(ValueError, match="PyTorch's own format") as raised:
        check_peft(folder, load_llama(bases("llama")).config)
    command = str(raised.value).split("python -c ")[1]
    subprocess.run([sys.executable, "-c", command.strip('"')], check=True)
    check_peft(folder, load_llama(bases("llama")).config)


# ---------------------------------------------------------------- out


def trained_adapters(llm, targets, *, rank=3, alpha=4.5):
    """Fresh adapters whose B is no longer zero."""
    lora.attach(llm, rank=rank, alpha=alpha, dropout=0.1, targets=targets, rngs=RNGS)
    rng = np.random.default_rng(0)
    for name in LINEARS:
        linear = getattr(llm.layers, name)
        if linear.lora_b is not None:
            b_LRO = 0.3 * rng.normal(size=linear.lora_b.shape)
            linear.lora_b.set_value(jnp.asarray(b_LRO, jnp.float32))
    return llm


def trained_layers(llm, seed=0):
    """All weights of all layers and norms another, as if all had been trained."""
    tuned = nnx.clone(llm)
    rng = np.random.default_rng(seed)
    for path, variable in nnx.to_flat_state(nnx.state(tuned)):
        if path[0] not in ("embedding", "output"):
            values = np.asarray(variable[...]) + 0.05 * rng.normal(size=variable.shape)
            variable.set_value(jnp.asarray(values, variable.dtype))
    return tuned


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_what_was_trained(bases, family, tmp_path):
    base = load_llama(bases(family))
    targets = ("all",) if family == "llama" else ("q", "v", "gate")
    tuned = trained_adapters(nnx.clone(base), targets)
    save_peft(tmp_path / "out", base, tuned, base_name="someone/a-model")
    theirs = with_peft(bases(family), tmp_path / "out")
    logits = our_logits if family == "llama" else merged_logits
    assert_same(logits(tuned), torch_logits(theirs))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    names = {LINEARS[name].split(".")[1] for name in (targets if len(targets) > 1 else LINEARS)}
    assert set(config["target_modules"]) == names
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 4.5, 0.1)
    assert config["base_model_name_or_path"] == "someone/a-model"
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
    # Read again, the factors are those that were written.
    again = load_llama(bases(family))
    attach_peft(again, tmp_path / "out", rngs=RNGS)
    assert again.layers.v.lora_scale == 1.5 and again.layers.v.lora_dropout == 0.1
    jax.tree.map(
        np.testing.assert_array_equal, nnx.state(again, LoRAParam), nnx.state(tuned, LoRAParam)
    )


def test_a_model_without_output_layer_takes_it_too(bases, tmp_path):
    """By its own method: PEFT's class for a causal LM asks for what generates text."""
    base = load_llama(bases("llama"))
    tuned = trained_adapters(nnx.clone(base), ("q", "down"))
    save_peft(tmp_path / "out", base, tuned, base_name="base")
    model = torch_base(bases("llama"), "AutoModel")
    model.load_adapter(tmp_path / "out")
    with torch.no_grad():
        h_BTD = model.eval()(input_ids=torch.tensor(IDS[:1]).long()).last_hidden_state
    assert_close(run(*nnx.split(tuned))[0][:1], h_BTD, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_trained_as_an_adapter_of_full_rank(bases, family, tmp_path):
    base = load_llama(bases(family))
    tuned = trained_layers(base)
    adapted, lost = difference_as_lora(base, tuned)
    assert lost == 0.0
    assert_same(merged_logits(adapted), our_logits(tuned), 1e-5)
    np.testing.assert_array_equal(adapted.layers.q.kernel[...], base.layers.q.kernel[...])
    save_peft(tmp_path / "out", base, adapted, base_name="base")
    expected = our_logits(tuned)
    assert np.abs(expected - our_logits(base))[SEGMENTS > 0].max() > 0.1
    assert_same(expected, torch_logits(with_peft(bases(family), tmp_path / "out")))
    merge_peft(base, tmp_path / "out")
    for (path, value), (_, wanted) in zip(
        nnx.to_flat_state(nnx.state(base)), nnx.to_flat_state(nnx.state(tuned)), strict=True
    ):
        np.testing.assert_allclose(value[...], wanted[...], atol=1e-6, err_msg=str(path))


def test_a_truncated_difference_is_the_nearest_and_says_what_it_lost(bases, tmp_path):
    base = load_llama(bases("llama"))
    tuned = trained_layers(base)
    adapted, lost = difference_as_lora(base, tuned, 5)
    save_peft(tmp_path / "out", base, adapted, base_name="base")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    shares = []
    for name, module in LINEARS.items():
        for layer in range(2):
            stem = f"base_model.model.model.layers.{layer}.{module}.lora_"
            product = tensors[f"{stem}B.weight"] @ tensors[f"{stem}A.weight"]
            one, other = (getattr(llm.layers, name).kernel[...][layer] for llm in (base, tuned))
            difference = np.asarray(other - one).T
            share = np.linalg.norm(difference - product) / np.linalg.norm(difference)
            tail = np.linalg.svd(difference, compute_uv=False)
            np.testing.assert_allclose(
                share, np.linalg.norm(tail[5:]) / np.linalg.norm(tail), rtol=1e-4
            )
            shares.append(share)
    np.testing.assert_allclose(lost, max(shares), rtol=1e-4)
    smaller, less = difference_as_lora(base, tuned, 8)
    assert less < lost and smaller.layers.q.lora_a.shape[-1] == 8
    # A rank above a matrix's own is that of the matrix: 16 for k and v of this model.
    wide, _ = difference_as_lora(base, tuned, 20)
    assert [x.lora_a.shape[-1] for x in (wide.layers.q, wide.layers.k)] == [20, 16]
    save_peft(tmp_path / "wide", base, wide, base_name="base")
    theirs = torch_logits(with_peft(bases("llama"), tmp_path / "wide"))
    assert_same(merged_logits(wide), theirs)


def test_adapters_count_in_a_difference_as_what_they_add(bases):
    """A rank that holds both: what an adapter adds, and what was done to the kernels before."""
    base = load_llama(bases("llama"))
    tuned = trained_adapters(nnx.clone(base), ("q", "up"), rank=2)
    lora.merge(tuned)
    tuned = trained_adapters(tuned, ("q", "down"), rank=3)
    adapted, lost = difference_as_lora(base, tuned, 5)
    assert lost < 1e-6
    assert_same(merged_logits(adapted), merged_logits(tuned), 1e-5)
    assert adapted.layers.k.lora_a is None


def test_dtype_and_what_stands_there(bases, tmp_path):
    base = load_llama(bases("llama"))
    tuned = trained_adapters(nnx.clone(base), ("q",))
    save_peft(tmp_path / "out", base, tuned, base_name="base", dtype="bfloat16")
    theirs = with_peft(bases("llama"), tmp_path / "out")
    assert_same(merged_logits(tuned), torch_logits(theirs), 0.05)
    size = (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    assert size < 2 * 2 * (32 + 32) * 3 * 2 + 1000
    with pytest.raises(ValueError, match="exists and is not empty"):
        save_peft(tmp_path / "out", base, tuned, base_name="base")


def test_what_an_adapter_cannot_hold(bases, tmp_path):
    base = load_llama(bases("llama"))
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="the LLM has no adapters to be written"):
        save_peft(out, base, base, base_name="base")
    tuned = trained_layers(base)
    with pytest.raises(ValueError, match="rank is 0; it must be at least 1"):
        difference_as_lora(base, tuned, 0)
    trained_adapters(tuned, ("q",))
    with pytest.raises(ValueError, match=r"layers\.{layer}\.mlp.down_proj.weight is not what it"):
        save_peft(out, base, tuned, base_name="base")
    for name, tensor in (("embedding", "model.embed_tokens"), ("output", "lm_head")):
        other = nnx.clone(base)
        variable = getattr(other, name)
        variable[...] = variable[...].at[3].add(1.0)
        with pytest.raises(ValueError, match=f"{tensor}.weight is not what it was in the original"):
            difference_as_lora(base, other)
        with pytest.raises(ValueError, match=f"{tensor}.weight is not what it was in the original"):
            save_peft(out, base, trained_adapters(other, ("q",)), base_name="base")
    with pytest.raises(ValueError, match="the LLMs have different configs"):
        difference_as_lora(base, load_llama(bases("qwen3")))
    assert not out.exists()
