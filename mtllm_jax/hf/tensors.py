"""safetensors files, one tensor or some of its rows at a time: a reader, and a writer of shards.

A file is 8 bytes of header length, a JSON header that gives each tensor's dtype, shape and byte
range, and the bytes: little-endian, row by row (the format's own description:
https://github.com/huggingface/safetensors#format). Several files have an index, a JSON file that
says which tensor lies where. Nothing here holds more than one tensor.
"""

import contextlib
import itertools
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from mtllm_jax.hf.files import Files

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}

CHUNK = 2**23  # the most numbers that are read, cast or written in one go
Progress = Callable[[int, int], None]  # told now and then: (bytes so far, bytes in all)

SHARD_BYTES = 5 * 10**9  # the largest file written, if no single tensor is larger


@dataclass(frozen=True)
class OutTensor:
    """A tensor to be written: its size is known before, its values only when `read` is called."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies: dtype in safetensors' name, `begin` in bytes from the file's start."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Tensors:
    """The tensors of a folder by name, each read from its byte range when asked for.

    The files are STEM.safetensors, or those that STEM.safetensors.index.json names.
    """

    def __init__(self, folder: str | os.PathLike, stem: str = "model"):
        """Reads the headers. ValueError names what is missing, truncated or contradicts itself."""
        self.folder = os.fspath(folder)
        self._files = Files(folder)
        self._entries: dict[str, _Entry] = {}
        weights, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
        if self._files.has(weights):
            self._add(weights)
        elif self._files.has(index):
            self._add_shards(index)
        else:
            raise ValueError(_no_safetensors(self._files, weights, index))

    def keys(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def check_dtype(self, name: str) -> None:
        """Raises ValueError for what `read` cannot read."""
        if (entry := self._entries[name]).dtype not in DTYPES:
            raise ValueError(
                f"{self._files.path(entry.file)}: {name} is stored as {entry.dtype}; it may be "
                f"{', '.join(DTYPES)}"
            )

    def read(self, name: str, begin: int = 0, end: int | None = None) -> np.ndarray:
        """float64, float32, float16 or (ml_dtypes) bfloat16, as on disk; not to be written to.

        begin, end: the rows (of dim 0) to read, all by default; no other bytes are touched.
        """
        self.check_dtype(name)
        entry = self._entries[name]
        dtype, shape = np.dtype(DTYPES[entry.dtype]), entry.shape
        first, last = entry.begin, entry.end
        if shape and (begin, end) != (0, None):
            rows = range(shape[0])[begin:end]
            shape = (len(rows), *shape[1:])
            of_a_row = math.prod(shape[1:]) * dtype.itemsize
            first, last = first + rows.start * of_a_row, first + rows.stop * of_a_row
        # An empty range means "to the end of the file" to some file systems.
        data = self._files.read(entry.file, first, last) if first < last else b""
        if len(data) != last - first:
            raise ValueError(f"{self._files.path(entry.file)} is truncated: {name} ends too early")
        return np.frombuffer(data, dtype).reshape(shape)

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors have the same shape and values; reads a piece of each at a time."""
        return self.shape(one) == self.shape(other) and all(
            np.array_equal(self.read(one, *rows), self.read(other, *rows))
            for rows in row_chunks(self.shape(one))
        )

    def _add_shards(self, index: str) -> None:
        path = self._files.path(index)
        try:
            weight_map = dict(self._files.read_json(index)["weight_map"])
            names = sorted(set(weight_map.values()))
            present = set(self._files.names())
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is not an index of safetensors files") from None
        for name in names:
            if name not in present:
                raise ValueError(f"{self._files.path(name)} is missing, though {index} names it")
            self._add(name)
        for tensor, name in weight_map.items():
            if tensor not in self._entries or self._entries[tensor].file != name:
                raise ValueError(f"{path} says that {tensor} lies in {name}, where it is not")

    def _add(self, file: str) -> None:
        """Reads one file's header."""
        path, size = self._files.path(file), self._files.size(file)
        start = self._files.read(file, 0, 8)
        data = 8 + (struct.unpack("<Q", start)[0] if len(start) == 8 else size)
        try:
            header = json.loads(self._files.read(file, 8, data)) if 8 < data <= size else None
        except ValueError:
            header = None
        if not isinstance(header, dict):
            raise ValueError(f"{path} is truncated or not a safetensors file")
        header.pop("__metadata__", None)
        entries = {name: _entry(path, file, name, found, data) for name, found in header.items()}
        ordered = sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end))
        for (one, before), (other, after) in itertools.pairwise(ordered):
            if after.begin < before.end:
                raise ValueError(f"{path} is damaged: the bytes of {one} and {other} overlap")
        for name, entry in ordered[-1:]:
            if entry.end > size:
                raise ValueError(f"{path} is truncated: {size} bytes, {name} ends at {entry.end}")
        for name in entries:
            if name in self._entries:
                other_path = self._files.path(self._entries[name].file)
                raise ValueError(f"{name} lies in both {other_path} and {path}; one may have it")
        self._entries |= entries


def _entry(path: str, file: str, name: str, found: Any, data: int) -> _Entry:
    """One tensor as the header gives it. data: where in the file its ranges start to count."""
    try:
        dtype, shape = found["dtype"], tuple(found["shape"])
        begin, end = found["data_offsets"]
        counts = (*shape, begin, end)
        is_whole = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in counts)
        is_whole = is_whole and begin <= end
    except (TypeError, KeyError, ValueError):
        is_whole = False
    if not is_whole:
        raise ValueError(f"{path} is damaged: its header does not say where {name} lies")
    if dtype in DTYPES:
        needed = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        if end - begin != needed:
            raise ValueError(
                f"{path} is damaged: {name}, {dtype} {list(shape)}, has {end - begin} bytes instead"
                f" of {needed}"
            )
    return _Entry(file, dtype, shape, data + begin, data + end)


def _no_safetensors(files: Files, weights: str, index: str) -> str:
    """Why a folder cannot be read, and for PyTorch's own format the command that converts it."""
    if not any(name.endswith((".bin", ".bin.index.json", ".pth", ".pt")) for name in files.names()):
        return f"{files.folder} has neither {weights} nor {index}"
    config = files.read_json("config.json") if files.has("config.json") else None
    found = config.get("architectures") if isinstance(config, dict) else None
    name = str(found[0]) if isinstance(found, list) and found else ""
    return (
        f"{files.folder} has its weights in PyTorch's own format (.bin), which is not read; convert"
        f" them once: {conversion(files.folder, name)}"
    )


def conversion(name: str, architecture: str = "", to: str | None = None) -> str:
    """The command, of one line, by which transformers writes a model's weights as safetensors.

    architecture: transformers' class, as config.json gives it. to: another folder, which gets the
    tokenizer too; None = beside the weights as they are.
    """
    model = architecture if architecture.isidentifier() else "AutoModel"
    if to is None:
        code = f"from transformers import {model} as M; M.from_pretrained({name!r})"
        return f'python -c "{code}.save_pretrained({name!r})"'
    code = f"from transformers import {model}, AutoTokenizer; [c.from_pretrained({name!r})"
    return f'python -c "{code}.save_pretrained({to!r}) for c in ({model}, AutoTokenizer)]"'


def row_chunks(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(begin, end) of pieces of rows, of at most `CHUNK` numbers or one row."""
    rows = shape[0] if shape else 1
    step = max(1, CHUNK // max(1, math.prod(shape[1:])))
    for begin in range(0, rows, step):
        yield begin, min(begin + step, rows)


def write_tensors(
    folder: Path | None,
    tensors: Sequence[OutTensor],
    stem: str = "model",
    *,
    max_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Writes STEM.safetensors into a folder; several shards and an index if it were too large.

    The tensors are read one after the other, and each is let go of before the next is read.
    folder: None where another process writes; the tensors are read all the same, since gathering
    what lies on several processes takes all of them.
    """
    # Larger elements first: a tensor then starts at a multiple of its element's size.
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise RuntimeError("two tensors to be written have the same name")
    shards = _shards(tensors, max_bytes)
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        names = [
            f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)
        ]
    total, written = sum(tensor.num_bytes for tensor in tensors), 0
    for name, shard in zip(names, shards, strict=True):
        for tensor in _write_shard(None if folder is None else folder / name, shard):
            written += tensor.num_bytes
            if progress is not None:
                progress(written, total)
    if folder is not None and len(shards) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {
                tensor.name: name
                for name, shard in zip(names, shards, strict=True)
                for tensor in shard
            },
        }
        text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
        (folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")


def _shards(tensors: Sequence[OutTensor], max_bytes: int) -> list[list[OutTensor]]:
    """The tensors in their order, cut where the next would make a file larger than `max_bytes`."""
    shards: list[list[OutTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    return shards


def _write_shard(path: Path | None, tensors: Sequence[OutTensor]) -> Iterator[OutTensor]:
    """Writes one file; gives back each tensor when it is written."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset := offset + tensor.num_bytes],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with contextlib.nullcontext() if path is None else path.open("wb") as file:
        if file is not None:
            file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            _write_tensor(file, tensor)
            yield tensor
        if file is not None:
            file.flush()
            os.fsync(file.fileno())


def _write_tensor(file: BinaryIO | None, tensor: OutTensor) -> None:
    """Reads a tensor and appends its bytes. What it held is free when it returns."""
    array = tensor.read()
    if array.shape != tensor.shape or array.dtype != tensor.dtype:
        raise RuntimeError(f"{tensor.name} is not of the shape and dtype it was to have")
    if file is None:
        return
    # A transposed matrix is copied to be written: a piece at a time.
    for begin, end in row_chunks(array.shape):
        piece = array[begin:end] if array.ndim else array
        file.write(np.ascontiguousarray(piece).view(np.uint8).data)
