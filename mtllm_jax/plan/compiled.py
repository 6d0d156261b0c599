"""The real step, compiled for TPUs that nobody here has.

It takes libtpu, which the extra `plan` brings, and some minutes for models of billions of weights.
"""

import dataclasses
import importlib.util
import os
import re
import time
from typing import Any

import jax
from jax.experimental import topologies

from mtllm_jax import sharding
from mtllm_jax.chips import Machine
from mtllm_jax.plan import abstract, hlo


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of the step on one chip. working: the most bytes that live at once
    beside the arguments; traffic: bytes received in a step, by kind of collective."""

    working: float
    traffic: dict[str, float]
    collectives: int
    seconds: float  # that it took to compile


@dataclasses.dataclass(frozen=True)
class TooLarge:
    """The compiler found no way to fit the step; `said` is its reason, `needed` the bytes of
    activations that it names, 0 where it names none."""

    said: str
    needed: float
    seconds: float


def is_there() -> bool:
    """Whether there is a compiler for TPUs."""
    return importlib.util.find_spec("libtpu") is not None


def compile_for(step: abstract.Step[Any], machine: Machine) -> Compiled | TooLarge:
    """Compile the step for a TPU machine. ValueError for a topology that TPUs do not come in."""
    mesh = sharding.make_mesh(step.config.mesh, _devices(machine))
    lowered = step.lower(mesh)
    start = time.monotonic()
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = _reason(str(error))
        return TooLarge(said, _needed(said), time.monotonic() - start)
    sizes, text = program.memory_analysis(), program.as_text()
    assert sizes is not None and text is not None  # both are there for TPUs
    found = hlo.collectives(text)
    return Compiled(
        working=sizes.peak_memory_in_bytes - sizes.argument_size_in_bytes,
        traffic=hlo.by_kind(found),
        collectives=len(found),
        seconds=time.monotonic() - start,
    )


def _devices(machine: Machine) -> list[jax.Device]:
    # For libtpu to look for no TPU here, and for a second process that plans.
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(name, value)
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=machine.name)
    except jax.errors.JaxRuntimeError as error:
        said = str(error).partition(": ")[2] or str(error)
        raise ValueError(f"--topology is {machine.name!r}, which libtpu refuses: {said}.") from None
    return list(description.devices)


def _needed(said: str) -> float:
    """Bytes of "HLO temporaries (22.38G)"."""
    match = re.search(r"temporaries \((?P<size>[\d.]+)G\)", said)
    return float(match["size"]) * 1024**3 if match else 0.0


def _reason(said: str) -> str:
    """The compiler's sentence about memory, out of pages about what takes it."""
    match = re.search(r"(Ran out of memory|.*exceed)[^\n]*", said)
    return match[0].strip() if match else said.splitlines()[0]
