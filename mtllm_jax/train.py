"""The training step and the loop around it: the same for every stage of every recipe."""

import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from mtllm_jax import distributed, sharding
from mtllm_jax.allocator import keep_for
from mtllm_jax.checkpoint import Checkpointer, has_params, load_params, save_params, tree_hash
from mtllm_jax.chips import chip_of
from mtllm_jax.config import Training
from mtllm_jax.data.packing import Rows
from mtllm_jax.data.pipeline import Batch, batches
from mtllm_jax.development import Choice, Data, Development
from mtllm_jax.flops import Flops
from mtllm_jax.goodput import FILE, Goodput, percentiles
from mtllm_jax.interrupt import Interrupted, graceful_stop
from mtllm_jax.metrics import Console, MetricsWriter, read_metrics
from mtllm_jax.objectives import Terms
from mtllm_jax.runfolder import StageFolder
from mtllm_jax.watch import UNWATCHED, Sink, Watch

_SHOWN = ("loss", "fvu", "accuracy", "dev_loss", "dev_fvu", "dev_accuracy")  # beside the bar

STREAMS = ("source", "target")  # of a batch: what the encoder reads, what the LLM reads

# (trainable, frozen, batch, key; None: without noise and dropout) → {"loss": (sum, count), …}
Objective = Callable[[nnx.State, Any, dict[str, Array], Any], Terms]


class TrainState(flax.struct.PyTreeNode):
    """All that changes while training, and all that a checkpoint holds beside the data iterator."""

    step: Array  # int32
    trainable: nnx.State
    opt_state: optax.OptState
    rng: Array  # a typed key, the stage's own; each step folds its number in


def make_optimizer(config: Training) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm, with a linear warm-up and then a linear or cosine
    decay to `final_rate` of the peak. Vectors (norms, biases) are not decayed."""
    adamw = optax.adamw(
        learning_rate(config),
        b2=config.adam_b2,
        weight_decay=config.weight_decay,
        mask=_is_matrix,
    )
    if config.clip_norm == 0:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def learning_rate(config: Training) -> optax.Schedule:
    """Of each update, from 0."""
    warmup = round(config.warmup * config.steps)
    decay_steps = max(1, config.steps - warmup)
    if config.schedule == "linear":
        end = config.learning_rate * config.final_rate
        decay = optax.linear_schedule(config.learning_rate, end, decay_steps)
    else:
        decay = optax.cosine_decay_schedule(config.learning_rate, decay_steps, config.final_rate)
    # Step 0 learns too: the ramp ends one step late rather than begin with a wasted update.
    ramp = optax.linear_schedule(config.learning_rate / (warmup + 1), config.learning_rate, warmup)
    return optax.join_schedules([ramp, decay], [warmup]) if warmup else decay


def _is_matrix(params: Any) -> Any:
    def of(variable: nnx.Variable) -> nnx.Variable:
        dims = [dim for dim in variable.get_metadata("dims") if dim != "layers"]
        return variable.replace(len(dims) >= 2)

    return jax.tree.map(of, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def train_step(
    state: TrainState,
    frozen: Any,
    batch: dict[str, Array],
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    accumulation: int = 1,
) -> tuple[TrainState, Terms]:
    """One optimizer update. `frozen` is only read; gradients exist for `state.trainable` alone.

    The summed loss is differentiated, and the gradients divided once by the global count, so
    that accumulation, packing and the number of processes change nothing. A step whose gradient
    is not finite, or that has nothing to count, leaves the state as it was ("skipped").
    """
    key = jax.random.fold_in(state.rng, state.step)

    def summed_loss(
        trainable: nnx.State, rows: dict[str, Array], key: Array
    ) -> tuple[Array, Terms]:
        terms = objective(trainable, frozen, rows, key)
        return terms["loss"][0], terms

    gradient = jax.grad(summed_loss, has_aux=True)
    if accumulation == 1:
        grads, terms = gradient(state.trainable, batch, key)
    else:
        # Every micro-batch takes rows of every device; cut into runs, each would lie on a few.
        micro = jax.tree.map(
            lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), batch
        )
        keys = jax.random.split(key, accumulation)

        def add(total: Any, rows_and_key: tuple[dict[str, Array], Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient(state.trainable, *rows_and_key)), None

        first = jax.tree.map(lambda x: x[0], (micro, keys))
        shapes = jax.eval_shape(gradient, state.trainable, *first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (grads, terms), _ = jax.lax.scan(add, zeros, (micro, keys))

    count = terms["loss"][1]
    grads = jax.tree.map(lambda g: g / jnp.maximum(count, 1).astype(g.dtype), grads)
    norm = optax.tree.norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    sound = jnp.isfinite(norm) & (count > 0)
    trainable, opt_state = jax.tree.map(
        lambda new, old: jnp.where(sound, new, old),
        (trainable, opt_state),
        (state.trainable, state.opt_state),
    )
    one = jnp.ones(())
    terms = {**terms, "grad_norm": (norm, one), "skipped": (1.0 - sound, one)} | _fill(batch)
    return state.replace(step=state.step + 1, trainable=trainable, opt_state=opt_state), terms


def _fill(batch: dict[str, Array]) -> Terms:
    """{stream}_fill: (tokens, positions) of each stream of a batch."""
    return {
        f"{stream}_fill": (jnp.sum(segments > 0).astype(jnp.float32), jnp.float32(segments.size))
        for stream in STREAMS
        if (segments := batch.get(f"{stream}_segments")) is not None
    }


def fit(
    stage: StageFolder,
    title: str,
    config: Training,
    *,
    objective: Objective,
    trainable: nnx.State,
    frozen: Any,
    rows: Callable[[], Any],
    mesh: jax.sharding.Mesh,
    seed: int,
    console: Console,
    watch: Watch = UNWATCHED,
    add: Callable[[], Callable[[Batch], Batch]] | None = None,
    flops: Callable[[Any], Flops] | None = None,
    dev: Callable[[], Data] | None = None,
) -> nnx.State:
    """Train one stage to its last step, going on where an earlier start stopped, and return the
    weights that `config.chosen` says.

    rows: makes the random-access source of packed rows (`data.packing`); add: then makes what gives
    a batch what it has beside. flops: of a step, given those rows; where it is there, and the
    device is one whose speed is known, model and hardware FLOPs utilisation are logged (padding
    counts in the latter alone). dev: makes the development data, if the config evaluates on any.
    Where the stage was trained before, its weights are read back; of no steps, they are kept as
    they are. Raises Interrupted after saving
    when the process, or any of several, is asked to stop, FloatingPointError after ten skipped
    steps in a row.
    """
    goodput = Goodput(stage.path / FILE)
    # A copy: the step gives its buffers away, and the caller may hold them as someone's weights.
    trainable = sharding.place(jax.tree.map(jnp.copy, trainable), mesh)
    params_folder = stage.path / "params"
    if distributed.by_first(lambda: has_params(params_folder)):
        return load_params(params_folder, trainable)
    if not config.steps:
        save_params(params_folder, trainable)
        return trainable
    frozen = sharding.place(frozen, mesh)
    optimizer = make_optimizer(config)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        opt_state=optimizer.init(trainable),
        rng=jax.random.key(seed),
    )
    state = sharding.place(state, mesh)
    goodput.to("packing")
    source = rows()
    goodput.to("setup")
    sizes = _sizes(state, frozen)
    keep_for(sum(sizes.values()))
    stage.notes |= {"rows": len(source), "bytes": sizes}
    if isinstance(source, Rows):
        stage.notes["packing"] = source.notes()
    mine = sharding.process_rows(config.batch_rows, mesh)
    iterator = batches(
        source,
        batch_rows=config.batch_rows,
        seed=seed,
        mine=mine,
        workers=config.workers,
        add=None if add is None else add(),
    )
    position = iterator.get_state()
    if distributed.by_first(lambda: position) != position:
        raise ValueError(
            f"the rows of {title} are not those of process 0; texts, labels and tokenizers must be"
            " the same on every machine."
        )
    one_step = functools.partial(
        train_step, objective=objective, optimizer=optimizer, accumulation=config.accumulation
    )
    step_fn = jax.jit(
        sharding.on(mesh, one_step),
        donate_argnums=0,
        out_shardings=(sharding.shardings(state, mesh), None),
    )
    choice = Choice(config, state.trainable, mesh)
    development = None
    if config.evaluate_every:
        if dev is None:
            raise ValueError(f"{title} has no development data; its evaluate_every must be 0.")
        development = Development(dev(), config, objective, mesh)
    frozen_hash = tree_hash(frozen)
    with Checkpointer(
        stage.checkpoints,
        keep_last=config.keep_last,
        keep_every=config.keep_every,
        warn=console.warn,
    ) as checkpointer:
        goodput.to("restore")
        restored = checkpointer.restore(choice.with_kept(state), iterator, frozen_hash=frozen_hash)
        goodput.to("setup")
        step = 0
        if restored is not None:
            saved, step = restored
            state = choice.restored(saved)
            console.print(f"going on from step {step} of {config.steps}")
        used = None if flops is None else flops(source)
        log = _Log(stage, title, config, step, console, watch.sinks(stage.path, step), used)
        profiler = watch.profiler(stage.path)
        ballot = distributed.Ballot()
        kind = "compile"  # is what the first call of a jitted function waits for
        with (
            graceful_stop() as stop,
            log,
            contextlib.closing(iterator),
            contextlib.closing(profiler),
        ):
            while step < config.steps and not choice.stops:
                goodput.to("input")
                batch = sharding.place_batch(next(iterator), mesh, config.batch_rows)
                if log.is_device_busy():
                    goodput.count_as("steps")
                goodput.to(kind)
                profiler.before(step + 1)
                began = time.monotonic()
                state, terms = step_fn(state, frozen, batch)
                goodput.to(kind := "steps")
                step += 1
                profiler.after(step, terms)
                log.add(step, terms, began, batch.get("example"))
                last = step == config.steps
                if development and (last or step % config.evaluate_every == 0):
                    log.wait()
                    goodput.to("evaluation")
                    found = development(state.trainable, frozen)
                    choice.evaluated(step, found, state.trainable)
                    log.add_evaluation(found)
                    last = last or choice.stops
                due = last or step % config.checkpoint_every == 0
                if due:
                    choice.at_checkpoint(state.trainable)
                asked = ballot(stop.signum if stop.requested else 0)
                if asked or due:
                    log.flush(sync=True)
                    goodput.to("save")
                    saved = choice.with_kept(state)
                    checkpointer.save(step, saved, iterator, frozen_hash=frozen_hash)
                    goodput.write()
                    log.add_to_next(goodput=goodput.share, **log.percentiles("seconds_"))
                if asked and not last:
                    distributed.after_first(checkpointer.wait)
                    goodput.write()
                    stop.signum = asked
                    raise Interrupted(f"{title}, step {step} of {config.steps}; saved.")
    if choice.stops:
        console.print(
            f"stopped at step {step} of {config.steps}: none of {choice.since} evaluations in a row"
            " was the best so far"
        )
    weights = choice.weights(state.trainable)
    goodput.to("save")
    save_params(params_folder, weights)
    goodput.write()
    stage.notes |= choice.notes() | {
        "goodput": round(goodput.share, 4),
        "step_seconds": log.percentiles(),
    }
    if distributed.is_first():
        stage.notes["skipped"] = skipped = skipped_steps(stage, step)
        if skipped:
            console.warn(
                f"{skipped} of {step} steps were skipped, as their gradients were not"
                " finite or their batches empty."
            )
    return weights


def skipped_steps(stage: StageFolder, last: int) -> int:
    """How many of the stage's steps up to `last` were skipped, in all starts."""
    if not stage.metrics.exists():
        return 0
    frame = read_metrics(stage.metrics)
    return int(np.sum(frame.get("skipped", 0) * (frame["step"] <= last)))


def _sizes(state: TrainState, frozen: Any) -> dict[str, int]:
    """Bytes of what a stage holds, over all devices together."""
    trees = {"frozen": frozen, "trained": state.trainable, "optimizer": state.opt_state}
    return {
        name: sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for name, tree in trees.items()
    }


class _Log:
    """Metrics of step t, read after step t + 1 was dispatched, so that the device never waits. Of
    several processes the first writes them down."""

    _MOST_SKIPPED = 10  # in a row

    def __init__(
        self,
        stage: StageFolder,
        title: str,
        config: Training,
        step: int,
        console: Console,
        sinks: Sequence[Sink],
        flops: Flops | None,
    ):
        self._writer: MetricsWriter | None = None
        if distributed.is_first():
            self._writer = MetricsWriter(stage.metrics)
            self._writer.truncate_after(step)
        self._sinks = sinks
        self._rates = np.asarray(learning_rate(config)(jnp.arange(config.steps)))
        # A skipped step is none for the schedule.
        self._updates = step - skipped_steps(stage, step) if distributed.is_first() else step
        self._utilisation = _utilisation(flops)
        self._progress = console.progress(config.steps, title, done=step)
        self._pending: tuple[int, Terms, float] | None = None  # and when its dispatch began
        self._ended: float | None = None  # when the step before did; None: there was none
        self._waited: float | None = None  # when the pending one did, if that is known
        self._seconds: list[float] = []
        self._beside: dict[str, float] = {}
        self._evaluation: dict[str, float] = {}  # the last one
        self._skipped_in_a_row = 0
        self._examples: Array | None = None  # of the pending step

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *exception: Any) -> None:
        with contextlib.ExitStack() as closing:  # each, though another cannot write its last lines
            for part in (*self._sinks, self._writer, self._progress):
                if part is not None:
                    closing.callback(part.close)

    def is_device_busy(self) -> bool:
        """Whether the step dispatched last is still being computed."""
        if self._pending is None:
            return False
        loss: Any = self._pending[1]["loss"][0]
        return not loss.is_ready()

    def percentiles(self, prefix: str = "") -> dict[str, float]:
        """Of the seconds that a step of this start took."""
        return {f"{prefix}{name}": value for name, value in percentiles(self._seconds).items()}

    def add_to_next(self, **values: float) -> None:
        """Have these stand among the metrics of the next step that is written down."""
        self._beside |= values

    def add_evaluation(self, found: Mapping[str, float]) -> None:
        """Have these stand among the metrics of the pending step, as those of development data."""
        self._evaluation = {f"dev_{name}": value for name, value in found.items()}
        self.add_to_next(**self._evaluation)

    def wait(self) -> None:
        """Wait for the pending step: what happens next takes none of its time."""
        if self._pending is not None:
            jax.block_until_ready(self._pending[1])
            self._waited = time.monotonic()

    def add(self, step: int, terms: Terms, began: float, examples_BN: Array | None) -> None:
        """Take in the metrics of a step just dispatched; write down those of the one before.

        began: when its dispatch did, which on CPUs may take as long as the step. examples_BN: the
        texts in its batch, as `data.packing` numbers them.
        """
        self.flush()
        self._pending = (step, terms, began)
        self._examples = examples_BN

    def flush(self, *, sync: bool = False) -> None:
        """Write down the metrics that are still on the device; with `sync` where they are kept,
        which object stores are not asked for at each step."""
        if self._pending is not None:
            self._write(*self._pending)
        if sync and self._writer is not None:
            for part in (self._writer, *self._sinks):
                part.sync()

    def _write(self, step: int, terms: Terms, began: float) -> None:
        self._pending = None
        sums = jax.device_get(terms)
        values = {
            name: float(total) / float(count) if count else float("nan")
            for name, (total, count) in sums.items()
        }
        values["lr"] = float(self._rates[self._updates])
        self._updates += not values["skipped"]
        values |= self._speed(sums, began) | self._beside
        self._beside = {}
        if self._writer is not None:
            self._writer.write(step, values)
        for sink in self._sinks:
            sink.write(step, values)
        seen = self._evaluation | values
        shown = {name: seen[name] for name in _SHOWN if name in seen}
        self._progress.update(step, **shown)
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if values["skipped"] else 0
        if self._skipped_in_a_row == self._MOST_SKIPPED:
            raise FloatingPointError(
                f"{self._skipped_in_a_row} steps in a row were skipped, as their gradients are not "
                f"finite or their batches empty, the last of them step {step}"
                f"{_texts_of(self._examples)}."
            )

    def _speed(self, sums: Terms, began: float) -> dict[str, float]:
        """Seconds and rates of the step that has just ended; of a start's first, which compiles,
        none."""
        before, self._ended = self._ended, self._waited or time.monotonic()
        self._waited = None
        if before is None:
            return {}
        seconds = self._ended - max(began, before)
        self._seconds.append(seconds)
        tokens = {
            stream: float(sums[f"{stream}_fill"][0])
            for stream in STREAMS
            if f"{stream}_fill" in sums
        }
        return (
            {"seconds": seconds}
            | {f"{stream}_tokens_per_second": n / seconds for stream, n in tokens.items()}
            | {name: least / seconds for name, least in self._utilisation.items()}
        )


def _texts_of(examples_BN: Array | None) -> str:
    """Which texts a batch holds, for a sentence; of several processes, what this one holds."""
    if examples_BN is None:
        return ""
    parts = [np.asarray(shard.data).reshape(-1) for shard in examples_BN.addressable_shards]
    places = np.unique(np.concatenate(parts))
    places = places[places > 0] - 1
    listed = ", ".join(map(str, places[:20])) + (", …" if len(places) > 20 else "")
    return f", with the texts {listed} (counted from 0, as they were packed)"


def _utilisation(flops: Flops | None) -> dict[str, float]:
    """Seconds that a step would take if the devices did nothing but its FLOPs: those that the
    mathematics asks for (mfu), those that are run (hfu). Nothing where their speed is unknown."""
    chip = chip_of(jax.devices()[0].device_kind)
    if flops is None or chip is None:
        return {}
    speed = jax.device_count() * chip.tflops * 1e12
    return {"mfu": flops.model_total / speed, "hfu": flops.hardware_total / speed}
