"""How a plan is shown, and the command behind launch/plan.py."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from mtllm_jax import chips, sharding
from mtllm_jax.config import MTLLM, SDRRL, naming
from mtllm_jax.metrics import Console, duration, number
from mtllm_jax.ops.attention import check_attention
from mtllm_jax.plan import abstract, compiled, search
from mtllm_jax.plan.adaptation import Adaptation
from mtllm_jax.plan.compiled import Compiled, TooLarge
from mtllm_jax.plan.plan import Plan, make_plan, numbers
from mtllm_jax.plan.tuning import Tuning

# What is planned of each recipe.
STEPS: dict[str, type[abstract.Step[Any]]] = {"mtllm": Adaptation, "sdrrl": Tuning}
_SHOWN = 10  # of a sweep's candidates, and
_SUGGESTED = 4  # of what would fit


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags of launch/plan.py."""

    topology: str | None
    gpu: int | None
    encoder: str
    llm: str
    texts: int
    analytic: bool
    sweep: bool
    json: str | None


def run(config: MTLLM | SDRRL, options: Options, console: Console) -> None:
    """Plan a recipe's step and print it. ValueError for what cannot be planned."""
    # Nothing is computed here, and a TPU or GPU that is there is left to others.
    jax.config.update("jax_platforms", "cpu")
    kind = STEPS[config.recipe]
    kind.check(config)
    machine = _machine(options)
    if options.texts < 1:
        raise ValueError(f"--texts is {options.texts}; it must be at least 1.")
    if kind.training_of(config).packing and options.texts == 1:
        console.warn("rows are packed, and --texts, how many texts a row holds, is taken to be 1.")
    out = None if options.json is None else Path(options.json)
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise ValueError(f"--json is {options.json}; it must be a file in a folder that is there.")
    by_compiler = machine.chip.platform == "tpu" and not options.analytic
    if by_compiler and not compiled.is_there():
        by_compiler = False
        console.warn("libtpu is absent, so all is by arithmetic; pip install -e '.[plan]' has it.")
    step = kind.of_names(config, options.encoder, options.llm, options.texts)
    swept = []
    if options.sweep:
        swept = search.sweep(step, machine)
        show_sweep(swept, machine, console)
        if swept:
            step = step.made_with(swept[0].step.config)
    _check(step, machine)
    if by_compiler:
        console.print(f"Compiling the step for {machine.name}; minutes, for large models.")
    plan = make_plan(step, machine, by_compiler=by_compiler)
    show(plan, console)
    if out is not None:
        values = numbers(plan) | ({"sweep": [_row(c) for c in swept]} if options.sweep else {})
        out.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _machine(options: Options) -> chips.Machine:
    if (options.topology is None) == (options.gpu is None):
        raise ValueError("one of --topology=v5e:4x4 and --gpu=24 is needed, and only one.")
    if options.gpu is not None:
        return chips.one_gpu(options.gpu)
    assert options.topology is not None
    return chips.topology(options.topology)


def _check(step: abstract.Step[Any], machine: chips.Machine) -> None:
    """Raise ValueError for what a run on the machine would refuse, or a plan leaves out."""
    config, training = step.config, step.training
    if config.mesh.slices != 1:
        raise ValueError(f"config.mesh.slices is {config.mesh.slices}; a plan is for one slice, 1.")
    with naming("attention"):
        check_attention(
            config.attention,
            machine.chip.platform,
            segments=training.packing,
            head_width=step.llm.head_width,
            dtype=config.compute_dtype,
            context=config.mesh.context,
        )
    mesh: Any = step.mesh(machine)
    rows = f"{step.WHERE}.batch_rows"
    sharding.check_rows(training.batch_rows, mesh, rows, training.accumulation)
    for side in ("source_length", "target_length"):
        sharding.check_length(getattr(training, side), mesh, f"{step.WHERE}.{side}")


def show(plan: Plan, console: Console) -> None:
    """The tables of a plan, what they come to, and what to change where it does not fit."""
    values, found, estimated = numbers(plan), plan.found, plan.estimate
    machine, step, seconds = plan.machine, plan.step, plan.seconds
    config, training = step.config, step.training
    axes = " × ".join(f"{axis} {n}" for axis, n in values["mesh"].items() if n > 1)
    console.print(
        f"{config.name} on {machine.name}, {machine.num_chips} × {machine.chip.name}", style="bold"
    )
    micro = f" in {training.accumulation} micro-batches" if training.accumulation > 1 else ""
    console.print(
        f"{step.TITLE}, a step of {training.batch_rows} rows of {step.told_rows()}{micro}; "
        f"remat {config.remat}" + (f"; mesh {axes}." if axes else ".")
    )
    sources = {"by arithmetic": (estimated.memory, estimated.traffic)}
    if isinstance(found, Compiled):
        sources = {"compiler": (plan.memory, plan.traffic), **sources}
    parts = [dataclasses.asdict(memory) | {"peak": memory.peak} for memory, _ in sources.values()]
    console.table(
        ["a chip's memory, GB", *sources],
        [[name, *(_gb(part[name]) for part in parts)] for name in parts[0]]
        + [["usable", *[""] * (len(sources) - 1), _gb(machine.chip.memory_gb * 1e9)]],
    )
    flops = estimated.flops
    console.table(
        ["FLOPs of a step", "model", "run"],
        [
            [
                name,
                *(
                    f"{of[name]:.3g}" if of.get(name) else ""
                    for of in (flops.model, flops.hardware)
                ),
            ]
            for name in flops.hardware
        ]
        + [["all", f"{flops.model_total:.4g}", f"{flops.hardware_total:.4g}"]],
    )
    if machine.num_chips > 1:
        kinds = dict.fromkeys(kind for _, traffic in sources.values() for kind in traffic)
        console.table(
            ["received by a chip in a step, GB", *sources],
            [
                [kind, *(_gb(traffic.get(kind, 0.0)) for _, traffic in sources.values())]
                for kind in kinds
            ],
        )
    console.table(
        ["a step's time at best", "s"],
        [[name, f"{value:.3f}"] for name, value in dataclasses.asdict(seconds).items()],
    )
    console.print(
        f"{seconds.roofline:.3f} s a step at best, bound by {seconds.bound}: "
        f"{number(values['tokens_per_second_per_chip'])} {step.TOKENS}/s/chip in full rows, "
        f"{100 * values['mfu_at_roofline']:.0f} % MFU; {number(values['chip_hours'])} chip-hours "
        f"for {training.steps} steps, which take {duration(training.steps * seconds.roofline)}."
    )
    console.print(step.told_beside(machine))
    if plan.largest_batch:
        console.print(f"The largest batch that fits has {plan.largest_batch} rows.")
    if isinstance(found, Compiled):
        console.print(f"Activations and traffic are the compiler's, in {duration(found.seconds)}.")
    else:
        console.print("All of this is by arithmetic, none of it a compiler's.")
    if not plan.fits:
        _suggest(plan, console)


def _suggest(plan: Plan, console: Console) -> None:
    usable, now = plan.machine.chip.memory_gb, plan.memory.peak / 1e9
    said = f" ({plan.found.said})" if isinstance(plan.found, TooLarge) else ""
    console.print(f"It does not fit: {now:.1f} GB of {usable:.1f} a chip{said}.", style="bold")
    for change in plan.changes[:_SUGGESTED]:
        peak = change.peak / 1e9
        what = "fits" if change.fits else "does not fit yet"
        console.print(f"  {change.flags}  saves {now - peak:.1f} GB, and {what}")
    if not any(change.fits for change in plan.changes):
        console.print("  more chips, or a smaller LLM")


def show_sweep(found: list[search.Candidate], machine: chips.Machine, console: Console) -> None:
    """The fastest ways to run the step, by arithmetic."""
    if not found:
        console.print(f"No mesh of {machine.name} fits the step, whatever remat and accumulation.")
        return
    rows = []
    for candidate in found[:_SHOWN]:
        row = _row(candidate)
        mesh = " × ".join(f"{axis} {row[axis]}" for axis in ("data", "fsdp", "tensor"))
        rows.append(
            [mesh, row["remat"], row["accumulation"], row["peak_gb"]]
            + [f"{row[name]:.3f}" for name in ("compute", "memory", "network")]
        )
    columns = ["mesh", "remat", "micro-batches", "GB", "compute, s", "memory, s", "network, s"]
    console.table(columns, rows, f"{len(found)} ways to run it fit; the fastest, by arithmetic")


def _row(candidate: search.Candidate) -> dict[str, object]:
    config, estimate = candidate.step.config, candidate.estimate
    mesh = {axis: getattr(config.mesh, axis) for axis in ("data", "fsdp", "tensor")}
    return mesh | {
        "remat": config.remat,
        "accumulation": candidate.step.training.accumulation,
        "peak_gb": round(estimate.memory.peak / 1e9, 2),
        **dataclasses.asdict(estimate.seconds),
    }


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}"
