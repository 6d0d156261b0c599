"""The files of a folder, wherever it lies: fsspec's memory stands for what is remote."""

import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from mtllm_jax.hf.files import Files, local_files

FILES = {
    "config.json": b'{"model_type": "toy"}',
    "tokenizer.json": b"{}",
    "model.safetensors": bytes(range(100)),
    "llm_tokenizer/tokenizer.json": b"[1]",
}


class Counted(MemoryFileSystem):
    """Google's storage, as far as a reader can tell; counts the bytes that are fetched."""

    protocol = ("gs", "gcs")
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    fetched: ClassVar[list] = []

    @classmethod
    def _strip_protocol(cls, path):
        for protocol in cls.protocol:
            path = path.removeprefix(f"{protocol}://")
        return "/" + path.strip("/") if path.strip("/") else ""

    def cat_file(self, path, start=None, end=None, **kwargs):
        data = super().cat_file(path, start, end, **kwargs)
        self.fetched.append((path.rsplit("/", 1)[-1], len(data)))
        return data


@pytest.fixture(params=["local", "gs"])
def folder(request, tmp_path, monkeypatch):
    if request.param == "local":
        for name, data in FILES.items():
            (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "model" / name).write_bytes(data)
        yield tmp_path / "model"
        return
    registered = sys.modules["fsspec.registry"]._registry  # fsspec.registry is a view of it
    for name in Counted.protocol:
        monkeypatch.setitem(registered, name, Counted)
    system = fsspec.filesystem("gs")
    for name, data in FILES.items():
        system.pipe_file(f"gs://bucket/model/{name}", data)
    Counted.fetched.clear()
    yield epath.Path("gs://bucket/model")
    Counted.store.clear()


def test_files_by_name_and_range(folder):
    files = Files(folder)
    assert files.is_folder()
    assert files.names() == ["config.json", "llm_tokenizer", "model.safetensors", "tokenizer.json"]
    assert files.has("model.safetensors")
    assert files.has("llm_tokenizer/tokenizer.json")
    assert not files.has("llm_tokenizer")
    assert not files.has("other.json")
    assert files.size("model.safetensors") == 100
    assert files.read("model.safetensors", 10, 14) == bytes(range(10, 14))
    assert files.read("model.safetensors", 98) == bytes([98, 99])
    assert files.read("model.safetensors", 98, 200) == bytes([98, 99])
    assert files.read_json("config.json") == {"model_type": "toy"}
    assert files.path("config.json") == f"{folder}/config.json"
    if files.is_remote:
        assert [size for name, size in Counted.fetched if name == "model.safetensors"] == [4, 2, 2]


def test_nothing_there(folder):
    files = Files(folder / "other")
    assert not files.is_folder()
    assert files.names() == []
    assert not files.has("config.json")


def test_local_files_are_copied_from_afar_alone(folder):
    names = ("tokenizer.json", "llm_tokenizer/tokenizer.json", "merges.txt")
    local = local_files(folder, names)
    if isinstance(folder, Path):
        assert local == folder
        return
    assert local == local_files(folder, names)
    found = {os.fspath(p.relative_to(local)): p.read_bytes() for p in local.rglob("*.*")}
    assert found == {name: FILES[name] for name in names[:2]}
    assert {name for name, _ in Counted.fetched} == {"tokenizer.json"}
    assert (local_files(folder) / "config.json").read_bytes() == FILES["config.json"]


def test_copies_go_when_the_process_ends():
    code = """
import fsspec
from mtllm_jax.hf.files import local_files
fsspec.filesystem("memory").pipe_file("/bucket/tokenizer.json", b"{}")
folder = local_files("memory://bucket")
assert (folder / "tokenizer.json").read_text() == "{}"
print(folder)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert not Path(done.stdout.strip()).exists()


def test_what_cannot_be_opened_is_one_sentence():
    for folder, message in (
        ("nowhere://bucket/model", "nowhere://bucket/model cannot be opened: Protocol not known"),
        ("abfs://bucket/model", "abfs://bucket/model cannot be opened: Install adlfs"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            Files(folder)
        assert "\n" not in str(caught.value)


def test_files_that_are_no_json(tmp_path):
    for data in (b"{", b"\xff", b""):
        (tmp_path / "config.json").write_bytes(data)
        with pytest.raises(ValueError, match=r"config\.json is not JSON"):
            Files(tmp_path).read_json("config.json")
