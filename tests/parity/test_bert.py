"""BERT, XLM-R and RoBERTa against torch, on tiny random models: states and folders.

B rows, S positions, E width.
"""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from mtllm_jax import sharding
from mtllm_jax.config import Mesh
from mtllm_jax.hf.bert import check_bert, load_bert, save_bert
from mtllm_jax.models.bert import ACTIVATIONS, Bert, BertConfig

torch = pytest.importorskip("torch", reason="parity needs torch (the `test` extra on Python 3.11)")
transformers = pytest.importorskip("transformers")
from safetensors.numpy import load_file, save_file  # noqa: E402

CLASSES = {"bert": "Bert", "xlm-roberta": "XLMRoberta", "roberta": "Roberta"}
FAMILIES = tuple(CLASSES)
QUICK = {"xla_backend_optimization_level": 0}  # compiles in half the time
PAD, VOCAB = 3, 50
# Whole, right-padded, left-padded, one token, and padding in the middle of a row.
SEGMENTS = np.array(
    [
        [1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 1, 1, 1],
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 1, 0],
    ],
    np.int32,
)
ON = SEGMENTS > 0
IDS = np.where(ON, np.random.default_rng(0).integers(4, VOCAB, SEGMENTS.shape), PAD).astype(
    np.int32
)


def torch_model(family, with_head=False, **changes):
    """Every parameter is random, biases and norms too: none can be forgotten unnoticed."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "intermediate_size": 24, "pad_token_id": PAD}
    sizes |= {"max_position_embeddings": 20, "layer_norm_eps": 1e-5, "type_vocab_size": 2}
    config = getattr(transformers, f"{CLASSES[family]}Config")(**(sizes | changes))
    kind = "ForMaskedLM" if with_head else "Model"
    model = getattr(transformers, f"{CLASSES[family]}{kind}")(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.4 + ("Norm.weight" in name))
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def reference(family):
    return torch_model(family)


@pytest.fixture(scope="module")
def folder(reference, tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "model"
    reference.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return load_bert(folder)


def as_torch(array):
    return torch.from_numpy(np.asarray(array).astype(np.int64))


def torch_states(reference, ids=IDS, segments=SEGMENTS):
    """BERT's own positions count padding at the left, ours do not: they are passed. RoBERTa's
    are left to it: that they begin behind the padding's id is what is to be found out."""
    positions = {}
    if reference.config.model_type == "bert":
        counted = np.maximum(np.cumsum(segments > 0, axis=1) - 1, 0)
        positions = {"position_ids": as_torch(counted)}
    with torch.no_grad():
        return reference(
            input_ids=as_torch(ids), attention_mask=as_torch(segments > 0), **positions
        ).last_hidden_state


@functools.partial(jax.jit, static_argnums=(0, 4), compiler_options=QUICK)
def encode(graph, state, ids, segments, dtype=jnp.float32):
    return nnx.merge(graph, state).encode(ids, segments, dtype)


def our_states(model, ids=IDS, segments=SEGMENTS, dtype=jnp.float32):
    return np.asarray(encode(*nnx.split(model), ids, segments, dtype), np.float32)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def gradient_of_weighted_states(graph, state, weight, ids, segments):
    def weighted(state):
        return jnp.sum(nnx.merge(graph, state).encode(ids, segments) * weight)

    return jax.grad(weighted)(state)


def assert_close_trees(a, b):
    """Within 1e-5 of each tensor's largest number; some (of key biases) are 0 but for rounding."""
    rounding = 1e-6 * max(float(jnp.max(jnp.abs(y))) for y in jax.tree.leaves(b))
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        atol = 1e-5 * float(jnp.max(jnp.abs(y))) + rounding
        np.testing.assert_allclose(x, y, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))


# --- forward passes -------------------------------------------------------------------------------


def test_embeddings(reference, model):
    ids = IDS[:1]
    with torch.no_grad():
        theirs = reference.embeddings(as_torch(ids)).numpy()
    positions = np.arange(ids.shape[1])[None]
    np.testing.assert_allclose(model.embed(ids, positions, jnp.float32), theirs, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_layer(activation, tmp_path):
    reference = torch_model("bert", hidden_act=activation)
    reference.save_pretrained(tmp_path)
    graph, state = nnx.split(load_bert(tmp_path).layers)
    layer = nnx.merge(graph, jax.tree.map(lambda x: x[1], state))
    h = np.random.default_rng(1).normal(size=(3, 6, 16)).astype(np.float32)
    with torch.no_grad():
        theirs = reference.encoder.layer[1](torch.from_numpy(h), None).numpy()
    ours = jax.jit(layer)(h, np.ones((3, 6), np.int32), None)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_states_at_every_kind_of_padding(reference, model):
    theirs = torch_states(reference).numpy()
    np.testing.assert_allclose(our_states(model)[ON], theirs[ON], atol=1e-4)


def test_a_text_of_as_many_tokens_as_there_are_positions(family, reference, model):
    length = 20 - (0 if family == "bert" else PAD + 1)
    assert model.config.max_positions == length
    ids = np.random.default_rng(2).integers(4, VOCAB, (1, length)).astype(np.int32)
    theirs = torch_states(reference, ids, np.ones_like(ids)).numpy()
    np.testing.assert_allclose(our_states(model, ids, np.ones_like(ids)), theirs, atol=1e-4)


def test_bfloat16_deviates_no_more_than_torchs_own(family, reference, model):
    exact = torch_states(reference).numpy()[ON]
    half = torch_states(torch_model(family).to(torch.bfloat16)).float().numpy()[ON]
    ours = our_states(model, dtype=jnp.bfloat16)[ON]
    assert np.abs(ours - exact).mean() <= 1.2 * np.abs(half - exact).mean()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["roberta"], indirect=True)
def test_scanned_unrolled_and_rematerialised_layers_agree(folder, model):
    unrolled = our_states(load_bert(folder, unroll_layers=True))
    np.testing.assert_allclose(unrolled[ON], our_states(model)[ON], atol=1e-5)
    weight = np.random.default_rng(3).normal(size=(*SEGMENTS.shape, 16)) * ON[:, :, None]
    gradient, same = (
        gradient_of_weighted_states(*nnx.split(m), weight.astype(np.float32), IDS, SEGMENTS)
        for m in (model, load_bert(folder, remat="dots"))
    )
    assert_close_trees(gradient, same)


@pytest.mark.parametrize("family", ["roberta"], indirect=True)
def test_packed_texts_equal_texts_alone(model):
    """States, and the gradients of all parameters, for two texts in a row, padding between."""
    segments = np.array([[1, 1, 1, 1, 1, 0, 0, 2, 2, 2, 0]], np.int32)
    ids = np.random.default_rng(4).integers(4, VOCAB, segments.shape).astype(np.int32)
    weight = np.random.default_rng(5).normal(size=(1, 11, 16)).astype(np.float32)
    weight[segments == 0] = 0.0

    def alone(n):
        """Text n at the left of a row of the same width."""
        row = [np.zeros_like(array) for array in (weight, ids, segments)]
        length = (segments == n).sum()
        for to, array in zip(row, (weight, ids, np.ones_like(segments)), strict=True):
            to[:, :length] = array[segments == n]
        return our_states(model, *row[1:])[0, :length], row

    packed = our_states(model, ids, segments)
    gradient = gradient_of_weighted_states(*nnx.split(model), weight, ids, segments)
    apart = []
    for n in (1, 2):
        states, row = alone(n)
        np.testing.assert_allclose(packed[segments == n], states, atol=1e-5)
        apart.append(gradient_of_weighted_states(*nnx.split(model), *row))
    assert_close_trees(gradient, jax.tree.map(jnp.add, *apart))


@pytest.mark.slow
@given(
    family=st.sampled_from(FAMILIES),
    heads=st.integers(1, 5),
    head_width=st.integers(1, 9),
    layers=st.integers(1, 3),
    ffn=st.integers(1, 40),
    types=st.integers(1, 3),
    pad=st.integers(0, 3),
    eps=st.sampled_from([1e-12, 1e-5, 1e-2]),
    activation=st.sampled_from(list(ACTIVATIONS)),
)
@settings(deadline=None, max_examples=6)
def test_any_config(
    tmp_path_factory, family, heads, head_width, layers, ffn, types, pad, eps, activation
):
    reference = torch_model(
        family,
        hidden_size=heads * head_width,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        intermediate_size=ffn,
        type_vocab_size=types,
        pad_token_id=pad,
        layer_norm_eps=eps,
        hidden_act=activation,
    )
    path = tmp_path_factory.mktemp("any")
    reference.save_pretrained(path / "in")
    model = load_bert(path / "in")
    ids = np.where(ON, IDS, pad).astype(np.int32)
    theirs = torch_states(reference, ids).numpy()
    np.testing.assert_allclose(our_states(model, ids)[ON], theirs[ON], atol=1e-4)
    save_bert(model, path / "out")
    assert load_bert(path / "out").config == model.config
    assert_same_tensors(path / "in", path / "out")


def test_a_large_model_is_laid_over_a_mesh():
    """XLM-R base in shapes alone."""
    sizes = BertConfig(250_002, 768, 12, 12, 3072, 514, 1, pad_id=1, family="xlm-roberta")
    state = nnx.state(nnx.eval_shape(lambda: Bert(sizes, nnx.Rngs(0))))
    laid = sharding.shardings(state, sharding.make_mesh(Mesh(data=1, fsdp=4, tensor=2)))
    specs = {
        ".".join(map(str, path)): leaf.get_raw_value().spec
        for path, leaf in nnx.to_flat_state(laid)
    }
    assert specs["embedding_VE"] == P("tensor", "fsdp")
    assert specs["position_PE"] == P(None, "fsdp")
    assert specs["layers.attention.query.kernel"] == P(None, "fsdp", "tensor")
    assert specs["layers.ffn_out.kernel"] == P(None, "tensor", "fsdp")
    assert specs["type_YE"] == specs["embedding_norm.scale"] == P()


# --- folders --------------------------------------------------------------------------------------


def assert_same_tensors(a, b):
    """All tensors of `b` bit for bit, and of `a` all but the pooler's."""
    theirs, ours = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert {name for name in theirs if not name.startswith("pooler.")} == ours.keys()
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype
        assert array.tobytes() == theirs[name].tobytes(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_bitwise(dtype, reference, family, tmp_path):
    torch_model(family).to(getattr(torch, dtype)).save_pretrained(tmp_path / "in")
    save_bert(load_bert(tmp_path / "in", dtype=dtype), tmp_path / "out")
    assert_same_tensors(tmp_path / "in", tmp_path / "out")
    again = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert type(again) is type(reference) and str(again.dtype) == f"torch.{dtype}"


def test_a_model_of_ours_runs_in_torch(tmp_path):
    config = BertConfig(VOCAB, 16, 2, 2, 32, 12, pad_id=PAD, family="xlm-roberta")
    model = Bert(config, nnx.Rngs(jax.random.key(3, impl="rbg")))
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "tokenizer_config.json").write_text("{}")
    save_bert(model, tmp_path / "to", tokenizer_files_from=tmp_path / "from")
    assert (tmp_path / "to" / "tokenizer_config.json").read_text() == "{}"
    assert check_bert(tmp_path / "to") == load_bert(tmp_path / "to").config == config
    theirs = torch_states(transformers.AutoModel.from_pretrained(tmp_path / "to").eval()).numpy()
    np.testing.assert_allclose(our_states(model)[ON], theirs[ON], atol=1e-4)


def test_checkpoints_with_a_head(family, tmp_path):
    """Their encoder lies behind a prefix, the head's tensors are left alone."""
    reference = torch_model(family, with_head=True)
    reference.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    prefix = "bert." if family == "bert" else "roberta."
    assert any(name.startswith(prefix) for name in weights)
    assert any(not name.startswith(prefix) for name in weights)
    weights[f"{prefix}embeddings.position_ids"] = np.arange(20)[None]
    weights[f"{prefix}pooler.dense.weight"] = np.zeros((16, 16), np.float32)
    save_file(weights, tmp_path / "model.safetensors")
    theirs = torch_states(reference.base_model).numpy()
    np.testing.assert_allclose(our_states(load_bert(tmp_path))[ON], theirs[ON], atol=1e-4)


def test_layer_norms_by_their_old_names(folder, model, tmp_path):
    shutil.copytree(folder, tmp_path / "old")
    weights = load_file(folder / "model.safetensors")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new in [name for name in weights if "LayerNorm" in name]:
        ending = ".".join(new.split(".")[-2:])
        weights[new.replace(ending, old[ending])] = weights.pop(new)
    save_file(weights, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    jax.tree.map(
        np.testing.assert_array_equal, nnx.state(model), nnx.state(load_bert(tmp_path / "old"))
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hidden_act": "silu"},
            "hidden_act is 'silu'; it may be one of ..gelu', 'gelu_new', 'relu'",
        ),
        ({"model_type": "t5"}, "model_type is 't5'; it may be bert or xlm-roberta or roberta"),
        ({"num_attention_heads": 3}, "num_attention_heads is 3; it must divide hidden_size, 16"),
        ({"hidden_size": None}, "hidden_size is None; it must be int"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps is 'small'; it must be float"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"is_decoder": True}, "is_decoder is True; it may be False"),
        ({"pad_token_id": None}, "pad_token_id is None; it must be int"),
        ({"type_vocab_size": 0}, "type_vocab_size is 0; it must be at least 1"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"vocab_size": 51}, r"word_embeddings\.weight is \[50, 16\], by the config \[51, 16\]"),
        ({"num_hidden_layers": 3}, r"missing: encoder\.layer\.2\..* and 12 more"),
        ({"num_hidden_layers": 1}, r"unexpected: encoder\.layer\.1\..* and 12 more"),
    ],
)
def test_a_config_that_does_not_fit(change, message, tmp_path):
    torch_model("bert").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    for read in (load_bert, check_bert):
        with pytest.raises(ValueError, match=message) as error:
            read(tmp_path)
        assert "\n" not in str(error.value)


def test_positions_that_padding_uses_up(tmp_path):
    torch_model("roberta", max_position_embeddings=4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="max_position_embeddings is 4; it must be at least 5"):
        load_bert(tmp_path)
