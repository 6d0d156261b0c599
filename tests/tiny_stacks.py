"""Stacks of a few thousand random weights with adapters, heads and tokenizers, and their outputs.

B texts, S positions, D LLM width.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiny
import tiny_folders
from flax import nnx

from mtllm_jax.data.packing import padded
from mtllm_jax.data.tokenise import SourceTokenizer, TargetTokenizer, source_tokenizer
from mtllm_jax.data.train_tokenizer import train_llama_tokenizer, train_nllb_tokenizer
from mtllm_jax.hf.stack import save_stack
from mtllm_jax.models import lora
from mtllm_jax.models.bert import Bert, BertConfig
from mtllm_jax.models.bridge import Bridge
from mtllm_jax.models.llama import Llama, LlamaConfig
from mtllm_jax.models.nllb import NLLB, NLLBConfig
from mtllm_jax.models.stack import Stack, classification_head, segment_mean
from mtllm_jax.ops.rope import Llama3Scaling

CODES = ("eng_Latn", "deu_Latn", "jpn_Jpan")
TEXTS = ["Japan und Kenia", "Peru", "ケニアと日本とペルー", "Kenya, Peru and Japan; Peru"]
LANGUAGES = ["deu_Latn", "eng_Latn", "jpn_Jpan", "eng_Latn"]
QUESTIONS = [
    ("Kenya and Peru and Japan", "Peru?", ("Kenya", "Peru", "Japan and Peru", "Kenya")),
    ("Japan", "Kenya?", ("Peru", "Japan")),
    ("Peru Kenya Japan " * 8, "and?", ("Japan", "Peru")),
]
LABELS = ("no", "yes", "so so")
MAX_LENGTH = 24
WIDTH = 32
LLMS: dict[str, dict[str, Any]] = {
    "llama": {"rope_scaling": Llama3Scaling(8.0, 1.0, 4.0, 16), "rope_theta": 5e5},
    "mistral": {"sliding_window": 3},
    "qwen2": {"qkv_bias": True, "rope_theta": 1e6},
    "qwen3": {"qk_norm": True, "tie_embeddings": True},
}
CLASSIFY, CHOOSE = "classification", "multiple_choice"


def make_tokenizers(root: Path) -> Path:
    """A folder with one tokenizer of each kind in a sub-folder."""
    train_nllb_tokenizer(TEXTS, CODES, 120, root / "nllb")
    train_llama_tokenizer(TEXTS, 320, root / "llm")
    (root / "llm" / "config.json").write_text('{"model_type": "llama"}')
    tiny_folders.bert_tokenizer(root / "bert", TEXTS, 120)
    tiny_folders.xlmr_tokenizer(root / "xlmr", TEXTS, 60)
    tiny_folders.m2m100_tokenizer(root / "m2m100", TEXTS, 120)
    return root


@dataclasses.dataclass(frozen=True)
class Made:
    """A stack with adapters, a head of each kind, and the name of its encoder's tokenizer."""

    stack: Stack
    heads: dict[str, Any]
    tokenizers: Path
    encoder: str

    @functools.cached_property
    def source(self) -> SourceTokenizer:
        return source_tokenizer(self.tokenizers / self.encoder)

    def save(self, folder: Path, kind: str = "none", **options: Any) -> Path:
        given = {
            "head": self.heads.get(kind),
            "kind": kind,
            "labels": LABELS if kind == CLASSIFY else (),
            "bidirectional": True,
            "max_length": MAX_LENGTH,
            "languages": self.source.languages,
            "encoder_tokenizer_from": self.tokenizers / self.encoder,
            "llm_tokenizer_from": self.tokenizers / "llm",
        }
        save_stack(folder, self.stack, **given | options)
        return folder

    def hidden(self, rows: list[np.ndarray], causal: bool = False) -> tuple[jax.Array, np.ndarray]:
        """States [B, P, D] of rows of token ids, and their segments [B, P]."""
        batch = padded(rows, "text", self.source.pad_id, rows=len(rows))
        h_BPD, segments_BP = self._hidden(batch["text_ids"], batch["text_segments"], causal)
        return h_BPD, np.asarray(segments_BP)

    def vectors(self, rows: list[np.ndarray], causal: bool = False) -> np.ndarray:
        """[B, D]."""
        h_BPD, segments_BP = self.hidden(rows, causal)
        return np.asarray(segment_mean(h_BPD, segments_BP, 1)[:, 0])

    @functools.cached_property
    def _hidden(self) -> Any:
        graph, state = nnx.split(self.stack)

        @functools.partial(jax.jit, static_argnums=3, compiler_options=tiny.QUICK)
        def run(state: Any, ids: jax.Array, segments: jax.Array, causal: bool) -> Any:
            return nnx.merge(graph, state).hidden(ids, segments, 1, causal=causal)

        return functools.partial(run, state)


def make_stack(tokenizers: Path, encoder: str, family: str, **bridge: int) -> Made:
    """A stack on an encoder whose tokenizer is in the sub-folder of its name. bridge: its sizes."""
    size = source_tokenizer(tokenizers / encoder).vocab_size
    bert = {"vocab_size": size, "width": 16, "num_layers": 1, "num_heads": 2, "ffn": 24}
    sources = {
        "nllb": NLLBConfig(size, 16, 2, 1, 2, 2, 24, 24),
        "m2m100": NLLBConfig(size, 16, 1, 0, 2, 2, 24, 24),
        "bert": BertConfig(**bert, num_positions=40),
        "xlmr": BertConfig(**bert, num_positions=40, pad_id=1, family="xlm-roberta"),
    }
    source = sources[encoder]
    config = LlamaConfig(
        vocab_size=TargetTokenizer(tokenizers / "llm").vocab_size,
        width=WIDTH,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_width=8,
        ffn_width=48,
        family=family,
        **LLMS[family],
    )

    def stack() -> Stack:
        rngs = tiny.rngs()
        llm = Llama(config, rngs)
        for rank, targets in ((4, ("q", "down")), (2, ("v",))):
            lora.attach(llm, rank=rank, alpha=6, dropout=0.1, targets=targets, rngs=rngs)
        module = NLLB if isinstance(source, NLLBConfig) else Bert
        return Stack(module(source, rngs), Bridge(16, WIDTH, 1.0, rngs, **bridge), llm)

    def head(size: int) -> Any:
        return _filled(lambda: classification_head(WIDTH, size, tiny.rngs()))

    heads = {CLASSIFY: head(len(LABELS)), CHOOSE: head(1)}
    return Made(_filled(stack), heads, tokenizers, encoder)


def _filled(make: Callable[[], Any]) -> Any:
    """A module with random weights, norms and biases too, that nothing is compiled for."""
    graph, state = nnx.split(nnx.eval_shape(make))
    rng = np.random.default_rng(1)
    flat = []
    for keys, value in nnx.to_flat_state(state):
        std = 0.1 if "norm" in str(keys) or keys[-1] == "bias" else value.shape[-2] ** -0.5
        array = rng.normal(keys[-1] == "scale", std, value.shape)
        flat.append((keys, value.replace(jnp.asarray(array, jnp.float32))))
    return nnx.merge(graph, nnx.from_flat_state(flat))
