"""What a process holds while a checkpoint streams in and out, beside the arrays themselves.

    python benchmarks/load_memory.py

Writes random weights of the size of Llama 3.2 1B (2.5 GB of bfloat16 in three files) to a temporary
folder, reads and writes them in a fresh process for each case, and leaves a dated Markdown file
beside this one. "Above" is the most resident memory (VmHWM) minus what was resident before, minus
the bytes of the arrays that stay: on CPU these are host memory too.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pandas as pd
from dated import page, table
from dated import write as write_page
from sides import resident

COMMAND = "python benchmarks/load_memory.py"
PACKAGES = ("jax", "flax", "numpy", "ml_dtypes", "fsspec")
SIZES: dict[str, Any] = {
    "vocab_size": 128_256,
    "width": 2048,
    "num_layers": 16,
    "num_heads": 32,
    "num_kv_heads": 8,
    "head_width": 64,
    "ffn_width": 8192,
    "tie_embeddings": True,
}
MESHES = {"": None, "fsdp 4 × tensor 2": {"fsdp": 4, "tensor": 2}}
# (on disk, in memory, devices)
CASES = [
    ("bfloat16", "bfloat16", ""),
    ("bfloat16", "float32", ""),
    ("bfloat16", "bfloat16", "fsdp 4 × tensor 2"),
    ("float32", "bfloat16", ""),
]


def forget_peak() -> int:
    """Lets VmHWM start again from what is resident now, and returns that."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def write(folder: Path, dtype: str) -> None:
    """The checkpoint, of numbers that differ from tensor to tensor."""
    import jax
    from flax import nnx

    from mtllm_jax.hf.folder import OutTensor, write_folder
    from mtllm_jax.hf.llama import config_to_hf, key_table
    from mtllm_jax.models.llama import Llama, LlamaConfig

    config = LlamaConfig(**SIZES)
    abstract = nnx.eval_shape(lambda: Llama(config, nnx.Rngs(jax.random.key(0))))
    shapes = {
        ".".join(map(str, keys)): value.shape
        for keys, value in nnx.to_flat_state(nnx.state(abstract))
    }
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    tensors = []
    for path, pattern in key_table(config).items():
        stacked = "{layer}" in pattern
        shape = shapes[path][1:] if stacked else shapes[path]
        shape = shape[::-1] if path.endswith("kernel") else shape
        for layer in range(config.num_layers if stacked else 1):

            def read(shape: tuple = shape, seed: int = len(tensors)) -> np.ndarray:
                rng = np.random.default_rng(seed)
                return rng.standard_normal(shape, np.float32).astype(kind)

            tensors.append(OutTensor(pattern.replace("{layer}", str(layer)), shape, kind, read))
    write_folder(folder, config_to_hf(config), tensors, max_shard_bytes=10**9)


def measure(stored: Path, out: Path, dtype: str, sizes: dict[str, int] | None) -> dict:
    """Loads and exports in this process; figures in GB and seconds."""
    import jax

    from mtllm_jax import config, sharding
    from mtllm_jax.hf.llama import load_llama, save_llama

    mesh = None if sizes is None else sharding.make_mesh(config.Mesh(**sizes))
    jax.block_until_ready(jax.numpy.zeros(8) + 1)  # what JAX itself takes at its first use
    figures: dict[str, float] = {}
    before, start = forget_peak(), time.perf_counter()
    model = load_llama(stored, dtype, mesh=mesh)
    arrays = jax.block_until_ready(jax.tree.leaves(model))
    figures["arrays"] = held = sum(array.nbytes for array in arrays)
    figures["largest"] = model.embedding[...].nbytes
    figures["load, above"] = resident("VmHWM") - before - held
    figures["load, s"] = time.perf_counter() - start

    forget_peak()
    start = time.perf_counter()
    save_llama(model, out)
    figures["export, above"] = resident("VmHWM") - before - held
    figures["export, s"] = time.perf_counter() - start
    return {name: x if name.endswith(" s") else x / 1e9 for name, x in figures.items()}


def in_a_process_of_its_own(*arguments: str, devices: int = 1) -> str:
    """What this script, called with `arguments`, prints last."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip().splitlines()[-1] if done.stdout else ""


def main() -> None:
    """Without flags: all cases, then the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.write:
        write(Path(flags.write[0]), flags.write[1])
        return
    if flags.measure:
        stored, out, dtype, devices = flags.measure
        print(json.dumps(measure(Path(stored), Path(out), dtype, MESHES[devices])))
        return

    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for i, (stored, dtype, devices) in enumerate(CASES):
            folder, out = Path(scratch) / stored, Path(scratch) / f"out{i}"
            if not folder.exists():
                in_a_process_of_its_own("--write", str(folder), stored)
            arguments = ("--measure", str(folder), str(out), dtype, devices)
            told = in_a_process_of_its_own(*arguments, devices=8 if devices else 1)
            rows.append(
                {"on disk": stored, "in memory": dtype, "mesh": devices or "one device"}
                | {name: f"{x:.2f}" for name, x in json.loads(told).items()}
            )
            for path in (*out.iterdir(), *(folder.iterdir() if i == len(CASES) - 1 else ())):
                path.unlink()
            print(rows[-1], flush=True)
            figures = json.loads(told)
            most = max(figures["load, above"], figures["export, above"])
            if most >= figures["largest"] + 1:
                sys.exit(f"{most:.2f} GB above the arrays is too much")

    body = f"""
Random weights of the size of Llama 3.2 1B, tied, in files of up to 1 GB; read from the page cache.
"Above" is the most resident memory (VmHWM), minus what was resident before the load, minus the
arrays that stay, which on CPU are host memory. The aim is to stay under the largest tensor + 1 GB.
GB are 10⁹ bytes; "largest" is the largest tensor, as it is in memory.

{table(pd.DataFrame(rows))}
"""
    title = "Memory while a checkpoint streams in and out"
    write_page("load-memory", page(title, COMMAND, PACKAGES, body))


if __name__ == "__main__":
    main()
