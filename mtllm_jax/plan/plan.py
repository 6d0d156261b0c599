"""A plan: what a recipe's step costs on a machine, by the compiler where there is one.

Its numbers as a dict are what `--json` writes.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mtllm_jax.chips import Machine
from mtllm_jax.plan import abstract, compiled, search
from mtllm_jax.plan.compiled import Compiled, TooLarge
from mtllm_jax.plan.estimate import Estimate, Memory, Seconds, estimate, seconds_of


@dataclasses.dataclass(frozen=True)
class Plan:
    """estimate: by arithmetic; found: what the compiler says, None where it was not asked."""

    step: abstract.Step[Any]
    machine: Machine
    estimate: Estimate
    found: Compiled | TooLarge | None
    largest_batch: int
    changes: list[search.Change]

    @property
    def memory(self) -> Memory:
        """Of a chip; activations are the compiler's where it could tell."""
        if not isinstance(self.found, Compiled):
            return self.estimate.memory
        return dataclasses.replace(self.estimate.memory, activations=self.found.working)

    @property
    def traffic(self) -> dict[str, float]:
        """Bytes that a chip receives in a step, by kind of collective."""
        return self.found.traffic if isinstance(self.found, Compiled) else self.estimate.traffic

    @property
    def seconds(self) -> Seconds:
        """Of a step."""
        estimate = self.estimate
        return seconds_of(self.machine, estimate.flops, estimate.memory_traffic, self.traffic)

    @property
    def fits(self) -> bool:
        return not isinstance(self.found, TooLarge) and search.fits(self.memory, self.machine)


def make_plan(step: abstract.Step[Any], machine: Machine, *, by_compiler: bool) -> Plan:
    """by_compiler: compile the step too, which must be for TPUs."""
    estimated = estimate(step, machine)
    found = compiled.compile_for(step, machine) if by_compiler else None
    activations = estimated.memory.activations
    scale = 1.0
    if isinstance(found, Compiled):
        scale = found.working / activations
    elif isinstance(found, TooLarge):
        scale = max(search.least_too_large(estimated.memory, machine), found.needed / activations)
    plan = Plan(
        step,
        machine,
        estimated,
        found,
        largest_batch=search.largest_batch(step, machine, scale),
        changes=[],
    )
    if plan.fits:
        return plan
    return dataclasses.replace(plan, changes=search.changes(step, machine, scale))


def numbers(plan: Plan) -> dict[str, Any]:
    """Everything of a plan as plain values. GB are 10⁹ bytes; memory and traffic are one chip's."""
    step, machine, seconds = plan.step, plan.machine, plan.seconds
    config, training = step.config, step.training
    positions = training.batch_rows * step.learner.length
    chip_seconds = seconds.roofline * machine.num_chips
    flops = plan.estimate.flops
    result = {
        "recipe": config.name,
        "machine": machine.name,
        "chip": machine.chip.name,
        "chips": machine.num_chips,
        "mesh": dict(step.mesh(machine).shape),
        "source": "compiler" if isinstance(plan.found, Compiled) else "analytic",
        "fits": plan.fits,
        "batch_rows": training.batch_rows,
        "accumulation": training.accumulation,
        "source_length": training.source_length,
        "target_length": training.target_length,
        "steps": training.steps,
        "remat": config.remat,
        "hbm_gb_per_chip": round(plan.memory.peak / 1e9, 4),
        "hbm_gb_by_kind": _rounded(dataclasses.asdict(plan.memory)),
        "hbm_gb_usable": round(machine.chip.memory_gb, 4),
        "hbm_gb_per_chip_analytic": round(plan.estimate.memory.peak / 1e9, 4),
        "hbm_gb_by_kind_analytic": _rounded(dataclasses.asdict(plan.estimate.memory)),
        "flops_per_step": flops.hardware_total,
        "model_flops_per_step": flops.model_total,
        "flops_by_part": dict(flops.hardware),
        "collective_gb_per_chip": _rounded(plan.traffic),
        "collective_gb_per_chip_analytic": _rounded(plan.estimate.traffic),
        "step_seconds": dataclasses.asdict(seconds),
        "step_seconds_roofline": seconds.roofline,
        "bound_by": seconds.bound,
        "mfu_at_roofline": flops.model_total / (chip_seconds * machine.chip.tflops * 1e12),
        "tokens_per_second_per_chip": positions / chip_seconds,
        "chip_hours": training.steps * chip_seconds / 3600,
        **step.beside(machine),
        "largest_batch": plan.largest_batch,
        "suggestions": [
            {"flags": c.flags, "hbm_gb_per_chip": round(c.peak / 1e9, 3), "fits": c.fits}
            for c in plan.changes
        ],
    }
    if plan.found is not None:
        result["compile_seconds"] = round(plan.found.seconds, 1)
    if isinstance(plan.found, TooLarge):
        result["compiler_said"] = plan.found.said
    return result


def _rounded(sizes: Mapping[str, float]) -> dict[str, float]:
    """Bytes → GB."""
    return {name: round(size / 1e9, 4) for name, size in sizes.items()}
