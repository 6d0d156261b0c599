"""What can be put in the place of the paper's choices: bridges, what learns, what is minimised."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import reduced
import test_task_run
import tiny
from flax import nnx

from mtllm_jax import config as c
from mtllm_jax.metrics import read_metrics
from mtllm_jax.models.bert import Bert, BertConfig
from mtllm_jax.models.bridge import shortened, windows
from mtllm_jax.models.nllb import NLLB
from mtllm_jax.recipes import stacking

ALL_TERMS = {"mse": 1.0, "cosine": 0.5, "contrastive": 0.25, "temperature": 0.2}
# Everything at once, so that little is compiled.
CHANGED = tiny.settings(
    trained="bridge",
    bridge=c.Bridge(hidden=24, stride=3),
    encoder_layers=1,
    adaptation=c.Adaptation(training=tiny.TRAINING, objective=c.TextObjective(**ALL_TERMS)),
    distillation=c.Distillation(
        training=tiny.TRAINING,
        start="stage1",
        objective=c.TaskObjective(**ALL_TERMS, logits_kl=0.5, logits_temperature=2.0),
    ),
)


def names(state):
    return {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)}


# ---------------------------------------------------------------- a bridge that shortens


@pytest.mark.parametrize("stride", [2, 20])
def test_windows_are_of_one_text_each(stride):
    """Against a loop over texts, which lie with and without paddings between them."""
    rng, width, num_texts = np.random.default_rng(stride), 17, 4
    rows = [
        [1, 1, 1, 1, 1, 2, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4, 4],
        [1] * width,
        [0, 0, 1, 1, 1, 0, 2, 2, 0, 0, 3, 3, 3, 3, 0, 0, 0],
        [0] * width,
    ]
    segments = np.array(rows, np.int32)
    states = rng.normal(size=(*segments.shape, 2)).astype(np.float32)
    got, of_text = windows(states, segments, num_texts, stride)
    assert got.shape[1] == of_text.shape[1] == shortened(width, num_texts, stride)
    for i, row in enumerate(rows):
        wanted = []
        for text in range(1, num_texts + 1):
            tokens = states[i][np.array(row) == text]
            for first in range(0, len(tokens), stride):
                window = tokens[first : first + stride].reshape(-1)
                wanted.append((text, np.pad(window, (0, 2 * stride - len(window)))))
        assert of_text[i].tolist() == [text for text, _ in wanted] + [0] * (
            of_text.shape[1] - len(wanted)
        )
        for j, (_, window) in enumerate(wanted):
            np.testing.assert_array_equal(got[i, j], window)
    # Alone in its row a text has no more positions than it needs.
    assert shortened(width, 1, stride) == -(-width // stride)


# ---------------------------------------------------------------- packing


# What compares the encoder's own positions, which a bridge that shortens texts does not keep.
PER_TOKEN = dataclasses.replace(
    CHANGED,
    bridge=c.Bridge(hidden=24),
    adaptation=c.Adaptation(tiny.TRAINING, c.TextObjective(**ALL_TERMS, per_token=0.5)),
)


@pytest.mark.parametrize(
    ("make", "config", "term"),
    [
        pytest.param(tiny.adaptation, PER_TOKEN, "per_token", marks=pytest.mark.slow),
        (tiny.distillation, CHANGED, "logits_kl"),
    ],
    ids=["adaptation", "distillation"],
)
def test_packed_equals_one_text_a_row(make, config, term):
    """Losses, every term of them and gradients; the texts of a batch are the same negatives."""
    stage = make(config)
    wanted = stage(stage.batch(packing=False))
    assert set(wanted[1]) == {"loss", "fvu", "mse", "cosine", "contrastive", term}
    assert all(np.all(np.isfinite(x)) and np.any(x) for x in jax.tree.leaves(wanted))
    for batch in (stage.batch(packing=True), stage.batch(packing=False, shift=3)):
        tiny.assert_close_trees(stage(batch), wanted)


# ---------------------------------------------------------------- what learns


def test_the_bridge_alone_learns():
    config = dataclasses.replace(CHANGED, encoder_layers=0)
    stack = stacking.build_stack(config, tiny.parts(), 0)
    _, trainable, frozen = nnx.split(stack, stacking.is_trained(config), ...)
    maps = ("inner/kernel", "inner/bias", "up/kernel", "up/bias")
    assert names(trainable) == {f"bridge/{name}" for name in maps}
    wanted = nnx.state(tiny.parts().llm)
    jax.tree.map(np.testing.assert_array_equal, frozen["llm"], wanted)  # the teacher's own
    assert stacking.adaptation_frozen(config, frozen, wanted).keys() == {"stack"}
    # The task's teacher learns nonetheless.
    teacher = stacking.new_teacher(config, tiny.parts(), 3, 0)
    learns = stacking.is_trained(stacking.of_teacher(config))
    assert any("lora_a" in name for name in names(nnx.state(teacher, learns)))


@pytest.mark.parametrize("trained", ["bridge", "lora", "all"])
def test_the_last_layers_of_the_encoder_learn(trained):
    config = tiny.settings(trained=trained, encoder_layers=1)
    stack = stacking.build_stack(config, tiny.parts(), 0)
    _, trainable, frozen = nnx.split(stack, stacking.is_trained(config), ...)
    of_encoder = {name for name in names(trainable) if name.startswith("encoder/")}
    norm = {"encoder/encoder_norm/scale", "encoder/encoder_norm/bias"}
    assert norm < of_encoder and all("/top/" in name for name in of_encoder - norm)
    assert not any("/top/" in name for name in names(frozen))
    assert "encoder/embedding_VE" in names(frozen)


BERT = BertConfig(tiny.VOCAB, 16, 2, 2, 16, num_positions=20)


@pytest.mark.parametrize(
    ("make", "num"),
    [
        (lambda: NLLB(tiny.ENCODER, tiny.rngs()), 1),
        (lambda: Bert(BERT, tiny.rngs()), BERT.num_layers),
    ],
    ids=["one of NLLB", "all of BERT"],
)
def test_layers_that_are_freed_do_what_they_did(make, num):
    """Of weights in bfloat16, which learn in float32; put back they are the encoder's again."""
    encoder = tiny.randomised(make(), 1)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(encoder))
    nnx.update(encoder, half)
    ids = np.random.default_rng(0).integers(3, tiny.VOCAB, (2, 9)).astype(np.int32)

    def encode(module):
        graph, state = nnx.split(module)

        def run(state):
            return nnx.merge(graph, state).encode(ids, np.ones_like(ids))

        return np.asarray(jax.jit(run, compiler_options=tiny.QUICK)(state))

    wanted, before = encode(encoder), jax.tree.map(np.asarray, nnx.state(encoder))
    freed = nnx.clone(encoder)
    freed.free(num)
    learns = stacking.is_trained(tiny.settings(trained="bridge", encoder_layers=num))
    dtypes = {x.dtype for x in jax.tree.leaves(nnx.state(freed, learns))}
    assert dtypes == {jnp.dtype("float32")}
    # Another program, in which sums are taken in another order.
    np.testing.assert_allclose(encode(freed), wanted, rtol=0, atol=1e-5)
    freed.whole()
    after = jax.tree.map(lambda x: np.asarray(x.astype(jnp.bfloat16)), nnx.state(freed))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    freed.whole()  # of one that is whole nothing changes
    assert names(nnx.state(freed)) == names(nnx.state(encoder))


# ---------------------------------------------------------------- settings that cannot be


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bridge": c.Bridge(stride=0)}, "bridge.stride is 0; it must be 1"),
        ({"bridge": c.Bridge(hidden=-1)}, "bridge.hidden is -1"),
        (
            {"bridge": c.Bridge(stride=2), "mesh": c.Mesh(context=2)},
            "bridge.stride is 2; it must be 1 where mesh.context is not",
        ),
        (
            {"bridge": c.Bridge(stride=2), "adaptation": PER_TOKEN.adaptation},
            "bridge.stride is 2; it must be 1 with adaptation.objective.per_token",
        ),
        (
            {"adaptation": dataclasses.replace(PER_TOKEN.adaptation, subword_sampling=0.1)},
            "adaptation.subword_sampling is 0.1; it must be 0 with",
        ),
        ({"encoder_layers": -1}, "encoder_layers is -1"),
        (
            {"encoder_layers": 1, "frozen_dtype": "int8", "trained": "lora"},
            "encoder_layers is 1; it must be 0 with frozen_dtype 'int8'",
        ),
        (
            {"adaptation": c.Adaptation(tiny.TRAINING, c.TextObjective(mse=0.0))},
            "adaptation.objective is .* at least one weight above 0",
        ),
        (
            {"adaptation": c.Adaptation(tiny.TRAINING, c.TextObjective(cosine=-1.0))},
            "adaptation.objective.cosine is -1.0; it must be 0",
        ),
        (
            {"teacher": dataclasses.replace(tiny.TRAINING, steps=0)},
            "teacher.steps is 0; it must be at least 1",
        ),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny.settings(**changes)


def test_stage_1_may_have_no_steps():
    training = dataclasses.replace(tiny.TRAINING, steps=0)
    assert tiny.settings(adaptation=c.Adaptation(training)).adaptation.training.steps == 0


# ---------------------------------------------------------------- whole runs

OTHER_OBJECTIVES = {
    "trained": "bridge",
    "bridge.hidden": 48,
    "encoder_layers": 1,
    "adaptation.objective.cosine": 0.5,
    "adaptation.objective.contrastive": 0.1,
    "adaptation.objective.per_token": 0.1,
    "distillation.objective.logits_kl": 1.0,
}
NO_STAGE_1 = {
    "trained": "lora",
    "bridge.stride": 2,
    "bidirectional": False,
    "distillation.start": "stage1",
    "distillation.objective.mse": 0.0,
    "distillation.objective.cosine": 1.0,
}
STEPS = {f"{stage}.steps": 2 for stage in ("teacher", "distillation.training", "mt_encoder")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "steps"), [(OTHER_OBJECTIVES, 2), (NO_STAGE_1, 0)], ids=["objectives", "no stage 1"]
)
def test_a_run_and_its_export(fields, steps, mini_run, tmp_path):
    """Two steps of each stage, or none of the first; PyTorch says what the run did."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch", reason="the reference is torch")
    fields = {**reduced.own_fields(tmp_path, mini_run), **STEPS, **fields}
    fields["adaptation.training.steps"] = steps
    arguments = (*reduced.ARGUMENTS, *reduced.flags(fields), "--workdir=run")
    done = reduced.train(*arguments, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    run = tmp_path / "run"
    metrics = run / "adaptation" / "metrics.jsonl"
    if steps:
        assert {"loss", "fvu", "mse", "cosine", "contrastive", "per_token"} <= set(
            read_metrics(metrics)
        )
        learnt = read_metrics(run / "distillation" / "metrics.jsonl")
        assert {"loss", "fvu", "mse", "logits_kl"} <= set(learnt) and learnt["fvu"].gt(0).all()
    else:
        assert not metrics.exists()
    frame = pd.read_json(run / "predictions" / "mt_llm.jsonl", lines=True)
    model = test_task_run.exported(tmp_path, transformers.AutoModelForSequenceClassification)
    shares = model.classify(frame["text"].tolist(), frame["language"].tolist())
    assert [next(iter(share)) for share in shares] == frame["prediction"].tolist()
