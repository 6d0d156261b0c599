"""GFLOP/s of bare float32 products, of the sizes that rows of the CPU's speed table have.

    python benchmarks/products.py --side=ours
    python benchmarks/products.py --side=peer

Each is timed alone, again and again for a second; printed is the median. A row has more to do, and
lays its operands its own way.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

# Row → rows, inputs and outputs of its products with weights.
SIZES = {
    "train_grouped": ((1920, 768, 768), (1920, 768, 2048), (1920, 2048, 768), (1920, 512, 2048)),
    "embed": ((1280, 384, 384), (1280, 384, 1536), (1280, 1536, 384)),
    "translate": ((320, 512, 512), (320, 512, 2048), (320, 2048, 512), (320, 512, 32_000)),
    "sample": ((32, 576, 576), (32, 576, 1536), (32, 1536, 576), (32, 576, 49_152)),
}


def ours(x: np.ndarray, weight: np.ndarray) -> Callable[[], Any]:
    """By XLA."""
    import jax
    import jax.numpy as jnp

    product, arrays = jax.jit(jnp.matmul), (jnp.asarray(x), jnp.asarray(weight))
    return lambda: product(*arrays).block_until_ready()


def peer(x: np.ndarray, weight: np.ndarray) -> Callable[[], Any]:
    """By torch, which keeps weights the other way round."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    arrays = torch.tensor(x), torch.tensor(weight.T.copy())
    return lambda: torch.nn.functional.linear(*arrays)


def rate(run: Callable[[], Any], size: tuple[int, int, int]) -> float:
    """GFLOP/s, of a product that has been made before."""
    run()
    seconds: list[float] = []
    end = time.perf_counter() + 1
    while not seconds or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return 2 * float(np.prod(size)) / statistics.median(seconds) / 1e9


def main() -> None:
    """Print a line a row."""
    sides = {"ours": ours, "peer": peer}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", choices=tuple(sides), required=True)
    make, rng = sides[parser.parse_args().side], np.random.default_rng(0)
    for row, sizes in SIZES.items():
        told = []
        for size in sizes:
            num_rows, num_in, num_out = size
            x = rng.standard_normal((num_rows, num_in), np.float32)
            weight = rng.standard_normal((num_in, num_out), np.float32)
            told.append(f"{num_rows}×{num_in}×{num_out} {rate(make(x, weight), size):.0f}")
        print(f"{row}: {', '.join(told)}")


if __name__ == "__main__":
    main()
