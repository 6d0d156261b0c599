"""Any valid config of any family: the same numbers as torch, and the same files again.

B rows, T positions, V vocabulary.
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch_models import (
    QUICK,
    SEGMENTS,
    assert_close,
    assert_equal_tensors,
    llm,
    llm_logits,
    m2m100,
    torch,
)

from mtllm_jax.hf.llama import load_llama, save_llama
from mtllm_jax.hf.nllb import load_nllb, save_nllb
from mtllm_jax.models.llama import FAMILIES

pytestmark = pytest.mark.slow

ON = SEGMENTS > 0
scalings = st.one_of(
    st.just({"rope_type": "default"}),
    st.fixed_dictionaries({"rope_type": st.just("linear"), "factor": st.floats(1, 8)}),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("llama3"),
            "factor": st.floats(1, 32),
            "low_freq_factor": st.floats(0.5, 2),
            "high_freq_factor": st.floats(3, 8),
            "original_max_position_embeddings": st.integers(8, 64),
        }
    ),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("yarn"),
            "factor": st.floats(1, 32),
            "original_max_position_embeddings": st.integers(8, 64),
        },
        optional={
            "attention_factor": st.floats(0.5, 1.5),
            "beta_fast": st.floats(16, 64),
            "beta_slow": st.floats(0.5, 4),
            "truncate": st.booleans(),
            "mscale": st.floats(0.5, 1),
            "mscale_all_dim": st.floats(0.5, 1),
        },
    ),
)


@st.composite
def llms(draw):
    """(family, fields of its config, causal)"""
    num_kv_heads, head_width = draw(st.integers(1, 3)), 2 * draw(st.integers(2, 8))
    num_heads = num_kv_heads * draw(st.integers(1, 3))
    family = draw(st.sampled_from(FAMILIES))
    fields = {
        "vocab_size": draw(st.integers(20, 60)),
        "hidden_size": num_heads * head_width,
        "num_hidden_layers": draw(st.integers(1, 2)),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "intermediate_size": draw(st.integers(1, 64)),
        "rms_norm_eps": draw(st.sampled_from([1e-5, 1e-6])),
        "rope_parameters": draw(scalings) | {"rope_theta": draw(st.floats(100, 1e6))},
        "tie_word_embeddings": draw(st.booleans()),
    }
    if family != "qwen2" and draw(st.booleans()):
        fields |= {"hidden_size": num_heads * draw(st.integers(2, 16)), "head_dim": head_width}
    elif family == "qwen3":
        fields |= {"head_dim": head_width}
    if family == "mistral":
        fields |= {"sliding_window": draw(st.none() | st.integers(1, 9))}
    return family, fields, draw(st.booleans())


@st.composite
def translators(draw):
    """Fields of an M2M100 config."""
    heads = [draw(st.integers(1, 3)) for _ in range(2)]
    return {
        "vocab_size": draw(st.integers(20, 60)),
        "d_model": 2 * heads[0] * heads[1] * draw(st.integers(2, 5)),
        "encoder_attention_heads": heads[0],
        "decoder_attention_heads": heads[1],
        "encoder_layers": draw(st.integers(1, 2)),
        "decoder_layers": draw(st.integers(1, 2)),
        "encoder_ffn_dim": draw(st.integers(1, 64)),
        "decoder_ffn_dim": draw(st.integers(1, 64)),
        "scale_embedding": draw(st.booleans()),
        "pad_token_id": draw(st.integers(0, 3)),
    }


few = settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)


@given(llms())
@few
def test_llms(drawn):
    family, fields, causal = drawn
    theirs = llm(family, **fields)
    ids = np.random.default_rng(0).integers(0, fields["vocab_size"], ON.shape).astype(np.int32)
    with tempfile.TemporaryDirectory() as name:
        theirs.save_pretrained(Path(name) / "theirs")
        ours = load_llama(Path(name) / "theirs")
        save_llama(ours, Path(name) / "ours")
        assert_equal_tensors(Path(name) / "theirs", Path(name) / "ours")
        assert load_llama(Path(name) / "ours").config == ours.config
        again = type(theirs).from_pretrained(Path(name) / "ours", attn_implementation="eager")
    graph, state = nnx.split(ours)

    def logits(state, ids):
        model = nnx.merge(graph, state)
        return model.logits(model.hidden(model.embed(ids), SEGMENTS, causal=causal))

    actual = jax.jit(logits, compiler_options=QUICK)(state, ids)
    for model in (theirs, again.eval()):
        assert_close(actual[ON], llm_logits(model, ids, SEGMENTS, causal=causal)[ON], 1e-4)


@given(translators())
@few
def test_translators(fields):
    theirs, pad = m2m100(**fields), fields["pad_token_id"]
    ids = np.random.default_rng(0).integers(4, fields["vocab_size"], ON.shape).astype(np.int32)
    ids = np.where(ON, ids, pad)
    with tempfile.TemporaryDirectory() as name:
        theirs.save_pretrained(Path(name) / "theirs")
        ours = load_nllb(Path(name) / "theirs")
        save_nllb(ours, Path(name) / "ours")
        assert_equal_tensors(Path(name) / "theirs", Path(name) / "ours")
        again = type(theirs).from_pretrained(Path(name) / "ours", attn_implementation="eager")
    graph, state = nnx.split(ours)

    def logits(state, ids):
        model = nnx.merge(graph, state)
        memory = model.encode(ids, SEGMENTS, jnp.float32)
        return model.logits(model.decode(ids, SEGMENTS, memory, SEGMENTS))

    actual = jax.jit(logits, compiler_options=QUICK)(state, ids)
    tokens, mask = torch.tensor(ids, dtype=torch.long), torch.tensor(SEGMENTS)
    for model in (theirs, again.eval()):
        with torch.no_grad():
            expected = model(tokens, mask, decoder_input_ids=tokens, decoder_attention_mask=mask)
        assert_close(actual[ON], expected.logits[ON], 1e-4)
