"""The stages of MT-LLM (arXiv 2406.12739): each = data + objective + what is trained.

B rows, N texts per row, S encoder positions, T decoder positions, D LLM width, C classes.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from mtllm_jax import distributed
from mtllm_jax.checkpoint import load_params, tree_hash
from mtllm_jax.config import MTLLM, SDRRL, Training
from mtllm_jax.data.benchmarks import source_language
from mtllm_jax.data.held_out import hold_out_rows, hold_out_texts
from mtllm_jax.data.packing import Rows, pack
from mtllm_jax.data.pipeline import Batch, add_by_example
from mtllm_jax.data.prepare import make_rows, maker_of
from mtllm_jax.data.prepared import Prepared
from mtllm_jax.data.texts import Texts
from mtllm_jax.data.tokenise import (
    Marked,
    SourceTokenizer,
    TargetTokenizer,
    encode_cut,
    source_tokenizer,
)
from mtllm_jax.development import Data
from mtllm_jax.flops import Batch as FlopsBatch
from mtllm_jax.flops import Flops, adaptation_flops
from mtllm_jax.hf.encoder import Encoder, load_encoder
from mtllm_jax.hf.files import local_files
from mtllm_jax.hf.peft import attach_peft, load_merged
from mtllm_jax.hf.stack import is_stack, load_stack
from mtllm_jax.hf.tensors import Progress
from mtllm_jax.inference import Forward, Vectors
from mtllm_jax.metrics import Console
from mtllm_jax.models import lora
from mtllm_jax.models.bridge import Bridge
from mtllm_jax.models.layers import Linear, LoRAParam, split
from mtllm_jax.models.llama import Llama
from mtllm_jax.models.stack import (
    Choices,
    Stack,
    classification_head,
    llm_hidden,
    llm_pooled,
    segment_mean,
)
from mtllm_jax.objectives import Terms, classification, likeness, logits_kl, per_token
from mtllm_jax.recipes.bridge_start import begin_bridge
from mtllm_jax.recipes.job import Job
from mtllm_jax.runfolder import StageFolder, changed_since, new_file
from mtllm_jax.tasks.task import Row, Task, texts_of
from mtllm_jax.train import Objective, fit

# In a run folder: `tree_hash` of encoder and LLM, as they are read; and of what config.stage1 has
# trained.
WEIGHTS, STAGE_1 = "weights.json", "stage1.json"


@dataclasses.dataclass
class Parts:
    """The checkpoints that a run starts from, as read."""

    source: SourceTokenizer
    target: TargetTokenizer
    encoder: Encoder
    llm: Llama


def load_parts(
    config: MTLLM,
    encoder_folder: str,
    llm_folder: str,
    mesh: jax.sharding.Mesh | None,
    console: Console | None = None,
) -> Parts:
    """Both models, laid over the devices of `mesh` (None: the first), and tokenizers.

    The LLM has the config's adapters merged into it. console: shows how far reading is.
    """

    llm = load_llm(config, llm_folder, config.llm_adapters, mesh, console)
    told = _told(console, "reading the encoder")
    return Parts(
        source=source_tokenizer(
            local_files(encoder_folder), legacy_source_order=config.legacy_source_order
        ),
        target=TargetTokenizer(local_files(llm_folder)),
        encoder=load_encoder(encoder_folder, progress=told, **_how_to_read(config, mesh)),
        llm=llm,
    )


def load_llm(
    config: MTLLM | SDRRL,
    folder: str,
    adapters: Sequence[str],
    mesh: jax.sharding.Mesh | None,
    console: Console | None = None,
) -> Llama:
    """The LLM as `load_parts` reads it, with these adapters merged."""
    told = _told(console, "reading the LLM")
    return load_merged(folder, adapters, progress=told, **_how_to_read(config, mesh))


def _told(console: Console | None, what: str) -> Progress | None:
    return None if console is None else console.progress_of_bytes(what)


def _how_to_read(config: MTLLM | SDRRL, mesh: jax.sharding.Mesh | None) -> dict[str, Any]:
    return {
        "dtype": jnp.dtype(config.frozen_dtype),
        "mesh": mesh,
        "remat": config.remat,
        "unroll_layers": config.unroll_layers,
        "attention": config.attention,
    }


def weights_of(parts: Parts) -> dict[str, str]:
    """What tells the models from others, bit for bit."""
    models = {"encoder": parts.encoder, "llm": parts.llm}
    return {name: tree_hash(nnx.state(model)) for name, model in models.items()}


def check_weights(
    run: epath.Path, weights: dict[str, str], *, write: bool = False, file: str = WEIGHTS
) -> None:
    """Raise ValueError unless the models are those that a run has begun with.

    What was trained is of use with these alone, and a stage that is done no longer looks at them.
    weights: of `weights_of`. write: where the run has just begun, write them down. file: of the
    run's folder, that has them.
    """
    changed = distributed.by_first(lambda: changed_since(run / file, weights, write=write))
    if changed:
        raise ValueError(
            f"the weights of {' and '.join(changed)} are not those that {run} was trained with; put"
            " them back, or begin in another workdir."
        )


def is_trained(config: MTLLM) -> Any:
    """The filter for what learns: the bridge, heads, the LLM's adapters or all its layers, and the
    encoder's last layers where they were made free."""
    parts = ["bridge", "head"]
    if config.encoder_layers:
        parts += ["top", "encoder_norm"]
    chosen = nnx.Any(*map(nnx.PathContains, parts))
    if config.trained != "all":
        return nnx.Any(chosen, LoRAParam)
    # Embeddings stay: the stack does not read them, and decay alone would shrink them.
    frozen = nnx.Any(*map(nnx.PathContains, ("encoder", "embedding", "output")))
    return nnx.Any(chosen, nnx.Not(frozen))


def with_adapters(config: MTLLM | SDRRL, llm: Llama, seed: int, start: str = "") -> Llama:
    """A copy of the LLM, with what of it learns: LoRA factors, or all in float32, or nothing.

    start: the PEFT folder that the factors are taken from; "" = fresh ones.
    """
    llm = nnx.clone(llm)
    if config.trained == "bridge":
        return llm
    if config.trained == "lora" and start:
        attach_peft(llm, start, rngs=nnx.Rngs(seed), dropout=config.lora.dropout)
        return llm
    if config.trained == "lora":
        _attach(config, llm, config.lora.targets, seed)
        return llm
    graph, state = nnx.split(llm)
    return nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.float32), state))


def _attach(config: MTLLM | SDRRL, module: nnx.Module, targets: Sequence[str], seed: int) -> None:
    lora.attach(
        module,
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        dropout=config.lora.dropout,
        targets=targets,
        rngs=nnx.Rngs(seed),
    )


def build_stack(config: MTLLM, parts: Parts, seed: int, start: str = "") -> Stack:
    """encoder → a fresh bridge → the LLM, with what may learn. start: as in `with_adapters`."""
    scale = float(_root_mean_square(parts.llm.embedding[...]))
    return new_stack(config, parts.encoder, parts.llm, scale, seed, start)


def new_stack(
    config: MTLLM, encoder: Encoder, llm: Llama, scale: float, seed: int, start: str = ""
) -> Stack:
    """The same with the bridge's `scale` given; traceable."""
    widths = encoder.config.width, llm.config.width
    bridge = Bridge(*widths, scale, nnx.Rngs(seed), **dataclasses.asdict(config.bridge))
    encoder = nnx.clone(encoder)
    if config.encoder_layers:
        encoder.free(config.encoder_layers)
    return Stack(encoder, bridge, with_adapters(config, llm, seed + 1, start))


@jax.jit  # so that a large table is never widened whole
def _root_mean_square(x: Array) -> Array:
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))


# ---------------------------------------------------------------- stage 1: general adaptation


def adaptation_frozen(config: MTLLM, stack: nnx.State, teacher: nnx.State) -> dict[str, nnx.State]:
    """What stage 1 only reads. But for its adapters the student's LLM is the teacher: held once."""
    return {"stack": stack, "teacher": teacher} if config.trained == "all" else {"stack": stack}


def adaptation_objective(
    config: MTLLM, stack_graph: nnx.GraphDef, teacher_graph: nnx.GraphDef
) -> Objective:
    """How far what the stack makes of a text is from what the LLM makes of it, both pooled.

    The objective's `frozen` is what `adaptation_frozen` gives.
    """
    dtype, causal = jnp.dtype(config.compute_dtype), not config.bidirectional
    wanted = config.adaptation.objective
    noise = (config.adaptation.noise_position, config.adaptation.noise_text)

    def objective(trainable: nnx.State, frozen: Any, batch: dict[str, Array], key: Array) -> Terms:
        stack: Stack = nnx.merge(stack_graph, trainable, frozen["stack"])
        weights = frozen["teacher"] if "teacher" in frozen else frozen["stack"]["llm"]
        teacher: Llama = nnx.merge(teacher_graph, weights)
        num_texts = batch["example"].shape[1]
        student_BPD, segments_BP = stack.hidden(
            batch["source_ids"],
            batch["source_segments"],
            num_texts,
            causal=causal,
            dtype=dtype,
            noise=noise,
            key=key,
        )
        teacher_BTD = llm_hidden(
            teacher,
            batch["target_ids"],
            batch["target_segments"],
            num_texts,
            causal=causal,
            dtype=dtype,
        )
        valid_BN = batch["example"] > 0
        others = {}
        if wanted.per_token:
            others["per_token"] = per_token(
                student_BPD,
                teacher_BTD,
                batch["aligned_ids"],
                segments_BP,
                batch["target_segments"],
                valid_BN,
            )
        return likeness(
            segment_mean(student_BPD, segments_BP, num_texts),
            segment_mean(teacher_BTD, batch["target_segments"], num_texts),
            valid_BN,
            wanted.weights(),
            wanted.temperature,
            others,
        )

    return objective


def adaptation_rows(config: MTLLM, parts: Parts, english: Texts | Prepared, seed: int) -> Rows:
    """English texts as both sides tokenise them, packed here or before."""
    if isinstance(english, Prepared):
        return english.rows()
    return make_rows(maker_of(config, parts.source, parts.target, seed), english)


def _held_out_rows(
    config: MTLLM, parts: Parts, english: Texts | Prepared, seed: int
) -> tuple[Rows, Rows]:
    """(rows to train on, rows of other texts to evaluate on, these segmented in one way)."""
    count = config.adaptation.dev_texts
    if isinstance(english, Prepared):
        return hold_out_rows(english.rows(), count)
    maker = maker_of(config, parts.source, parts.target, seed)
    left, held = hold_out_texts(english, count)
    plain = dataclasses.replace(maker, subword_sampling=0.0, samplings=1)
    return make_rows(maker, left), make_rows(plain, held)


def general_adaptation(
    job: Job[MTLLM], parts: Parts, english: Texts | Prepared | None
) -> nnx.State:
    """Stage 1: train bridge and LLM side of the stack on English text; returns what was trained, or
    of 0 steps, which read none, what would have been."""
    config, seed = job.config, job.stage_seed("adaptation")
    training = config.adaptation.training

    @functools.cache
    def split_rows() -> tuple[Rows, Rows]:
        assert english is not None
        return _held_out_rows(config, parts, english, seed)

    @functools.cache
    def rows() -> Rows:
        assert english is not None
        if training.evaluate_every:
            packed, _ = split_rows()
        else:
            packed = adaptation_rows(config, parts, english, seed)
        job.console.print(packed.told())
        return packed

    def flops(packed: Rows) -> Flops:
        step = FlopsBatch(
            rows=training.batch_rows,
            source_length=training.source_length,
            target_length=training.target_length,
            texts=packed.counts.texts / packed.counts.rows,
            source_fill=packed.fill["source"],
            target_fill=packed.fill["target"],
        )
        sizes = parts.encoder.config, parts.llm.config
        return adaptation_flops(trainable, frozen, *sizes, step, config.bridge.stride)

    stack = build_stack(config, parts, seed, config.lora.start)
    if config.adaptation.bridge_start == "embeddings":
        begin_bridge(job, stack, rows, seed)
    with job.stage("adaptation", "stage 1, general adaptation") as stage:
        graph, trainable, frozen = split(stack, is_trained(config))
        teacher_graph, teacher = nnx.split(parts.llm)
        return fit(
            stage,
            "stage 1",
            training,
            objective=adaptation_objective(config, graph, teacher_graph),
            trainable=trainable,
            frozen=adaptation_frozen(config, frozen, teacher),
            rows=rows,
            mesh=job.mesh,
            seed=seed,
            console=job.console,
            watch=job.watch,
            flops=flops,
            dev=lambda: (split_rows()[1], None),
        )


def load_adapted(config: MTLLM, parts: Parts, mesh: jax.sharding.Mesh) -> nnx.State:
    """What was trained by the stage 1 that config.stage1 names: a run's, or an exported one.

    ValueError for weights that are missing or damaged, or of other models than these.
    """
    _, fresh, frozen = split(build_stack(config, parts, seed=0), is_trained(config))
    if is_stack(config.stage1):
        return _exported(config, fresh, frozen, mesh)
    return load_params(epath.Path(config.stage1) / "adaptation" / "params", fresh)


def load_stage_1(run: epath.Path, config: MTLLM, parts: Parts) -> Stack:
    """The stack as the stage 1 of a run left it, its encoder's layers in one piece.

    ValueError for weights that are missing or damaged.
    """
    stack = build_stack(config, parts, seed=0)
    _, fresh, _ = split(stack, is_trained(config))
    stack = with_trained(config, stack, load_params(run / "adaptation" / "params", fresh))
    stack.encoder.whole()
    return stack


def _exported(
    config: MTLLM, fresh: nnx.State, frozen: nnx.State, mesh: jax.sharding.Mesh
) -> nnx.State:
    """What an exported stack has in the place of `fresh`; the rest of it must be `frozen`."""
    stack = load_stack(config.stage1, mesh=mesh).stack
    encoder: Any = stack.encoder
    if config.encoder_layers:
        encoder.free(config.encoder_layers)
    theirs = dict(nnx.to_flat_state(nnx.state(stack)))

    def of_theirs(path: Any, variable: nnx.Variable) -> nnx.Variable:
        return variable.replace(theirs[path][...].astype(variable.dtype))

    # A folder keeps no decoder and no output layer.
    shared = [(path, v) for path, v in nnx.to_flat_state(frozen) if path in theirs]
    for part in ("encoder", "llm"):
        ours = {path: v[...] for path, v in shared if path[0] == part}
        same = {path: of_theirs(path, v)[...] for path, v in shared if path[0] == part}
        if tree_hash(ours) != tree_hash(same):
            raise ValueError(
                f"config.stage1: {config.stage1} has other weights than config.{part} where stage 1"
                " changes none; name the model that it began with, and export in its dtype, with"
                " --adapters=kept where they are what learns."
            )
    learnt = [(path, of_theirs(path, v)) for path, v in nnx.to_flat_state(fresh)]
    return nnx.from_flat_state(learnt)


# ---------------------------------------------------------------- stage 2a: the task's teacher


class LLMClassifier(nnx.Module):
    """The LLM on its own tokens, mean pool, head: the teacher of stage 2b, and LLM zero-shot."""

    def __init__(self, llm: Llama, head: Linear):
        self.llm = llm
        self.head = head


def of_teacher(config: MTLLM) -> MTLLM:
    """The config as stage 2a has it: a teacher cannot but learn, with adapters if nothing else."""
    return dataclasses.replace(config, trained="lora") if config.trained == "bridge" else config


def new_teacher(config: MTLLM, parts: Parts, num_outputs: int, seed: int) -> LLMClassifier:
    """The LLM with what it may learn and a fresh head, as stage 2a starts."""
    head = classification_head(parts.llm.config.width, num_outputs, nnx.Rngs(seed))
    return LLMClassifier(with_adapters(of_teacher(config), parts.llm, seed + 1), head)


def teacher_objective(config: MTLLM, graph: nnx.GraphDef, num_choices: int = 0) -> Objective:
    """Cross-entropy of the task's English labels; of multiple choice, over a row's choices."""
    dtype, causal = jnp.dtype(config.compute_dtype), not config.bidirectional

    def objective(trainable: nnx.State, frozen: Any, batch: dict[str, Array], key: Array) -> Terms:
        model: LLMClassifier = nnx.merge(graph, trainable, frozen)
        pooled_BND = llm_pooled(
            model.llm,
            batch["target_ids"],
            batch["target_segments"],
            batch["example"].shape[1],
            causal=causal,
            dtype=dtype,
            key=key,
            choices=_choices(batch, num_choices),
        )
        return _classified(model.head(pooled_BND), batch, num_choices)

    return objective


def _choices(batch: dict[str, Array], num_choices: int) -> Choices | None:
    return (batch["marks"][:, 0] - 1, num_choices) if num_choices else None


def _classified(logits: Array, batch: dict[str, Array], num_choices: int) -> Terms:
    """logits: [B, N, C] of texts and their classes, or [B, C, 1] of the choices of a row."""
    logits_BNC = jnp.swapaxes(logits, 1, 2) if num_choices else logits
    return classification(logits_BNC, batch["label"], batch["example"] > 0)


def task_teacher(job: Job[MTLLM], parts: Parts, task: Task) -> LLMClassifier:
    """Stage 2a: fine-tune the LLM and a head on the task in English."""
    title = "stage 2a, the task's English teacher"
    return _tuned_llm(job, parts, task, lambda _: task.train, "teacher", title, "stage 2a")


def translate_train_baseline(
    job: Job[MTLLM], parts: Parts, task: Task, translated: Callable[[epath.Path], Sequence[Row]]
) -> LLMClassifier:
    """Fine-tune the LLM and a head as stage 2a does, on translations of its English rows.

    translated: makes them, and may keep what it needs to go on in a folder of the stage's.
    """
    title = "baseline, the LLM on translated rows"
    return _tuned_llm(job, parts, task, translated, "translate_train", title, "translate-train")


def _tuned_llm(
    job: Job[MTLLM],
    parts: Parts,
    task: Task,
    rows_in: Callable[[epath.Path], Sequence[Row]],
    name: str,
    title: str,
    shown: str,
) -> LLMClassifier:
    """rows_in: the stage's folder → the rows to train on, asked for where the stage is not done."""
    config, seed = job.config, job.stage_seed(name)
    training = config.teacher
    with job.stage(name, title) as stage:
        model = new_teacher(config, parts, task.num_outputs, seed)
        graph, trainable, frozen = split(model, is_trained(of_teacher(config)))
        rows = functools.cache(lambda: rows_in(stage.path))
        read = functools.cache(lambda: _target_rows(parts, task, rows(), training))
        trained = fit(
            stage,
            shown,
            training,
            objective=teacher_objective(config, graph, task.num_choices),
            trainable=trainable,
            frozen=frozen,
            rows=lambda: read().rows,
            mesh=job.mesh,
            seed=seed,
            console=job.console,
            watch=job.watch,
            add=lambda: read().beside({"label": task.label_ids(rows())}),
            dev=lambda: _target_rows(parts, task, task.dev, training).data(
                {"label": task.label_ids(task.dev)}
            ),
        )
        return nnx.merge(graph, trained, frozen)


@dataclasses.dataclass(frozen=True)
class _TaskRows:
    """A task's rows as one side reads them; with choices, `marks` [texts, length]."""

    rows: Rows
    marks: np.ndarray | None

    def beside(self, tables: Mapping[str, np.ndarray]) -> Callable[[Batch], Batch]:
        """What gives a batch what belongs to its texts."""
        marks = {} if self.marks is None else {"marks": self.marks}
        return add_by_example({**tables, **marks})

    def data(self, tables: Mapping[str, np.ndarray]) -> Data:
        """Rows and `beside` together, as development data."""
        return self.rows, self.beside(tables)


def _source_rows(parts: Parts, task: Task, given: Sequence[Row], training: Training) -> _TaskRows:
    def encode(rows: Sequence[Row], length: int) -> Marked:
        return source_tokens(parts.source, rows, length)

    length, pad_id = training.source_length, parts.source.pad_id
    return _task_rows("source", encode, task, given, length, pad_id, training)


def _target_rows(parts: Parts, task: Task, given: Sequence[Row], training: Training) -> _TaskRows:
    def encode(rows: Sequence[Row], length: int) -> Marked:
        return target_tokens(parts.target, rows, length)

    length, pad_id = training.target_length, parts.target.pad_id
    return _task_rows("target", encode, task, given, length, pad_id, training)


def source_tokens(tokenizer: SourceTokenizer, rows: Sequence[Row], length: int) -> Marked:
    """A task's rows as the encoder reads them, in their languages or the stand-ins for these, and
    marks: of choices, else 1 at every token."""
    codes = [row["language"] for row in rows]
    told = {code: source_language(code, tokenizer.languages) for code in set(codes)}
    languages = [told[code] for code in codes]
    if "choices" in rows[0]:
        return tokenizer.encode_choices(rows, languages, max_length=length)
    texts, pairs = texts_of(rows)
    ids = tokenizer.encode(texts, languages, text_pairs=pairs, max_length=length)
    return ids, [np.ones_like(row) for row in ids]


def target_tokens(tokenizer: TargetTokenizer, rows: Sequence[Row], length: int) -> Marked:
    """The same as the LLM reads them."""
    if "choices" in rows[0]:
        return tokenizer.encode_choices(rows, max_length=length)
    texts, pairs = texts_of(rows)
    ids = tokenizer.encode(texts, text_pairs=pairs, max_length=length)
    return ids, [np.ones_like(row) for row in ids]


def _task_rows(
    stream: str,
    encode: Callable[[Sequence[Row], int], Marked],
    task: Task,
    given: Sequence[Row],
    length: int,
    pad_id: int,
    training: Training,
) -> _TaskRows:
    def marked(rows: Sequence[Row], length: int) -> list[tuple[np.ndarray, np.ndarray]]:
        return list(zip(*encode(rows, length), strict=True)) if rows else []

    texts, cut = encode_cut(marked, given, length, size=lambda text: len(text[0]))
    # A row of choices has segments of its own within it, and so stands alone.
    packing = training.packing and not task.num_choices
    tokens = [{stream: ids} for ids, _ in texts]
    rows = pack(tokens, {stream: length}, {stream: pad_id}, packing=packing)
    counts = dataclasses.replace(rows.counts, truncated={stream: cut})
    rows = dataclasses.replace(rows, counts=counts)
    if not task.num_choices:
        return _TaskRows(rows, None)
    table = np.zeros((len(texts), length), np.int32)
    for row, (_, marks) in zip(table, texts, strict=True):
        row[: len(marks)] = marks
    return _TaskRows(rows, table)


# ---------------------------------------------------------------- stage 2b: task distillation


class StackClassifier(nnx.Module):
    """The stack and a head, the teacher's or its own: the system that is shipped."""

    def __init__(self, stack: Stack, head: Linear):
        self.stack = stack
        self.head = head


def distillation_frozen(config: MTLLM, stack: nnx.State, head: Linear) -> dict[str, nnx.State]:
    """What stage 2b only reads: the teacher's head is asked where its logits are in the loss."""
    if not config.distillation.objective.logits_kl:
        return {"stack": stack}
    return {"stack": stack, "head": nnx.state(head)}


def distillation_objective(config: MTLLM, graph: nnx.GraphDef, num_choices: int = 0) -> Objective:
    """How far the stack's pooled state is from the stored one of the task's teacher; of multiple
    choice, those of every choice.

    The objective's `frozen` is what `distillation_frozen` gives.
    """
    dtype, causal = jnp.dtype(config.compute_dtype), not config.bidirectional
    noise = (config.distillation.noise_position, config.distillation.noise_text)
    wanted = config.distillation.objective

    def objective(trainable: nnx.State, frozen: Any, batch: dict[str, Array], key: Array) -> Terms:
        stack: Stack = nnx.merge(graph, trainable, frozen["stack"])
        student_BND = stack.pooled(
            batch["source_ids"],
            batch["source_segments"],
            batch["example"].shape[1],
            causal=causal,
            dtype=dtype,
            noise=noise,
            key=key,
            choices=_choices(batch, num_choices),
        )
        teacher_BND, valid_BN = batch["teacher"], batch["example"] > 0
        if num_choices:
            teacher_BND = teacher_BND[:, 0]
            valid_BN = jnp.broadcast_to(valid_BN, student_BND.shape[:2])
        others = {}
        if "head" in frozen:
            kernel_DC = frozen["head"]["kernel"][...].astype(jnp.float32)
            others["logits_kl"] = logits_kl(
                student_BND @ kernel_DC,
                teacher_BND @ kernel_DC,
                valid_BN,
                wanted.logits_temperature,
                across=bool(num_choices),
            )
        return likeness(
            student_BND, teacher_BND, valid_BN, wanted.weights(), wanted.temperature, others
        )

    return objective


def task_distillation(
    job: Job[MTLLM],
    parts: Parts,
    task: Task,
    adapted: nnx.State,
    teacher: LLMClassifier,
) -> StackClassifier:
    """Stage 2b: the stack learns the teacher's states of the task's English texts."""
    config, seed = job.config, job.stage_seed("distillation")
    training = config.distillation.training
    with job.stage("distillation", "stage 2b, task distillation") as stage:
        stack = with_trained(config, build_stack(config, parts, seed), adapted)
        if config.distillation.start == "stage1+teacher":
            add_difference(stack.llm, teacher.llm, parts.llm)
        graph, trainable, frozen = split(stack, is_trained(config))
        path = stage.path / "teacher_vectors.npy"
        vectors = _teacher_vectors(job, path, parts, task, task.train, teacher)
        if training.evaluate_every:
            path = stage.path / "teacher_vectors_dev.npy"
            dev_vectors = _teacher_vectors(job, path, parts, task, task.dev, teacher)
        read = functools.cache(lambda: _source_rows(parts, task, task.train, training))
        trained = fit(
            stage,
            "stage 2b",
            training,
            objective=distillation_objective(config, graph, task.num_choices),
            trainable=trainable,
            frozen=distillation_frozen(config, frozen, teacher.head),
            rows=lambda: read().rows,
            mesh=job.mesh,
            seed=seed,
            console=job.console,
            watch=job.watch,
            add=lambda: read().beside({"teacher": vectors}),
            dev=lambda: _source_rows(parts, task, task.dev, training).data(
                {"teacher": dev_vectors}
            ),
        )
        return StackClassifier(nnx.merge(graph, trained, frozen), teacher.head)


def new_student(
    config: MTLLM, parts: Parts, adapted: nnx.State | None, num_outputs: int, seed: int
) -> StackClassifier:
    """The stack as stage 1 left it (None: afresh) and a fresh head."""
    stack = build_stack(config, parts, seed)
    if adapted is not None:
        stack = with_trained(config, stack, adapted)
    head = classification_head(parts.llm.config.width, num_outputs, nnx.Rngs(seed + 2))
    return StackClassifier(stack, head)


def tuning_objective(config: MTLLM, graph: nnx.GraphDef, num_choices: int = 0) -> Objective:
    """Cross-entropy of the task's English labels, as `teacher_objective`, by the stack itself."""
    dtype, causal = jnp.dtype(config.compute_dtype), not config.bidirectional
    noise = (config.distillation.noise_position, config.distillation.noise_text)

    def objective(trainable: nnx.State, frozen: Any, batch: dict[str, Array], key: Array) -> Terms:
        model: StackClassifier = nnx.merge(graph, trainable, frozen)
        pooled_BND = model.stack.pooled(
            batch["source_ids"],
            batch["source_segments"],
            batch["example"].shape[1],
            causal=causal,
            dtype=dtype,
            noise=noise,
            key=key,
            choices=_choices(batch, num_choices),
        )
        return _classified(model.head(pooled_BND), batch, num_choices)

    return objective


def task_tuning(job: Job[MTLLM], parts: Parts, task: Task, adapted: nnx.State) -> StackClassifier:
    """Stage 2b without a teacher: the stack and a head of its own learn the task's labels."""
    config, seed = job.config, job.stage_seed("distillation")
    training = config.distillation.training
    with job.stage("distillation", "stage 2b, the task's labels") as stage:
        model = new_student(config, parts, adapted, task.num_outputs, seed)
        graph, trainable, frozen = split(model, is_trained(config))
        objective = tuning_objective(config, graph, task.num_choices)
        trained = _fit_to_labels(
            job, stage, "stage 2b", training, parts, task, objective, trainable, frozen, seed
        )
        return nnx.merge(graph, trained, frozen)


def _fit_to_labels(
    job: Job[MTLLM],
    stage: StageFolder,
    shown: str,
    training: Training,
    parts: Parts,
    task: Task,
    objective: Objective,
    trainable: nnx.State,
    frozen: nnx.State,
    seed: int,
) -> nnx.State:
    """`fit` of what reads the encoder's tokens to the task's labels."""
    read = functools.cache(lambda: _source_rows(parts, task, task.train, training))
    return fit(
        stage,
        shown,
        training,
        objective=objective,
        trainable=trainable,
        frozen=frozen,
        rows=lambda: read().rows,
        mesh=job.mesh,
        seed=seed,
        console=job.console,
        watch=job.watch,
        add=lambda: read().beside({"label": task.label_ids(task.train)}),
        dev=lambda: _source_rows(parts, task, task.dev, training).data(
            {"label": task.label_ids(task.dev)}
        ),
    )


def with_trained(config: MTLLM, model: Any, trained: nnx.State) -> Any:
    """The model with `trained` in the place of what learns."""
    graph, _, frozen = split(model, is_trained(config))
    return nnx.merge(graph, trained, frozen)


def load_trained(
    run: epath.Path, config: MTLLM, parts: Parts, num_outputs: int
) -> tuple[LLMClassifier, StackClassifier]:
    """What stages 2a and 2b of a run ended with: the task's teacher and the student, its encoder's
    layers in one piece.

    ValueError for weights that are missing or damaged.
    """

    def trained(config: MTLLM, model: Any, stage: str) -> Any:
        _, fresh, _ = split(model, is_trained(config))
        return with_trained(config, model, load_params(run / stage / "params", fresh))

    fresh_teacher = new_teacher(config, parts, num_outputs, seed=0)
    teacher = trained(of_teacher(config), fresh_teacher, "teacher")
    if config.distillation.learns == "labels":
        student = new_student(config, parts, None, num_outputs, seed=0)
        student = trained(config, student, "distillation")
        student.stack.encoder.whole()
        return teacher, student
    stack = build_stack(config, parts, seed=0)
    if config.distillation.start == "stage1+teacher":
        # For the frozen weights' sake, beside adapters: what learnt is read in the next line.
        add_difference(stack.llm, teacher.llm, parts.llm)
    stack = trained(config, stack, "distillation")
    stack.encoder.whole()
    return teacher, StackClassifier(stack, teacher.head)


def add_difference(student: Llama, tuned: Llama, base: Llama) -> None:
    """Add to the student, in place, what tuning changed: W += W_tuned − W_base [ours].

    Adapters of `tuned` count as the kernels they stand for.
    """
    tuned = nnx.clone(tuned)
    lora.merge(tuned)
    base_state = dict(nnx.to_flat_state(nnx.state(base)))
    tuned_state = dict(nnx.to_flat_state(nnx.state(tuned)))
    for path, variable in nnx.to_flat_state(nnx.state(student)):
        if path in base_state:
            delta = tuned_state[path][...].astype(jnp.float32) - base_state[path][...].astype(
                jnp.float32
            )
            value = variable[...]
            variable[...] = (value.astype(jnp.float32) + delta).astype(value.dtype)


def _teacher_vectors(
    job: Job[MTLLM],
    path: epath.Path,
    parts: Parts,
    task: Task,
    rows: Sequence[Row],
    teacher: LLMClassifier,
) -> np.ndarray:
    """The teacher's pooled state of every text, computed once and stored at `path`: [texts, D], of
    multiple choice [texts, C, D]."""
    if distributed.by_first(path.exists):
        with path.open("rb") as file:
            return np.load(file)
    forward, state = llm_forward(job.config, teacher, task.num_choices)
    run = Vectors(
        forward,
        state,
        pad_id=parts.target.pad_id,
        batch_rows=job.config.evaluation.batch_rows,
        mesh=job.mesh,
    )
    vectors = run(*target_tokens(parts.target, rows, job.config.teacher.target_length))
    if distributed.is_first():
        with new_file(path) as file:
            np.save(file, vectors)
    return vectors


# ---------------------------------------------------------------- systems as forward functions


def _one_text(marks: Array, num_choices: int) -> tuple[Array, Choices | None]:
    """Segments of rows of one text each, and their choices, from marks: 1, or 1 + a choice's."""
    return jnp.minimum(marks, 1), (marks - 1, num_choices) if num_choices else None


def llm_forward(config: MTLLM, model: LLMClassifier, num_choices: int = 0) -> tuple[Forward, Any]:
    """(forward, state): tokens of the LLM → pooled state [B, D], or one of each choice."""
    graph, state = nnx.split(model.llm)

    def forward(state: Any, ids_BT: Array, marks_BT: Array) -> Array:
        segments_BT, choices = _one_text(marks_BT, num_choices)
        pooled_BND = llm_pooled(
            nnx.merge(graph, state),
            ids_BT,
            segments_BT,
            1,
            causal=not config.bidirectional,
            dtype=jnp.dtype(config.compute_dtype),
            choices=choices,
        )
        return pooled_BND if num_choices else pooled_BND[:, 0]

    return forward, state


def stack_forward(
    stack: Stack, *, causal: bool, dtype: DTypeLike, num_choices: int = 0
) -> tuple[Forward, Any]:
    """(forward, state): tokens of the encoder → the stack's pooled state [B, D], or one of each
    choice."""
    graph, state = nnx.split(stack)

    def forward(state: Any, ids_BS: Array, marks_BS: Array) -> Array:
        stack: Stack = nnx.merge(graph, state)
        segments_BS, choices = _one_text(marks_BS, num_choices)
        pooled_BND = stack.pooled(
            ids_BS, segments_BS, 1, causal=causal, dtype=dtype, choices=choices
        )
        return pooled_BND if num_choices else pooled_BND[:, 0]

    return forward, state


# ---------------------------------------------------------------- baseline: the encoder alone


class EncoderClassifier(nnx.Module):
    """MT encoder with adapters, mean pool, head: the baseline without an LLM."""

    def __init__(self, encoder: Encoder, head: Linear):
        self.encoder = encoder
        self.head = head


def encoder_pooled(
    encoder: Encoder,
    ids_BS: Array,
    segments_BS: Array,
    num_texts: int,
    dtype: Any,
    key: Array | None,
    choices: Choices | None,
) -> Array:
    """Mean of the encoder's states over each text, or each choice. float32 [B, N, E]."""
    h_BSE = encoder.encode(ids_BS, segments_BS, dtype, dropout_key=key, packed=num_texts > 1)
    return segment_mean(h_BSE, *(choices or (segments_BS, num_texts)))


def encoder_objective(config: MTLLM, graph: nnx.GraphDef, num_choices: int = 0) -> Objective:
    """Cross-entropy of the task's English labels, as `teacher_objective`."""
    dtype = jnp.dtype(config.compute_dtype)

    def objective(trainable: nnx.State, frozen: Any, batch: dict[str, Array], key: Array) -> Terms:
        model: EncoderClassifier = nnx.merge(graph, trainable, frozen)
        pooled_BNE = encoder_pooled(
            model.encoder,
            batch["source_ids"],
            batch["source_segments"],
            batch["example"].shape[1],
            dtype,
            key,
            _choices(batch, num_choices),
        )
        return _classified(model.head(pooled_BNE), batch, num_choices)

    return objective


def mt_encoder_baseline(job: Job[MTLLM], parts: Parts, task: Task) -> EncoderClassifier:
    """Tune the MT encoder's adapters and a head on the task in English [code]."""
    config, seed = job.config, job.stage_seed("mt_encoder")
    training = config.mt_encoder
    with job.stage("mt_encoder", "baseline, Encoder + head") as stage:
        encoder = nnx.clone(parts.encoder)
        _attach(config, encoder, ("all",), seed)
        head = classification_head(encoder.config.width, task.num_outputs, nnx.Rngs(seed + 1))
        model = EncoderClassifier(encoder, head)
        learns = nnx.Any(nnx.PathContains("head"), LoRAParam)
        graph, trainable, frozen = split(model, learns)
        objective = encoder_objective(config, graph, task.num_choices)
        trained = _fit_to_labels(
            job, stage, "MT encoder", training, parts, task, objective, trainable, frozen, seed
        )
        return nnx.merge(graph, trained, frozen)


def encoder_forward(config: MTLLM, encoder: Encoder, num_choices: int = 0) -> tuple[Forward, Any]:
    """(forward, state): tokens of the encoder → its pooled state [B, E], or one of each choice."""
    graph, state = nnx.split(encoder)

    def forward(state: Any, ids_BS: Array, marks_BS: Array) -> Array:
        encoder: Encoder = nnx.merge(graph, state)
        segments_BS, choices = _one_text(marks_BS, num_choices)
        dtype = jnp.dtype(config.compute_dtype)
        pooled_BNE = encoder_pooled(encoder, ids_BS, segments_BS, 1, dtype, None, choices)
        return pooled_BNE if num_choices else pooled_BNE[:, 0]

    return forward, state
