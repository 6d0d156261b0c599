"""What chips can do, by their makers' data sheets, and which of them a machine holds.

GB are 10⁹ bytes; FLOP/s are those of dense bfloat16 products. Read in November 2026:
v5e, v6e, v5p: docs.cloud.google.com/tpu/docs/v5e, v6e, v5p. A100 (80 GB), H100, H200: NVIDIA's
data sheets of the SXM modules. L40S: NVIDIA's data sheet. RTX 4090: NVIDIA's white paper of the Ada
architecture. The last two are joined by PCIe 4.0 with 16 lanes.
"""

import dataclasses
import math
import re


@dataclasses.dataclass(frozen=True)
class Chip:
    """memory_gb is what a program may use of it. Bandwidths in GB/s: of memory, and one way of one
    link, of which a TPU has `links` and a GPU one, to a switch."""

    name: str
    platform: str
    tflops: float
    memory_gb: float
    memory_bandwidth: float
    links: int
    link_bandwidth: float


# Usable memory: of TPUs what the compiler of libtpu 0.0.42 grants, in GiB of 1024³ bytes; of GPUs
# 92 %, which leaves room for CUDA, its libraries and what lies badly [ours].
_GIB = 1024**3 / 1e9
CHIPS = {
    "v5e": Chip("TPU v5e", "tpu", 197, 15.75 * _GIB, 819, 4, 50),
    "v6e": Chip("TPU v6e", "tpu", 918, 31.25 * _GIB, 1600, 4, 100),
    "v5p": Chip("TPU v5p", "tpu", 459, 95.74 * _GIB, 2765, 6, 100),
    "a100": Chip("A100", "gpu", 312, 0.92 * 80, 2039, 1, 300),
    "h100": Chip("H100", "gpu", 989, 0.92 * 80, 3350, 1, 450),
    "h200": Chip("H200", "gpu", 989, 0.92 * 141, 4800, 1, 450),
    "l40s": Chip("L40S", "gpu", 362, 0.92 * 48, 864, 1, 32),
    "rtx4090": Chip("RTX 4090", "gpu", 165, 0.92 * 24, 1008, 1, 32),
}
# One GPU of so many GB.
GPUS = {24: "rtx4090", 48: "l40s", 80: "h100", 141: "h200"}

# What jax calls them (device_kind).
_KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA L40S": "l40s",
    "NVIDIA GeForce RTX 4090": "rtx4090",
}

# Along a dim of so many chips a TPU's links close to a ring.
_RING = {"v5e": 16, "v6e": 16, "v5p": 4}


@dataclasses.dataclass(frozen=True)
class Machine:
    """Chips of one kind. network: GB/s that a chip can receive from all its neighbours at once, at
    the place in the machine that has the fewest; 0 for a single chip."""

    name: str
    chip: Chip
    num_chips: int
    network: float


def chip_of(device_kind: str) -> Chip | None:
    """The chip behind a device's `device_kind`; None for one that is not in the table."""
    name = _KINDS.get(device_kind)
    return None if name is None else CHIPS[name]


def one_gpu(gigabytes: int) -> Machine:
    """The machine behind --gpu."""
    if gigabytes not in GPUS:
        raise ValueError(
            f"--gpu is {gigabytes}; it must be one of {', '.join(map(str, GPUS))} (GB); of other"
            " GPUs there is --topology, as in a100:1."
        )
    chip = CHIPS[GPUS[gigabytes]]
    return Machine(f"one {chip.name} of {gigabytes} GB", chip, 1, 0.0)


def topology(name: str) -> Machine:
    """The machine behind --topology: v5e:4x4, v5p:4x4x4, a100:8, h100:8."""
    match = re.fullmatch(r"(?P<kind>\w+):(?P<dims>\d+(x\d+)*)", name)
    if match is None or match["kind"] not in CHIPS:
        raise ValueError(
            f"--topology is {name!r}; it must be one of {', '.join(CHIPS)} and its chips, as in "
            "v5e:4x4, v5p:4x4x4 or a100:8."
        )
    kind, chip = match["kind"], CHIPS[match["kind"]]
    dims = [int(size) for size in match["dims"].split("x")]
    wanted = chip.links // 2 if chip.platform == "tpu" else 1
    if len(dims) != wanted or min(dims) < 1:
        raise ValueError(
            f"--topology is {name!r}; {kind} has {wanted} positive sizes, joined by x."
        )
    if chip.platform == "gpu":
        return Machine(name, chip, dims[0], chip.link_bandwidth if dims[0] > 1 else 0.0)
    # A ring gives two links along its dim; a line gives its ends one.
    links = sum(2 if size % _RING[kind] == 0 else 1 for size in dims if size > 1)
    return Machine(name, chip, math.prod(dims), links * chip.link_bandwidth)
