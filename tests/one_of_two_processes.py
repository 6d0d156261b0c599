"""Loads a folder and writes it again, as one of two processes with four devices each.

    python one_of_two_processes.py PORT PROCESS FOLDER OUT FSDP TENSOR

Prints, as JSON, the (file, begin, end) of what this process read.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from toy_model import TABLE, abstract, mesh_of

from mtllm_jax import sharding
from mtllm_jax.hf import reading
from mtllm_jax.hf import tensors as tensors_module
from mtllm_jax.hf.files import Files
from mtllm_jax.hf.folder import Tensors, export_tensors, load_into, write_folder
from mtllm_jax.models import lora


def main(port: str, process: str, folder: str, out: str, fsdp: str, tensor: str) -> None:
    jax.distributed.initialize(f"localhost:{port}", 2, int(process))
    assert len(jax.devices()) == 8
    sharding.SMALLEST_SHARDED = 2
    reading.CHUNK = tensors_module.CHUNK = 100
    opened, spans, read = Tensors(folder), [], Files.read

    def spy(self, name, begin=0, end=None):
        spans.append((name, begin, end))
        return read(self, name, begin, end)

    Files.read = spy
    mesh = mesh_of(1, int(fsdp), int(tensor))
    loaded = load_into(abstract(), opened, TABLE, jnp.bfloat16, mesh=mesh)
    assert not loaded.layers.up.kernel[...].is_fully_addressable
    write_folder(out, {}, export_tensors(loaded, TABLE), max_shard_bytes=2000)

    rngs = nnx.Rngs(jax.random.key(0, impl="rbg"))
    lora.attach(loaded, rank=2, alpha=2, dropout=0.0, targets=("up",), rngs=rngs)
    write_folder(f"{out}-merged", {}, export_tensors(loaded, TABLE, merge_lora=True))
    Files.read = read
    int8 = load_into(abstract(), opened, TABLE, jnp.int8, mesh=mesh)
    flat = {".".join(map(str, keys)): x[...] for keys, x in nnx.to_flat_state(nnx.state(int8))}
    arrays = multihost_utils.process_allgather(
        {name: x for name, x in flat.items() if name.startswith("layers")}, tiled=True
    )
    if jax.process_index() == 0:
        np.savez(f"{out}-int8.npz", **{name: x.astype(np.float32) for name, x in arrays.items()})
    print(json.dumps(spans))


if __name__ == "__main__":
    main(*sys.argv[1:])
