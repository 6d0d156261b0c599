"""Eight devices against one: the same losses and gradients on every kind of mesh.

Tolerance: of each array's largest number 2e-5. Sums run in another order over devices, and a
float32 sum of n terms is then off by up to n/2 · 2^-24 relative to its largest part: 2e-5 for the
some 300 numbers that meet here.
"""

import collections
import functools
import re

import jax
import numpy as np
import pytest
import tiny
from flax import nnx
from jax.sharding import PartitionSpec as P

from mtllm_jax import sharding
from mtllm_jax.config import Mesh
from mtllm_jax.decode import translate
from mtllm_jax.models.nllb import NLLB
from mtllm_jax.train import TrainState, make_optimizer, train_step

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        len(jax.devices()) < 8, reason="needs the eight simulated devices of conftest"
    ),
]

TOLERANCE = 2e-5
ONE = Mesh(1, 1, 1)
DATA, FSDP = Mesh(8, 1, 1), Mesh(1, 8, 1)
TENSOR, CONTEXT = Mesh(1, 1, 2), Mesh(1, 1, 1, 4)
# Together they mix each axis with every other.
MIXED = (Mesh(2, 2, 2), Mesh(1, 2, 2, 2), Mesh(2, 2, 1, 2), Mesh(2, 1, 2, 2))


@pytest.fixture(autouse=True)
def small_too(monkeypatch):
    """Cuts arrays of any size, as the models of these tests are small."""
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 1)


@functools.cache
def mesh_of(config):
    num_devices = config.data * config.fsdp * config.tensor * config.context
    return sharding.make_mesh(config, jax.devices()[:num_devices])


def check(case, config):
    """Packed rows, of which some are padding alone, and rows of one text each. Returns the weights
    that learn and the program."""
    stage, mesh = tiny.stage(case), mesh_of(config)
    trainable, frozen = (sharding.place(x, mesh) for x in (stage.trainable, stage.frozen))
    batches = [stage.batch(packing=packing) for packing in (True, False)]
    placed = [sharding.place_batch(batch, mesh) for batch in batches]
    gradient = jax.jit(sharding.on(mesh, stage.gradient.__wrapped__))
    key = jax.random.key(0)
    program = gradient.lower(trainable, frozen, placed[0], key).compile(tiny.QUICK)
    for batch, arrays in zip(batches, placed, strict=True):
        got = program(trainable, frozen, arrays, key)
        tiny.assert_close_trees(got, stage(batch), TOLERANCE)
    return trainable, program.as_text()


# With `trained="all"` adaptation is distillation and a teacher.
@pytest.mark.parametrize("case", [case for case in tiny.CASES if case != "adaptation"])
def test_every_objective_on_mixed_meshes(case):
    check(case, MIXED[tiny.CASES.index(case) % len(MIXED)])


@pytest.mark.parametrize(("case", "mesh"), [("mntp-lora", MIXED[0]), ("simcse-lora", MIXED[3])])
def test_preparing_the_llm(case, mesh):
    """What is masked, dropped out and compared is the same, wherever a text lies."""
    check(case, mesh)


def collectives(program):
    """{kind: shapes of what the devices get by it}, numbers alone: positions are integers."""
    found = collections.defaultdict(list)
    kinds = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
    for results, kind in re.findall(rf"= (\S+|\(.*?\)) ({kinds})(?:-start)?\(", program):
        for shape in re.findall(r"f32\[([\d,]*)\]", results):
            found[kind].append(tuple(int(size) for size in shape.split(",") if size))
    return found


def sizes(shapes):
    """Shapes up to the order of their dims, as gradients of products may be transposed."""
    return {tuple(sorted(size for size in shape if size > 1)) for shape in shapes}


def layers(*trees):
    """Sizes of weights, as they are and as one layer of them."""
    shapes = [x.shape for x in jax.tree.leaves(trees)]
    return sizes(shapes) | sizes(shape[1:] for shape in shapes)


ROWS, E, D = tiny.NUM_TEXTS, tiny.ENCODER.width, tiny.LLM.width
SUMS = {(), (D,)}  # losses and counts; the mean state that FVU is relative to


def test_data():
    """Nothing but gradients and losses is exchanged."""
    trainable, program = check("adaptation-lora", DATA)
    found = collectives(program)
    assert set(found) == {"all-reduce"}
    assert sizes(found["all-reduce"]) <= layers(trainable) | SUMS


def test_fsdp():
    """Weights are gathered, a layer at a time, and never rows; each device keeps an eighth."""
    trainable, program = check("adaptation-lora", FSDP)
    found = collectives(program)
    assert sizes(found["all-gather"]) <= layers(trainable, tiny.stage("adaptation-lora").frozen)
    assert sizes(found["all-reduce"]) <= layers(trainable) | SUMS
    # The embeddings of tokens, looked up where their part of the table lies.
    assert {*found["all-to-all"]} == {(1, ROWS // 8, 16, E // 8), (1, ROWS // 8, 12, D // 8)}
    cut = [x for x in jax.tree.leaves(trainable) if not x.sharding.is_fully_replicated]
    assert len(cut) == 8  # the bridge, and of each of seven maps the factor that D is in
    assert all(x.addressable_shards[0].data.size == x.size // 8 for x in cut)
    # Nor are layers kept that way: what is gathered forward is gathered again backward. (Layers of
    # states have the shape of one stack, [2, 3 · 16 positions, D].)
    stacks = {x.shape for x in jax.tree.leaves(tiny.stage("adaptation-lora").frozen) if x.ndim == 3}
    whole = {shape for shape in stacks if f"f32[{','.join(map(str, shape))}]" in program}
    assert len(stacks) > 5 and whole <= {(2, ROWS // 8 * 16, D)}


def test_tensor():
    """States are summed after attention and feed-forward, not gathered; the bridge's are, once."""
    _, program = check("adaptation-lora", TENSOR)
    assert collectives(program)["all-gather"] == [(ROWS * 16, D)]


def test_context():
    """Keys and values are gathered over a row's positions, and nothing else."""
    _, program = check("adaptation-lora", CONTEXT)
    gathered = collectives(program)["all-gather"]
    kv_width = tiny.LLM.num_kv_heads * tiny.LLM.head_width
    assert {(*shape[:2], np.prod(shape[2:])) for shape in gathered} == {
        (ROWS, 16, E), (ROWS, 16, kv_width), (ROWS, 12, kv_width)
    }  # fmt: skip


def test_a_step():
    """Moments lie where their parameters lie, before the step and after; the numbers are one's."""
    stage = tiny.stage("teacher-lora")
    optimizer = make_optimizer(tiny.TRAINING)
    one_step = functools.partial(
        train_step, objective=stage.objective, optimizer=optimizer, accumulation=3
    )

    def step_on(mesh):
        trainable, frozen = (sharding.place(x, mesh) for x in (stage.trainable, stage.frozen))
        state = TrainState(np.int32(0), trainable, optimizer.init(trainable), jax.random.key(0))
        state = sharding.place(state, mesh)
        step = jax.jit(
            sharding.on(mesh, one_step),
            out_shardings=(sharding.shardings(state, mesh), None),
            compiler_options=tiny.QUICK,
        )
        batch = sharding.place_batch(stage.batch(), mesh)
        return state, *step(state, frozen, batch)

    before, after, terms = step_on(mesh_of(Mesh(2, 2, 2)))
    kernel = after.trainable["llm"]["layers"]["gate"]["lora_b"][...]
    assert kernel.sharding.spec == P(None, None, "tensor")
    for state in (before, after):
        specs = [x.sharding for x in jax.tree.leaves(state.trainable)]
        (adam,) = (
            x
            for x in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu"))
            if hasattr(x, "mu")
        )
        for moment in (adam.mu, adam.nu):
            assert [x.sharding for x in jax.tree.leaves(moment)] == specs
    _, one, terms_of_one = step_on(mesh_of(ONE))
    tiny.assert_close_trees(terms, terms_of_one, TOLERANCE)
    # Adam's first move is the sign of the gradient: where that is rounding, it may go either way.
    moved = jax.tree.map(
        lambda x, y: np.mean(np.abs(np.asarray(x) - np.asarray(y)) > 1e-5),
        after.trainable,
        one.trainable,
    )
    assert max(jax.tree.leaves(moved)) < 0.01


class Numbers:
    """A tokenizer of texts that are numbers."""

    pad_id = tiny.ENCODER.pad_id

    def encode(self, texts, language, *, max_length):
        return [np.array([5, *map(int, text.split()), tiny.ENCODER.eos_id]) for text in texts]

    def decode(self, rows):
        return [" ".join(map(str, row)) for row in rows]

    def language_id(self, code):
        return 6


@pytest.mark.parametrize(("config", "num_beams"), [(MIXED[0], 1), (MIXED[1], 3)])
def test_translations(config, num_beams):
    """The very same tokens; the last batch has rows that only fill it."""
    model, rng = NLLB(tiny.ENCODER, tiny.rngs()), np.random.default_rng(1)
    for _, variable in nnx.to_flat_state(nnx.state(model)):  # so much that texts count
        noise = 0.5 * rng.normal(size=variable.shape)
        variable[...] = (np.asarray(variable[...]) + noise).astype(np.float32)
    texts = [" ".join(map(str, rng.integers(7, tiny.VOCAB, n))) for n in rng.integers(1, 6, 11)]
    limits = {"max_length": 16, "max_new_tokens": 6, "batch_size": 8, "num_beams": num_beams}
    wanted = translate(model, Numbers(), texts, "deu_Latn", "eng_Latn", **limits)
    assert len(set(wanted)) > 4
    got = translate(model, Numbers(), texts, "deu_Latn", "eng_Latn", **limits, mesh=mesh_of(config))
    assert got == wanted
