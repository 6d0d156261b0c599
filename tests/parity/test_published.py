"""The config.json of published checkpoints, at full size and without weights, against transformers.

Each is what its authors put on the hub, in transformers 4's form, less the fields that say nothing
about the model. Tensors are compared by name and shape with a torch model on the meta device, and
their number with the published one.
"""

import math

import numpy as np
import pytest
from flax import nnx
from torch_models import CLASSES, torch, transformers

from mtllm_jax.hf import llama, nllb
from mtllm_jax.hf.folder import match
from mtllm_jax.models.llama import Llama
from mtllm_jax.models.nllb import NLLB
from mtllm_jax.ops.rope import Llama3Scaling, YarnScaling, rope_frequencies, rope_gain

from transformers.models.llama import modeling_llama  # isort: skip

LLAMA_2 = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "vocab_size": 32_000,
}
LLAMA_3 = LLAMA_2 | {
    "bos_token_id": 128_000,
    "eos_token_id": 128_001,
    "intermediate_size": 14_336,
    "max_position_embeddings": 8192,
    "num_key_value_heads": 8,
    "rope_theta": 500_000.0,
    "vocab_size": 128_256,
}
SCALING = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
MISTRAL = LLAMA_2 | {
    "model_type": "mistral",
    "intermediate_size": 14_336,
    "max_position_embeddings": 32_768,
    "num_key_value_heads": 8,
    "rope_theta": 10_000.0,
    "sliding_window": 4096,
}
QWEN_2 = {
    "model_type": "qwen2",
    "bos_token_id": 151_643,
    "eos_token_id": 151_643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "max_position_embeddings": 131_072,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "sliding_window": 131_072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152_064,
}
QWEN_3 = QWEN_2 | {
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40_960,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "rope_scaling": None,
    "rope_theta": 1_000_000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "vocab_size": 151_936,
}
NLLB_600M = {
    "model_type": "m2m_100",
    "activation_function": "relu",
    "bos_token_id": 0,
    "d_model": 1024,
    "decoder_attention_heads": 16,
    "decoder_ffn_dim": 4096,
    "decoder_layers": 12,
    "decoder_start_token_id": 2,
    "encoder_attention_heads": 16,
    "encoder_ffn_dim": 4096,
    "encoder_layers": 12,
    "eos_token_id": 2,
    "is_encoder_decoder": True,
    "max_position_embeddings": 1024,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "scale_embedding": True,
    "vocab_size": 256_206,
}
DEEP = {"encoder_layers": 24, "decoder_layers": 24, "num_hidden_layers": 24}
WIDE = {"encoder_ffn_dim": 8192, "decoder_ffn_dim": 8192}
# name → (config, parameters, tied ones once; None where no number is at hand)
PUBLISHED = {
    "Llama 2 7B": (LLAMA_2, 6_738_415_616),
    "Llama 3 8B": (LLAMA_3, 8_030_261_248),
    "Llama 3.1 8B": (
        LLAMA_3 | {"max_position_embeddings": 131_072, "rope_scaling": SCALING},
        8_030_261_248,
    ),
    "Llama 3.2 1B": (
        LLAMA_3
        | {
            "head_dim": 64,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "max_position_embeddings": 131_072,
            "num_hidden_layers": 16,
            "rope_scaling": SCALING | {"factor": 32.0},
            "tie_word_embeddings": True,
        },
        1_235_814_400,
    ),
    "Mistral 7B v0.1": (MISTRAL, 7_241_732_096),
    "Mistral 7B v0.3": (
        MISTRAL | {"rope_theta": 1_000_000.0, "sliding_window": None, "vocab_size": 32_768},
        7_248_023_552,
    ),
    "Qwen2 7B": (QWEN_2, 7_615_616_512),
    "Qwen2.5 0.5B": (
        QWEN_2
        | {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "max_position_embeddings": 32_768,
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "vocab_size": 151_936,
        },
        494_032_768,
    ),
    "Qwen2.5 7B, long context by its card": (
        QWEN_2
        | {
            "max_position_embeddings": 32_768,
            "rope_scaling": {
                "factor": 4.0,
                "original_max_position_embeddings": 32_768,
                "type": "yarn",
            },
        },
        7_615_616_512,
    ),
    "Qwen3 0.6B": (QWEN_3, 596_049_920),
    "SmolLM2 135M": (
        LLAMA_2
        | {
            "bos_token_id": 0,
            "eos_token_id": 0,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "max_position_embeddings": 8192,
            "num_attention_heads": 9,
            "num_hidden_layers": 30,
            "num_key_value_heads": 3,
            "rope_theta": 100_000,
            "tie_word_embeddings": True,
            "vocab_size": 49_152,
        },
        134_515_008,
    ),
    # SeaLLM 2 is a Mistral, 3 a Qwen2 of the size above; 1 was a Llama 2 with more pieces.
    "a Llama 2 13B with SeaLLM's larger vocabulary": (
        LLAMA_2
        | {
            "hidden_size": 5120,
            "intermediate_size": 13_824,
            "num_attention_heads": 40,
            "num_hidden_layers": 40,
            "num_key_value_heads": 40,
            "vocab_size": 48_512,
        },
        None,
    ),
    "a Mistral with SeaLLM's larger vocabulary": (MISTRAL | {"vocab_size": 48_384}, None),
    "NLLB-200 distilled 600M": (NLLB_600M, 615_073_792),
    "NLLB-200 1.3B, distilled or not": (NLLB_600M | DEEP | WIDE, 1_370_638_336),
    "NLLB-200 3.3B": (NLLB_600M | DEEP | WIDE | {"d_model": 2048}, 3_344_863_232),
    "M2M100 418M": (NLLB_600M | {"vocab_size": 128_112}, 483_905_536),
    "M2M100 1.2B": (NLLB_600M | DEEP | WIDE | {"vocab_size": 128_112}, 1_239_470_080),
}
LLMS = [name for name, (config, _) in PUBLISHED.items() if config["model_type"] != "m2m_100"]


class Shapes:
    """A folder's tensors, of which there are only names and shapes."""

    folder = "published"

    def __init__(self, model):
        self.by_name = {name: tuple(w.shape) for name, w in model.named_parameters()}

    def keys(self):
        return list(self.by_name)

    def shape(self, name):
        return self.by_name[name]

    def check_dtype(self, name):
        pass


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_of_all_tensors(name):
    source, published = PUBLISHED[name]
    kind = source["model_type"]
    if kind == "m2m_100":
        config = nllb.config_from_values(source, name)
        module, table = nnx.eval_shape(lambda: NLLB(config, nnx.Rngs(0))), nllb.key_table(config)
    else:
        config = llama.config_from_hf(source)
        module, table = nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0))), llama.key_table(config)
    with torch.device("meta"):
        theirs = getattr(transformers, CLASSES[kind])(
            transformers.AutoConfig.for_model(kind, **_rest(source))
        )
    tensors = Shapes(theirs)
    plan = match(module, tensors, table)
    assert sorted(n for names in plan.values() for n in names) == sorted(tensors.keys())
    count = sum(math.prod(shape) for shape in tensors.by_name.values())
    assert count == sum(math.prod(p.shape) for _, p in nnx.to_flat_state(nnx.state(module)))
    assert published in (None, count)


@pytest.mark.parametrize("name", LLMS)
def test_positions_and_what_is_written_of_them(name):
    """Theta, scaling and window are those that transformers reads, from this file and from ours."""
    source, _ = PUBLISHED[name]
    ours = llama.config_from_hf(source)
    assert ours.rope_theta == source.get("rope_theta", 10_000.0)
    frequencies = rope_frequencies(ours.head_width, ours.rope_theta, ours.rope_scaling)
    for told in (source, llama.config_to_hf(ours)):
        config = transformers.AutoConfig.for_model(source["model_type"], **_rest(told))
        theirs = modeling_llama.LlamaRotaryEmbedding(config)
        np.testing.assert_allclose(frequencies, theirs.inv_freq.numpy(), rtol=2.5e-7)
        assert rope_gain(ours.rope_scaling) == theirs.attention_scaling
        assert getattr(config, "sliding_window", None) == ours.sliding_window


def test_what_the_scalings_are():
    """As their releases give them."""
    found = {name: llama.config_from_hf(PUBLISHED[name][0]).rope_scaling for name in LLMS}
    assert found["Llama 3 8B"] is None
    assert found["Llama 3.1 8B"] == Llama3Scaling(8.0, 1.0, 4.0, 8192)
    assert found["Llama 3.2 1B"] == Llama3Scaling(32.0, 1.0, 4.0, 8192)
    assert found["Qwen2.5 7B, long context by its card"] == YarnScaling(
        4.0, 32_768, 1 + 0.1 * math.log(4)
    )


def _rest(source):
    return {field: value for field, value in source.items() if field != "model_type"}
