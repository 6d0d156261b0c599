"""A Hugging Face folder: config.json and safetensors, read lazily and written in one piece.

A key table says where a model's tensors lie. It is a dict from the path of a parameter of ours to
the name of the tensor(s) of theirs:

    {"embedding_VE": "model.shared.weight",
     "layers.query.kernel": "model.layers.{layer}.self_attn.q_proj.weight"}

`{layer}` stands for 0 … L−1, stacked along our leading dim. A parameter called `kernel` is the
transpose of the torch weight ([in, out] against [out, in]); all others have the same layout.
"""

import fnmatch
import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from mtllm_jax import sharding

KeyTable = Mapping[str, str]
Module = TypeVar("Module", bound=nnx.Module)

_PREFIX = "model."
_WEIGHTS = "model.safetensors"
_CHUNK = 2**26  # bytes of a tensor that are held at a time
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "sentencepiece.bpe.model", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip


@dataclass(frozen=True)
class OutTensor:
    """A tensor to be written: its size is known before, its values only when `read` is called."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def read_config(folder: str | os.PathLike, model_types: Sequence[str]) -> dict[str, Any]:
    """The folder's config.json. ValueError for what is not a folder of one of `model_types`."""
    path = Path(folder) / "config.json"
    allowed = " or ".join(model_types)
    if not path.is_file():
        what = "has no config.json" if Path(folder).is_dir() else "is not a folder"
        raise ValueError(f"{folder} {what}; expected a Hugging Face folder of {allowed}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
    if not isinstance(config, dict) or config.get("model_type") not in model_types:
        found = config.get("model_type") if isinstance(config, dict) else None
        raise ValueError(f"{path}: model_type is {found!r}; it may be {allowed}")
    if config.get("quantization_config"):
        raise ValueError(f"{path}: quantised weights cannot be read; take the unquantised ones")
    return config


class Tensors:
    """The tensors of a folder by name, each read from its byte range when asked for."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self._entries: dict[str, tuple[Path, str, tuple[int, ...], int]] = {}
        for path in self._files():
            self._open(path)

    def keys(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name][2]

    def check_dtype(self, name: str) -> None:
        """Raises ValueError for what `read` cannot read."""
        path, dtype, _, _ = self._entries[name]
        if dtype not in _DTYPES:
            raise ValueError(f"{path}: {name} is stored as {dtype}; it may be {', '.join(_DTYPES)}")

    def read(self, name: str, begin: int = 0, end: int | None = None) -> np.ndarray:
        """float64, float32, float16 or (ml_dtypes) bfloat16, as on disk.

        begin, end: the rows (of dim 0) to read, all by default; no other bytes are touched.
        """
        self.check_dtype(name)
        path, dtype, shape, offset = self._entries[name]
        rows = shape[:1] if end is None else (end,)
        shape = tuple(size - begin for size in rows) + shape[1:]
        count, of_a_row = math.prod(shape), math.prod(shape[1:])
        offset += begin * of_a_row * np.dtype(_DTYPES[dtype]).itemsize
        return np.fromfile(path, _DTYPES[dtype], count, offset=offset).reshape(shape)

    def chunks(self, name: str) -> Iterator[tuple[int, int]]:
        """(begin, end) of pieces of rows that are small enough to be held beside a model."""
        shape = self.shape(name)
        rows = max(1, _CHUNK // (8 * max(1, math.prod(shape[1:]))))
        for begin in range(0, shape[0], rows):
            yield begin, min(begin + rows, shape[0])

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors have the same shape and values; reads a piece of each at a time."""
        return self.shape(one) == self.shape(other) and all(
            np.array_equal(self.read(one, *rows), self.read(other, *rows))
            for rows in self.chunks(one)
        )

    def _files(self) -> list[Path]:
        if (single := self.folder / _WEIGHTS).is_file():
            return [single]
        index = self.folder / f"{_WEIGHTS}.index.json"
        if not index.is_file():
            if any(self.folder.glob("*.bin")):
                raise ValueError(
                    f"{self.folder} has .bin weights; convert them once with `AutoModel.from_"
                    "pretrained(DIR).save_pretrained(NEW_DIR)` of a transformers that reads them"
                )
            raise ValueError(f"{self.folder} has neither {_WEIGHTS} nor {index.name}")
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{index} is not an index of safetensors files") from None
        for name in names:
            if not (self.folder / name).is_file():
                raise ValueError(f"{self.folder / name} is missing, though {index.name} names it")
        return [self.folder / name for name in names]

    def _open(self, path: Path) -> None:
        """Reads the header: 8 bytes of length, then JSON with a byte range for each tensor."""
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            try:
                header = json.loads(file.read(length)) if 8 + length <= size else None
            except ValueError:
                header = None
        if not isinstance(header, dict):
            raise ValueError(f"{path} is truncated or not a safetensors file")
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            if (needed := 8 + length + end) > size:
                raise ValueError(f"{path} is truncated: {size} bytes, {name} ends at {needed}")
            shape = tuple(entry["shape"])
            self._entries[name] = (path, entry["dtype"], shape, 8 + length + begin)


def load_into(
    module: Module,
    tensors: Tensors,
    table: KeyTable,
    dtype: DTypeLike = jnp.float32,
    *,
    mesh: jax.sharding.Mesh | None = None,
    aliases: Mapping[str, Sequence[str]] = {},
    ignored: Iterable[str] = (),
) -> Module:
    """`module` (from `nnx.eval_shape`) with its parameters read from `tensors`, in `dtype`.

    mesh: where they go, by `sharding.shardings`; None = the first device. The other arguments and
    the errors are those of `match`.
    """
    plan = match(module, tensors, table, aliases=aliases, ignored=ignored)
    graph, state = nnx.split(module)
    flat = []
    for keys, value in nnx.to_flat_state(state):
        path = _path(keys)
        array = np.empty(value.shape, jnp.dtype(dtype))
        rows = array if "{layer}" in table[path] else array[None]
        for row, name in zip(rows, plan[path], strict=True):
            row[...] = _transposed(path, tensors.read(name))
        flat.append((keys, value.replace(jnp.asarray(array))))
    filled = nnx.from_flat_state(flat)
    return nnx.merge(graph, filled if mesh is None else sharding.place(filled, mesh))


def match(
    module: nnx.Module,
    tensors: Tensors,
    table: KeyTable,
    *,
    aliases: Mapping[str, Sequence[str]] = {},
    ignored: Iterable[str] = (),
) -> dict[str, list[str]]:
    """For each parameter the names, as on disk, of the tensors it is made of; reads no weights.

    aliases: other names under which tied weights may also, or alone, be stored: {name: others}.
    ignored: patterns (`*`) of tensors that may be there without being read.
    The prefix `model.` may be absent from all names on disk. What is missing, unexpected or of
    another shape is told in one ValueError.
    """
    stored = _stored(tensors)
    parameters = {_path(keys): value for keys, value in nnx.to_flat_state(nnx.state(module))}
    if missing_rows := parameters.keys() ^ table.keys():
        raise RuntimeError(f"the key table and the module differ in {sorted(missing_rows)}")

    missing, misshapen = [], []
    plan: dict[str, list[str]] = {}
    for path, value in parameters.items():
        plan[path] = []
        for name, shape in _tensors_of(path, table[path], value.shape):
            name = next((n for n in (name, *aliases.get(name, ())) if n in stored), name)
            if name not in stored:
                missing.append(name)
            elif tensors.shape(stored[name]) != shape:
                found = list(tensors.shape(stored[name]))
                misshapen.append(f"{name} is {found}, by the config {list(shape)}")
            else:
                tensors.check_dtype(stored[name])
                plan[path].append(stored[name])
    used = {name for names in plan.values() for name in names}
    known = [*ignored, *aliases, *(other for others in aliases.values() for other in others)]
    unexpected = [
        key
        for key in tensors.keys()
        if key not in used
        and not any(fnmatch.fnmatchcase(n, p) for n in (key, _PREFIX + key) for p in known)
    ]
    problems = {"missing": missing, "of another shape": misshapen, "unexpected": unexpected}
    if any(problems.values()):
        told = "; ".join(f"{what}: {_some(names)}" for what, names in problems.items() if names)
        raise ValueError(f"{tensors.folder}: its tensors are not those of its config.json; {told}")
    return plan


def check_tied(tensors: Tensors, aliases: Mapping[str, Sequence[str]]) -> None:
    """ValueError if a file holds tied weights under several names and they differ: loaders of it
    would disagree. aliases: as for `match`. The copies are read, a piece at a time."""
    stored = _stored(tensors)
    for name, others in aliases.items():
        first, *copies = [n for n in (name, *others) if n in stored] or [name]
        for copy in copies:
            if not tensors.equal(stored[first], stored[copy]):
                raise ValueError(
                    f"{tensors.folder}: {copy} differs from {first} though tie_word_embeddings is "
                    "true in config.json; tied weights are equal, or stored once"
                )


def export_tensors(module: nnx.Module, table: KeyTable) -> list[OutTensor]:
    """Every tensor in the table, in torch's layout: the inverse of `load_into`.

    ValueError for parameters that the table does not name.
    """
    parameters = {_path(keys): value for keys, value in nnx.to_flat_state(nnx.state(module))}
    if unknown := sorted(parameters.keys() - table.keys()):
        raise ValueError(f"parameters without a Hugging Face name: {_some(unknown)} (merge LoRA?)")
    return [tensor for path in table for tensor in _out(path, table[path], parameters[path])]


def _out(path: str, pattern: str, parameter: nnx.Variable) -> Iterator[OutTensor]:
    value = parameter[...]
    stacked = "{layer}" in pattern
    for layer, (name, shape) in enumerate(_tensors_of(path, pattern, value.shape)):

        def read(layer: int = layer) -> np.ndarray:
            return _transposed(path, np.asarray(value[layer] if stacked else value))

        yield OutTensor(name, shape, np.dtype(value.dtype), read)


def write_folder(
    folder: str | os.PathLike,
    config: Mapping[str, Any],
    tensors: Sequence[OutTensor],
    *,
    generation_config: Mapping[str, Any] | None = None,
    tokenizer_files_from: str | os.PathLike | None = None,
    replace: bool = False,
) -> None:
    """A folder with config.json, model.safetensors and, if named, another folder's tokenizer.

    Written beside its place and renamed when complete. ValueError if something stands there,
    unless `replace`.
    """
    folder = Path(folder)
    if folder.exists() and not replace and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-partial-", dir=folder.parent))
    try:
        partial.chmod(0o755)
        arrays = {tensor.name: np.ascontiguousarray(tensor.read()) for tensor in tensors}
        save_file(arrays, partial / _WEIGHTS, metadata={"format": "pt"})
        _write_json(partial / "config.json", config)
        if generation_config is not None:
            _write_json(partial / "generation_config.json", generation_config)
        if tokenizer_files_from is not None:
            for name in _TOKENIZER_FILES:
                if (path := Path(tokenizer_files_from) / name).is_file():
                    shutil.copyfile(path, partial / name)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _tensors_of(
    path: str, pattern: str, shape: tuple[int, ...]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and torch shape of the tensors that one parameter is made of."""
    stacked = "{layer}" in pattern
    one = shape[1:] if stacked else shape
    one = one[::-1] if path.endswith("kernel") else one
    for layer in range(shape[0] if stacked else 1):
        yield pattern.replace("{layer}", str(layer)), one


def _transposed(path: str, array: np.ndarray) -> np.ndarray:
    return array.T if path.endswith("kernel") else array


def _stored(tensors: Tensors) -> dict[str, str]:
    """From a tensor's name, with the prefix and as it is, to its name on disk."""
    stored = {key: key for key in tensors.keys()}
    return stored | {_PREFIX + key: key for key in stored if not key.startswith(_PREFIX)}


def _path(keys: tuple[Any, ...]) -> str:
    return ".".join(map(str, keys))


def _some(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
