"""The Llama family against PyTorch: tiny random models, written by transformers, read by us.

B rows, T positions, D width, V vocabulary.
"""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_models import (
    QUICK,
    SEGMENTS,
    additive_mask,
    assert_close,
    assert_equal_tensors,
    assert_no_further,
    llm,
    llm_logits,
    torch,
    transformers,
)

from mtllm_jax.hf.llama import check_llama, config_from_hf, config_to_hf, load_llama, save_llama
from mtllm_jax.models.layers import RMSNorm
from mtllm_jax.models.llama import FAMILIES, Llama, LlamaConfig
from mtllm_jax.ops.rope import (
    LinearScaling,
    Llama3Scaling,
    YarnScaling,
    apply_rope,
    rope_frequencies,
    rope_gain,
)

from safetensors.numpy import load_file, save_file  # isort: skip
from transformers.models.llama import modeling_llama  # isort: skip

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 500_000.0, "factor": 4.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_IN_FULL = YARN | {
    "attention_factor": 1.25,
    "beta_fast": 16.0,
    "beta_slow": 2.0,
    "truncate": False,
}


def theta(value):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": value}}


# kind → (family, what differs from the common tiny config). SeaLLM's versions are checkpoints of
# Llama 2, Mistral and Qwen2 with a larger vocabulary.
KINDS = {
    "llama-2": ("llama", {"num_key_value_heads": 4, "pad_token_id": 0} | theta(10_000.0)),
    "llama-3": ("llama", {"eos_token_id": [2, 5]} | theta(500_000.0)),
    "llama-3.1": ("llama", {"rope_parameters": LLAMA3}),
    "llama-3.2": (
        "llama",
        {"tie_word_embeddings": True, "head_dim": 16}
        | {"rope_parameters": LLAMA3 | {"factor": 32.0}},
    ),
    "llama-linear": ("llama", {"rope_parameters": LINEAR, "num_key_value_heads": 1}),
    "smollm2": (
        "llama",
        {"tie_word_embeddings": True, "hidden_size": 72, "num_attention_heads": 9}
        | {"num_key_value_heads": 3}
        | theta(100_000.0),
    ),
    "mistral-0.1": ("mistral", {"sliding_window": 3} | theta(10_000.0)),
    "mistral-0.3": ("mistral", {"sliding_window": None} | theta(1e6)),
    "seallm-2": ("mistral", {"sliding_window": 5, "vocab_size": 77}),
    "qwen2": ("qwen2", theta(1e6)),
    "qwen2.5": ("qwen2", {"tie_word_embeddings": True, "rope_parameters": YARN_IN_FULL}),
    "qwen3": ("qwen3", {"head_dim": 16} | theta(1e6)),
    "qwen3-tied": (
        "qwen3",
        {"head_dim": 8, "tie_word_embeddings": True, "num_key_value_heads": 1}
        | {"rope_parameters": YARN_IN_FULL | {"truncate": True}},
    ),
}
# Several rows of each kind of padding, so that the mean over them is no accident.
ROWS = np.tile(SEGMENTS, (8, 1))
IDS = np.random.default_rng(0).integers(0, 50, ROWS.shape).astype(np.int32)
ON = ROWS > 0


def torch_model(kind):
    family, changes = KINDS[kind]
    return llm(family, **changes)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """kind → (torch model, its folder, our model), each made once."""
    made = {}

    def make(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            model = torch_model(kind)
            model.save_pretrained(folder)
            made[kind] = (model, folder, load_llama(folder))
        return made[kind]

    return make


@functools.partial(jax.jit, static_argnums=(0, 4), compiler_options=QUICK)
def both_logits(graph, state, ids, segments, dtype):
    """{causal: logits}: the two readings of a model, compiled together."""
    model = nnx.merge(graph, state)
    h_BTD = model.embed(ids, dtype)
    return {
        causal: model.logits(model.hidden(h_BTD, segments, causal=causal))
        for causal in (True, False)
    }


def our_logits(model, dtype=jnp.float32):
    return both_logits(*nnx.split(model), IDS, ROWS, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_logits(pairs, kind):
    theirs, _, ours = pairs(kind)
    for causal, actual in our_logits(ours).items():
        expected = llm_logits(theirs, IDS, ROWS, causal=causal).numpy()
        assert np.abs(expected).max() > 1
        assert_close(actual[ON], expected[ON], 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_as_near_as_torch(pairs, kind):
    """Weights and activations in bfloat16 on both sides, against torch in float32."""
    theirs, folder, _ = pairs(kind)
    low = (
        type(theirs)
        .from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
        .eval()
    )
    for causal, actual in our_logits(load_llama(folder, jnp.bfloat16), jnp.bfloat16).items():
        exact, theirs_low = (
            llm_logits(model, IDS, ROWS, causal=causal).float().numpy()[ON]
            for model in (theirs, low)
        )
        assert_no_further(actual[ON], theirs_low, exact)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_feed_forward_and_layer(pairs, kind):
    """The second layer and its two blocks, on padded rows, causal with its window and not."""
    theirs, _, ours = pairs(kind)
    graph, state = nnx.split(ours.layers)
    width = ours.config.width
    x = np.random.default_rng(3).normal(size=(*SEGMENTS.shape, width)).astype(np.float32)
    positions = (np.cumsum(SEGMENTS > 0, 1, dtype=np.int32) - 1).clip(0)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(state, x):
        second = nnx.merge(graph, jax.tree.map(lambda w: w[1], state))
        return second.feed_forward(x), {
            causal: (
                second.attend(x, SEGMENTS, positions, causal=causal),
                second(x, SEGMENTS, positions, causal=causal),
            )
            for causal in (True, False)
        }

    fed, read = run(state, x)
    layer = theirs.model.layers[1]
    h = torch.tensor(x)
    rotary = theirs.model.rotary_emb(h, torch.tensor(positions))
    with torch.no_grad():
        assert_close(fed, layer.mlp(h), 1e-5)
        for causal, (attended, whole) in read.items():
            window = ours.config.sliding_window if causal else None
            mask = additive_mask(SEGMENTS, SEGMENTS, h.dtype, causal=causal, window=window)
            told = {"position_embeddings": rotary, "attention_mask": mask}
            assert_close(attended[SEGMENTS > 0], layer.self_attn(h, **told)[0][SEGMENTS > 0], 1e-5)
            assert_close(whole[SEGMENTS > 0], layer(h, **told)[SEGMENTS > 0], 1e-5)


def test_norm():
    x = np.random.default_rng(1).normal(size=(2, 3, 8)).astype(np.float32)
    ours = RMSNorm(8, 1e-5, nnx.Rngs(0))
    ours.scale[...] = jnp.linspace(0.5, 2.0, 8)
    theirs = modeling_llama.LlamaRMSNorm(8, 1e-5)
    theirs.weight.data = torch.tensor(np.asarray(ours.scale[...]))
    assert_close(ours(jnp.asarray(x)), theirs(torch.tensor(x)).detach().numpy(), 1e-5)


@pytest.mark.parametrize(
    ("parameters", "scaling"),
    [
        ({"rope_type": "default", "rope_theta": 500_000.0}, None),
        (LINEAR, LinearScaling(4.0)),
        (LLAMA3, Llama3Scaling(8.0, 1.0, 4.0, 32)),
        (
            LLAMA3 | {"rope_theta": 500_000.0, "original_max_position_embeddings": 8192},
            Llama3Scaling(8.0, 1.0, 4.0, 8192),  # Llama 3.1
        ),
        (YARN, YarnScaling(4.0, 64, 1.1386294361119891)),  # 0.1 ln 4 + 1
        (YARN_IN_FULL, YarnScaling(4.0, 64, 1.25, 16.0, 2.0, truncate=False)),
        (
            YARN | {"rope_theta": 1e6, "original_max_position_embeddings": 32_768},
            YarnScaling(4.0, 32_768, 1.1386294361119891),  # Qwen2.5 and Qwen3
        ),
        (
            YARN | {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.5},
            YarnScaling(40.0, 64, 1.1557219901962608),  # (0.1 ln 40 + 1) / (0.05 ln 40 + 1)
        ),
        (YARN | {"original_max_position_embeddings": 4}, YarnScaling(4.0, 4, 1.1386294361119891)),
        (
            YARN | {"factor": 1.0, "beta_slow": 32.0, "beta_fast": 33.0},
            YarnScaling(1.0, 64, 1.0, 33.0, 32.0),
        ),
    ],
)
def test_rope(parameters, scaling):
    config = transformers.LlamaConfig(
        hidden_size=256,
        num_attention_heads=2,
        max_position_embeddings=131_072,
        rope_parameters=dict(parameters),
    )
    theirs = modeling_llama.LlamaRotaryEmbedding(config)
    ours = config_from_hf(config.to_dict())
    assert ours.rope_theta == parameters["rope_theta"]
    assert ours.rope_scaling == scaling
    frequencies = rope_frequencies(128, ours.rope_theta, ours.rope_scaling)
    # Bit for bit where torch's own power is rounded to nearest: it may be off by a unit or two.
    np.testing.assert_allclose(frequencies, theirs.inv_freq.numpy(), rtol=2.5e-7, atol=0)

    x = np.random.default_rng(2).normal(size=(2, 40, 3, 128)).astype(np.float32)
    positions = np.stack([np.arange(40) * 3300, np.arange(40) % 7]).astype(np.int32)
    cos, sin = theirs(torch.tensor(x), torch.tensor(positions))
    turned, _ = modeling_llama.apply_rotary_pos_emb(
        torch.tensor(x), torch.tensor(x), cos, sin, unsqueeze_dim=2
    )
    actual = apply_rope(jnp.asarray(x), positions, frequencies, rope_gain(ours.rope_scaling))
    assert_close(actual, turned, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(pairs, kind, tmp_path):
    """Tensors bitwise as they were; a config transformers reads as it read the first."""
    theirs, folder, ours = pairs(kind)
    save_llama(ours, tmp_path / "saved")
    assert_equal_tensors(folder, tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", attn_implementation="eager"
    )
    assert type(again) is type(theirs)
    told = [m.config.to_dict() for m in (theirs, again)]
    for field in ("_name_or_path", "architectures", "max_window_layers", "dtype"):
        for one in told:
            one.pop(field, None)
    if kind.startswith("qwen2"):  # transformers derives it, we write it
        assert told[1].pop("head_dim") == 8
    assert told[0] == told[1]
    expected = llm_logits(theirs, IDS, ROWS, causal=True)[ON]
    assert_close(llm_logits(again, IDS, ROWS, causal=True)[ON], expected, 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_ours_run_in_torch(family, tmp_path):
    """From scratch and in bfloat16: nothing of it came from a folder."""
    config = dataclasses.replace(
        TINY,
        family=family,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        sliding_window=None,
        rope_scaling=YarnScaling(2.0, 8, 1.1),
        tie_embeddings=family in ("llama", "qwen2"),
    )
    graph, state = nnx.split(fresh(config))
    model = nnx.merge(graph, jax.tree.map(lambda w: w.astype(jnp.bfloat16), state))
    save_llama(model, tmp_path / "saved")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype=torch.float32, attn_implementation="eager"
    )
    assert transformers.AutoConfig.from_pretrained(tmp_path / "saved").dtype == torch.bfloat16
    ids = IDS % config.vocab_size
    for causal, actual in both_logits(*nnx.split(model), ids, ROWS, jnp.float32).items():
        expected = llm_logits(theirs, ids, ROWS, causal=causal)
        assert_close(actual[ON], expected[ON], 1e-4)
    assert load_llama(tmp_path / "saved").config == config


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama-3.2", "mistral-0.1", "qwen2", "qwen3"])
def test_dtypes_on_disk(kind, dtype, tmp_path):
    """Kept on request, bit for bit on the way out again; otherwise widened exactly."""
    low = torch_model(kind).to(getattr(torch, dtype))
    low.save_pretrained(tmp_path / "low")
    kept, widened = (load_llama(tmp_path / "low", jnp.dtype(d)) for d in (dtype, "float32"))
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a, np.float32), b),
        nnx.state(kept),
        nnx.state(widened),
    )
    assert widened.embedding[...].dtype == jnp.float32
    np.testing.assert_array_equal(
        widened.embedding[...], low.get_input_embeddings().weight.detach().float()
    )
    save_llama(kept, tmp_path / "saved")
    assert_equal_tensors(tmp_path / "low", tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    for (name, a), b in zip(low.named_parameters(), again.parameters(), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b), name


@pytest.mark.parametrize("form", ["sharded", "base model", "without prefix", "old constants"])
@pytest.mark.parametrize("kind", ["llama-2", "llama-3.2", "mistral-0.1", "qwen2.5", "qwen3-tied"])
def test_forms_on_disk(pairs, kind, form, tmp_path):
    """The same weights in other files: in several, under shorter names, beside a constant."""
    theirs, folder, ours = pairs(kind)
    tied = theirs.config.tie_word_embeddings
    if form == "sharded":
        theirs.save_pretrained(tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
    elif form == "base model":
        theirs.model.save_pretrained(tmp_path)  # AutoModel's files: no prefix, no output
    else:
        tensors = load_file(folder / "model.safetensors")
        if form == "without prefix":
            tensors = {name.removeprefix("model."): array for name, array in tensors.items()}
        else:
            for layer in range(2):
                name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
                tensors[name] = np.ones(4, np.float32)
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    if form == "base model" and not tied:
        with pytest.raises(ValueError, match=r"missing: lm_head\.weight$"):
            load_llama(tmp_path)
        return
    again = load_llama(tmp_path)
    assert again.config == ours.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(ours))


@pytest.mark.parametrize("kind", ["llama-3.1", "llama-linear", "llama-3", "qwen2.5", "mistral-0.1"])
def test_transformers_4_config(pairs, kind, tmp_path):
    """`rope_theta` beside `rope_scaling`, its kind under the older name `type` or the newer."""
    _, folder, ours = pairs(kind)
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind_of_rope = rope.pop("rope_type")
    for name in ("type", "rope_type"):
        scaling = None if kind_of_rope == "default" else rope | {name: kind_of_rope}
        config["rope_scaling"] = scaling
        (tmp_path / "config.json").write_text(json.dumps(config))
        theirs = transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters
        assert (theirs["rope_type"], theirs["rope_theta"]) == (kind_of_rope, ours.config.rope_theta)
        assert config_from_hf(config) == ours.config
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    assert check_llama(tmp_path) == ours.config


def test_tied_output_stored_alone_or_twice(pairs, tmp_path):
    _, folder, ours = pairs("llama-3.2")
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors.pop("model.embed_tokens.weight")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    for stored in (
        {"lm_head.weight": embedding},
        {"lm_head.weight": embedding, "model.embed_tokens.weight": embedding.copy()},
        {"embed_tokens.weight": embedding},
    ):
        without_prefix = {name.removeprefix("model."): a for name, a in tensors.items()}
        rest = without_prefix if "embed_tokens.weight" in stored else tensors
        save_file(rest | stored, tmp_path / "model.safetensors")
        np.testing.assert_array_equal(load_llama(tmp_path).embedding[...], embedding)
        assert ours.output is None

    save_file(
        tensors | {"lm_head.weight": embedding, "model.embed_tokens.weight": embedding + 1},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(ValueError, match=r"lm_head.weight differs .* tie_word_embeddings is true"):
        load_llama(tmp_path)


def rope(**values):
    return {"rope_parameters": values}


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "llama-3",
            rope(rope_type="longrope"),
            "longrope'; allowed: default, linear, llama3, yarn",
        ),
        ("llama-3", {"rope_scaling": {"type": "dynamic"}}, "rope_scaling.rope_type is 'dynamic'"),
        ("llama-3", rope(rope_type="su"), "rope_parameters.rope_type is 'su'; allowed: default"),
        ("llama-3", rope(full_attention={}), "one set of values for all layers"),
        ("llama-3", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5; only 1"),
        ("llama-3", {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is None"),
        ("llama-3", rope(rope_theta=1), "rope_theta is 1; it must be a number above 1"),
        ("llama-3", rope(rope_theta="1e4"), "rope_theta is '1e4'; it must be a number"),
        ("llama-3.1", rope(**LLAMA3 | {"low_freq_factor": 4}), "low_freq_factor is 4.0; .* below"),
        ("qwen2.5", rope(**YARN | {"beta_slow": 64}), "beta_slow is 64.0; .* below beta_fast, 32"),
        ("qwen2.5", rope(**YARN | {"truncate": "no"}), "truncate is 'no'; it must be true or fal"),
        ("qwen2.5", rope(**YARN | {"attention_factor": 0}), "attention_factor is 0; .* above 0"),
        (
            "qwen2.5",
            rope(**YARN | {"original_max_position_embeddings": 6.5}),
            r"original_max_position_embeddings is 6\.5; it must be a whole number",
        ),
        ("llama-3", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
        ("llama-3", {"attention_bias": True}, "attention_bias is True; only false"),
        ("llama-3", {"mlp_bias": True}, "mlp_bias is True; only false"),
        ("llama-3", {"quantization_config": {"bits": 4}}, "quantised"),
        ("llama-3", {"num_key_value_heads": 3}, "num_attention_heads is 4; .* of num_key_val"),
        (
            "qwen2",
            {"num_attention_heads": 5, "head_dim": None},
            "hidden_size is 32; .* of num_att",
        ),
        ("llama-3", {"head_dim": 7}, "head_dim is 7; rotary positions need an even number"),
        ("llama-3", {"intermediate_size": None}, "intermediate_size is None; .* whole number"),
        ("llama-3", {"rms_norm_eps": 0}, "rms_norm_eps is 0; it must be a number above 0"),
        *(
            ("llama-3", {"model_type": other}, f"model_type is '{other}'; it may be llama or mis")
            for other in ("gemma", "gemma2", "phi3", "mixtral", "qwen2_moe", "ministral")
        ),
        ("llama-3", {"num_hidden_layers": 3}, "missing: model.layers.2.input_layernorm.weight"),
        ("llama-3", {"num_hidden_layers": 1}, "unexpected: model.layers.1.input_layernorm.weight"),
        ("llama-3", {"vocab_size": 60}, r"embed_tokens.weight is \[50, 32\], by the config \[60, "),
        ("llama-3", {"model_type": "qwen2"}, "missing: model.layers.0.self_attn.k_proj.bias"),
        ("qwen2", {"model_type": "llama"}, "unexpected: model.layers.0.self_attn.k_proj.bias"),
        ("qwen3", {"model_type": "llama"}, "unexpected: model.layers.0.self_attn.k_norm.weight"),
        ("llama-3.2", {"tie_word_embeddings": False}, "missing: lm_head.weight"),
        ("llama-3", {"tie_word_embeddings": True}, "lm_head.weight differs from model.embed_tok"),
        ("mistral-0.1", {"sliding_window": 0}, "sliding_window is 0; it must be a whole number"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True; only false"),
        (
            "qwen3",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types has 'sliding_attention'; only 'full_attention' in every layer",
        ),
    ],
)
def test_what_does_not_fit_is_refused(pairs, kind, changes, message, tmp_path):
    _, folder, _ = pairs(kind)
    config = json.loads((folder / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    for read in (load_llama, check_llama):
        with pytest.raises(ValueError, match=message) as caught:
            read(tmp_path)
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_truncated_file_is_named(pairs, tmp_path):
    theirs, _, _ = pairs("llama-3")
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    cut = sorted(tmp_path.glob("*.safetensors"))[1]
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(ValueError, match=re.escape(str(cut)) + " is truncated"):
        load_llama(tmp_path)


TINY = LlamaConfig(
    vocab_size=20,
    width=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_width=4,
    ffn_width=24,
    sliding_window=3,
    family="mistral",
)


def fresh(config):
    """A model from scratch. The key's kind is the one that compiles fastest."""
    return Llama(config, nnx.Rngs(jax.random.key(0, impl="rbg")))


@functools.cache
def tiny_state():
    return nnx.state(fresh(TINY))


@functools.partial(jax.jit, static_argnums=0, static_argnames="causal", compiler_options=QUICK)
@functools.partial(jax.value_and_grad, argnums=1)
def value_and_gradients(graph, state, ids, segments, weights, *, causal):
    model = nnx.merge(graph, state)
    logits = model.logits(model.hidden(model.embed(ids), segments, causal=causal))
    return jnp.sum(jnp.tanh(logits) * (weights * (segments > 0))[:, :, None])


def loss_and_gradients(config, ids, segments, weights, *, causal):
    """Of one weighted sum of the logits at tokens; weights_BT scale the positions."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: fresh(config)))
    value, gradients = value_and_gradients(
        graph, tiny_state(), ids, segments, weights, causal=causal
    )
    return value, nnx.to_pure_dict(gradients)


@pytest.mark.parametrize("causal", [True, False])
def test_packed_equals_unpacked(causal):
    """Three texts in one row, beside two rows of padding, and then a row each."""
    segments, ids, weights = np.zeros((3, 3, 12))
    segments[0] = [1, 1, 1, 1, 1, 2, 2, 0, 3, 3, 3, 0]
    random = np.random.default_rng(4)
    ids[0], weights[0] = random.integers(0, 20, 12), random.normal(size=12)
    packed = [ids, segments, weights]
    unpacked = np.zeros((3, 3, 12))
    for row, segment in enumerate((1, 2, 3)):
        at = np.flatnonzero(segments[0] == segment)
        unpacked[:, row, : len(at)] = ids[0, at], np.ones(len(at)), weights[0, at]
    kinds = (np.int32, np.int32, np.float32)
    one, other = (
        loss_and_gradients(
            TINY, *(a.astype(kind) for a, kind in zip(rows, kinds, strict=True)), causal=causal
        )
        for rows in (packed, unpacked)
    )
    assert np.abs(one[1]["layers"]["q"]["kernel"]).max() > 0.01
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), one, other)


@pytest.mark.slow
def test_unrolled_and_remat_compute_the_same():
    ids = np.random.default_rng(5).integers(0, 20, (3, 12)).astype(np.int32)
    arguments = (ids, np.ones((3, 12), np.int32), np.ones((3, 12), np.float32))
    plain = loss_and_gradients(TINY, *arguments, causal=True)
    for changes in (
        {"unroll_layers": True},
        {"remat": "full"},
        {"remat": "dots"},
        {"unroll_layers": True, "remat": "full"},
    ):
        config = dataclasses.replace(TINY, **changes)
        changed = loss_and_gradients(config, *arguments, causal=True)
        jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), plain, changed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads is 4; .* num_kv_heads, 3"),
        ({"head_width": 5}, "head_width is 5"),
        ({"remat": "some"}, "remat is 'some'; allowed: none, full, dots"),
        ({"family": "gemma"}, "family is 'gemma'; allowed: llama, mistral"),
        ({"family": "llama"}, "sliding_window is 3 for family 'llama'"),
        ({"qkv_bias": True}, "qkv_bias is True for family 'mistral'"),
    ],
)
def test_config_is_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


@pytest.mark.slow
def test_fresh_logits_are_of_size_one():
    """From scratch the first loss is near ln V, at any width and depth."""
    for width, layers in ((32, 6), (128, 2)):
        config = LlamaConfig(200, width, layers, 4, 2, width // 4, 2 * width, tie_embeddings=True)
        model = fresh(config)
        ids = np.random.default_rng(6).integers(0, 200, (4, 8))
        ones = np.ones((4, 8), np.int32)
        assert 0.7 < both_logits(*nnx.split(model), ids, ones, jnp.float32)[True].std() < 1.3


@st.composite
def configs(draw):
    family = draw(st.sampled_from(FAMILIES))
    num_kv_heads = draw(st.integers(1, 4))
    scalings = st.one_of(
        st.none(),
        st.builds(LinearScaling, st.floats(1, 8)),
        st.builds(
            Llama3Scaling, st.floats(1, 8), st.floats(0.5, 2), st.floats(3, 8), st.integers(16, 64)
        ),
        st.builds(
            YarnScaling,
            st.floats(1, 8),
            st.integers(16, 64),
            st.floats(0.5, 2),
            st.floats(16, 64),
            st.floats(0.5, 4),
            st.booleans(),
        ),
    )
    return LlamaConfig(
        vocab_size=draw(st.integers(1, 99)),
        width=draw(st.integers(1, 64)),
        num_layers=draw(st.integers(1, 3)),
        num_heads=num_kv_heads * draw(st.integers(1, 3)),
        num_kv_heads=num_kv_heads,
        head_width=2 * draw(st.integers(1, 8)),
        ffn_width=draw(st.integers(1, 64)),
        rms_eps=draw(st.sampled_from([1e-5, 1e-6])),
        rope_theta=draw(st.floats(1e3, 1e6)),
        rope_scaling=draw(scalings),
        tie_embeddings=draw(st.booleans()),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        sliding_window=draw(st.none() | st.integers(1, 9)) if family == "mistral" else None,
        family=family,
        max_positions=draw(st.integers(65, 4096)),
        bos_id=draw(st.none() | st.integers(0, 9)),
        eos_ids=tuple(draw(st.lists(st.integers(0, 9), max_size=3))),
        pad_id=draw(st.none() | st.integers(0, 9)),
    )


@given(configs())
@settings(max_examples=100, deadline=None)
def test_config_round_trip(config):
    written = json.loads(json.dumps(config_to_hf(config)))
    assert config_from_hf(written) == config
    rope = written.pop("rope_parameters")  # what transformers 4 reads is enough
    assert config_from_hf(written) == config
    written |= {"rope_parameters": rope}  # and so is what transformers 5 reads
    del written["rope_theta"], written["rope_scaling"]
    assert config_from_hf(written) == config
