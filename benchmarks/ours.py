"""Our side of the table: the product's own functions, as a run uses them.

    python benchmarks/ours.py --row=train_grouped --shape=cpu --folder=FOLDER --data=DATA

`run.py` starts it and says when to measure; see `sides.py` for what is said.
"""

import dataclasses
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from shapes import (
    SHAPES,
    build,
    config_of,
    sentences,
    sizes_of,
    texts_to_embed,
    write_texts_to_embed,
)
from sides import Work, serve

sys.path.insert(0, str(Path(__file__).parents[1]))
# The product is installed without torch, which transformers would load where it finds it.
sys.modules["torch"] = None  # type: ignore[assignment]


class Training(Work):
    """Steps of stage 1, or of task distillation with stored teacher vectors, on packed rows."""

    def __init__(self, options: Any):
        import jax
        import jax.numpy as jnp
        from flax import nnx

        from mtllm_jax import sharding
        from mtllm_jax.data.packing import pack
        from mtllm_jax.data.pipeline import add_by_example, batches
        from mtllm_jax.data.prepare import make_rows, maker_of
        from mtllm_jax.flops import Batch, adaptation_flops
        from mtllm_jax.models.layers import split
        from mtllm_jax.recipes import stacking
        from mtllm_jax.train import make_optimizer

        shape, self.texts = SHAPES[options.shape], sentences(options.data)
        self.config = config = config_of(shape, options.folder)
        self.vectors = None
        mesh = sharding.make_mesh(config.mesh)
        self.parts = parts = stacking.load_parts(config, config.encoder, config.llm, mesh)
        stack = stacking.build_stack(config, parts, 0, config.lora.start)
        weights = np.load(options.folder / "bridge.npz")
        stack.bridge.up.kernel[...] = jnp.asarray(weights["kernel"])
        stack.bridge.up.bias[...] = jnp.asarray(weights["bias"])
        graph, trainable, frozen = split(stack, stacking.is_trained(config))
        training, add, self.flops = config.adaptation.training, None, None
        if options.row.startswith("distil"):
            training = config.distillation.training
            objective = stacking.distillation_objective(config, graph)
            frozen = {"stack": frozen}
            length = training.source_length
            ids = parts.source.encode(self.texts, config.english, max_length=length)
            pad_ids = {"source": parts.source.pad_id}
            rows = pack([{"source": row} for row in ids], {"source": length}, pad_ids)
            self.vectors = np.load(options.folder / "teacher.npy")
            add = add_by_example({"teacher": self.vectors})
        else:
            teacher_graph, teacher = nnx.split(parts.llm)
            objective = stacking.adaptation_objective(config, graph, teacher_graph)
            rows = make_rows(maker_of(config, parts.source, parts.target, 0), self.texts)
            # As many sentences as the peer has rows.
        batch_rows = max(1, round(shape.rows * len(rows) / rows.counts.texts))
        if self.vectors is None:
            step = Batch(
                rows=batch_rows,
                source_length=training.source_length,
                target_length=training.target_length,
                texts=rows.counts.texts / rows.counts.rows,
                source_fill=rows.fill["source"],
                target_fill=rows.fill["target"],
            )
            sizes = parts.encoder.config, parts.llm.config
            self.flops = adaptation_flops(trainable, frozen, *sizes, step)
            frozen = stacking.adaptation_frozen(config, frozen, teacher)
        self.batches = batches(rows, batch_rows=batch_rows, seed=0, add=add)
        self.objective = objective
        self.steps = _Steps(
            objective, make_optimizer(training), trainable, frozen, mesh, jax.random.key(0)
        )
        self.num_steps = shape.steps[0]

    def facts(self) -> dict[str, Any]:
        """The loss of the first 64 sentences, as they are packed by themselves."""
        import jax

        from mtllm_jax.data.packing import pack

        training, parts = self.config.adaptation.training, self.parts
        texts = self.texts[:64]
        lengths = {"source": training.source_length}
        pad_ids = {"source": parts.source.pad_id, "target": parts.target.pad_id}
        sources = parts.source.encode(texts, self.config.english, max_length=lengths["source"])
        tokens = [{"source": ids} for ids in sources]
        if self.vectors is None:
            lengths["target"] = training.target_length
            targets = parts.target.encode(texts, max_length=lengths["target"])
            tokens = [both | {"target": ids} for both, ids in zip(tokens, targets, strict=True)]
        rows = pack(tokens, lengths, {name: pad_ids[name] for name in lengths})
        batch = {name: np.stack([rows[i][name] for i in range(len(rows))]) for name in rows[0]}
        if self.vectors is not None:
            batch["teacher"] = self.vectors[np.maximum(batch["example"] - 1, 0)]
        state, frozen = self.steps.state, self.steps.frozen
        terms = jax.jit(self.objective)(state.trainable, frozen, batch, jax.random.key(0))
        total, count = terms["loss"]
        return {"loss": float(total / count)}

    def first(self) -> None:
        """One step."""
        self.steps.run(next(self.batches))
        self.steps.wait()

    def measure(self) -> dict[str, float]:
        """Steps of the next batches."""
        start, read = time.perf_counter(), 0
        for batch in itertools.islice(self.batches, self.num_steps):
            read += tokens_of(batch)
            self.steps.run(batch)
        self.steps.wait()
        took = {"seconds": time.perf_counter() - start, "useful": read, "steps": self.num_steps}
        if self.flops is not None:
            took["hardware_flops"] = self.flops.hardware_total * self.num_steps
            took["model_flops"] = self.flops.model_total * self.num_steps
        return took


class _Steps:
    """The jitted step of `train.fit`, and what it changes."""

    def __init__(
        self, objective: Any, optimizer: Any, trainable: Any, frozen: Any, mesh: Any, key: Any
    ):
        import functools

        import jax
        import jax.numpy as jnp

        from mtllm_jax import sharding
        from mtllm_jax.train import TrainState, train_step

        trainable = sharding.place(trainable, mesh)
        self.frozen = sharding.place(frozen, mesh)
        start = jnp.zeros((), jnp.int32)
        self.state = TrainState(start, trainable, optimizer.init(trainable), key)
        step = functools.partial(train_step, objective=objective, optimizer=optimizer)
        self._step = jax.jit(sharding.on(mesh, step), donate_argnums=0)
        self._place = functools.partial(sharding.place_batch, mesh=mesh)

    def run(self, batch: dict[str, np.ndarray]) -> None:
        self.state, _ = self._step(self.state, self.frozen, self._place(batch))

    def wait(self) -> None:
        import jax

        jax.block_until_ready(self.state)


def tokens_of(batch: dict[str, np.ndarray]) -> int:
    """Those that are no padding, on both sides."""
    return sum(int((x > 0).sum()) for name, x in batch.items() if name.endswith("_segments"))


class Control(Work):
    """The LLM alone, with its adapters, on full rows read causally, as any trainer would have it:
    each token foretells the next. What the hardware gives at best."""

    def __init__(self, options: Any):
        import jax
        import jax.numpy as jnp
        from flax import nnx

        from mtllm_jax import sharding
        from mtllm_jax.flops import attention_width, is_matrix
        from mtllm_jax.models.layers import split
        from mtllm_jax.models.llama import Llama
        from mtllm_jax.ops.vocab_loss import cross_entropy
        from mtllm_jax.recipes import stacking
        from mtllm_jax.train import make_optimizer

        shape = SHAPES[options.shape]
        config = config_of(shape, options.folder)
        mesh = sharding.make_mesh(config.mesh)
        llm = stacking.load_llm(config, config.llm, (), mesh)
        tuned = stacking.with_adapters(config, llm, 1, config.lora.start)
        graph, trainable, frozen = split(tuned, stacking.is_trained(config))
        rows, length, dtype = 24, shape.row_length, jnp.dtype(shape.dtype)

        def objective(trainable: Any, frozen: Any, batch: Any, key: Any) -> Any:
            model: Llama = nnx.merge(graph, trainable, frozen)
            ids_BT = batch["target_ids"]
            h_BTD = model.embed(ids_BT, dtype)
            h_BTD = model.hidden(h_BTD, jnp.ones_like(ids_BT), causal=True, packed=False)
            kernel_VD = model.output_kernel()
            loss = cross_entropy(
                h_BTD[:, :-1].reshape(-1, kernel_VD.shape[1]),
                kernel_VD.astype(dtype),
                ids_BT[:, 1:].reshape(-1),
                jnp.ones(rows * (length - 1)),
                chunk=1024,
            )
            return {"loss": loss}

        def weights(state: Any) -> int:
            leaves = jax.tree_util.tree_leaves_with_path(state)
            return sum(x.size for path, x in leaves if is_matrix(path))

        # As `flops` counts: 4 a frozen weight and position, 6 a trained one; 3 times attention.
        learnt, kept = weights(trainable), weights(frozen) + llm.output_kernel().size
        attended = 3 * 4 * attention_width(llm.config) * length
        self.flops = rows * length * (4 * kept + 6 * learnt + attended)
        draw = np.random.default_rng(0).integers(5, shape.vocabulary, (rows, length), np.int32)
        self.batch = {"target_ids": draw}
        optimizer = make_optimizer(config.adaptation.training)
        self.steps = _Steps(objective, optimizer, trainable, frozen, mesh, jax.random.key(0))
        self.num_steps = 10

    def first(self) -> None:
        """One step."""
        self.steps.run(self.batch)
        self.steps.wait()

    def measure(self) -> dict[str, float]:
        """The same rows again."""
        start = time.perf_counter()
        for _ in range(self.num_steps):
            self.steps.run(self.batch)
        self.steps.wait()
        seconds = time.perf_counter() - start
        useful = self.num_steps * self.batch["target_ids"].size
        return {
            "seconds": seconds,
            "useful": useful,
            "steps": self.num_steps,
            "model_flops": self.num_steps * self.flops,
        }


class Embedding(Work):
    """As an evaluation reads texts with a frozen encoder."""

    def __init__(self, options: Any):
        from configs.mtllm import mini
        from mtllm_jax import config as c
        from mtllm_jax import sharding
        from mtllm_jax.data.tokenise import source_tokenizer
        from mtllm_jax.hf.encoder import load_encoder
        from mtllm_jax.inference import Vectors
        from mtllm_jax.recipes import stacking

        folder = options.models / "multilingual-e5-small"
        mesh = sharding.make_mesh(c.Mesh())
        self.tokenizer = source_tokenizer(folder)
        encoder = load_encoder(folder, mesh=mesh)
        self.run = Vectors(
            *stacking.encoder_forward(mini(), encoder),
            pad_id=self.tokenizer.pad_id,
            batch_rows=32,
            mesh=mesh,
        )
        self.texts = texts_to_embed(options.folder)

    def vectors(self) -> tuple[np.ndarray, int]:
        """Of all texts, [texts, E], and the number of tokens read."""
        ids = self.tokenizer.encode(self.texts, "eng_Latn", max_length=512)
        return self.run(ids), sum(map(len, ids))

    def facts(self) -> dict[str, Any]:
        """The mean square of all vectors, in the place of a loss."""
        vectors, read = self.vectors()
        return {"loss": float(np.square(vectors).mean()), "read": read}

    def measure(self) -> dict[str, float]:
        """All texts."""
        start = time.perf_counter()
        _, read = self.vectors()
        return {"seconds": time.perf_counter() - start, "useful": read}


class Translating(Work):
    """As translate-test translates."""

    def __init__(self, options: Any):
        import jax
        import jax.numpy as jnp
        from flax import nnx

        from mtllm_jax.data.tokenise import translation_tokenizer
        from mtllm_jax.decode import beam_translate
        from mtllm_jax.hf.nllb import load_nllb

        shape, folder = SHAPES[options.shape], options.folder / "encoder"
        dtype, new_tokens = jnp.dtype(shape.dtype), shape.new_tokens["translate"]
        graph, self.state = nnx.split(load_nllb(folder, dtype=dtype))
        self.tokenizer = translation_tokenizer(folder)
        self.texts = sentences(options.data)[:64]
        self.language = self.tokenizer.language_id("deu_Latn")

        @jax.jit
        def search(state: Any, ids_BS: Any, segments_BS: Any, language: Any) -> Any:
            text = nnx.merge(graph, state), ids_BS, segments_BS, language
            return beam_translate(*text, new_tokens, dtype, num_beams=5)

        self.search = search

    def translate(self) -> np.ndarray:
        """The tokens after the language's, [B, new_tokens]."""
        from mtllm_jax.data.packing import padded

        ids = self.tokenizer.encode(self.texts, "eng_Latn", max_length=512)
        rows = padded(ids, "text", self.tokenizer.pad_id, rows=len(ids))
        batch = rows["text_ids"], rows["text_segments"]
        return np.asarray(self.search(self.state, *batch, self.language))

    def facts(self) -> dict[str, Any]:
        """All tokens."""
        return {"tokens": self.translate().tolist()}

    def measure(self) -> dict[str, float]:
        """The same texts again."""
        start = time.perf_counter()
        ids = self.translate()
        return {"seconds": time.perf_counter() - start, "useful": ids.size}


class Sampling(Work):
    """As launch/generate.py answers, as the peer draws; no token ends an answer."""

    def __init__(self, options: Any):
        from mtllm_jax import config as c
        from mtllm_jax import sharding
        from mtllm_jax.data.tokenise import TargetTokenizer
        from mtllm_jax.hf.llama import load_llama
        from mtllm_jax.sampling import Sampler, Sampling

        folder = options.models / "smollm2-135m-instruct"
        mesh = sharding.make_mesh(c.Mesh())
        self.tokenizer, self.texts = TargetTokenizer(folder), sentences(options.data)[:32]
        self.sampler = Sampler(
            load_llama(folder, mesh=mesh),
            stop_ids=(),
            sampling=Sampling(temperature=0.95, top_k=50, top_p=0.7),
            max_new_tokens=SHAPES[options.shape].new_tokens["sample"],
            num_rows=len(self.texts),
            mesh=mesh,
        )

    def sample(self) -> tuple[int, int]:
        """Tokens of prompts, and of answers."""
        prompts = self.tokenizer.encode(self.texts)
        keys = [np.array([0, i], np.uint32) for i in range(len(prompts))]
        slots = -(-max(map(len, prompts)) // 16) * 16
        made = self.sampler(prompts, keys, slots)
        return sum(map(len, prompts)), int((made >= 0).sum())

    def facts(self) -> dict[str, Any]:
        """Draws differ; what is read and how much is said must not."""
        read, made = self.sample()
        return {"read": read, "made": made}

    def measure(self) -> dict[str, float]:
        """The same prompts again."""
        start = time.perf_counter()
        _, made = self.sample()
        return {"seconds": time.perf_counter() - start, "useful": made}


class Loading(Work):
    """A real LLM read into memory."""

    def __init__(self, options: Any):
        self.folder = options.models / "smollm2-135m-instruct"

    def load(self) -> int:
        """Bytes of the arrays that stay, each of them read once."""
        import jax
        import jax.numpy as jnp
        from flax import nnx

        from mtllm_jax.hf.llama import load_llama

        self.model = load_llama(self.folder, jnp.float32)
        stay = jax.block_until_ready(jax.tree.leaves(nnx.state(self.model)))
        for array in stay:
            np.asarray(array).max()
        return sum(array.nbytes for array in stay)


class Input(Work):
    """Batches of stage 1 from prepared, packed shards."""

    def __init__(self, options: Any):
        from mtllm_jax.data.pipeline import batches
        from mtllm_jax.data.prepare import maker_of, prepare
        from mtllm_jax.data.texts import read_texts
        from mtllm_jax.data.tokenise import TargetTokenizer, source_tokenizer

        folder, shape = options.folder, SHAPES[options.shape]
        text = folder / "english.txt"
        text.write_text("\n".join(sentences(options.data)) + "\n", encoding="utf-8")
        source, target = source_tokenizer(folder / "encoder"), TargetTokenizer(folder / "llm")
        maker = maker_of(config_of(shape, folder), source, target, 0)
        rows = prepare(folder / "prepared", maker, read_texts(text)).rows()
        batch_rows = max(1, round(shape.rows * len(rows) / rows.counts.texts))
        self.batches = batches(rows, batch_rows=batch_rows, seed=0)

    def first(self) -> None:
        """One batch."""
        next(self.batches)

    def measure(self) -> dict[str, float]:
        """A few hundred batches, some seconds."""
        start = time.perf_counter()
        read = sum(tokens_of(batch) for batch in itertools.islice(self.batches, 500))
        return {"seconds": time.perf_counter() - start, "useful": read}


class Planning(Work):
    """What a plan and the compiled step say that a device receives, over 8 devices."""

    def __init__(self, options: Any):
        self.shape = SHAPES[options.shape]

    def facts(self) -> dict[str, Any]:
        """Bytes by kind of collective, as planned and as compiled. All is cut over fsdp, as in the
        study's settings; layers are a loop and computed again, as there."""
        from mtllm_jax import config as c
        from mtllm_jax import sharding
        from mtllm_jax.chips import topology
        from mtllm_jax.plan import adaptation, hlo
        from mtllm_jax.plan.estimate import estimate

        config = dataclasses.replace(
            config_of(self.shape, Path(), batch_rows=16, packing=False),
            mesh=c.Mesh(data=1, fsdp=8),
            unroll_layers=False,
            remat="full",
        )
        encoder, llm = sizes_of(self.shape)
        encoder = dataclasses.replace(encoder, decoder_layers=0)  # stage 1 reads no decoder
        step = adaptation.stage_1(config, encoder, llm)
        program = step.lower(sharding.make_mesh(config.mesh)).compile()
        found = hlo.collectives(program.as_text())
        planned = estimate(step, topology("h100:8")).traffic
        return {"planned": planned, "compiled": hlo.by_kind(found)}


class Building(Work):
    """What both sides read, written unless it is there."""

    def __init__(self, options: Any):
        self.options = options

    def facts(self) -> dict[str, Any]:
        """Models of the shape, or the texts of row `embed`."""
        options = self.options
        if options.row == "texts":
            write_texts_to_embed(options.folder, options.data)
        else:
            build(SHAPES[options.shape], options.folder, options.data)
        return {}


WORK: dict[str, Callable[[Any], Work]] = {
    "models": Building,
    "texts": Building,
    "train_grouped": Training,
    "train_random": Training,
    "distil_grouped": Training,
    "embed": Embedding,
    "translate": Translating,
    "sample": Sampling,
    "load_memory": Loading,
    "input": Input,
    "plan": Planning,
    "control": Control,
}

if __name__ == "__main__":
    from mtllm_jax.allocator import keep_freed_memory

    keep_freed_memory()  # as every tool of launch/ does
    serve(WORK)
