"""NLLB against torch's M2M100, on tiny random models: states, logits, translations, folders.

B rows, S encoder positions, T decoder positions, E width, V vocabulary.
"""

import dataclasses
import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from torch_models import (
    QUICK,
    additive_mask,
    assert_close,
    assert_equal_tensors,
    assert_no_further,
    m2m100,
    torch,
    transformers,
)

from mtllm_jax.decode import beam_translate, greedy_translate, translate
from mtllm_jax.hf.nllb import check_nllb, load_nllb, save_nllb
from mtllm_jax.models.layers import LayerNorm
from mtllm_jax.models.nllb import NLLB, NLLBConfig, sinusoids
from mtllm_jax.ops.largest import top_k

from safetensors.numpy import load_file, save_file  # isort: skip

PAD, EOS, VOCAB = 1, 2, 60

# What distinguishes the published sizes: feed-forward widths, depths and heads in proportion.
# M2M100 418M is shaped as NLLB 600M, M2M100 1.2B as NLLB 1.3B (distilled or not).
KINDS = {
    "600M": {"encoder_attention_heads": 4, "decoder_layers": 2}
    | {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
    "1.3B": {"encoder_attention_heads": 4, "encoder_layers": 3}
    | {"encoder_ffn_dim": 128, "decoder_ffn_dim": 128},
    "3.3B": {"d_model": 32, "encoder_attention_heads": 4, "encoder_layers": 3}
    | {"encoder_ffn_dim": 128, "decoder_ffn_dim": 128},
    "uneven": {},
    "unscaled": {"scale_embedding": False, "encoder_layers": 1, "decoder_layers": 1},
}

# 0 marks padding: at the right, at the left, in the middle, none, and a text of one token.
MASKS = np.array(
    [
        [1, 1, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 1, 1],
        [1, 1, 0, 0, 1, 1, 0],
        [1, 1, 1, 1, 1, 1, 1],
        [1, 0, 0, 0, 0, 0, 0],
    ],
    np.int32,
)
# The same many times over, and the decoder's padding where the encoder's is not.
ROWS = np.tile(MASKS, (8, 1))
TARGET_ROWS = np.roll(ROWS[::-1], 1, axis=0)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """kind → (torch model, its folder, our model), each made once."""
    made = {}

    def make(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            reference = m2m100(**KINDS[kind])
            reference.save_pretrained(folder)
            made[kind] = (reference, folder, load_nllb(folder))
        return made[kind]

    return make


@pytest.fixture(scope="module")
def reference(pairs):
    return pairs("uneven")[0]


@pytest.fixture(scope="module")
def folder(pairs):
    return pairs("uneven")[1]


@pytest.fixture(scope="module")
def model(pairs):
    return pairs("uneven")[2]


def random_rows(masks, seed):
    ids = np.random.default_rng(seed).integers(3, VOCAB, masks.shape).astype(np.int32)
    return np.where(masks, ids, PAD)


def as_torch(array):
    return torch.from_numpy(np.asarray(array).astype(np.int64))


def torch_outputs(reference, ids, masks, target_ids, target_masks):
    with torch.no_grad():
        return reference(
            input_ids=as_torch(ids),
            attention_mask=as_torch(masks),
            decoder_input_ids=as_torch(target_ids),
            decoder_attention_mask=as_torch(target_masks),
            output_hidden_states=True,
            use_cache=False,
        )


def forward(graph, state, ids, segments, target_ids, target_segments, dtype=jnp.float32):
    """(encoder states, decoder states, logits)"""
    model = nnx.merge(graph, state)
    memory = model.encode(ids, segments, dtype)
    h = model.decode(target_ids, target_segments, memory, segments)
    return memory, h, model.logits(h)


compiled = jax.jit(forward, static_argnums=(0, 6), compiler_options=QUICK)


def our_outputs(model, *text, dtype=jnp.float32):
    return compiled(*nnx.split(model), *text, dtype)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def gradient_of_weighted_logits(graph, state, weight, *text):
    def weighted(state):
        logits = forward(graph, state, *text)[2]
        return jnp.sum(logits * weight), logits

    (_, logits), gradient = jax.value_and_grad(weighted, has_aux=True)(state)
    return logits, gradient


@functools.partial(jax.jit, static_argnums=(0, 5), compiler_options=QUICK)
def greedy(graph, state, ids, segments, language_id, max_new_tokens):
    model = nnx.merge(graph, state)
    return greedy_translate(model, ids, segments, language_id, max_new_tokens)


def assert_close_trees(a, b):
    """Within 1e-5 of each tensor's largest number; some (of key biases) are 0 but for rounding."""
    rounding = 1e-6 * max(float(jnp.max(jnp.abs(y))) for y in jax.tree.leaves(b))
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        atol = 1e-5 * float(jnp.max(jnp.abs(y))) + rounding
        np.testing.assert_allclose(x, y, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))


def layer(stack, i):
    graph, state = nnx.split(stack)
    return nnx.merge(graph, jax.tree.map(lambda x: x[i], state))


# --- forward passes -------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [16, 30, 128])
def test_sinusoids(width):
    module = transformers.models.m2m_100.modeling_m2m_100.M2M100SinusoidalPositionalEmbedding
    theirs = module.get_embedding(1026, width, None)[2:].numpy()
    ours = jax.jit(sinusoids, static_argnums=1)(np.arange(2, 1026)[None], width)[0]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_layer_norm():
    x = np.random.default_rng(1).normal(size=(2, 3, 8)).astype(np.float32) + 0.5
    ours, theirs = LayerNorm(8, 1e-5, nnx.Rngs(0)), torch.nn.LayerNorm(8, 1e-5)
    ours.scale[...], ours.bias[...] = jnp.linspace(0.5, 2.0, 8), jnp.linspace(-1.0, 1.0, 8)
    theirs.weight.data, theirs.bias.data = (
        torch.tensor(np.asarray(w[...])) for w in (ours.scale, ours.bias)
    )
    assert_close(ours(jnp.asarray(x)), theirs(torch.tensor(x)).detach(), 1e-5)


@pytest.mark.parametrize("kind", ["600M", "uneven"])
def test_attention_feed_forward_and_layer(pairs, kind):
    """The last layer of both stacks and its blocks, at every kind of padding."""
    theirs, _, ours = pairs(kind)
    rng, target_masks = np.random.default_rng(0), TARGET_ROWS[: len(MASKS)]
    h, memory = rng.normal(size=(2, *MASKS.shape, 16)).astype(np.float32)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(h, memory):
        encoder, decoder = layer(ours.encoder, -1), layer(ours.decoder, -1)
        return {
            "encoder's attention": encoder.self_attention(h, h, MASKS, MASKS),
            "encoder's layer": encoder(h, MASKS, None),
            "feed-forward": encoder.feed_forward(h) - h,
            "decoder's attention": decoder.self_attention(
                h, h, target_masks, target_masks, causal=True
            ),
            "attention to the encoder": decoder.cross_attention(h, memory, target_masks, MASKS),
            "decoder's layer": decoder(h, target_masks, memory, MASKS, None),
        }

    encoder, decoder = theirs.model.encoder.layers[-1], theirs.model.decoder.layers[-1]
    th, tm = torch.tensor(h), torch.tensor(memory)
    mask = additive_mask(MASKS, MASKS, th.dtype)
    past = additive_mask(target_masks, target_masks, th.dtype, causal=True)
    across = additive_mask(target_masks, MASKS, th.dtype)
    with torch.no_grad():
        fed = encoder.fc2(encoder.activation_fn(encoder.fc1(encoder.final_layer_norm(th))))
        expected = {
            "encoder's attention": encoder.self_attn(th, attention_mask=mask)[0],
            "encoder's layer": encoder(th, mask),
            "feed-forward": fed,
            "decoder's attention": decoder.self_attn(th, attention_mask=past)[0],
            "attention to the encoder": decoder.encoder_attn(
                th, key_value_states=tm, attention_mask=across
            )[0],
            "decoder's layer": decoder(th, past, tm, across),
        }
    actual = run(h, memory)
    assert actual.keys() == expected.keys()
    for name, array in actual.items():
        where = (MASKS if "encoder's" in name else target_masks) > 0
        assert_close(array[where], expected[name][where], 1e-5)


def torch_states(reference, *text):
    """(encoder states, decoder states, logits), float32."""
    outputs = torch_outputs(reference, *text)
    found = outputs.encoder_last_hidden_state, outputs.decoder_hidden_states[-1], outputs.logits
    return [array.float().numpy() for array in found]


@pytest.mark.parametrize("kind", KINDS)
def test_states_and_logits_at_every_kind_of_padding(pairs, kind):
    """In float32, and in bfloat16 no further from that than torch's own."""
    theirs, folder, ours = pairs(kind)
    text = random_rows(ROWS, 0), ROWS, random_rows(TARGET_ROWS, 1), TARGET_ROWS
    exact = torch_states(theirs, *text)
    low = (
        type(theirs)
        .from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
        .eval()
    )
    theirs_low = torch_states(low, *text)
    ours_low = our_outputs(load_nllb(folder, dtype=jnp.bfloat16), *text, dtype=jnp.bfloat16)
    for i, array in enumerate(our_outputs(ours, *text)):
        on = (TARGET_ROWS if i else ROWS) > 0
        assert np.abs(exact[i]).max() > 1
        assert_close(array[on], exact[i][on], 1e-4)
        assert_no_further(ours_low[i][on], theirs_low[i][on], exact[i][on])


@pytest.mark.slow
def test_scanned_unrolled_and_rematerialised_layers_agree(folder, model):
    text = (random_rows(MASKS, 3), MASKS) * 2
    unrolled = our_outputs(load_nllb(folder, unroll_layers=True), *text)
    for a, b in zip(our_outputs(model, *text), unrolled, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    rematerialised = load_nllb(folder, remat="dots")
    _, gradient = gradient_of_weighted_logits(*nnx.split(model), *two_texts())
    _, same = gradient_of_weighted_logits(*nnx.split(rematerialised), *two_texts())
    assert_close_trees(gradient, same)


# --- packing --------------------------------------------------------------------------------------


def two_texts():
    """A row with padding between the texts: weights of logits, ids, segments, the decoder's too."""
    segments = np.array([[1, 1, 1, 1, 1, 0, 0, 2, 2, 2, 0]], np.int32)
    target_segments = np.array([[1, 1, 1, 0, 2, 2, 2, 2, 2, 2]], np.int32)
    ids, target_ids = random_rows(segments, 4), random_rows(target_segments, 5)
    weight = np.random.default_rng(4).normal(size=(1, 10, VOCAB)).astype(np.float32)
    weight[target_segments == 0] = 0.0
    return weight, ids, segments, target_ids, target_segments


@pytest.mark.slow
def test_packed_texts_equal_texts_alone(model):
    """Logits, and the gradients of all parameters."""
    weight, ids, segments, target_ids, target_segments = two_texts()

    def alone(n):
        """Text n at the left of rows of the same widths."""
        row = [np.zeros_like(a) for a in (weight, ids, segments, target_ids, target_segments)]
        s, t = (segments == n).sum(), (target_segments == n).sum()
        row[0][:, :t] = weight[target_segments == n]
        row[1][:, :s], row[2][:, :s] = ids[segments == n], 1
        row[3][:, :t], row[4][:, :t] = target_ids[target_segments == n], 1
        logits, gradient = gradient_of_weighted_logits(*nnx.split(model), *row)
        return logits[0, :t], gradient

    packed, gradient = gradient_of_weighted_logits(
        *nnx.split(model), weight, ids, segments, target_ids, target_segments
    )
    (first, first_gradient), (second, second_gradient) = alone(1), alone(2)
    np.testing.assert_allclose(packed[target_segments == 1], first, atol=1e-5)
    np.testing.assert_allclose(packed[target_segments == 2], second, atol=1e-5)
    assert_close_trees(gradient, jax.tree.map(jnp.add, first_gradient, second_gradient))


# --- translation ----------------------------------------------------------------------------------


def test_greedy_translation_is_that_of_generate(tmp_path):
    """Token for token on 50 texts, among them such that end and such that are cut off."""
    reference = m2m100(gain=0.6)  # translations then differ from text to text
    reference.save_pretrained(tmp_path)
    model = load_nllb(tmp_path)
    lengths = np.random.default_rng(5).integers(1, 12, 50)
    masks = (np.arange(12)[None] < lengths[:, None]).astype(np.int32)
    ids, language, new_tokens = random_rows(masks, 6), 7, 14
    theirs = reference.generate(
        input_ids=as_torch(ids),
        attention_mask=as_torch(masks),
        num_beams=1,
        do_sample=False,
        forced_bos_token_id=language,
        max_new_tokens=new_tokens + 1,  # they count the language's token
    ).numpy()
    assert (theirs[:, 0] == EOS).all()
    assert (theirs[:, 1] == language).all()
    theirs = theirs[:, 2:]
    theirs = np.pad(theirs, ((0, 0), (0, new_tokens - theirs.shape[1])), constant_values=PAD)

    assert 5 <= (theirs == EOS).any(1).sum() <= 45
    assert len(set(map(tuple, theirs))) > 30
    for language_id in (language, np.full(50, language)):
        ours = greedy(*nnx.split(model), ids, masks, language_id, new_tokens)
        np.testing.assert_array_equal(ours, theirs)


@functools.partial(jax.jit, static_argnums=(0, 5, 6), compiler_options=QUICK)
def beams(graph, state, ids, segments, language_id, max_new_tokens, options):
    model = nnx.merge(graph, state)
    return beam_translate(model, ids, segments, language_id, max_new_tokens, **dict(options))


@pytest.mark.parametrize(
    ("num_beams", "length_penalty", "early_stopping"),
    [(5, 1.0, False), (5, 1.0, True), (1, 1.0, False), (2, 0.0, False), (8, 2.0, False),
     (4, -1.0, True)],
)  # fmt: skip
def test_beam_search_is_that_of_generate(num_beams, length_penalty, early_stopping, tmp_path):
    """Token for token on 200 texts of several lengths, padded on both sides."""
    reference = m2m100(gain=0.6)
    reference.save_pretrained(tmp_path)
    model = load_nllb(tmp_path)
    lengths = np.random.default_rng(5).integers(1, 12, 200)
    masks = (np.arange(12)[None] < lengths[:, None]).astype(np.int32)
    masks[::3] = masks[::3, ::-1]
    ids, language, new_tokens = random_rows(masks, 6), 7, 14
    theirs = reference.generate(
        input_ids=as_torch(ids),
        attention_mask=as_torch(masks),
        num_beams=num_beams,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        do_sample=False,
        forced_bos_token_id=language,
        max_new_tokens=new_tokens + 1,  # they count the language's token
    ).numpy()[:, 2:]
    theirs = np.pad(theirs, ((0, 0), (0, new_tokens - theirs.shape[1])), constant_values=PAD)
    assert len(set(map(tuple, theirs))) > 100
    options = {"num_beams": num_beams, "early_stopping": early_stopping}
    options = tuple((options | {"length_penalty": length_penalty}).items())
    ours = beams(*nnx.split(model), ids, masks, language, new_tokens, options)
    np.testing.assert_array_equal(ours, theirs)


def test_the_largest_by_chunks_are_the_largest():
    """Of vocabularies that chunks divide or not, with ties among the rest."""
    rng = np.random.default_rng(0)
    for size in (40, 2560, 32_001):
        x = rng.permutation(2 * 3 * size).reshape(2, 3, size).astype(np.float32)
        x[..., : size // 2] = np.minimum(x[..., : size // 2], 5.0)
        values, places = top_k(jnp.asarray(x), 10)
        np.testing.assert_array_equal(values, -np.sort(-x, axis=-1)[..., :10])
        np.testing.assert_array_equal(np.take_along_axis(x, np.asarray(places), -1), values)


class Digits:
    """A tokenizer for texts like "12 7 40"."""

    pad_id = PAD

    def encode(self, texts, language, *, max_length):
        rows = [[self.language_id(language), *map(int, text.split())] for text in texts]
        return [np.array([*row[: max_length - 1], EOS], np.int32) for row in rows]

    def decode(self, rows):
        return [" ".join(str(i) for i in row if i != EOS) for row in rows]

    def language_id(self, code):
        return {"aaa_Latn": 8, "bbb_Latn": 9}[code]


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "num_beams"), [(4, 1), (64, 1), (4, 3)])
def test_translate_keeps_the_order_whatever_the_batches(model, batch_size, num_beams):
    rng, tokenizer = np.random.default_rng(7), Digits()
    texts = [" ".join(map(str, rng.integers(10, VOCAB, n))) for n in rng.integers(1, 20, 10)]
    codes, limits = ("aaa_Latn", "bbb_Latn"), {"max_length": 16, "max_new_tokens": 6}
    limits["num_beams"] = num_beams
    together = translate(model, tokenizer, texts, *codes, **limits, batch_size=batch_size)
    assert max(len(text.split()) for text in texts) > 14  # the limit, less language and </s>
    for text, translation in zip(texts, together, strict=True):
        ids, segments = np.full((1, 24), PAD, np.int32), np.zeros((1, 24), np.int32)
        row = [8, *map(int, text.split()[:14]), EOS]
        ids[0, : len(row)], segments[0, : len(row)] = row, 1
        row = (*nnx.split(model), ids, segments, 9, 6)
        options = (("num_beams", num_beams),)
        (alone,) = np.asarray(greedy(*row) if num_beams == 1 else beams(*row, options))
        assert translation == tokenizer.decode([alone[alone != PAD]])[0]
    assert translate(model, tokenizer, [], *codes, **limits) == []


# --- folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(pairs, kind, tmp_path):
    """Tensors bitwise as they were; a config transformers reads as it read the first."""
    theirs, folder, ours = pairs(kind)
    save_nllb(ours, tmp_path / "saved")
    assert_equal_tensors(folder, tmp_path / "saved")
    told = [
        transformers.AutoConfig.from_pretrained(path).to_dict() | {"_name_or_path": ""}
        for path in (folder, tmp_path / "saved")
    ]
    assert told[0] == told[1]
    again = type(theirs).from_pretrained(tmp_path / "saved", attn_implementation="eager").eval()
    text = random_rows(MASKS, 0), MASKS, random_rows(MASKS, 1), MASKS
    for a, b in zip(torch_states(theirs, *text), torch_states(again, *text), strict=True):
        np.testing.assert_array_equal(a[MASKS > 0], b[MASKS > 0])
    options = {"forced_bos_token_id": 7, "num_beams": 1, "max_new_tokens": 6}
    one, other = (m.generate(as_torch(text[0]), **options) for m in (theirs, again))
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtypes_on_disk(dtype, tmp_path):
    """Kept on request, bit for bit on the way out again; otherwise widened exactly."""
    m2m100().to(getattr(torch, dtype)).save_pretrained(tmp_path / "in")
    kept, widened = (load_nllb(tmp_path / "in", dtype=jnp.dtype(d)) for d in (dtype, "float32"))
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a, np.float32), b),
        nnx.state(kept),
        nnx.state(widened),
    )
    save_nllb(kept, tmp_path / "out")
    assert_equal_tensors(tmp_path / "in", tmp_path / "out")


def test_a_model_of_ours_runs_in_torch(tmp_path):
    config = NLLBConfig(VOCAB, 16, 1, 2, 4, 2, 32, 24)
    model = NLLB(config, nnx.Rngs(jax.random.key(3, impl="rbg")))  # compiles fastest
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "tokenizer_config.json").write_text("{}")
    save_nllb(model, tmp_path / "to", tokenizer_files_from=tmp_path / "from")
    assert (tmp_path / "to" / "tokenizer_config.json").read_text() == "{}"
    assert load_nllb(tmp_path / "to").config == config

    reference = transformers.M2M100ForConditionalGeneration.from_pretrained(tmp_path / "to").eval()
    ids = random_rows(MASKS, 8)
    theirs = torch_outputs(reference, ids, MASKS, ids, MASKS).logits.numpy()
    ours = np.asarray(our_outputs(model, ids, MASKS, ids, MASKS)[2])
    np.testing.assert_allclose(ours[MASKS > 0], theirs[MASKS > 0], atol=1e-4)


def stored_otherwise(kind, reference, folder, to):
    """The same weights in one of the ways in which they are found on disk."""
    if kind == "sharded":
        return reference.save_pretrained(to, max_shard_size="20KB")
    shutil.copytree(folder, to)
    weights = load_file(folder / "model.safetensors")
    shared = weights.pop("model.shared.weight")
    if kind == "without prefix":
        weights = {n.removeprefix("model."): w for n, w in weights.items()}
        weights |= {"shared.weight": shared, "encoder.embed_tokens.weight": shared}
    elif kind == "encoder's copy alone":
        weights["model.encoder.embed_tokens.weight"] = shared
    elif kind == "all tied names":
        ties = ("model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens")
        weights |= {f"{tie}.weight": shared.copy() for tie in (*ties, "lm_head")}
        weights["model.encoder.embed_positions.weights"] = np.zeros((66, 16), np.float32)
    else:
        weights["lm_head.weight"] = shared
    save_file(weights, to / "model.safetensors")


@pytest.mark.parametrize(
    "kind",
    ["sharded", "without prefix", "all tied names", "encoder's copy alone", "output alone"],
)
def test_kinds_of_checkpoints(kind, reference, folder, model, tmp_path):
    stored_otherwise(kind, reference, folder, tmp_path / "other")
    if kind == "sharded":
        assert len(list((tmp_path / "other").glob("*.safetensors"))) > 2
    other = nnx.state(load_nllb(tmp_path / "other"))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), other)


@pytest.mark.parametrize(
    "name", ["model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"]
)
@pytest.mark.parametrize("with_decoder", [True, False])
def test_tied_copies_that_differ_are_refused(name, with_decoder, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    weights[f"{name}.weight"] = weights["model.shared.weight"].copy()
    weights[f"{name}.weight"][-1, -1] += 1e-6
    save_file(weights, tmp_path / "m" / "model.safetensors")
    message = rf"{re.escape(name)}\.weight differs from model\.shared\.weight though tie_word"
    with pytest.raises(ValueError, match=message):
        load_nllb(tmp_path / "m", with_decoder=with_decoder)
    with pytest.raises(ValueError, match=message):
        check_nllb(tmp_path / "m")


def test_the_encoder_alone(reference, folder, model, tmp_path):
    encoder = load_nllb(folder, with_decoder=False)
    assert encoder.config == dataclasses.replace(model.config, decoder_layers=0)
    assert not [p for p, _ in nnx.to_flat_state(nnx.state(encoder)) if "decoder" in p[0]]
    ids = random_rows(MASKS, 10)
    states = jax.jit(encoder.encode, compiler_options=QUICK)(ids, MASKS)
    with torch.no_grad():
        theirs = reference.get_encoder()(as_torch(ids), as_torch(MASKS)).last_hidden_state
    assert_close(states[MASKS > 0], theirs[MASKS > 0], 1e-4)
    with pytest.raises(ValueError, match="encoder alone"):
        encoder.decode(ids, MASKS, jnp.zeros((5, 7, 16)), MASKS)
    with pytest.raises(ValueError, match="an encoder alone is no M2M100 folder"):
        save_nllb(encoder, tmp_path / "saved")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_function": "gelu"}, "activation_function is 'gelu'; it may be 'relu'"),
        ({"model_type": "t5"}, "model_type is 't5'; it may be m2m_100"),
        ({"d_model": 18}, "decoder_attention_heads is 4; it must divide d_model, 18"),
        ({"encoder_attention_heads": 3}, "encoder_attention_heads is 3; it must divide d_model, 1"),
        ({"encoder_attention_heads": 0}, "encoder_attention_heads is 0; .* whole number from 1 on"),
        ({"d_model": 17}, "d_model is 17; it must be even and at least 4"),
        ({"d_model": None}, "d_model is None; it must be a whole number from 1 on"),
        (
            {"encoder_ffn_dim": 24.0},
            r"encoder_ffn_dim is 24\.0; it must be a whole number from 1 on",
        ),
        ({"scale_embedding": 1}, "scale_embedding is 1; it must be true or false"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"decoder_start_token_id": 5}, "decoder_start_token_id is 5; it may be 2"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"vocab_size": 61}, r"model\.shared\.weight is \[60, 16\], by the config \[61, 16\]"),
        ({"encoder_layers": 3}, r"missing: model\.encoder\.layers\.2\..* and 12 more"),
        ({"decoder_layers": 2}, r"unexpected: model\.decoder\.layers\.2\."),
    ],
)
def test_a_config_that_does_not_fit(change, message, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message) as error:
        load_nllb(tmp_path / "m")
    assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_read(folder, tmp_path):
    def refused(message):
        with pytest.raises(ValueError, match=message):
            load_nllb(tmp_path / "m")

    refused("is not a folder")
    (tmp_path / "m").mkdir()
    refused("has no config.json")
    (tmp_path / "m" / "config.json").write_text("{")
    refused("is not JSON")
    shutil.copy(folder / "config.json", tmp_path / "m")
    refused("has neither model.safetensors nor")
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"")
    refused("convert them once: .*M2M100ForConditionalGeneration")
    weights = (folder / "model.safetensors").read_bytes()
    for size in (0, 5, 100, len(weights) - 1):
        (tmp_path / "m" / "model.safetensors").write_bytes(weights[:size])
        refused(re.escape(str(tmp_path / "m" / "model.safetensors")) + " is truncated")


def test_a_folder_is_not_overwritten_unasked(model, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="exists and is not empty"):
        save_nllb(model, tmp_path / "mine")
    assert [p.name for p in tmp_path.rglob("*")] == ["mine", "notes.txt"]
    save_nllb(model, tmp_path / "mine", replace=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine"]
    jax.tree.map(
        np.testing.assert_array_equal, nnx.state(model), nnx.state(load_nllb(tmp_path / "mine"))
    )
