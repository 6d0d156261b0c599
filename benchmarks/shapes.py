"""What the speed of both sides is measured on: models of a shape, and real sentences.

The models' weights are random and are written once, as Hugging Face folders that both sides read:
`encoder` (NLLB's shape, with a decoder), `llm`, `adapter` (PEFT); the bridge is `bridge.npz`.
"""

import dataclasses
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ENGLISH_FILES = ("ntrex128/NTREX-128/newstest2019-src.eng.txt", "nllb_seed/seed/eng_Latn")
LANGUAGES = ("eng_Latn", "deu_Latn", "swh_Latn")  # of the tokenizer; all that is read is English
RANK, ALPHA = 16, 32.0  # of the adapters, on all linear maps, as the authors have them


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of both models, and the work of a round.

    rows: sentences of a step. row_length: positions of a packed row, on both sides. vocabulary: of
    the tokenizers. dtype: that both sides compute in, and hold frozen weights in. steps: of a
    round, ours and the peer's. pieces: that the peer takes its step in, so that it fits in memory.
    new_tokens: of a translation and of an answer. remat, unroll_layers: the config's.
    """

    name: str
    encoder: dict[str, int]
    llm: dict[str, int]
    rows: int
    row_length: int
    vocabulary: int
    dtype: str
    steps: tuple[int, int]
    pieces: int
    new_tokens: dict[str, int]
    remat: str
    unroll_layers: bool


CPU = Shape(
    name="cpu",
    encoder={"width": 512, "layers": 6, "heads": 8, "ffn": 2048, "vocab_size": 32_000},
    llm={
        "vocab_size": 32_000,
        "width": 768,
        "num_layers": 8,
        "num_heads": 12,
        "num_kv_heads": 4,
        "head_width": 64,
        "ffn_width": 2048,
    },
    rows=64,
    row_length=128,
    vocabulary=32_000,
    dtype="float32",
    steps=(4, 4),
    pieces=1,
    new_tokens={"translate": 40, "sample": 64},
    remat="dots",
    unroll_layers=False,
)
# NLLB-200-distilled-600M's encoder and Llama 3 8B.
H200 = Shape(
    name="h200",
    encoder={"width": 1024, "layers": 12, "heads": 16, "ffn": 4096, "vocab_size": 256_206},
    llm={
        "vocab_size": 128_256,
        "width": 4096,
        "num_layers": 32,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_width": 128,
        "ffn_width": 14_336,
    },
    rows=256,
    row_length=512,
    vocabulary=32_000,
    dtype="bfloat16",
    steps=(35, 10),
    pieces=8,
    new_tokens={},
    remat="dots",
    unroll_layers=False,
)
# To try the runner on: its figures mean nothing.
TINY = dataclasses.replace(
    CPU,
    name="tiny",
    encoder={"width": 64, "layers": 2, "heads": 2, "ffn": 128, "vocab_size": 2_000},
    llm={
        "vocab_size": 2_000,
        "width": 64,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_width": 32,
        "ffn_width": 128,
    },
    vocabulary=1_500,
    steps=(1, 1),
    new_tokens={"translate": 4, "sample": 2},
)
SHAPES = {shape.name: shape for shape in (CPU, H200, TINY)}


def sentences(data: Path) -> list[str]:
    """The English of NTREX-128 and NLLB-Seed, in an order of their own."""
    lines = [
        line for name in ENGLISH_FILES for line in (data / name).read_text("utf-8").split("\n")
    ]
    kept = [line.strip() for line in lines if line.strip()]
    return [kept[i] for i in np.random.default_rng(0).permutation(len(kept))]


def texts_to_embed(folder: Path) -> list[str]:
    """The sentences of row `embed`, as `write_texts_to_embed` has written them."""
    return json.loads((folder / "texts.json").read_text(encoding="utf-8"))


def write_texts_to_embed(folder: Path, data: Path, *, languages: int = 20, each: int = 100) -> None:
    """So many of SIB-200's test sentences in so many of its languages, unless they are there."""
    from mtllm_jax.data.benchmarks import read_benchmark

    if (folder / "texts.json").exists():
        return
    read = read_benchmark("sib200", data / "sib200", splits=("test",), limit=each)
    codes = sorted({row["language"] for row in read.test})
    chosen = set(codes[:: len(codes) // languages][:languages])
    texts = [row["text"] for row in read.test if row["language"] in chosen]
    text = json.dumps(texts, ensure_ascii=False)
    (folder / "texts.json").write_text(text, encoding="utf-8")


def config_of(shape: Shape, folder: Path, **training: Any) -> Any:
    """The product's own settings for the shape: those of the authors, but packed."""
    from configs.mtllm import llama3_8b
    from mtllm_jax import config as c

    base = llama3_8b()
    settings = {"packing": True, "source_length": shape.row_length, "clip_norm": 1.0} | training
    stage_1 = dataclasses.replace(
        base.adaptation.training, target_length=shape.row_length, **settings
    )
    stage_2b = dataclasses.replace(base.distillation.training, **settings)
    return dataclasses.replace(
        base,
        encoder=os.fspath(folder / "encoder"),
        llm=os.fspath(folder / "llm"),
        # Dropout draws differently on the two sides, and costs both the same: it is off.
        lora=dataclasses.replace(base.lora, dropout=0.0, start=os.fspath(folder / "adapter")),
        adaptation=dataclasses.replace(base.adaptation, training=stage_1),
        distillation=dataclasses.replace(base.distillation, training=stage_2b),
        mesh=c.Mesh(),
        compute_dtype=shape.dtype,
        frozen_dtype=shape.dtype,
        remat=shape.remat,
        unroll_layers=shape.unroll_layers,
    )


def sizes_of(shape: Shape) -> tuple[Any, Any]:
    """Both models' configs."""
    from mtllm_jax.models.llama import LlamaConfig
    from mtllm_jax.models.nllb import NLLBConfig

    sizes = shape.encoder
    encoder = NLLBConfig(
        vocab_size=sizes["vocab_size"],
        width=sizes["width"],
        encoder_layers=sizes["layers"],
        decoder_layers=sizes["layers"],
        encoder_heads=sizes["heads"],
        decoder_heads=sizes["heads"],
        encoder_ffn=sizes["ffn"],
        decoder_ffn=sizes["ffn"],
    )
    return encoder, LlamaConfig(**shape.llm)


def build(shape: Shape, folder: Path, data: Path) -> None:
    """Write the models, unless they are there."""
    done = folder / "done.json"
    if done.exists():
        return
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from mtllm_jax.data.train_tokenizer import train_llama_tokenizer, train_nllb_tokenizer
    from mtllm_jax.hf.llama import save_llama
    from mtllm_jax.hf.nllb import save_nllb
    from mtllm_jax.hf.peft import save_peft
    from mtllm_jax.models import lora
    from mtllm_jax.models.bridge import Bridge
    from mtllm_jax.models.llama import Llama
    from mtllm_jax.models.nllb import NLLB

    texts = sentences(data)
    train_nllb_tokenizer(texts, LANGUAGES, shape.vocabulary, folder / "encoder-tokenizer")
    train_llama_tokenizer(texts, shape.vocabulary, folder / "llm-tokenizer")
    encoder_config, llm_config = sizes_of(shape)

    def made(make: Any) -> Any:
        """The module in the shape's dtype."""
        graph, state = nnx.split(make())
        return nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.dtype(shape.dtype)), state))

    encoder = made(lambda: NLLB(encoder_config, nnx.Rngs(0)))
    # </s> then scores 0 against thousands of others, and no beam search ends before its limit.
    embedding = encoder.embedding_VE
    embedding[...] = embedding[...].at[encoder_config.eos_id].set(0)
    save_nllb(encoder, folder / "encoder", tokenizer_files_from=folder / "encoder-tokenizer")
    llm = made(lambda: Llama(llm_config, nnx.Rngs(1)))
    save_llama(llm, folder / "llm", tokenizer_files_from=folder / "llm-tokenizer")
    tuned = nnx.clone(llm)
    lora.attach(tuned, rank=RANK, alpha=ALPHA, dropout=0.0, targets=("all",), rngs=nnx.Rngs(2))
    state = nnx.state(tuned)
    for path, variable in nnx.to_flat_state(state):
        if path[-1] == "lora_b":  # fresh ones are 0, and would hide a mistake in the adapters
            key = jax.random.key(zlib.crc32(repr(path).encode()))
            variable[...] = 0.02 * jax.random.normal(key, variable[...].shape, variable[...].dtype)
    nnx.update(tuned, state)
    save_peft(folder / "adapter", llm, tuned, base_name=os.fspath(folder / "llm"))
    scale = float(jnp.sqrt(jnp.mean(jnp.square(llm.embedding[...].astype(jnp.float32)))))
    bridge = Bridge(encoder_config.width, llm_config.width, scale, nnx.Rngs(3))
    np.savez(folder / "bridge.npz", kernel=bridge.up.kernel[...], bias=bridge.up.bias[...])
    # What a teacher says is no matter of speed: numbers of the size of normed states.
    vectors = np.random.default_rng(0).standard_normal((len(texts), llm_config.width), np.float32)
    np.save(folder / "teacher.npy", vectors)
    done.write_text(json.dumps({"shape": shape.name}))


def batches_of(lengths: Sequence[int], rows: int, *, grouped: bool) -> list[np.ndarray]:
    """Places of the sentences of each step: of like length together, or as they come."""
    order = np.argsort(lengths, kind="stable") if grouped else np.arange(len(lengths))
    cut = [order[i : i + rows] for i in range(0, len(order) - rows + 1, rows)]
    return [cut[i] for i in np.random.default_rng(1).permutation(len(cut))]
