"""safetensors files: what is read of them, what is refused, what is written."""

import json
import struct
import weakref

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mtllm_jax.hf import tensors as module
from mtllm_jax.hf.tensors import OutTensor, Tensors, row_chunks, write_tensors

DTYPES = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)


def random(shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def out(name, array):
    return OutTensor(name, array.shape, array.dtype, lambda: array)


def header_of(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def rewrite(path, change):
    """The file with its header changed in place by `change`."""
    header, data = header_of(path)
    text = json.dumps(change(header) or header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.fixture
def folder(tmp_path):
    """Two shards and their index."""
    shards = {
        "model-00001-of-00002.safetensors": {"a": random((3, 4)), "b": random(5)},
        "model-00002-of-00002.safetensors": {"c": random((2, 2), np.float16)},
    }
    for name, tensors in shards.items():
        save_file(tensors, tmp_path / name)
    write_index(tmp_path, {t: name for name, tensors in shards.items() for t in tensors})
    return tmp_path


def write_index(folder, weight_map):
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_what_safetensors_wrote(dtype, tmp_path):
    arrays = {"matrix": random((7, 3), dtype), "vector": random(5, dtype), "none": random(0, dtype)}
    arrays["cube"] = random((2, 3, 4), dtype)
    save_file(arrays, tmp_path / "model.safetensors")
    tensors = Tensors(tmp_path)
    assert sorted(tensors.keys()) == sorted(arrays)
    for name, array in arrays.items():
        assert tensors.shape(name) == array.shape
        np.testing.assert_array_equal(tensors.read(name), array, strict=True)
    np.testing.assert_array_equal(tensors.read("matrix", 2, 5), arrays["matrix"][2:5], strict=True)
    np.testing.assert_array_equal(tensors.read("vector", 4), arrays["vector"][4:], strict=True)
    assert tensors.read("cube", 1, 1).shape == (0, 3, 4)


def test_equal_reads_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 8)
    one = random((9, 4))
    last = one.copy()
    last[8, 3] += 1
    save_file({"a": one, "b": one.copy(), "c": last, "d": one[:8]}, tmp_path / "model.safetensors")
    tensors = Tensors(tmp_path)
    assert tensors.equal("a", "b")
    assert not tensors.equal("a", "c")
    assert not tensors.equal("a", "d")


@given(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.integers(1, 30))
def test_row_chunks_cover_all_rows_once(shape, most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", most)
        pieces = list(row_chunks(shape))
    assert [row for begin, end in pieces for row in range(begin, end)] == list(range(shape[0]))
    of_a_row = np.prod(shape[1:])
    assert all((end - begin) * of_a_row <= max(most, of_a_row) for begin, end in pieces)


def test_another_stem(tmp_path):
    save_file({"a": random(3)}, tmp_path / "adapter_model.safetensors")
    assert Tensors(tmp_path, "adapter_model").keys() == ["a"]
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor model\.safetensors\.in"):
        Tensors(tmp_path)


# ------------------------------------------------------------------ what is refused


def refused(folder, message):
    with pytest.raises(ValueError, match=message) as caught:
        Tensors(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_index_that_does_not_fit_its_files(folder):
    first, second = sorted(folder.glob("*.safetensors"))
    write_index(folder, {"a": first.name, "b": first.name, "c": second.name, "d": second.name})
    refused(folder, f"index.json says that d lies in {second.name}, where it is not")
    write_index(folder, {"a": first.name, "b": second.name, "c": second.name})
    refused(folder, f"says that b lies in {second.name}, where it is not")
    write_index(folder, {"a": first.name, "e": "model-00003-of-00003.safetensors"})
    refused(folder, "model-00003-of-00003.safetensors is missing, though model.safetensors.index")
    for text in ("[]", '{"weight_map": 3}', '{"weight_map": {"a": 3, "b": "c"}}', "{", "{}"):
        (folder / "model.safetensors.index.json").write_text(text)
        refused(folder, "model.safetensors.index.json is not an index of safetensors files")


def test_a_tensor_in_two_shards(folder):
    _, second = sorted(folder.glob("*.safetensors"))
    save_file({"c": random((2, 2)), "a": random((3, 4))}, second)
    refused(folder, "a lies in both .*00001-of-00002.safetensors and .*00002-of-00002.safetensors")


def test_a_truncated_shard_is_named(folder):
    first, second = sorted(folder.glob("*.safetensors"))
    data = second.read_bytes()
    for size in (0, 7, 8, 20, len(data) - 1):
        second.write_bytes(data[:size])
        refused(folder, f"{second.name} is truncated")
    second.write_bytes(data)
    tensors = Tensors(folder)
    second.write_bytes(data[:-1])  # after the door
    with pytest.raises(ValueError, match=f"{second.name} is truncated"):
        tensors.read("c")
    first.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12\n")
    refused(folder, f"{first.name} is truncated or not a safetensors file")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"data_offsets": [0, 44]}, r"a, F32 \[3, 4\], has 44 bytes instead of 48"),
        ({"data_offsets": [48, 0]}, "does not say where a lies"),
        ({"data_offsets": [-4, 44]}, "does not say where a lies"),
        ({"data_offsets": [0]}, "does not say where a lies"),
        ({"data_offsets": [0, 48.0]}, "does not say where a lies"),
        ({"shape": [3, "4"]}, "does not say where a lies"),
        ({"shape": None}, "does not say where a lies"),
        ({"data_offsets": [4, 52]}, "the bytes of a and b overlap"),
    ],
)
def test_a_header_that_contradicts_itself(folder, entry, message):
    first, _ = sorted(folder.glob("*.safetensors"))
    rewrite(first, lambda header: header["a"].update(entry))
    refused(folder, f"{first.name} is damaged: .*{message}")


def test_headers_that_are_no_headers(folder):
    first, _ = sorted(folder.glob("*.safetensors"))
    rewrite(first, lambda header: ["a"])
    refused(folder, f"{first.name} is truncated or not a safetensors file")
    rewrite(first, lambda header: {"a": 3})
    refused(folder, "does not say where a lies")
    first.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    refused(folder, f"{first.name} is truncated or not a safetensors file")


def test_dtypes_that_cannot_be_read_are_told_when_asked_for(tmp_path):
    save_file({"ids": np.arange(4), "a": random(3)}, tmp_path / "model.safetensors")
    tensors = Tensors(tmp_path)
    tensors.check_dtype("a")
    with pytest.raises(ValueError, match=r"model\.safetensors: ids is stored as I64; it may be F6"):
        tensors.read("ids")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_weights_of_torch_come_with_the_command_that_converts_them(name, tmp_path):
    (tmp_path / name).write_bytes(b"")
    refused(tmp_path, "not read; convert them once: python -c .* import AutoModel as M")
    config = {"architectures": ["M2M100ForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, "import M2M100ForConditionalGeneration as M; M.from_pretrained.*save_pretr")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["M; import os"]}))
    refused(tmp_path, "import AutoModel as M")


# ------------------------------------------------------------------ what is written


@pytest.mark.parametrize("max_bytes", [10**6, 100, 1])
@pytest.mark.parametrize("chunk", [2**20, 5])
def test_safetensors_reads_what_is_written(max_bytes, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    arrays = {f"t{i}": random((3, 5), dtype, i) for i, dtype in enumerate(DTYPES)}
    arrays |= {"transposed": random((4, 6)).T, "vector": random(7), "scalar": random(())}
    arrays |= {"odd": random(3, np.float16), "empty": random((0, 2))}
    write_tensors(tmp_path, [out(*item) for item in arrays.items()], max_bytes=max_bytes)

    files = sorted(tmp_path.glob("*.safetensors"))
    read = {}
    for path in files:
        header, data = header_of(path)
        assert (path.stat().st_size - len(data)) % 8 == 0
        assert header.pop("__metadata__") == {"format": "pt"}
        assert len(data) <= max_bytes or len(header) == 1
        with safe_open(path, "np") as opened:
            assert sorted(opened.keys()) == sorted(header)
        read |= load_file(path)
        for entry in header.values():  # each where its elements can be read in place
            size = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}[entry["dtype"]]
            assert entry["data_offsets"][0] % size == 0
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array, strict=True)

    index = tmp_path / "model.safetensors.index.json"
    if max_bytes == 10**6:
        assert [path.name for path in files] == ["model.safetensors"]
        assert not index.exists()
        return
    count = len(files)
    assert count > 1
    expected = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    assert [path.name for path in files] == expected
    told = json.loads(index.read_text())
    assert told["metadata"] == {"total_size": sum(a.nbytes for a in arrays.values())}
    assert told["weight_map"] == {
        name: path.name for path in files for name in load_file(path).keys()
    }
    again = Tensors(tmp_path)
    assert all(np.array_equal(again.read(name), array) for name, array in arrays.items())


def test_one_tensor_at_a_time_is_read_and_let_go(tmp_path):
    earlier = []

    def read():
        assert all(array() is None for array in earlier)
        array = random((4, 6)).T.copy().T
        earlier.append(weakref.ref(array if array.base is None else array.base))
        return array

    tensors = [OutTensor(str(i), (4, 6), np.dtype(np.float32), read) for i in range(6)]
    write_tensors(tmp_path, tensors, max_bytes=200)
    assert len(earlier) == 6
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_a_process_that_does_not_write_reads_all_the_same():
    read = []
    tensors = [
        OutTensor(str(i), (2,), np.dtype(np.float32), lambda i=i: read.append(i) or random(2))
        for i in range(3)
    ]
    write_tensors(None, tensors, max_bytes=8)
    assert read == [0, 1, 2]


def test_mistakes_of_ours_are_noticed(tmp_path):
    with pytest.raises(RuntimeError, match="same name"):
        write_tensors(tmp_path, [out("a", random(2)), out("a", random(2))])
    wrong = OutTensor("a", (2,), np.dtype(np.float32), lambda: random(3))
    with pytest.raises(RuntimeError, match="a is not of the shape"):
        write_tensors(tmp_path, [wrong])


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda s: s != "__metadata__"),
        st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(DTYPES)),
        max_size=5,
    ),
    st.integers(1, 200),
)
def test_written_is_read(tmp_path_factory, specs, max_bytes):
    folder = tmp_path_factory.mktemp("any")
    arrays = {name: random(shape, dtype) for name, (shape, dtype) in specs.items()}
    write_tensors(folder, [out(*item) for item in arrays.items()], max_bytes=max_bytes)
    tensors = Tensors(folder)
    assert sorted(tensors.keys()) == sorted(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(tensors.read(name), array, strict=True)
