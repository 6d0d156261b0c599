"""The stack and every objective: like torch, packed or not, wherever the padding is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from mtllm_jax.hf.llama import load_llama
from mtllm_jax.hf.nllb import load_nllb
from mtllm_jax.models.layers import Linear
from mtllm_jax.models.llama import Llama
from mtllm_jax.models.stack import Stack, add_noise, segment_mean
from mtllm_jax.recipes import stacking


@pytest.mark.parametrize("case", tiny.CASES)
def test_packed_equals_one_text_a_row_and_padding_changes_nothing(case):
    """The same loss, metrics and gradients, all of them finite, in one compiled program."""
    stage = tiny.stage(case)
    packed = stage.batch(packing=True)
    alone = stage.batch(packing=False)
    assert np.sum(packed["example"] > 0) == np.sum(alone["example"] > 0) == tiny.NUM_TEXTS
    assert np.any(packed["example"][:, 1] > 0) and np.any(packed["example"][:, 0] == 0)
    wanted = stage(alone)
    assert wanted[1]["loss"][1] >= tiny.NUM_TEXTS
    assert all(np.all(np.isfinite(x)) and np.any(x) for x in jax.tree.leaves(wanted))
    for batch in (packed, stage.batch(packing=False, shift=3)):
        tiny.assert_close_trees(stage(batch), wanted)


@pytest.mark.parametrize("case", tiny.CASES)
def test_pad_ids_are_never_read(case):
    """Other ids at padding give the same numbers, bit for bit."""
    stage = tiny.stage(case)
    batch = stage.batch()
    other = dict(batch)
    for stream in stage.texts[0]:
        is_pad = batch[f"{stream}_segments"] == 0
        other[f"{stream}_ids"] = np.where(is_pad, 7, batch[f"{stream}_ids"])
    if case == "translation":
        # The sums over the embedding's rows, where padded inputs add zeros, take another order.
        tiny.assert_close_trees(stage(other), stage(batch), 1e-6)
    else:
        jax.tree.map(np.testing.assert_array_equal, stage(other), stage(batch))


# ---------------------------------------------------------------- against torch


def torch_stack(torch, encoder, bridge, llm, ids, segments):
    """M2M100's encoder → Linear → Llama by inputs_embeds with a full mask → mean."""
    up = torch.nn.Linear(bridge.up.kernel.shape[0], bridge.up.kernel.shape[1])
    with torch.no_grad():
        up.weight.copy_(torch.tensor(np.asarray(bridge.up.kernel[...]).T))
        up.bias.copy_(torch.tensor(np.asarray(bridge.up.bias[...])))
        ids, mask = torch.tensor(ids, dtype=torch.long), torch.tensor(segments > 0)
        h = up(encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state)
        # A ready 4-D mask is used as it is: every position sees the tokens of its row.
        lowest = torch.finfo(h.dtype).min
        full = torch.where(mask[:, None, None, :], torch.zeros(()), lowest)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        h = llm(
            inputs_embeds=h,
            attention_mask=full.expand(-1, 1, ids.shape[1], -1),
            position_ids=positions,
        ).last_hidden_state
        return ((h * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)).numpy()


def random_torch(torch, kind, config):
    """Every weight is random, norms and biases too."""
    model = kind(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise * p.shape[1] ** -0.5 if p.ndim == 2 else 0.1 * noise + ("norm" in name))
    return model


def test_stack_equals_its_composition_in_torch(tmp_path):
    torch = pytest.importorskip(
        "torch", reason="torch is installed by the test extra on Python 3.11 alone"
    )
    import transformers

    encoder = random_torch(
        torch,
        transformers.M2M100ForConditionalGeneration,
        transformers.M2M100Config(
            vocab_size=tiny.VOCAB,
            d_model=16,
            encoder_layers=2,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_position_embeddings=64,
        ),
    )
    llm = random_torch(
        torch,
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(
            vocab_size=tiny.VOCAB,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            attn_implementation="eager",
        ),
    )
    encoder.save_pretrained(tmp_path / "encoder")
    llm.save_pretrained(tmp_path / "llm")
    ours = load_nllb(tmp_path / "encoder", with_decoder=False), load_llama(tmp_path / "llm")
    parts = stacking.Parts(None, None, *ours)
    stack = stacking.build_stack(tiny.settings(trained="lora"), parts, 0)
    tiny.randomised(stack.bridge, 0)
    # In torch, adapters are what their product changes in the kernels.
    for name, adapted in vars(stack.llm.layers).items():
        if isinstance(adapted, Linear):
            tiny.randomised(adapted, 1)
            update_LIO = adapted.lora_scale * (adapted.lora_a[...] @ adapted.lora_b[...])
            kernel_LIO = np.asarray(adapted.kernel[...] + update_LIO)
            for kernel_IO, layer in zip(kernel_LIO, llm.model.layers, strict=True):
                block = layer.mlp if hasattr(layer.mlp, f"{name}_proj") else layer.self_attn
                weight = getattr(block, f"{name}_proj").weight
                weight.data = torch.tensor(kernel_IO.T.copy())

    lengths = np.array([9, 1, 6, 4, 8])
    segments = (np.arange(9)[None] < lengths[:, None]).astype(np.int32)
    ids = np.random.default_rng(0).integers(3, tiny.VOCAB, segments.shape).astype(np.int32)
    ids = np.where(segments, ids, 1)
    graph, state = nnx.split(stack)

    def pooled(state, ids, segments):
        return nnx.merge(graph, state).pooled(ids, segments, 1, causal=False)[:, 0]

    wanted = torch_stack(torch, encoder.model.encoder, stack.bridge, llm.model, ids, segments)
    assert np.std(wanted) > 0.1
    pooled = jax.jit(pooled, compiler_options=tiny.QUICK)
    np.testing.assert_allclose(pooled(state, ids, segments), wanted, atol=1e-4)


# ---------------------------------------------------------------- the pieces


def test_segment_mean():
    rng = np.random.default_rng(0)
    h = rng.normal(size=(2, 7, 3)).astype(np.float32)
    segments = np.array([[1, 1, 2, 0, 3, 3, 3], [0, 0, 1, 1, 1, 0, 0]], np.int32)
    got = np.asarray(segment_mean(h, segments, 4))
    for b in range(2):
        for n in range(4):
            own = h[b][segments[b] == n + 1]
            np.testing.assert_allclose(got[b, n], own.mean(0) if len(own) else 0, atol=1e-6)


def test_noise_is_shared_within_a_text_and_only_there():
    segments = np.repeat([[1, 2, 2, 2, 3, 3, 0, 0]], 4, axis=0).astype(np.int32)
    zeros = jnp.zeros((4, 8, 4000))
    shared = np.asarray(add_noise(zeros, segments, 3, 0.0, 0.7, jax.random.key(0)))
    own = np.asarray(add_noise(zeros, segments, 3, 0.3, 0.0, jax.random.key(0)))
    both = np.asarray(add_noise(zeros, segments, 3, 0.3, 0.7, jax.random.key(0)))
    np.testing.assert_allclose(both, shared + own, atol=1e-6)
    for b in range(4):
        for s in range(8):
            for t in range(s):
                same = segments[b, s] == segments[b, t]
                assert np.array_equal(shared[b, s], shared[b, t]) == same
                assert not np.array_equal(own[b, s], own[b, t])
    np.testing.assert_allclose(shared.std(axis=2), 0.7, rtol=0.05)
    np.testing.assert_allclose(own.std(axis=2), 0.3, rtol=0.05)
    assert add_noise(zeros, segments, 3, 0.3, 0.7, None) is zeros


def test_a_copy_shares_nothing_that_changes_in_place():
    llm = nnx.clone(tiny.parts().llm)
    before = np.asarray(llm.embedding[...]).copy()
    other = nnx.clone(llm)
    tiny.randomised(other, 0)
    np.testing.assert_array_equal(llm.embedding[...], before)
    assert np.any(np.asarray(other.embedding[...]) != before)


@pytest.mark.parametrize("trained", ["all", "lora"])
def test_what_tuning_changed_is_added_to_the_student(trained):
    """student + (tuned + scale · A B) − base, for every weight; nothing else changes."""
    config = tiny.settings(trained=trained)
    base = tiny.parts().llm
    student = tiny.randomised(stacking.with_adapters(config, base, 0), 1)
    tuned = tiny.randomised(stacking.with_adapters(config, base, 0), 2)
    before = {name: arrays(model) for name, model in locals().items() if isinstance(model, Llama)}
    stacking.add_difference(student, tuned, base)
    assert_same(arrays(base), before["base"])
    assert_same(arrays(tuned), before["tuned"])
    after = arrays(student)
    assert after.keys() == before["student"].keys()
    for name, value in before["base"].items():
        wanted = before["student"][name] + before["tuned"][name] - value
        if trained == "lora" and name.endswith("kernel"):
            prefix = name.removesuffix("kernel")
            a, b = (before["tuned"][f"{prefix}lora_{x}"] for x in "ab")
            wanted = wanted + config.lora.alpha / config.lora.rank * (a @ b)
        np.testing.assert_allclose(after[name], wanted, atol=1e-5, err_msg=name)
    for name in after.keys() - before["base"].keys():
        assert "lora_" in name
        np.testing.assert_array_equal(after[name], before["student"][name])


def arrays(module):
    flat = nnx.to_flat_state(nnx.state(module))
    return {"/".join(map(str, path)): np.asarray(value[...]).copy() for path, value in flat}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name])


@pytest.mark.parametrize("trained", ["all", "lora"])
def test_what_is_trained(trained):
    config = tiny.settings(trained=trained)
    stack = stacking.build_stack(config, tiny.parts(), 0)
    _, trainable, frozen = nnx.split(stack, stacking.is_trained(config), ...)
    names = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(trainable)}
    bridge = {"bridge/up/kernel", "bridge/up/bias"}
    assert bridge < names
    frozen_names = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(frozen)}
    if trained == "lora":
        assert all("lora_" in name for name in names - bridge)
        assert "llm/layers/q/kernel" in frozen_names
    else:
        outside = {name for name in frozen_names if not name.startswith("encoder/")}
        assert outside == {"llm/embedding", "llm/output"}
    assert not any(name.startswith("encoder/") for name in names)


def test_the_stack_starts_as_the_llm_left_it():
    """Fresh adapters change nothing, and the bridge speaks at the size of the LLM's embeddings."""
    parts = tiny.parts()
    stack: Stack = stacking.build_stack(tiny.settings(trained="lora"), parts, 0)
    ids, segments = np.array([[5, 6, 7, 8]], np.int32), np.ones((1, 4), np.int32)

    def hidden(llm):
        graph, state = nnx.split(llm)

        def run(state):
            llm = nnx.merge(graph, state)
            return llm.hidden(llm.embed(ids), segments, causal=False)

        return jax.jit(run, compiler_options=tiny.QUICK)(state)

    np.testing.assert_array_equal(hidden(stack.llm), hidden(parts.llm))
    wide = dataclasses.replace(parts.encoder.config, width=512)
    heard = jax.random.normal(jax.random.key(0), (1, 64, wide.width))
    for hidden, stride in ((0, 1), (256, 1), (0, 2), (256, 4)):
        bridge = stacking.Bridge(wide.width, 400, 0.37, nnx.Rngs(0), hidden=hidden, stride=stride)
        spoken, _ = bridge(heard, np.ones((1, 64), np.int32), 1)
        assert spoken.shape == (1, 64 // stride, 400)
        np.testing.assert_allclose(jnp.std(spoken), 0.37, rtol=0.03)
