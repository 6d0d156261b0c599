"""Checkpoints in and out where no process holds the whole model."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from toy_model import D, F, L, random_tensors, saved

from mtllm_jax.hf.tensors import Tensors
from mtllm_jax.models.quantised import quantised

SCRIPT = Path(__file__).parents[1] / "one_of_two_processes.py"


def run_two(folder, out, fsdp, tensor):
    """The spans that each of two processes read."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    processes = []
    for i in range(2):
        arguments = (port, i, folder, out, fsdp, tensor)
        command = [sys.executable, str(SCRIPT), *map(str, arguments)]
        pipe = subprocess.PIPE
        processes.append(
            subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)
        )
    told = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    return [json.loads(out.splitlines()[-1]) for out, _ in told]


def bytes_of(opened, name, spans):
    """How many of a tensor's bytes were read."""
    entry = opened._entries[name]
    return sum(
        max(0, min(end, entry.end) - max(begin, entry.begin))
        for file, begin, end in spans
        if file == entry.file
    )


@pytest.mark.slow
@pytest.mark.parametrize(("fsdp", "tensor"), [(4, 2), (8, 1)])
def test_each_reads_its_own_rows_and_the_first_writes(fsdp, tensor, tmp_path):
    tensors = random_tensors(np.float32)
    saved(tmp_path, tensors, num_files=2)
    spans = run_two(tmp_path, tmp_path / "out", fsdp, tensor)

    opened = Tensors(tmp_path)
    for layer in range(L):
        # torch's rows of `down` are cut over fsdp, and so over the processes; those of `up` are not
        for process in range(2):
            name = f"model.layers.{layer}"
            assert bytes_of(opened, f"{name}.down.weight", spans[process]) == D * F * 4 // 2
            assert bytes_of(opened, f"{name}.up.weight", spans[process]) == D * F * 4

    for written in (tmp_path / "out", tmp_path / "out-merged"):
        again = Tensors(written)
        assert sorted(again.keys()) == sorted(tensors)
        for name, array in tensors.items():
            wanted = array.astype(ml_dtypes.bfloat16)
            np.testing.assert_array_equal(again.read(name), wanted, strict=True)
    with np.load(tmp_path / "out-int8.npz") as found:
        for name in ("up", "down"):
            layers = [tensors[f"model.layers.{layer}.{name}.weight"].T for layer in range(L)]
            for suffix, wanted in zip(("", "_scale"), quantised(np.stack(layers)), strict=True):
                np.testing.assert_array_equal(found[f"layers.{name}.kernel{suffix}"], wanted)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert not list(tmp_path.glob(".*"))
