"""Tiny models of transformers as references for parity, and the rows they are compared on.

Every weight is random, norms and biases too: none can be forgotten unnoticed. B rows, T positions.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity needs torch (the `test` extra on Python 3.11)")
transformers = pytest.importorskip("transformers")
from safetensors.numpy import load_file  # noqa: E402

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "m2m_100": "M2M100ForConditionalGeneration",
}
CONFIGS = {
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "m2m_100": "M2M100Config",
}
QUICK = {"xla_backend_optimization_level": 0}  # compiles in half the time
# Whole, right-padded, left-padded, one token, and padding in the middle of a row; 0 is padding.
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


def llm(family, seed=0, **changes):
    """A decoder-only model with logits near 1, so that a tolerance says something."""
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0},
    }
    config = getattr(transformers, CONFIGS[family])(**sizes | changes)
    config._attn_implementation = "eager"
    model = getattr(transformers, CLASSES[family])(config).eval()

    def scale(name, weight):
        return weight.shape[1] ** -0.5 if weight.ndim == 2 else 0.1

    return _randomised(model, scale, seed)


def m2m100(seed=0, gain=0.25, **changes):
    """An encoder-decoder; `gain` is the standard deviation of its linear maps' weights."""
    sizes = {
        "vocab_size": 60,
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 40,
    }
    config = transformers.M2M100Config(**sizes | changes)
    config._attn_implementation = "eager"
    model = transformers.M2M100ForConditionalGeneration(config).eval()

    def scale(name, weight):
        return 0.25 if "shared" in name else gain if weight.ndim == 2 else 0.1

    _randomised(model, scale, seed)
    with torch.no_grad():
        model.model.shared.weight[model.config.pad_token_id] = 0.0
        model.model.shared.weight[model.config.eos_token_id] *= 3.0  # so that translations end
    return model


def _randomised(model, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = scale(name, weight) * torch.randn(weight.shape, generator=generator)
            weight.copy_(noise + name.endswith("norm.weight"))
    return model


def llm_logits(model, ids, segments, *, causal):
    """[B, T, V] for one text a row. Torch is told by a mask and by positions what we derive from
    segments: causal by the usual [B, T] one, otherwise by one that shows every query all tokens of
    its row."""
    is_token = torch.tensor(segments > 0)
    positions = (is_token.long().cumsum(1) - 1).clamp(min=0)
    mask = is_token if causal else additive_mask(segments, segments, model.dtype)
    with torch.no_grad():
        ids = torch.tensor(ids, dtype=torch.long)
        return model(input_ids=ids, attention_mask=mask, position_ids=positions).logits


def additive_mask(query_segments, key_segments, dtype, *, causal=False, window=None):
    """[B, 1, T, S]: 0 where a query sees a key, else the lowest number: what transformers adds to
    scores as it is."""
    sees = np.broadcast_to(
        (key_segments > 0)[:, None, :], (*query_segments.shape, key_segments.shape[1])
    )
    if causal:
        distance = np.subtract.outer(
            *(np.arange(s.shape[1]) for s in (query_segments, key_segments))
        )
        sees = sees & (distance >= 0) & (distance < (window or np.inf))
    zero, lowest = torch.zeros((), dtype=dtype), torch.finfo(dtype).min
    return torch.where(torch.tensor(sees)[:, None], zero, lowest)


def assert_close(actual, expected, tolerance):
    actual, expected = (np.asarray(a, np.float32) for a in (actual, expected))
    np.testing.assert_allclose(actual, expected, atol=tolerance, rtol=tolerance)


def assert_no_further(ours, theirs, exact):
    """Low precision of ours is nearer to the exact numbers than torch's own, on average."""
    ours, theirs = (np.abs(np.asarray(a, np.float32) - exact) for a in (ours, theirs))
    assert theirs.mean() > 0
    assert ours.mean() <= theirs.mean()


def assert_equal_tensors(one, other):
    """Two folders hold the same tensors: names, dtypes, bits."""
    one, other = (_all_tensors(folder) for folder in (one, other))
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert array.dtype == other[name].dtype, name
        assert array.shape == other[name].shape, name
        assert array.tobytes() == other[name].tobytes(), name


def _all_tensors(folder):
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    assert tensors
    return tensors
