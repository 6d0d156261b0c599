"""Models into and out of folders: every dtype, any mesh, a piece at a time, whole or not at all.

L layers, D width, F hidden width, V vocabulary, R LoRA rank.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections import Counter

import fsspec
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from toy_model import (
    SHAPES,
    TABLE,
    D,
    F,
    L,
    abstract,
    expected_parameters,
    mesh_of,
    parameters_of,
    random_model,
    random_tensors,
    saved,
)

from mtllm_jax import sharding
from mtllm_jax.hf import reading
from mtllm_jax.hf import tensors as tensors_module
from mtllm_jax.hf.files import Files
from mtllm_jax.hf.folder import (
    OutTensor,
    Tensors,
    export_tensors,
    load_into,
    new_folder,
    read_config,
    write_folder,
)
from mtllm_jax.models import lora

ON_DISK = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
CONFIG = {"model_type": "toy"}


@pytest.fixture
def cut_small(monkeypatch):
    """Arrays of a few numbers are cut over the mesh as large ones are."""
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 2)


@pytest.fixture(params=["together", "one by one", "in pieces"])
def steps(request, monkeypatch):
    """How much is read in one go: all layers of a parameter, one, or few rows of one.

    As where devices have a memory of their own; on the CPU layers are always read together.
    """
    monkeypatch.setattr(reading, "_is_on_host", lambda place: False)
    sizes = {"together": 2**20, "one by one": D * F, "in pieces": 5 * D}
    for where in (reading, tensors_module):
        monkeypatch.setattr(where, "CHUNK", sizes[request.param])


# ------------------------------------------------------------------ in


@pytest.mark.usefixtures("cut_small", "steps")
@pytest.mark.parametrize("sizes", [None, (1, 4, 2), (2, 2, 2), (1, 8, 1), (1, 1, 8), (8, 1, 1)])
def test_any_mesh_gives_the_same_numbers(sizes, tmp_path):
    tensors = random_tensors(np.float32)
    saved(tmp_path, tensors, num_files=3)
    mesh = mesh_of(*sizes) if sizes else None
    loaded = load_into(abstract(), Tensors(tmp_path), TABLE, jnp.bfloat16, mesh=mesh)
    for path, wanted in expected_parameters(tensors, ml_dtypes.bfloat16).items():
        np.testing.assert_array_equal(parameters_of(loaded)[path], wanted, strict=True)
    state = nnx.state(loaded)
    if mesh is None:
        assert all(x.devices() == {jax.devices()[0]} for x in jax.tree.leaves(state))
        return
    places = jax.tree.leaves(sharding.shardings(state, mesh))
    assert [x.sharding for x in jax.tree.leaves(state)] == places
    up = loaded.layers.up.kernel[...]
    assert up.addressable_shards[0].data.shape == (L, D // sizes[1], F // sizes[2])


@pytest.mark.usefixtures("steps")
@pytest.mark.parametrize("dtype", ON_DISK)
@pytest.mark.parametrize("stored", ON_DISK)
def test_any_dtype_to_any_other(stored, dtype, tmp_path):
    tensors = random_tensors(ON_DISK[stored])
    saved(tmp_path, tensors)
    loaded = parameters_of(load_into(abstract(), Tensors(tmp_path), TABLE, dtype))
    for path, wanted in expected_parameters(tensors, ON_DISK[dtype]).items():
        np.testing.assert_array_equal(loaded[path], wanted, strict=True)


@pytest.mark.usefixtures("cut_small", "steps")
@pytest.mark.parametrize("sizes", [(1, 4, 2), (2, 2, 2), (8, 1, 1)])
def test_each_byte_is_read_once(sizes, tmp_path, monkeypatch):
    tensors = random_tensors(np.float16)
    saved(tmp_path, tensors | {"other.weight": np.zeros((50, 50), np.float16)})
    opened = Tensors(tmp_path)
    spans = spied(monkeypatch)
    load_into(abstract(), opened, TABLE, mesh=mesh_of(*sizes), ignored=("other.*",))
    read = Counter(byte for _, begin, end in spans for byte in range(begin, end))
    assert set(read.values()) == {1}
    assert len(read) == sum(array.nbytes for array in tensors.values())


def spied(monkeypatch):
    """A list of (file, begin, end) of all that is read from now on."""
    spans, read = [], Files.read

    def spy(self, name, begin=0, end=None):
        spans.append((name, begin, end))
        return read(self, name, begin, end)

    monkeypatch.setattr(Files, "read", spy)
    return spans


def test_loaded_parameters_may_be_donated(tmp_path):
    """Whoever owns their memory: an update in place changes nothing else."""
    tensors = random_tensors(np.float32)
    saved(tmp_path, tensors)
    state = nnx.state(load_into(abstract(), Tensors(tmp_path), TABLE))
    doubled = jax.jit(lambda s: jax.tree.map(lambda x: 2 * x, s), donate_argnums=0)(state)
    again = parameters_of(load_into(abstract(), Tensors(tmp_path), TABLE))
    for path, wanted in expected_parameters(tensors, np.float32).items():
        np.testing.assert_array_equal(again[path], wanted)
    for (_, twice), wanted in zip(nnx.to_flat_state(doubled), again.values(), strict=True):
        np.testing.assert_array_equal(twice[...], 2 * wanted)


def test_on_the_cpu_parameters_are_read_straight_into_their_place(tmp_path, monkeypatch):
    """No copy is made: the arrays of all devices that hold the same lie at one address."""
    monkeypatch.setattr(tensors_module, "CHUNK", D * F)
    tensors = random_tensors(np.float32)
    saved(tmp_path, tensors)
    mesh = mesh_of(8, 1, 1)
    loaded = load_into(abstract(), Tensors(tmp_path), TABLE, mesh=mesh)
    for path, wanted in expected_parameters(tensors, np.float32).items():
        np.testing.assert_array_equal(parameters_of(loaded)[path], wanted)
    for _, value in nnx.to_flat_state(nnx.state(loaded)):
        shards = value[...].addressable_shards
        assert len({shard.data.unsafe_buffer_pointer() for shard in shards}) == 1


def test_a_reader_that_fails_is_heard(tmp_path):
    saved(tmp_path, random_tensors(np.float32))
    opened = Tensors(tmp_path)
    os.truncate(tmp_path / "model.safetensors", (tmp_path / "model.safetensors").stat().st_size - 1)
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated"):
        load_into(abstract(), opened, TABLE)


# ------------------------------------------------------------------ out


@pytest.mark.usefixtures("cut_small")
@pytest.mark.parametrize("sizes", [None, (1, 4, 2), (2, 2, 2)])
@pytest.mark.parametrize("max_bytes", [10**6, 3000])
def test_round_trip(sizes, max_bytes, tmp_path):
    mesh = mesh_of(*sizes) if sizes else None
    model = random_model(jnp.bfloat16, mesh)
    tensors = export_tensors(model, TABLE)
    assert {t.name: t.shape for t in tensors} == SHAPES
    write_folder(tmp_path / "out", CONFIG, tensors, max_shard_bytes=max_bytes)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) > 1) == (max_bytes == 3000)
    read = {name: a for file in files for name, a in load_file(file).items()}
    for path, wanted in expected_parameters(read, ml_dtypes.bfloat16).items():
        np.testing.assert_array_equal(parameters_of(model)[path], wanted, strict=True)
    loaded = load_into(abstract(), Tensors(tmp_path / "out"), TABLE, jnp.bfloat16, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(model))


def test_tensors_are_cast_on_the_way_out():
    model = random_model()
    for tensor, plain in zip(
        export_tensors(model, TABLE, dtype=jnp.bfloat16), export_tensors(model, TABLE), strict=True
    ):
        assert tensor.dtype == tensor.read().dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(tensor.read(), plain.read().astype(ml_dtypes.bfloat16))


def test_no_copies_stay_on_the_host():
    """An array remembers what was fetched of it; what is exported must not be remembered."""
    model = random_model(mesh=mesh_of(1, 4, 2))
    for tensor in export_tensors(model, TABLE):
        tensor.read()
    assert all(x._npy_value is None for x in jax.tree.leaves(nnx.state(model)))


def adapted(targets, dtype, mesh=None):
    """All parameters random, B too; scale 6 / 4."""
    model = random_model()
    rngs = nnx.Rngs(jax.random.key(1, impl="rbg"))
    lora.attach(model, rank=4, alpha=6.0, dropout=0.1, targets=targets, rngs=rngs)
    graph, state = nnx.split(model)
    rng = np.random.default_rng(2)
    state = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), dtype), state)
    return nnx.merge(graph, state if mesh is None else sharding.place(state, mesh))


@pytest.mark.usefixtures("cut_small")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("sizes", [None, (1, 4, 2)])
def test_adapters_are_merged_a_tensor_at_a_time(dtype, sizes):
    model = adapted(("up", "head"), dtype, mesh_of(*sizes) if sizes else None)
    exact = {path: np.asarray(x, np.float64) for path, x in parameters_of(model).items()}

    with pytest.raises(ValueError, match=r"without a Hugging Face name: head\.lora_a, head"):
        export_tensors(model, TABLE)
    tensors = {t.name: t for t in export_tensors(model, TABLE, merge_lora=True)}
    assert {name: t.shape for name, t in tensors.items()} == SHAPES
    read = {name: t.read() for name, t in tensors.items()}
    for path, merged in expected_parameters(read, np.float64).items():
        base = path.removesuffix(".kernel")
        if base in ("layers.up", "head"):
            update = exact[f"{base}.lora_a"] @ exact[f"{base}.lora_b"]
            wanted = exact[path] + 6.0 / 4 * update
            allowed = 1e-5 if dtype == jnp.float32 else 2.0**-8  # half of bfloat16's last bit
            np.testing.assert_allclose(merged, wanted, rtol=allowed, atol=1e-5)
        else:
            np.testing.assert_array_equal(merged, exact[path])
    assert all(t.dtype == dtype == read[name].dtype for name, t in tensors.items())
    for path, value in parameters_of(model).items():  # the model is as it was
        np.testing.assert_array_equal(np.asarray(value, np.float64), exact[path])


def test_merged_at_export_equals_merged_before():
    model = adapted(("all",), jnp.bfloat16)
    lazily = {t.name: t.read() for t in export_tensors(model, TABLE, merge_lora=True)}
    lora.merge(model)
    for tensor in export_tensors(model, TABLE):
        np.testing.assert_array_equal(lazily[tensor.name], tensor.read(), strict=True)


# ------------------------------------------------------------------ whole or not at all


def out(*names, read=lambda: np.ones((4, 4), np.float32)):
    return [OutTensor(name, (4, 4), np.dtype(np.float32), read) for name in names]


KILLED = """
    import os, signal, sys
    import numpy as np
    from mtllm_jax.hf.folder import OutTensor, write_folder

    def last():
        os.kill(os.getpid(), signal.SIGKILL)

    def tensor(name, read):
        return OutTensor(name, (4, 4), np.dtype(np.float32), read)

    whole = [tensor(str(i), lambda: np.ones((4, 4), np.float32)) for i in range(3)]
    write_folder(sys.argv[1], {"model_type": "toy"}, [*whole, tensor("last", last)],
                 max_shard_bytes=70, replace=len(sys.argv) > 2)
"""


def killed(*arguments):
    command = [sys.executable, "-c", textwrap.dedent(KILLED), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_killed_export_does_not_look_finished(tmp_path):
    target = tmp_path / "model"
    killed(target)
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(".model-partial-")
    assert len(list(leftover.glob("*.safetensors"))) == 4  # it was killed in the middle
    with pytest.raises(ValueError, match="is not a folder"):
        read_config(target, ["toy"])
    write_folder(target, CONFIG, out("a"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert Tensors(target).keys() == ["a"]

    killed(target, "replace")
    assert Tensors(target).keys() == ["a"]
    write_folder(target, CONFIG, out("b"), replace=True)
    assert Tensors(target).keys() == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_is_told_and_nothing_is_left(tmp_path):
    large = [
        OutTensor(name, (1000, 1000), np.dtype(np.float32), lambda: np.ones((1000, 1000), "f4"))
        for name in "abc"
    ]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9_000_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_folder(tmp_path / "new" / "model", CONFIG, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / "new").iterdir()) == []
    write_folder(tmp_path / "new" / "model", CONFIG, large)


def test_an_export_in_progress_is_left_alone(tmp_path):
    with new_folder(tmp_path / "model") as first:
        (first / "mine").write_text("1")
        with new_folder(tmp_path / "model") as second:
            (second / "theirs").write_text("2")
        assert (first / "mine").exists()
        (tmp_path / "model").rename(tmp_path / "elsewhere")
    assert [p.name for p in sorted(tmp_path.rglob("*"))] == ["elsewhere", "theirs", "model", "mine"]


def test_other_names_with_the_same_beginning_are_left_alone(tmp_path):
    for name in (".model-partial", ".model-2-partial-x", "model-partial-x"):
        (tmp_path / name).mkdir()
    (tmp_path / ".model-partial-x").mkdir()
    write_folder(tmp_path / "model", CONFIG, out("a"))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".model-2-partial-x", ".model-partial", "model", "model-partial-x"]


def test_what_stands_there_is_not_overwritten(tmp_path):
    (tmp_path / "file").write_text("keep")
    for replace in (False, True):
        with pytest.raises(ValueError, match="file exists and is no folder; choose another"):
            write_folder(tmp_path / "file", CONFIG, out("a"), replace=replace)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="full exists and is not empty; choose another folder"):
        write_folder(tmp_path / "full", CONFIG, out("a"))
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "full", "notes.txt"]
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "empty", CONFIG, out("a"))
    write_folder(tmp_path / "full", CONFIG, out("a"), replace=True)
    assert sorted(p.name for p in (tmp_path / "full").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    with pytest.raises(ValueError, match=r"gs://bucket/model is remote; models are written to loc"):
        write_folder("gs://bucket/model", CONFIG, out("a"))


def test_a_relative_folder_and_its_tokenizer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "vocab.txt", "model.safetensors", "notes.txt"):
        (source / name).write_text(name)
    write_folder("here", CONFIG, out("a"), tokenizer_files_from="source", generation_config={})
    assert sorted(p.name for p in (tmp_path / "here").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "vocab.txt",
    ]
    assert read_config("here", ["toy"]) == CONFIG
    assert (tmp_path / "here").stat().st_mode & 0o777 == 0o755


# ------------------------------------------------------------------ remote folders


@pytest.fixture
def remote(tmp_path):
    """A folder in fsspec's memory: a file system that is not the local one."""
    tensors = random_tensors(np.float16)
    saved(tmp_path, tensors | {"other.weight": np.zeros((99, 99), np.float16)}, num_files=2)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    system = fsspec.filesystem("memory")
    system.put(f"{tmp_path}/", "/bucket/model/", recursive=True)
    yield "memory://bucket/model", tensors
    system.rm("/bucket", recursive=True)


@pytest.mark.usefixtures("cut_small")
def test_a_remote_folder_is_read_by_byte_range(remote, monkeypatch):
    folder, tensors = remote
    spans = spied(monkeypatch)
    assert read_config(folder, ["toy"]) == CONFIG
    opened = Tensors(folder)
    weights = [*tensors.values(), np.zeros((99, 99), np.float16)]
    files = sum(Files(folder).size(f"model-{i}.safetensors") for i in range(2))
    headers = sum(end - begin for name, begin, end in spans if name.endswith("safetensors"))
    assert headers == files - sum(array.nbytes for array in weights)
    spans.clear()
    loaded = load_into(abstract(), opened, TABLE, mesh=mesh_of(1, 4, 2), ignored=("other.*",))
    assert sum(end - begin for _, begin, end in spans) == sum(a.nbytes for a in tensors.values())
    for path, wanted in expected_parameters(tensors, np.float32).items():
        np.testing.assert_array_equal(parameters_of(loaded)[path], wanted, strict=True)


def test_a_remote_folder_that_does_not_fit(remote):
    folder, _ = remote
    system = fsspec.filesystem("memory")
    with pytest.raises(ValueError, match="memory://bucket/other is not a folder; expected"):
        read_config("memory://bucket/other", ["toy"])
    with pytest.raises(ValueError, match=r"model/config\.json: model_type is 'toy'; it may be x"):
        read_config(folder, ["x"])
    size = system.size("/bucket/model/model-1.safetensors")
    data = system.cat_file("/bucket/model/model-1.safetensors")
    system.pipe_file("/bucket/model/model-1.safetensors", data[: size - 1])
    with pytest.raises(ValueError, match=r"memory://bucket/model/model-1\.safetensors is trunc"):
        Tensors(folder)
    system.rm("/bucket/model/model-1.safetensors")
    with pytest.raises(ValueError, match=r"model-1\.safetensors is missing, though"):
        Tensors(folder)
    system.rm("/bucket/model/config.json")
    with pytest.raises(ValueError, match=r"memory://bucket/model has no config\.json"):
        read_config(folder, ["toy"])
