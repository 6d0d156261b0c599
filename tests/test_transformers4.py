"""What is exported, in transformers 4.57: an environment of its own, beside the installed 5."""

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="exports are loaded with torch (the `test` extra)")
import tiny  # noqa: E402
import tiny_stacks  # noqa: E402
import transformers  # noqa: E402
from tiny_stacks import CHOOSE, CLASSIFY, LANGUAGES, QUESTIONS, TEXTS  # noqa: E402

from mtllm_jax.data.tokenise import TargetTokenizer, source_tokenizer  # noqa: E402
from mtllm_jax.hf.llama import save_llama  # noqa: E402
from mtllm_jax.hf.nllb import save_nllb  # noqa: E402
from mtllm_jax.hf.stack import load_stack  # noqa: E402
from mtllm_jax.models.llama import Llama, LlamaConfig  # noqa: E402
from mtllm_jax.models.nllb import NLLB, NLLBConfig  # noqa: E402
from mtllm_jax.ops.rope import LinearScaling, Llama3Scaling, YarnScaling  # noqa: E402

pytestmark = pytest.mark.slow

# What 4.57 runs on, in the releases that it asks for, and what else it imports.
PINNED = ("transformers==4.57.*", "huggingface_hub>=0.34,<1", "tokenizers>=0.22,<=0.23")
IMPORTED = {"requests": "requests", "regex": "regex", "yaml": "pyyaml", "filelock": "filelock"}
STACKS = {
    "merged": ("nllb", "llama", CLASSIFY, {}),
    "kept": ("nllb", "qwen2", CLASSIFY, {"lora": "kept"}),
    "causal": ("nllb", "mistral", "none", {"bidirectional": False}),
    "choices": ("xlmr", "qwen3", CHOOSE, {"max_length": 30}),
    "bert": ("bert", "llama", CLASSIFY, {}),
    "m2m100": ("m2m100", "llama", "none", {}),
}
SIZES = {
    "vocab_size": 320,
    "width": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_width": 8,
    "ffn_width": 48,
    "max_positions": 64,
}
LLMS = {
    "llama": {"rope_theta": 5e5},
    "llama3": {"rope_theta": 5e5, "rope_scaling": Llama3Scaling(8.0, 1.0, 4.0, 16)},
    "linear": {"rope_scaling": LinearScaling(4.0)},
    "yarn": {"rope_scaling": YarnScaling(4.0, 16, 1.3)},
    "mistral": {"family": "mistral", "sliding_window": 3, "rope_theta": 1e6},
    "qwen2": {"family": "qwen2", "qkv_bias": True, "tie_embeddings": True, "rope_theta": 1e6},
    "qwen3": {"family": "qwen3", "qk_norm": True, "rope_theta": 1e6},
}
IDS = np.random.default_rng(0).integers(4, 60, (2, 9))


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The variables of a process that imports transformers 4.57 instead of the installed one."""
    target = tmp_path_factory.mktemp("transformers4")
    missing = [
        name for module, name in IMPORTED.items() if importlib.util.find_spec(module) is None
    ]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    done = subprocess.run(
        [*command, "--target", str(target), *PINNED, *missing], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"transformers 4.57 cannot be installed: {done.stderr.strip()[-300:]}")
    modules = {"HF_MODULES_CACHE": str(target / "modules"), "HF_HUB_OFFLINE": "1"}
    return os.environ | modules | {"PYTHONPATH": str(target)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def stacks(root):
    """{name: Made}, each saved in the folder of its name."""
    tokenizers = tiny_stacks.make_tokenizers(root)
    make = functools.cache(functools.partial(tiny_stacks.make_stack, tokenizers))
    made = {name: make(encoder, family) for name, (encoder, family, _, _) in STACKS.items()}
    for name, (_, _, kind, options) in STACKS.items():
        made[name].save(root / f"stack-{name}", kind, **options)
    return made


@pytest.fixture(scope="module")
def llms(root, stacks):
    """{name: model}, each saved in the folder of its name."""
    made = {
        name: tiny.randomised(Llama(LlamaConfig(**SIZES, **changes), tiny.rngs()), 4)
        for name, changes in LLMS.items()
    }
    for name, model in made.items():
        save_llama(model, root / f"llm-{name}", tokenizer_files_from=root / "llm")
    return made


@pytest.fixture(scope="module")
def translator(root, stacks):
    size = source_tokenizer(root / "nllb").vocab_size
    model = tiny.randomised(NLLB(NLLBConfig(size, 16, 2, 2, 2, 2, 24, 24), tiny.rngs()), 5)
    save_nllb(model, root / "translator", tokenizer_files_from=root / "nllb")
    return model


@pytest.fixture(scope="module")
def found(environment, root, stacks, llms, translator):
    """What 4.57 makes of all of them, by the folder's name."""
    job = {
        "texts": TEXTS,
        "languages": LANGUAGES,
        "questions": QUESTIONS,
        "ids": IDS.tolist(),
        "stacks": {str(root / f"stack-{name}"): kind for name, (_, _, kind, _) in STACKS.items()},
        "llms": [str(root / f"llm-{name}") for name in llms],
        "translators": [str(root / "translator")],
        "tokenizers": [str(root / "llm-llama"), str(root / "translator")],
    }
    (root / "job.json").write_text(json.dumps(job), encoding="utf-8")
    script = Path(__file__).with_name("in_transformers4.py")
    done = subprocess.run(
        [sys.executable, script, root / "job.json", root / "out.json"],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "not initialized" not in done.stderr and "not used" not in done.stderr, done.stderr
    out = json.loads((root / "out.json").read_text(encoding="utf-8"))
    assert out["version"].startswith("4.57.")
    return {Path(folder).name: value for folder, value in out.items()}


@pytest.mark.parametrize("name", STACKS)
def test_stacks(name, found, stacks, root):
    """As the stack itself, and as transformers 5 reads the same folder."""
    _, _, kind, options = STACKS[name]
    folder, ours, theirs = root / f"stack-{name}", stacks[name], found[f"stack-{name}"]
    length = options.get("max_length", tiny_stacks.MAX_LENGTH)
    rows = ours.source.encode(TEXTS, LANGUAGES, max_length=length)
    causal = not options.get("bidirectional", True)
    np.testing.assert_allclose(theirs["vectors"], ours.vectors(rows, causal), atol=1e-4)
    rows = TargetTokenizer(root / "llm").encode(TEXTS)
    assert theirs["llm_tokens"] == [row.tolist() for row in rows]
    rows = ours.source.encode(TEXTS, "eng_Latn")  # which a tokenizer takes if it is not told
    assert theirs["tokens"] == [row.tolist() for row in rows]

    auto = {
        "none": transformers.AutoModel,
        CLASSIFY: transformers.AutoModelForSequenceClassification,
        CHOOSE: transformers.AutoModelForMultipleChoice,
    }[kind]
    model = auto.from_pretrained(folder, trust_remote_code=True)
    vectors = model.encode(TEXTS, LANGUAGES).numpy()
    np.testing.assert_allclose(theirs["vectors"], vectors, atol=1e-5)
    if kind == CLASSIFY:
        for answer, wanted in zip(theirs["answers"], model.classify(TEXTS, LANGUAGES), strict=True):
            assert list(answer) == list(wanted)
            np.testing.assert_allclose(list(answer.values()), list(wanted.values()), atol=1e-5)
    if kind == CHOOSE:
        wanted = model.choose(*zip(*QUESTIONS, strict=True), LANGUAGES[0])
        for shares, wanted_shares in zip(theirs["choices"], wanted, strict=True):
            np.testing.assert_allclose(shares, wanted_shares, atol=1e-5)


@pytest.mark.parametrize("name", STACKS)
def test_stacks_that_4_57_saved_again(name, found, stacks, root):
    """They come back here: their config.json leaves out what is 4.57's default."""
    _, _, kind, options = STACKS[name]
    folder = root / f"stack-{name}-again"
    again = load_stack(folder)
    length = options.get("max_length", tiny_stacks.MAX_LENGTH)
    assert (again.kind, again.max_length) == (kind, length)
    assert again.languages == stacks[name].source.languages == source_tokenizer(folder).languages
    rows = source_tokenizer(folder).encode(TEXTS, LANGUAGES, max_length=length)
    vectors = dataclasses.replace(stacks[name], stack=again.stack).vectors(
        rows, not again.bidirectional
    )
    np.testing.assert_allclose(vectors, found[f"stack-{name}"]["vectors"], atol=1e-4)


@pytest.mark.parametrize("name", LLMS)
def test_llms(name, found, llms):
    """The same logits, whatever the rotary positions: 4.57 has them elsewhere in config.json."""
    model = llms[name]
    segments = jnp.ones(IDS.shape, jnp.int32)
    h_BTD = model.hidden(model.embed(jnp.asarray(IDS)), segments, causal=True)
    np.testing.assert_allclose(found[f"llm-{name}"], model.logits(h_BTD), atol=1e-4)


def test_a_translator(found, translator):
    ids, segments = jnp.asarray(IDS), jnp.ones(IDS.shape, jnp.int32)
    memory = translator.encode(ids, segments)
    logits = translator.logits(translator.decode(ids, segments, memory, segments))
    np.testing.assert_allclose(found["translator"], logits, atol=1e-4)


def test_tokenizers(found, root):
    """As transformers 5 reads them, and as they were before they were copied."""
    tokens = {Path(folder).name: rows for folder, rows in found["tokens"].items()}
    assert tokens.keys() == {"llm-llama", "translator"}
    for name, rows in tokens.items():
        assert transformers.AutoTokenizer.from_pretrained(root / name)(TEXTS).input_ids == rows
    rows = source_tokenizer(root / "nllb").encode(TEXTS, "eng_Latn")
    assert tokens["translator"] == [row.tolist() for row in rows]
    rows = TargetTokenizer(root / "llm").encode(TEXTS)
    assert tokens["llm-llama"] == [row.tolist() for row in rows]
