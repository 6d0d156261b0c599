"""The objectives of all stages on models of a few thousand weights, with texts to feed them.

Every weight is random, norms, biases and LoRA's B too: none can be forgotten unnoticed.
"""

import dataclasses
import functools
import types
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from configs.mtllm import mini
from mtllm_jax import config as c
from mtllm_jax.data.packing import Rows, pack
from mtllm_jax.data.pipeline import add_by_example
from mtllm_jax.models import lora
from mtllm_jax.models.layers import Linear, LoRAParam
from mtllm_jax.models.llama import Llama, LlamaConfig
from mtllm_jax.models.nllb import NLLB, NLLBConfig
from mtllm_jax.models.quantised import quantised
from mtllm_jax.models.stack import classification_head
from mtllm_jax.recipes import llm2vec, mini_models, stacking
from mtllm_jax.train import Objective

PAD_IDS = {"source": 1, "target": 0, "aligned": 0}
LENGTHS = {"source": 16, "target": 12, "aligned": 16}
VOCAB, CLASSES, NUM_TEXTS, MOST_TEXTS = 48, 3, 24, 6
QUICK = {"xla_backend_optimization_level": 0}  # compiles in half the time
ENCODER = NLLBConfig(
    vocab_size=VOCAB,
    width=16,
    encoder_layers=2,
    decoder_layers=1,
    encoder_heads=2,
    decoder_heads=2,
    encoder_ffn=32,
    decoder_ffn=32,
)
LLM = LlamaConfig(
    vocab_size=VOCAB,
    width=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_width=8,
    ffn_width=48,
)
TRAINING = c.Training(
    steps=20, batch_rows=8, learning_rate=1e-2, source_length=16, target_length=12, warmup=0.2
)


def settings(**changes: Any) -> c.MTLLM:
    """The default recipe without noise and dropout, float32, whole copies trained."""
    quiet = {
        "trained": "all",
        "bidirectional": True,
        "lora": c.LoRA(rank=4, alpha=8, dropout=0.0, targets=("all",)),
        "adaptation": c.Adaptation(training=TRAINING),
        "distillation": c.Distillation(training=TRAINING, start="stage1"),
        "mini_nllb": dataclasses.replace(
            mini().mini_nllb, noise_position=0.0, noise_text=0.0, memory_dropout=0.0, negatives=8
        ),
        "compute_dtype": "float32",
        "frozen_dtype": "float32",
    }
    return dataclasses.replace(mini(), **(quiet | changes))


@dataclasses.dataclass
class Stage:
    """What `fit` is given, and the texts its rows are packed from."""

    graph: nnx.GraphDef
    trainable: nnx.State
    frozen: Any
    objective: Objective
    texts: Sequence[dict[str, np.ndarray]]
    tables: dict[str, np.ndarray]

    def rows(self, *, packing: bool = True) -> Rows:
        return pack(self.texts, {s: LENGTHS[s] for s in self.texts[0]}, PAD_IDS, packing=packing)

    def batch(self, *, packing: bool = True, shift: int = 0) -> dict[str, np.ndarray]:
        """All texts as one batch, of one shape however they are packed: rows are filled up with
        rows of padding alone. shift: positions by which rows are moved to the right."""
        arrays = {}
        rows = list(self.rows(packing=packing))
        for name in rows[0]:
            array = np.stack([row[name] for row in rows])
            is_example = name == "example"
            pad_id = PAD_IDS[name.removesuffix("_ids")] if name.endswith("_ids") else 0
            wide = MOST_TEXTS - array.shape[1] if is_example else 0
            array = array if is_example else np.roll(array, shift, axis=1)
            filler = ((0, NUM_TEXTS - len(array)), (0, wide))
            arrays[name] = np.pad(array, filler, constant_values=pad_id)
        return add_by_example(self.tables)(arrays)

    @functools.cached_property
    def gradient(self) -> Any:
        """Jitted (trainable, frozen, batch, key) → (gradient of the loss's sum, terms)."""

        def loss(trainable: Any, frozen: Any, batch: Any, key: jax.Array) -> Any:
            terms = self.objective(trainable, frozen, batch, key)
            return terms["loss"][0], terms

        return jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICK)

    def __call__(self, batch: dict[str, Any], seed: int = 0) -> tuple[Any, Any]:
        return self.gradient(self.trainable, self.frozen, batch, jax.random.key(seed))


@functools.cache
def parts() -> stacking.Parts:
    """The models a run starts from, as if read from folders; no tokenizers."""
    encoder = randomised(NLLB(dataclasses.replace(ENCODER, decoder_layers=0), rngs()), 1)
    return stacking.Parts(None, None, encoder, randomised(Llama(LLM, rngs()), 2))  # type: ignore[arg-type]


def rngs() -> nnx.Rngs:
    return nnx.Rngs(jax.random.key(0, impl="rbg"))  # compiles fastest


def randomised(module: Any, seed: int) -> Any:
    """The module with noise on every weight."""
    rng = np.random.default_rng(seed)
    for _, variable in nnx.to_flat_state(nnx.state(module)):
        noise = 0.1 * rng.normal(size=variable.shape)
        variable[...] = jnp.asarray(np.asarray(variable[...]) + noise, jnp.float32)
    return module


def in_int8(module: Any) -> Any:
    """A copy of the module whose stacked kernels are quantised, as those that are read are."""
    module = nnx.clone(module)
    for _, linear in nnx.iter_graph(module):
        if isinstance(linear, Linear) and linear.kernel.ndim == 3:
            layers, dim_in, dim_out = linear.kernel.get_metadata("dims")
            kernel_LIO, scale_LO = quantised(linear.kernel[...])
            linear.kernel = nnx.Param(kernel_LIO, dims=(layers, dim_in, dim_out))
            linear.kernel_scale = nnx.Param(scale_LO, dims=(layers, dim_out))
    return module


def texts(*streams: str) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(5)
    return [
        {s: rng.integers(3, VOCAB, rng.integers(2, 8)).astype(np.int32) for s in streams}
        for _ in range(NUM_TEXTS)
    ]


def labels() -> dict[str, np.ndarray]:
    return {"label": np.random.default_rng(6).integers(0, CLASSES, NUM_TEXTS).astype(np.int32)}


def adaptation(config: c.MTLLM) -> Stage:
    stack, llm = randomised(stacking.build_stack(config, parts(), 0), 3), parts().llm
    if config.frozen_dtype == "int8":
        stack, llm = in_int8(stack), in_int8(llm)
    graph, trainable, frozen = nnx.split(stack, stacking.is_trained(config), ...)
    teacher_graph, teacher = nnx.split(llm)
    objective = stacking.adaptation_objective(config, graph, teacher_graph)
    frozen = stacking.adaptation_frozen(config, frozen, teacher)
    read = texts("source", "target")
    if config.adaptation.objective.per_token:
        rng = np.random.default_rng(10)
        for text in read:
            numbers = rng.integers(0, len(text["target"]) + 1, len(text["source"]))
            text["aligned"] = numbers.astype(np.int32)
    return Stage(graph, trainable, frozen, objective, read, {})


def teacher(config: c.MTLLM) -> Stage:
    head = classification_head(LLM.width, CLASSES, rngs())
    model = stacking.LLMClassifier(stacking.with_adapters(config, parts().llm, 0), head)
    graph, trainable, frozen = nnx.split(randomised(model, 4), stacking.is_trained(config), ...)
    objective = stacking.teacher_objective(config, graph)
    return Stage(graph, trainable, frozen, objective, texts("target"), labels())


def distillation(config: c.MTLLM) -> Stage:
    stack = randomised(stacking.build_stack(config, parts(), 0), 3)
    graph, trainable, frozen = nnx.split(stack, stacking.is_trained(config), ...)
    vectors = np.random.default_rng(7).normal(size=(NUM_TEXTS, LLM.width)).astype(np.float32)
    objective = stacking.distillation_objective(config, graph)
    head = randomised(classification_head(LLM.width, CLASSES, rngs()), 9)
    frozen = stacking.distillation_frozen(config, frozen, head)
    return Stage(graph, trainable, frozen, objective, texts("source"), {"teacher": vectors})


def mt_encoder(config: c.MTLLM) -> Stage:
    encoder = nnx.clone(parts().encoder)
    lora.attach(encoder, rank=4, alpha=8, dropout=0.0, targets=("all",), rngs=rngs())
    head = classification_head(ENCODER.width, CLASSES, rngs())
    model = randomised(stacking.EncoderClassifier(encoder, head), 5)
    learns = nnx.Any(nnx.PathContains("head"), LoRAParam)
    graph, trainable, frozen = nnx.split(model, learns, ...)
    objective = stacking.encoder_objective(config, graph)
    return Stage(graph, trainable, frozen, objective, texts("source"), labels())


def translation(config: c.MTLLM) -> Stage:
    model = randomised(NLLB(ENCODER, rngs()), 6)
    graph, frozen, trainable = nnx.split(model, nnx.PathContains("encoder_norm"), ...)
    pairs = texts("source", "target")
    is_label = np.isin(np.arange(VOCAB), np.concatenate([pair["target"] for pair in pairs]))
    is_label[VOCAB // 2 :] = False
    for pair in pairs:
        pair["target"] = np.where(pair["target"] < VOCAB // 2, pair["target"], 3).astype(np.int32)
    is_label[3] = True
    objective = mini_models.translation(graph, config.mini_nllb, is_label)
    return Stage(graph, trainable, frozen, objective, pairs, {})


def language_modelling(config: c.MTLLM) -> Stage:
    graph, trainable = nnx.split(randomised(Llama(LLM, rngs()), 8))
    return Stage(graph, trainable, {}, mini_models.language_modelling(graph), texts("target"), {})


def mntp(config: c.MTLLM) -> Stage:
    return _preparation(config, llm2vec.masked_prediction)


def simcse(config: c.MTLLM) -> Stage:
    return _preparation(config, llm2vec.read_twice)


def _preparation(config: c.MTLLM, objective: Any) -> Stage:
    llm = randomised(stacking.with_adapters(config, parts().llm, 0), 9)
    graph, trainable, frozen = nnx.split(llm, LoRAParam, ...)
    tokenizer = types.SimpleNamespace(special_ids=[0, 1], mask_id=lambda: 2, vocab_size=VOCAB)
    made = objective(config, tokenizer, graph)
    return Stage(graph, trainable, frozen, made, texts("target"), {})


# What these draw goes by the place in a row: they differ from one packing to another.
PREPARATION = (mntp, simcse)
MAKERS = (adaptation, teacher, distillation, mt_encoder, translation, language_modelling)
CASES = ("adaptation-lora", "adaptation-int8", *(make.__name__ for make in MAKERS))


@functools.cache
def stage(case: str) -> Stage:
    """An objective, with "-lora" where adapters are trained and "-int8" where that is over weights
    in int8; made once, for all that compile it."""
    name, _, variant = case.partition("-")
    make = {make.__name__: make for make in MAKERS + PREPARATION}[name]
    frozen_dtype = "int8" if variant == "int8" else "float32"
    return make(settings(trained="lora" if variant else "all", frozen_dtype=frozen_dtype))


def assert_close_trees(got: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    """Within `tolerance` of each array's largest number, or of the whole tree's rounding: some
    gradients (of key biases) are 0 but for that."""
    rounding = 0.1 * tolerance * max(float(np.max(np.abs(y))) for y in jax.tree.leaves(wanted))
    pairs = zip(jax.tree.leaves_with_path(got), jax.tree.leaves(wanted), strict=True)
    for (path, x), y in pairs:
        atol = tolerance * float(np.max(np.abs(y))) + rounding
        np.testing.assert_allclose(x, y, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))
