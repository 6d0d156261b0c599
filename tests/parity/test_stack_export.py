"""Exported stacks in PyTorch against the stack they were exported from, and read back.

B texts, S positions, D LLM width.
"""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity needs torch (the `test` extra on Python 3.11)")
transformers = pytest.importorskip("transformers")
import tiny_stacks  # noqa: E402
from flax import nnx  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402
from tiny_stacks import (  # noqa: E402
    CHOOSE,
    CLASSIFY,
    LABELS,
    LANGUAGES,
    LLMS,
    MAX_LENGTH,
    QUESTIONS,
    TEXTS,
    WIDTH,
)

from mtllm_jax import sharding  # noqa: E402
from mtllm_jax.config import Mesh  # noqa: E402
from mtllm_jax.data.tokenise import TargetTokenizer, source_tokenizer  # noqa: E402
from mtllm_jax.hf.stack import check_stack, load_stack, save_stack  # noqa: E402
from mtllm_jax.models.stack import segment_mean  # noqa: E402
from mtllm_jax.tasks.multiple_choice import (  # noqa: E402
    choice_segments,
    choice_text,
    kept_tokens,
)

COMBINATIONS = [*(("nllb", family) for family in LLMS), ("bert", "llama"), ("xlmr", "qwen3")]
AUTO = {
    "none": transformers.AutoModel,
    CLASSIFY: transformers.AutoModelForSequenceClassification,
    CHOOSE: transformers.AutoModelForMultipleChoice,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(encoder, LLM family) → Made, each made once."""
    tokenizers = tiny_stacks.make_tokenizers(tmp_path_factory.mktemp("tokenizers"))
    return functools.cache(functools.partial(tiny_stacks.make_stack, tokenizers))


def in_torch(folder, kind="none", **options):
    """The model, after a look that nothing of it was left out or made up."""
    model, loading = AUTO[kind].from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not any(loading.values()), loading
    return model


def softmax(logits):
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    return odds / odds.sum(-1, keepdims=True)


def arrays(module):
    return {".".join(map(str, k)): v[...] for k, v in nnx.to_flat_state(nnx.state(module))}


def assert_same(module, other, without=()):
    """The other has all parameters of `module`, bit by bit, but those that begin with `without`."""
    wanted = {k: v for k, v in arrays(module).items() if not k.startswith(tuple(without))}
    found = arrays(other)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert array.dtype == found[name].dtype, name
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(array), err_msg=name)


# What a folder does not store.
LEFT_OUT = ("encoder.decoder", "llm.output")


# ------------------------------------------------------------------ in torch


@pytest.mark.parametrize(("encoder", "family"), COMBINATIONS)
def test_vectors_and_labels(encoder, family, made, tmp_path):
    """Adapters merged and kept; one folder serves with and without its head."""
    ours = made(encoder, family)
    expected = ours.vectors(ours.source.encode(TEXTS, LANGUAGES, max_length=MAX_LENGTH))
    shares = softmax(expected @ np.asarray(ours.heads[CLASSIFY].kernel[...]))
    for adapters in ("merged", "kept"):
        folder = ours.save(tmp_path / adapters, CLASSIFY, lora=adapters)
        vectors = in_torch(folder).encode(TEXTS, LANGUAGES, batch_size=3)
        assert vectors.dtype == torch.float32 and not vectors.requires_grad
        np.testing.assert_allclose(vectors.numpy(), expected, atol=1e-4)
        answers = in_torch(folder, CLASSIFY).classify(TEXTS, LANGUAGES, batch_size=3)
        for answer, share_C in zip(answers, shares, strict=True):
            assert list(answer) == [LABELS[i] for i in np.argsort(-share_C)]
            found = [answer[label] for label in LABELS]
            np.testing.assert_allclose(found, share_C, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_causal_reading(family, made, tmp_path):
    """Mistral looks back as far as its window, which reading both ways drops."""
    ours = made("nllb", family)
    rows = ours.source.encode(TEXTS, LANGUAGES)
    expected = ours.vectors(rows, causal=True)
    assert np.abs(expected - ours.vectors(rows)).max() > 0.1
    model = in_torch(ours.save(tmp_path / "out", bidirectional=False))
    np.testing.assert_allclose(model.encode(TEXTS, LANGUAGES).numpy(), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("encoder", "family", "bidirectional"),
    [
        ("nllb", "mistral", True),
        ("nllb", "mistral", False),
        ("bert", "llama", True),
        ("xlmr", "qwen3", True),
    ],
)
def test_padding_on_either_side(encoder, family, bidirectional, made, tmp_path):
    ours = made(encoder, family)
    rows = ours.source.encode(TEXTS, LANGUAGES)
    expected = ours.vectors(rows, causal=not bidirectional)
    model = in_torch(ours.save(tmp_path / "out", bidirectional=bidirectional))
    length = max(map(len, rows)) + 1
    for side in (1, -1):
        ids = np.full((len(rows), length), ours.source.pad_id)
        mask = np.zeros_like(ids)
        for i, row in enumerate(rows):
            place = slice(0, len(row)) if side > 0 else slice(length - len(row), length)
            ids[i, place], mask[i, place] = row, 1
        with torch.no_grad():
            output = model(torch.tensor(ids), torch.tensor(mask))
        assert output.last_hidden_state.shape == (*ids.shape, WIDTH)
        np.testing.assert_allclose(output.pooler_output.numpy(), expected, atol=1e-4)
    with torch.no_grad():  # without a mask nothing is padding
        alone = model(torch.tensor(rows[0])[None].long()).pooler_output.numpy()
    np.testing.assert_allclose(alone[0], expected[0], atol=1e-4)


def test_another_bridge(made, tmp_path):
    """An MLP that shortens texts, a causal LLM; with padding on either side, and read back."""
    ours = made("nllb", "llama", hidden=24, stride=3)
    rows = ours.source.encode(TEXTS, LANGUAGES)
    expected = ours.vectors(rows, causal=True)
    folder = ours.save(tmp_path / "out", CLASSIFY, lora="kept", bidirectional=False)
    model = in_torch(folder)
    np.testing.assert_allclose(model.encode(TEXTS, LANGUAGES).numpy(), expected, atol=1e-4)
    length = max(map(len, rows)) + 1
    ids = np.full((len(rows), length), ours.source.pad_id)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, length - len(row) :], mask[i, length - len(row) :] = row, 1
    with torch.no_grad():
        vectors = model(torch.tensor(ids), torch.tensor(mask)).pooler_output.numpy()
    np.testing.assert_allclose(vectors, expected, atol=1e-4)
    assert_same(ours.stack, load_stack(folder).stack, LEFT_OUT)
    with pytest.raises(ValueError, match="'multiple_choice', but the bridge shortens"):
        ours.save(tmp_path / "choices", CHOOSE)


@pytest.mark.parametrize(("encoder", "family"), [("nllb", "llama"), ("xlmr", "qwen3")])
def test_multiple_choice(encoder, family, made, tmp_path):
    """Rows of 2 and 4 choices; the last one's context is cut."""
    ours = made(encoder, family)
    reference = transformers.AutoTokenizer.from_pretrained(ours.tokenizers / encoder)
    rows, segments = [], []
    for context, question, choices in QUESTIONS:
        text, spans = choice_text(context, question, choices)
        offsets = reference(text, return_offsets_mapping=True).offset_mapping
        kept = kept_tokens(offsets, len(context), 30)
        rows.append(ours.source.encode([text], "eng_Latn")[0][kept])
        segments.append(np.array(choice_segments([offsets[i] for i in kept], spans), np.int32))
    assert len(rows[2]) == 30 > len(rows[1])
    h_BSD, row_segments = ours.hidden(rows)
    choices_BS = np.zeros_like(row_segments)
    for i, row in enumerate(segments):
        choices_BS[i, : len(row)] = row
    vectors_BCD = np.asarray(segment_mean(h_BSD, choices_BS, 4))
    logits_BC = vectors_BCD @ np.asarray(ours.heads[CHOOSE].kernel[...])[:, 0]
    folder = ours.save(tmp_path / "out", CHOOSE, max_length=30)
    model = in_torch(folder, CHOOSE)
    found = model.choose(*zip(*QUESTIONS, strict=True), "eng_Latn", batch_size=2)
    for row, logits_C, (_, _, choices) in zip(found, logits_BC, QUESTIONS, strict=True):
        np.testing.assert_allclose(row, softmax(logits_C[: len(choices)]), atol=1e-4)

    inputs = [torch.tensor(np.asarray(x)) for x in (rows[0], segments[0])]
    ids, marks = (x[None].long() for x in inputs)
    loss = model(ids, marks, labels=torch.tensor([1])).loss
    np.testing.assert_allclose(loss.item(), -np.log(softmax(logits_BC[0])[1]), atol=1e-4)
    loss.backward()
    assert float(model.score.weight.grad.abs().sum()) > 0
    with pytest.raises(ValueError, match="choice 2 has no token"):
        model.choose(["Peru"], ["Peru?"], [["Kenya", ""]], "eng_Latn")


def test_loss_of_labels(made, tmp_path):
    ours = made("nllb", "llama")
    model = in_torch(ours.save(tmp_path / "out", CLASSIFY, lora="kept"), CLASSIFY)
    rows = ours.source.encode(TEXTS[:1], "deu_Latn")
    logits_C = ours.vectors(rows)[0] @ np.asarray(ours.heads[CLASSIFY].kernel[...])
    output = model(torch.tensor(rows[0])[None].long(), labels=torch.tensor([2]))
    np.testing.assert_allclose(output.logits[0].detach().numpy(), logits_C, atol=1e-4)
    np.testing.assert_allclose(output.loss.item(), -np.log(softmax(logits_C)[2]), atol=1e-4)
    output.loss.backward()
    adapter = model.llm.layers[0].self_attn.q_proj.lora_A.weight
    assert float(adapter.grad.abs().sum()) > 0


def test_bfloat16(made, tmp_path):
    """Written and read in half the bytes; vectors are float32 all the same."""
    ours = made("nllb", "llama")
    expected = ours.vectors(ours.source.encode(TEXTS, LANGUAGES))
    folder = ours.save(tmp_path / "out", CLASSIFY, dtype=jnp.bfloat16)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    stored = load_stack(folder, jnp.bfloat16)
    assert {x.dtype for x in arrays(stored.stack).values()} == {jnp.dtype(jnp.bfloat16)}
    for dtype in (torch.bfloat16, torch.float32):
        model = in_torch(folder, CLASSIFY, dtype=dtype)
        assert {weight.dtype for weight in model.parameters()} == {dtype}
        vectors = model.encode(TEXTS, LANGUAGES)
        assert vectors.dtype == torch.float32
        scale = np.abs(expected).max()
        np.testing.assert_allclose(vectors.numpy(), expected, atol=0.05 * scale)
        assert model.classify(TEXTS, LANGUAGES)[0].keys() == set(LABELS)


def test_a_folder_is_whole(made, tmp_path):
    """Both tokenizers, the card and the code are in it; so it can be moved and saved again."""
    ours = made("nllb", "llama")
    ours.save(tmp_path / "first", CLASSIFY, card="# A stack\n", max_shard_bytes=20_000)
    folder = tmp_path / "moved"
    (tmp_path / "first").rename(folder)
    assert (folder / "README.md").read_text() == "# A stack\n"
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    source = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    source.src_lang = "jpn_Jpan"
    rows = ours.source.encode(TEXTS, "jpn_Jpan")
    assert source(TEXTS).input_ids == [row.tolist() for row in rows]
    target = transformers.AutoTokenizer.from_pretrained(folder / "llm_tokenizer")
    rows = TargetTokenizer(ours.tokenizers / "llm").encode(TEXTS)
    assert target(TEXTS).input_ids == [row.tolist() for row in rows]

    model = in_torch(folder, CLASSIFY)
    model.save_pretrained(tmp_path / "again")
    shutil.rmtree(folder)
    again = in_torch(tmp_path / "again", CLASSIFY)
    assert again.classify(TEXTS, LANGUAGES) == model.classify(TEXTS, LANGUAGES)
    found = load_stack(tmp_path / "again")
    assert found.labels == LABELS
    rows = ours.source.encode(TEXTS, LANGUAGES)
    vectors = dataclasses.replace(ours, stack=found.stack).vectors(rows)
    np.testing.assert_allclose(vectors, ours.vectors(rows), atol=1e-4)


def test_long_and_empty_texts(made, tmp_path):
    ours = made("nllb", "llama")
    model = in_torch(ours.save(tmp_path / "out", CLASSIFY), CLASSIFY)
    texts = ["", "Peru und Kenia " * 30]
    rows = ours.source.encode(texts, "deu_Latn", max_length=MAX_LENGTH)
    assert [len(row) for row in rows] == [2, MAX_LENGTH]
    found = model.encode(texts, "deu_Latn").numpy()
    np.testing.assert_allclose(found, ours.vectors(rows), atol=1e-4)
    assert model.encode([], "deu_Latn").shape == (0, WIDTH)
    assert model.classify([], "deu_Latn") == []


@pytest.mark.parametrize(("encoder", "legacy"), [("nllb", True), ("m2m100", False)])
def test_how_the_encoder_is_told_the_language(encoder, legacy, made, tmp_path):
    """NLLB's order of long ago, and M2M100's tokens, which are called otherwise than the codes."""
    ours = made(encoder, "llama")
    source = source_tokenizer(ours.tokenizers / encoder, legacy_source_order=legacy)
    rows = source.encode(TEXTS, LANGUAGES)
    assert {row[-1 if legacy else 0] for row in rows} == set(map(source.language_id, LANGUAGES))
    folder = ours.save(tmp_path / "out", legacy_source_order=legacy)
    assert load_stack(folder).legacy_source_order is legacy
    model = in_torch(folder)
    found = model.encode(TEXTS, LANGUAGES).numpy()
    np.testing.assert_allclose(found, ours.vectors(rows), atol=1e-4)


def test_bad_texts_and_languages(made, tmp_path):
    model = in_torch(made("nllb", "llama").save(tmp_path / "out"))
    with pytest.raises(ValueError, match="lang is 'deu_Latin'; of 3 codes the nearest: deu_Latn, "):
        model.encode(TEXTS, "deu_Latin")
    with pytest.raises(ValueError, match="lang has 2 codes; it must be one or 4"):
        model.encode(TEXTS, ["deu_Latn", "eng_Latn"])
    with pytest.raises(ValueError, match="texts is 'Peru'; it must be a list of str"):
        model.encode("Peru", "deu_Latn")
    with pytest.raises(ValueError, match=r"texts is \[None\]; it must be a list of str"):
        model.encode([None], "deu_Latn")


# ------------------------------------------------------------------ and back


@pytest.mark.parametrize(("encoder", "family"), COMBINATIONS)
def test_round_trip(encoder, family, made, tmp_path):
    ours = made(encoder, family)
    folder = ours.save(tmp_path / "kept", CLASSIFY, lora="kept", bidirectional=False)
    found = load_stack(folder)
    assert_same(ours.stack, found.stack, LEFT_OUT)
    assert_same(ours.heads[CLASSIFY], found.head)
    told = (found.labels, found.kind, found.bidirectional, found.max_length, found.languages)
    assert told == (LABELS, CLASSIFY, False, MAX_LENGTH, ours.source.languages)
    q, v = found.stack.llm.layers.q, found.stack.llm.layers.v
    assert (q.lora_scale, v.lora_scale) == (1.5, 3.0)
    config = check_stack(folder)
    assert config.llm == found.stack.llm.config
    assert config.llm == dataclasses.replace(ours.stack.llm.config, tie_embeddings=True)
    assert config.encoder == found.stack.encoder.config
    assert config.lora == {"q": (4, 6.0), "v": (2, 6.0), "down": (4, 6.0)}

    save_stack(
        tmp_path / "again",
        found.stack,
        head=found.head,
        labels=found.labels,
        kind=found.kind,
        bidirectional=found.bidirectional,
        max_length=found.max_length,
        languages=found.languages,
        encoder_tokenizer_from=folder,
        llm_tokenizer_from=folder / "llm_tokenizer",
        lora="kept",
    )
    for file in folder.rglob("*.*"):
        again = tmp_path / "again" / file.relative_to(folder)
        assert again.read_bytes() == file.read_bytes(), file.name


def test_merged_adapters_and_the_other_head(made, tmp_path):
    ours = made("nllb", "llama")
    found = load_stack(ours.save(tmp_path / "out", CHOOSE))
    assert (found.kind, found.labels, found.head.kernel.shape) == (CHOOSE, (), (WIDTH, 1))
    kernel = ours.stack.llm.layers.v
    wanted = kernel.kernel[...] + 3.0 * (kernel.lora_a[...] @ kernel.lora_b[...])
    np.testing.assert_allclose(found.stack.llm.layers.v.kernel[...], wanted, atol=1e-6)
    assert kernel.lora_a is not None and ours.stack.encoder.decoder is not None


def test_onto_a_mesh(made, tmp_path):
    ours = made("nllb", "llama")
    mesh = sharding.make_mesh(Mesh(1, 4, 2), jax.devices())
    folder = ours.save(tmp_path / "out", lora="kept")
    found = load_stack(folder, mesh=mesh)
    assert_same(ours.stack, found.stack, LEFT_OUT)
    assert len(found.stack.llm.layers.q.kernel[...].sharding.device_set) == 8


# What tensors begin with there, and whether the bridge has a bias: neither is known for sure.
AUTHORS = {
    "parts side by side": (("nllb_encoder.", "llm2vec.", "up_proj."), True),
    "parts of a part": (("model.nllb.encoder.", "model.llama.", "model.up_proj."), False),
}


@pytest.mark.parametrize("case", AUTHORS)
@pytest.mark.parametrize("kind", ["none", CLASSIFY])
def test_the_authors_release(case, kind, made, tmp_path):
    """A folder of another model_type, other names and configs that leave out defaults."""
    ours = made("nllb", "llama")
    ours.save(tmp_path / "ours", kind)
    prefixes, has_bias = AUTHORS[case]
    tensors = {}
    for name, array in load_file(tmp_path / "ours" / "model.safetensors").items():
        for start, there in zip(("encoder.", "llm.", "up_proj."), prefixes, strict=True):
            if name.startswith(start):
                tensors[there + name.removeprefix(start)] = array
        if name == "score.weight":
            tensors[name] = array
    if not has_bias:
        del tensors["model.up_proj.bias"]
        tensors["model.nllb.shared.weight"] = tensors.pop("model.nllb.encoder.embed_tokens.weight")
    folder = tmp_path / "theirs"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    inner = [
        transformers.AutoConfig.for_model(**config[name]).to_diff_dict()
        for name in ("encoder_config", "llm_config")
    ]
    theirs = {"model_type": "nllb-llm2vec", "nllb_config": inner[0], "llm2vec_config": inner[1]}
    theirs |= {"id2label": config["id2label"]} if kind == CLASSIFY else {}
    (folder / "config.json").write_text(json.dumps(theirs))

    found, wanted = load_stack(folder), load_stack(tmp_path / "ours")
    if not has_bias:
        assert not np.asarray(found.stack.bridge.up.bias[...]).any()
        wanted.stack.bridge.up.bias[...] = jnp.zeros(WIDTH)
    assert_same(wanted.stack, found.stack)
    assert check_stack(folder).llm == check_stack(tmp_path / "ours").llm
    assert (found.kind, found.labels) == (kind, LABELS if kind == CLASSIFY else ())
    assert (found.bidirectional, found.max_length, found.languages) == (True, 512, ())
    if kind == CLASSIFY:
        assert_same(wanted.head, found.head)


# ------------------------------------------------------------------ at the door


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "regression"}, "kind is 'regression'; it may be none, classification, multiple_"),
        ({"lora": "dropped"}, "lora is 'dropped'; it may be merged, kept"),
        ({"kind": CLASSIFY, "head": None}, "kind is 'classification', but there is no head"),
        ({"labels": LABELS}, "labels are .'no', 'yes', 'so so'., but kind is 'none'"),
        ({"languages": ["deu_Latn", "fra_Latn"]}, "language 'fra_Latn' is not one of the 3"),
        ({"languages": []}, "languages are empty; they are the codes of what texts may be in"),
        ({"encoder_tokenizer_from": "nowhere"}, "nowhere is not a folder"),
        ({"llm_tokenizer_from": "nowhere"}, "nowhere is not a folder"),
    ],
)
def test_what_cannot_be_written(options, message, made, tmp_path):
    with pytest.raises(ValueError, match=message):
        made("nllb", "llama").save(tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_heads_and_adapters_that_do_not_fit(made, tmp_path):
    ours = made("nllb", "llama")
    with pytest.raises(ValueError, match=r"head is \[32, 3\]; it must be \[32, 2\] without a bias"):
        ours.save(tmp_path / "out", CLASSIFY, labels=("a", "b"))
    with pytest.raises(ValueError, match=r"head is \[32, 3\]; it must be \[32, 1\]"):
        ours.save(tmp_path / "out", CHOOSE, head=ours.heads[CLASSIFY])
    bare = dataclasses.replace(ours, stack=load_stack(ours.save(tmp_path / "merged")).stack)
    with pytest.raises(ValueError, match="lora is 'kept', but the LLM has no adapters"):
        bare.save(tmp_path / "out", lora="kept")
    with pytest.raises(ValueError, match="max_length is 41; the encoder has positions for 40 tok"):
        made("bert", "llama").save(tmp_path / "out", max_length=41)
    with pytest.raises(ValueError, match="merged exists and is not empty"):
        ours.save(tmp_path / "merged")
    ours.save(tmp_path / "merged", lora="kept", replace=True)
    assert check_stack(tmp_path / "merged").lora


CONFIG_ERRORS = {
    "model_type": ("bert", "model_type is 'bert'; it may be mtllm or nllb-llm2vec"),
    "head": ("pooler", "head is 'pooler'; it may be none, classification, multiple_choice"),
    "bidirectional": (1, "bidirectional is 1; it must be bool"),
    "max_source_length": (None, "max_source_length is None; it must be int"),
    "languages": ("deu_Latn", "languages is 'deu_Latn'; it must be list"),
    "id2label": ({"1": "a"}, "id2label is .*; it must name the labels 0, 1, …"),
    "lora": ({"qkv": {"r": 1, "alpha": 1}}, "lora has 'qkv'; it may have q_proj, k_proj, v_proj"),
    "encoder_config": (None, "encoder_config is None; it must be the config of a model"),
    "encoder_config.model_type": ("t5", "encoder_config.model_type is 't5'; it may be m2m_100, b"),
    "encoder_config.encoder_attention_heads": (3, "encoder_config: encoder_attention_heads is 3"),
    "llm_config.model_type": ("gpt2", "llm_config.model_type is 'gpt2'; it may be llama, mistral"),
    "llm_config.hidden_act": ("gelu", "llm_config: hidden_act is 'gelu'"),
    "llm_config.hidden_size": ("big", "llm_config: .*'hidden_size' expected int, got str"),
    "llm_config.intermediate_size": (
        40,
        "of another shape: llm.layers.0.mlp.down_proj.weight is [^;]*$",
    ),
    "llm_config.num_hidden_layers": (3, "missing: llm.layers.2.input_layernorm.weight"),
}


@pytest.fixture(scope="module")
def exported(made, tmp_path_factory):
    return made("nllb", "llama").save(tmp_path_factory.mktemp("exported") / "out", CLASSIFY)


@pytest.mark.parametrize("field", CONFIG_ERRORS)
def test_errors_in_the_config(field, exported, tmp_path):
    folder = tmp_path / "changed"
    shutil.copytree(exported, folder)
    config = json.loads((folder / "config.json").read_text())
    *outer, name = field.split(".")
    value, message = CONFIG_ERRORS[field]
    (config[outer[0]] if outer else config)[name] = value
    (folder / "config.json").write_text(json.dumps(config))
    for read in (check_stack, load_stack):
        with pytest.raises(ValueError, match=message) as told:
            read(folder)
        assert str(folder) in str(told.value) and "\n" not in str(told.value)


def test_errors_in_the_tensors(exported, tmp_path):
    tensors = load_file(exported / "model.safetensors")
    for name in ("config.json",):
        shutil.copyfile(exported / name, tmp_path / name)

    def told(changed, **config):
        save_file(changed, tmp_path / "model.safetensors")
        if config:
            (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=str(tmp_path)) as error:
            check_stack(tmp_path)
        return str(error.value)

    without = {name: array for name, array in tensors.items() if name != "score.weight"}
    assert "missing: score.weight" in told(without)
    assert "unexpected: pooler.weight" in told(tensors | {"pooler.weight": np.zeros((2, 2))})
    inner = json.loads((exported / "config.json").read_text())
    theirs = {"model_type": "nllb-llm2vec", "nllb_config": inner["encoder_config"]}
    assert "none of its fields is a config of model_type llama" in told(tensors, **theirs)
    theirs["llm2vec_config"] = inner["llm_config"]
    more = tensors | {"a.layers.0.fc1.weight": np.zeros((2, 2))}
    assert "2 tensors …layers.0.fc1.weight; a stack has one" in told(more, **theirs)
    fewer = {name: array for name, array in tensors.items() if not name.startswith("up_proj")}
    assert "no tensor …up_proj.weight; a stack has one" in told(fewer)
