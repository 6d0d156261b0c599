"""Sizes of the models that a plan is made for: published ones by name, or those of a folder.

No weights are read, so a plan needs no checkpoints. How layers are run is for the step.
"""

import dataclasses
import os

from mtllm_jax.config import MTLLM, SDRRL
from mtllm_jax.hf import bert, llama, nllb
from mtllm_jax.hf.folder import read_config
from mtllm_jax.models.bert import FAMILIES as BERT_FAMILIES
from mtllm_jax.models.bert import BertConfig
from mtllm_jax.models.llama import FAMILIES as LLAMA_FAMILIES
from mtllm_jax.models.llama import LlamaConfig
from mtllm_jax.models.nllb import NLLBConfig


def _nllb(width: int, layers: int, ffn: int) -> NLLBConfig:
    return NLLBConfig(
        vocab_size=256_206,
        width=width,
        encoder_layers=layers,
        decoder_layers=0,
        encoder_heads=16,
        decoder_heads=16,
        encoder_ffn=ffn,
        decoder_ffn=ffn,
    )


def _llama3(width: int, layers: int, heads: int, ffn: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128_256,
        width=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_width=128,
        ffn_width=ffn,
        rope_theta=500_000.0,
        max_positions=8192,
        bos_id=128_000,
        eos_ids=(128_001,),
    )


# From config.json of facebook/nllb-200-distilled-600M, nllb-200-1.3B and nllb-200-3.3B, and of
# intfloat/multilingual-e5-small.
ENCODERS: dict[str, NLLBConfig | BertConfig] = {
    "nllb-600m": _nllb(1024, 12, 4096),
    "nllb-1.3b": _nllb(1024, 24, 8192),
    "nllb-3.3b": _nllb(2048, 24, 8192),
    "e5-small": BertConfig(
        vocab_size=250_037, width=384, num_layers=12, num_heads=12, ffn=1536, num_positions=512
    ),
}
# From config.json of meta-llama/Meta-Llama-3-8B and -70B, meta-llama/Llama-2-7b-chat-hf,
# mistralai/Mistral-7B-Instruct-v0.2, Qwen/Qwen3-8B and HuggingFaceTB/SmolLM2-135M-Instruct.
LLMS = {
    "llama3-8b": _llama3(4096, 32, 32, 14_336),
    "llama3-70b": _llama3(8192, 80, 64, 28_672),
    "llama2-7b": LlamaConfig(
        vocab_size=32_000,
        width=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_width=128,
        ffn_width=11_008,
        max_positions=4096,
    ),
    "mistral-7b": LlamaConfig(
        vocab_size=32_000,
        width=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_width=128,
        ffn_width=14_336,
        rope_theta=1_000_000.0,
        family="mistral",
        max_positions=32_768,
    ),
    "qwen3-8b": LlamaConfig(
        vocab_size=151_936,
        width=4096,
        num_layers=36,
        num_heads=32,
        num_kv_heads=8,
        head_width=128,
        ffn_width=12_288,
        rms_eps=1e-6,
        rope_theta=1_000_000.0,
        qk_norm=True,
        family="qwen3",
        max_positions=40_960,
        bos_id=151_643,
        eos_ids=(151_645,),
    ),
    "smollm2-135m": LlamaConfig(
        vocab_size=49_152,
        width=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_width=64,
        ffn_width=1536,
        rope_theta=100_000.0,
        tie_embeddings=True,
        max_positions=8192,
    ),
}


def encoder_sizes(config: MTLLM, name: str) -> NLLBConfig | BertConfig:
    """Of the encoder that the config names a folder of, of the mini NLLB, or of a published one.

    name: "" = the one that the recipe is named for, or the paper's.
    """
    if config.encoder:
        return _encoder_of(config.encoder)
    if config.mini_nllb is not None:
        mini = config.mini_nllb
        return NLLBConfig(
            vocab_size=mini.vocab_size,
            width=mini.width,
            encoder_layers=mini.encoder_layers,
            decoder_layers=0,
            encoder_heads=mini.num_heads,
            decoder_heads=mini.num_heads,
            encoder_ffn=mini.ffn_width,
            decoder_ffn=mini.ffn_width,
        )
    name = name or _named_for(config.name)[0]
    if name not in ENCODERS:
        raise ValueError(f"--encoder is {name!r}; it must be one of {', '.join(ENCODERS)}.")
    return ENCODERS[name]


def _encoder_of(folder: str | os.PathLike[str]) -> NLLBConfig | BertConfig:
    source = read_config(folder, ("m2m_100", *BERT_FAMILIES))
    if source["model_type"] == "m2m_100":
        return dataclasses.replace(nllb.config_from_hf(folder), decoder_layers=0)
    return bert.config_from_hf(folder)


def llm_sizes(config: MTLLM | SDRRL, name: str) -> LlamaConfig:
    """Of the LLM that the config names a folder of, of the mini Llama, or of a published one.

    name: "" = the one that the recipe is named for.
    """
    if config.llm:
        return llama.config_from_hf(read_config(config.llm, LLAMA_FAMILIES))
    if config.mini_llama is not None:
        mini = config.mini_llama
        return LlamaConfig(
            vocab_size=mini.vocab_size,
            width=mini.width,
            num_layers=mini.num_layers,
            num_heads=mini.num_heads,
            num_kv_heads=mini.num_kv_heads,
            head_width=mini.width // mini.num_heads,
            ffn_width=mini.ffn_width,
        )
    name = name or _named_for(config.name)[1]
    if name not in LLMS:
        raise ValueError(f"--llm is {name!r}; it must be one of {', '.join(LLMS)}.")
    return LLMS[name]


def _named_for(recipe: str) -> tuple[str, str]:
    """The encoder and the LLM of a recipe that is called LLM or ENCODER-LLM, the one the beginning
    of the other's name or the other way round; "" for an LLM that is none of them."""
    first, _, rest = recipe.partition("-")
    encoder = next((name for name in ENCODERS if name.partition("-")[0] == first), "")
    llm = rest if encoder else recipe
    likely = (name for name in LLMS if llm.startswith(name) or name.startswith(llm))
    return encoder or next(iter(ENCODERS)), next(likely, "")
