"""What would fit, and what would be faster: batches, settings, meshes. All by arithmetic."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from mtllm_jax.chips import Machine
from mtllm_jax.config import Mesh
from mtllm_jax.plan import abstract
from mtllm_jax.plan.estimate import Estimate, Memory, estimate


@dataclasses.dataclass(frozen=True)
class Change:
    """Settings, by the flags that make them, and the bytes of a chip under them."""

    flags: str
    peak: float
    fits: bool


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to run the same step: mesh, remat, accumulation."""

    step: abstract.Step[Any]
    estimate: Estimate


def fits(memory: Memory, machine: Machine, scale: float = 1.0) -> bool:
    """scale: of what activations take to what the estimate says."""
    return peak(memory, scale) <= machine.chip.memory_gb * 1e9


def peak(memory: Memory, scale: float) -> float:
    """Bytes of a chip."""
    return memory.peak + (scale - 1.0) * memory.activations


def least_too_large(memory: Memory, machine: Machine) -> float:
    """The scale from which on a step does not fit."""
    lies = memory.peak - memory.activations
    return 1.001 * (machine.chip.memory_gb * 1e9 - lies) / memory.activations


def largest_batch(step: abstract.Step[Any], machine: Machine, scale: float = 1.0) -> int:
    """Rows of the largest step that fits, in as many micro-batches as now; 0 if none does."""
    mesh = step.mesh(machine)
    unit = mesh.shape["data"] * mesh.shape["fsdp"] * step.training.accumulation

    def is_small(units: int) -> bool:
        config = step.with_training(step.config, batch_rows=units * unit)
        return fits(estimate(step.under(config), machine).memory, machine, scale)

    most = 1
    while is_small(most) and most < 2**20:
        most *= 2
    least = most // 2
    while most - least > 1:  # least fits, most does not
        middle = (least + most) // 2
        least, most = (middle, most) if is_small(middle) else (least, middle)
    return least * unit


def changes(step: abstract.Step[Any], machine: Machine, scale: float = 1.0) -> list[Change]:
    """Settings under which the step takes less memory: those that let it fit first, then those
    that save most. Where none lets it alone, all of them together are the last."""
    now = peak(estimate(step, machine).memory, scale)

    def change(flags: str, config: Any) -> Change:
        other = estimate(_step_of(step, config), machine).memory
        return Change(flags, peak(other, scale), fits(other, machine, scale))

    single = _smaller(step, machine)
    found = [change(flags, make(step.config)) for flags, make in single]
    more = [change(flags, config) for flags, config in _accumulated(step, machine)]
    # The fewest micro-batches that let it fit, or else the most there are.
    found += [c for c in more if c.fits][:1] or more[-1:]
    found = [change for change in found if change.peak < 0.98 * now]
    found.sort(key=lambda change: (not change.fits, change.peak))
    if len(found) > 1 and not found[0].fits:
        config = functools.reduce(lambda config, item: item[1](config), single, step.config)
        last = list(_accumulated(step.under(config), machine))[-1:]
        flags = " ".join(flags for flags, _ in [*single, *last])
        found.append(change(flags, last[0][1] if last else config))
    return found


def _smaller(step: abstract.Step[Any], machine: Machine) -> list[tuple[str, Callable[[Any], Any]]]:
    """Flags that save memory here, and what each does to a config."""
    config, sizes = step.config, step.mesh(machine).shape
    # Chips that hold the same weights share them instead.
    mesh = dataclasses.replace(config.mesh, data=1, fsdp=-1)
    mesh_flags = "--config.mesh.data=1 --config.mesh.fsdp=-1"
    for axis in ("tensor", "context"):
        if getattr(config.mesh, axis) == -1:
            mesh = dataclasses.replace(mesh, **{axis: sizes[axis]})
            mesh_flags += f" --config.mesh.{axis}={sizes[axis]}"

    def setting(**values: Any) -> Callable[[Any], Any]:
        return lambda config: dataclasses.replace(config, **values)

    choices = [(mesh_flags, setting(mesh=mesh))] if sizes["data"] > 1 else []
    for name, value in step.savings().items():
        choices.append((f"--config.{name}={value}", setting(**{name: value})))
    return choices


def _accumulated(step: abstract.Step[Any], machine: Machine) -> Iterator[tuple[str, Any]]:
    """More micro-batches than now, fewest first."""
    training, sizes = step.training, step.mesh(machine).shape
    for times in _divisors(training.batch_rows // (sizes["data"] * sizes["fsdp"])):
        if times > training.accumulation:
            flag = f"--config.{step.WHERE}.accumulation={times}"
            yield flag, step.with_training(step.config, accumulation=times)


def sweep(step: abstract.Step[Any], machine: Machine) -> list[Candidate]:
    """Every mesh and remat policy in which the step fits, each with the fewest micro-batches that
    let it; the fastest first, and of equally fast ones those with less to do besides."""
    found = []
    rows = step.training.batch_rows
    kv_heads = step.llm.num_kv_heads
    for data, fsdp, tensor in _factorisations(machine.num_chips):
        if rows % (data * fsdp) or kv_heads % tensor:
            continue
        for remat in ("none", "dots", "full"):
            mesh = Mesh(data=data, fsdp=fsdp, tensor=tensor)
            config = dataclasses.replace(step.config, mesh=mesh, remat=remat)
            for times in _divisors(rows // (data * fsdp)):
                candidate = step.under(step.with_training(config, accumulation=times))
                estimated = estimate(candidate, machine)
                if fits(estimated.memory, machine):
                    found.append(Candidate(candidate, estimated))
                    break

    def cost(candidate: Candidate) -> tuple[float, float]:
        seconds = candidate.estimate.seconds
        return seconds.roofline, sum(dataclasses.astuple(seconds))

    return sorted(found, key=cost)


def _step_of(step: abstract.Step[Any], config: Any) -> abstract.Step[Any]:
    same = (step.config.frozen_dtype, step.config.trained) == (config.frozen_dtype, config.trained)
    return step.under(config) if same else step.made_with(config)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _factorisations(number: int) -> Iterator[tuple[int, int, int]]:
    """All (a, b, c) with a · b · c = number."""
    for a, b in itertools.product(_divisors(number), repeat=2):
        if number % (a * b) == 0:
            yield a, b, number // (a * b)
