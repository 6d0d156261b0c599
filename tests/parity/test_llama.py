"""The Llama family against PyTorch: tiny random models, written by transformers, read by us.

B rows, T positions, D width, V vocabulary.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from mtllm_jax.hf.llama import config_from_hf, config_to_hf, load_llama, save_llama
from mtllm_jax.models.layers import RMSNorm
from mtllm_jax.models.llama import FAMILIES, Llama, LlamaConfig
from mtllm_jax.ops.rope import LinearScaling, Llama3Scaling, apply_rope, rope_frequencies

torch = pytest.importorskip("torch", reason="parity needs torch (the `test` extra on Python 3.11)")
transformers = pytest.importorskip("transformers")
from safetensors.numpy import load_file, save_file  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 500_000.0, "factor": 4.0}
# kind → (family, what differs from the common tiny config)
KINDS = {
    "untied": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "llama3": ("llama", {"rope_parameters": LLAMA3, "num_key_value_heads": 1}),
    "linear": ("llama", {"rope_parameters": LINEAR, "num_key_value_heads": 4}),
    "wide-heads": ("llama", {"head_dim": 16, "eos_token_id": [2, 5]}),
    "mistral-window": ("mistral", {"sliding_window": 3}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
}
CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
# Whole, right-padded, left-padded, one token, and padding in the middle of a row.
SEGMENTS = np.array(
    [
        [1, 1, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 1, 1, 1, 1],
        [1, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 1, 1, 1, 1],
    ],
    np.int32,
)
IDS = np.random.default_rng(0).integers(0, 50, SEGMENTS.shape).astype(np.int32)


def torch_model(kind):
    """A tiny model all of whose weights are random, norms and biases too, with logits near 1."""
    family, changes = KINDS[kind]
    common = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0},
    }
    config = getattr(transformers, CLASSES[family] + "Config")(**common | changes)
    config._attn_implementation = "eager"
    model = getattr(transformers, CLASSES[family] + "ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 2:
                weight.copy_(noise * weight.shape[1] ** -0.5)
            else:
                weight.copy_(0.1 * noise + ("norm" in name))
    return model


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


def our_logits(model, ids, segments, *, causal, dtype=jnp.float32):
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, ids, segments):
        model = nnx.merge(graph, state)
        return model.logits(model.hidden(model.embed(ids, dtype), segments, causal=causal))

    return np.asarray(run(state, ids, segments))


def torch_logits(model, ids, segments, *, causal):
    """Torch is told by a mask and by positions what we derive from segments (one text a row)."""
    mask = torch.tensor(segments > 0)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    if not causal:  # a ready 4-D mask is used as it is: every query sees the tokens of its row
        zero = torch.zeros((), dtype=model.dtype)
        lowest = torch.finfo(model.dtype).min
        mask = torch.where(mask[:, None, None, :], zero, lowest).expand(-1, 1, ids.shape[1], -1)
    with torch.no_grad():
        ids = torch.tensor(ids, dtype=torch.long)
        return model(input_ids=ids, attention_mask=mask, position_ids=positions).logits


def assert_close(actual, expected, tolerance):
    np.testing.assert_allclose(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_logits(pairs, kind):
    theirs, _, ours = pairs(kind)
    expected = torch_logits(theirs, IDS, SEGMENTS, causal=True).numpy()
    actual = our_logits(ours, IDS, SEGMENTS, causal=True)
    assert np.abs(expected).max() > 1
    assert_close(actual[SEGMENTS > 0], expected[SEGMENTS > 0], 1e-4)


@pytest.mark.parametrize("kind", ["untied", "llama3", "qwen3"])
def test_bidirectional_logits(pairs, kind):
    theirs, _, ours = pairs(kind)
    expected = torch_logits(theirs, IDS, SEGMENTS, causal=False).numpy()
    actual = our_logits(ours, IDS, SEGMENTS, causal=False)
    assert_close(actual[SEGMENTS > 0], expected[SEGMENTS > 0], 1e-4)


def test_bfloat16_is_as_near_as_torch(pairs):
    theirs, _, ours = pairs("llama3")
    exact = torch_logits(theirs, IDS, SEGMENTS, causal=True).numpy()
    low = torch_model("llama3").to(torch.bfloat16)
    theirs_low = torch_logits(low, IDS, SEGMENTS, causal=True).float().numpy()
    ours_low = our_logits(ours, IDS, SEGMENTS, causal=True, dtype=jnp.bfloat16)
    is_token = SEGMENTS > 0
    allowed = np.abs(theirs_low - exact)[is_token].mean()
    assert np.abs(ours_low - exact)[is_token].mean() <= allowed


def test_norm():
    x = np.random.default_rng(1).normal(size=(2, 3, 8)).astype(np.float32)
    ours = RMSNorm(8, 1e-5, nnx.Rngs(0))
    ours.scale[...] = jnp.linspace(0.5, 2.0, 8)
    theirs = modeling_llama.LlamaRMSNorm(8, 1e-5)
    theirs.weight.data = torch.tensor(np.asarray(ours.scale[...]))
    assert_close(ours(jnp.asarray(x)), theirs(torch.tensor(x)).detach().numpy(), 1e-5)


@pytest.mark.parametrize(
    ("parameters", "theta", "scaling"),
    [
        ({"rope_type": "default", "rope_theta": 500_000.0}, 500_000.0, None),
        (LINEAR, 500_000.0, LinearScaling(4.0)),
        (LLAMA3, 10_000.0, Llama3Scaling(8.0, 1.0, 4.0, 32)),
        (
            LLAMA3 | {"rope_theta": 500_000.0, "original_max_position_embeddings": 8192},
            500_000.0,
            Llama3Scaling(8.0, 1.0, 4.0, 8192),  # Llama 3.1
        ),
    ],
)
def test_rope(parameters, theta, scaling):
    config = transformers.LlamaConfig(
        hidden_size=256,
        num_attention_heads=2,
        max_position_embeddings=131_072,
        rope_parameters=dict(parameters),
    )
    theirs = modeling_llama.LlamaRotaryEmbedding(config)
    frequencies = rope_frequencies(128, theta, scaling)
    np.testing.assert_allclose(frequencies, theirs.inv_freq.numpy(), rtol=5e-7, atol=0)

    x = np.random.default_rng(2).normal(size=(2, 40, 3, 128)).astype(np.float32)
    positions = np.stack([np.arange(40), np.arange(40) % 7]).astype(np.int32)
    cos, sin = theirs(torch.tensor(x), torch.tensor(positions))
    turned, _ = modeling_llama.apply_rotary_pos_emb(
        torch.tensor(x), torch.tensor(x), cos, sin, unsqueeze_dim=2
    )
    assert_close(apply_rope(jnp.asarray(x), positions, frequencies), turned.numpy(), 1e-5)


@pytest.mark.parametrize("kind", ["llama3", "qwen2", "qwen3"])
def test_layer(pairs, kind):
    theirs, _, ours = pairs(kind)
    x = np.random.default_rng(3).normal(size=(2, 9, 32)).astype(np.float32)
    positions = np.tile(np.arange(9, dtype=np.int32)[None], (2, 1))
    graph, state = nnx.split(ours.layers)
    second = nnx.merge(graph, jax.tree.map(lambda w: w[1], state))
    run = jax.jit(lambda x: second(x, np.ones((2, 9), np.int32), positions, causal=True))
    actual = run(x)
    rotary = theirs.model.rotary_emb(torch.tensor(x), torch.tensor(positions))
    mask = torch.full((9, 9), torch.finfo(torch.float32).min).triu(1).expand(2, 1, 9, 9)
    with torch.no_grad():
        expected = theirs.model.layers[1](
            torch.tensor(x), attention_mask=mask, position_embeddings=rotary
        )
    assert_close(actual, expected.numpy(), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(pairs, kind, tmp_path):
    """Tensors bitwise as they were; a config transformers reads as it read the first."""
    theirs, folder, ours = pairs(kind)
    save_llama(ours, tmp_path / "saved")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "saved"))
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(array, after[name], strict=True, err_msg=name)

    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(again) is type(theirs)
    told = [m.config.to_dict() for m in (theirs, again)]
    for field in ("_name_or_path", "architectures", "max_window_layers", "dtype"):
        for one in told:
            one.pop(field, None)
    if kind == "qwen2":  # transformers derives it, we write it
        assert told[1].pop("head_dim") == 8
    assert told[0] == told[1]
    is_token = SEGMENTS > 0
    expected = torch_logits(theirs, IDS, SEGMENTS, causal=True)[is_token]
    assert_close(torch_logits(again, IDS, SEGMENTS, causal=True)[is_token], expected, 1e-5)


def test_bfloat16_on_disk(tmp_path):
    low = torch_model("tied").to(torch.bfloat16)
    low.save_pretrained(tmp_path / "low")
    kept, widened = (load_llama(tmp_path / "low", dtype) for dtype in (jnp.bfloat16, jnp.float32))
    assert kept.embedding[...].dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        kept.embedding[...].astype(jnp.float32), widened.embedding[...], strict=True
    )
    save_llama(kept, tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    for (name, a), b in zip(low.named_parameters(), again.parameters(), strict=True):
        assert a.dtype == b.dtype == torch.bfloat16
        assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", ["llama3", "linear", "untied"])
def test_transformers_4_config(pairs, kind, tmp_path):
    """`rope_theta` beside `rope_scaling`, its kind under the older name `type`."""
    _, folder, ours = pairs(kind)
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind_of_rope = rope.pop("rope_type")
    config["rope_scaling"] = None if kind_of_rope == "default" else rope | {"type": kind_of_rope}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    assert load_llama(tmp_path).config == ours.config


def test_tied_output_stored_alone_or_twice(pairs, tmp_path):
    _, folder, ours = pairs("tied")
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


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "untied",
            {"rope_parameters": {"rope_type": "longrope"}},
            "rope_type is 'longrope'; allowed: default, linear, llama3, yarn",
        ),
        ("untied", {"rope_scaling": {"type": "dynamic"}}, "rope_scaling.rope_type is 'dynamic'"),
        ("untied", {"rope_parameters": {"full_attention": {}}}, "one set of values for all layers"),
        ("untied", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5"),
        ("untied", {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is None"),
        ("untied", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
        ("untied", {"attention_bias": True}, "attention_bias is True"),
        ("untied", {"quantization_config": {"bits": 4}}, "quantised"),
        (
            "untied",
            {"num_key_value_heads": 3},
            "num_attention_heads is 4; .* of num_key_val",
        ),
        (
            "untied",
            {"num_attention_heads": 5, "head_dim": None},
            "hidden_size is 32; .* of num_att",
        ),
        ("untied", {"intermediate_size": None}, "intermediate_size is None"),
        ("untied", {"model_type": "gemma"}, "model_type is 'gemma'; it may be llama or mistral"),
        ("untied", {"num_hidden_layers": 3}, "missing: model.layers.2.input_layernorm.weight"),
        ("untied", {"num_hidden_layers": 1}, "unexpected: model.layers.1.input_layernorm.weight"),
        ("untied", {"vocab_size": 60}, r"embed_tokens.weight is \[50, 32\], by the config \[60, 3"),
        ("tied", {"tie_word_embeddings": False}, "missing: lm_head.weight"),
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
    with pytest.raises(ValueError, match=message) as caught:
        load_llama(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


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


@functools.partial(jax.jit, static_argnums=0, static_argnames="causal")
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


def test_fresh_logits_are_of_size_one():
    """From scratch the first loss is near ln V, at any width and depth."""
    for width, layers in ((32, 6), (128, 2)):
        config = LlamaConfig(200, width, layers, 4, 2, width // 4, 2 * width, tie_embeddings=True)
        model = fresh(config)
        ids = np.random.default_rng(6).integers(0, 200, (4, 8))
        logits = our_logits(model, ids, np.ones((4, 8), np.int32), causal=True)
        assert 0.7 < logits.std() < 1.3


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
