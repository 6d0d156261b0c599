"""A Hugging Face folder: config.json and safetensors, read lazily and written in one piece.

A key table says where a model's tensors lie. It is a dict from the path of a parameter of ours to
the name of the tensor(s) of theirs:

    {"embedding_VE": "model.shared.weight",
     "layers.query.kernel": "model.layers.{layer}.self_attn.q_proj.weight"}

`{layer}` stands for 0 … L−1, stacked along our leading dim. A parameter called `kernel` is the
transpose of the torch weight ([in, out] against [out, in]), and so are `lora_a` and `lora_b`; all
others have the same layout.

Models are streamed both ways: beside the parameters themselves the process holds a tensor at a time
and some pieces of rows, whatever the size of the model.
"""

import contextlib
import fcntl
import fnmatch
import functools
import glob
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from mtllm_jax import sharding
from mtllm_jax.hf.files import TOKENIZER_CONFIG, TOKENIZER_FILES, Files
from mtllm_jax.hf.reading import read_parameter, read_quantised
from mtllm_jax.hf.tensors import SHARD_BYTES, OutTensor, Progress, Tensors, write_tensors
from mtllm_jax.hf.tokenizer_config import readable_config
from mtllm_jax.models import lora
from mtllm_jax.models.layers import Linear
from mtllm_jax.models.quantised import in_dtype
from mtllm_jax.runfolder import is_remote

__all__ = [
    "KeyTable",
    "OutTensor",
    "Tensors",
    "check_fit",
    "check_tied",
    "check_unquantised",
    "copy_tokenizer_files",
    "export_tensors",
    "load_into",
    "match",
    "new_folder",
    "read_config",
    "write_folder",
    "write_json",
    "write_tensors",
]

KeyTable = Mapping[str, str]
Module = TypeVar("Module", bound=nnx.Module)

_PREFIX = "model."


def read_config(folder: str | os.PathLike, model_types: Sequence[str]) -> dict[str, Any]:
    """The folder's config.json. ValueError for what is not a folder of one of `model_types`."""
    files, name = Files(folder), "config.json"
    allowed = " or ".join(model_types)
    if not files.has(name):
        what = f"has no {name}" if files.is_folder() else "is not a folder"
        raise ValueError(f"{folder} {what}; expected a Hugging Face folder of {allowed}")
    config = files.read_json(name)
    if not isinstance(config, dict) or config.get("model_type") not in model_types:
        found = config.get("model_type") if isinstance(config, dict) else None
        raise ValueError(f"{files.path(name)}: model_type is {found!r}; it may be {allowed}")
    check_unquantised(config, files.path(name))
    return config


def check_unquantised(config: Mapping[str, Any], where: str) -> None:
    """ValueError for the config of a model whose weights are not plain numbers."""
    if config.get("quantization_config") or config.get("compression_config"):
        raise ValueError(f"{where}: quantised weights cannot be read; take the unquantised ones")


# ------------------------------------------------------------------ in


def load_into(
    module: Module,
    tensors: Tensors,
    table: KeyTable,
    dtype: DTypeLike = jnp.float32,
    *,
    mesh: jax.sharding.Mesh | None = None,
    aliases: Mapping[str, Sequence[str]] = {},
    ignored: Iterable[str] = (),
    updates: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]] = {},
    progress: Progress | None = None,
) -> Module:
    """`module` (from `nnx.eval_shape`) with its parameters read from `tensors`, in `dtype`.

    dtype: as of `in_dtype`. mesh: where they go, by `sharding.shardings`; None = the first device.
    Of several processes each reads the rows that its own devices hold. updates, in int8 alone: for
    the path of a kernel the factors A [L, I, R] and B [L, R, O] of what is added to it before it is
    quantised. The other arguments and the errors are those of `match`.
    """
    plan = match(module, tensors, table, aliases=aliases, ignored=ignored)
    graph, state = nnx.split(in_dtype(module, dtype))
    values = dict(nnx.to_flat_state(state))
    places: dict[tuple[Any, ...], NamedSharding | None] = dict.fromkeys(values)
    if mesh is not None:
        placed = nnx.to_flat_state(sharding.shardings(state, mesh))
        places = {keys: place.get_raw_value() for keys, place in placed}
    total = sum(math.prod(value.shape) * value.dtype.itemsize for value in values.values())
    arrays: dict[tuple[Any, ...], jax.Array] = {}
    for keys, value in values.items():
        path = _path(keys)
        if value.dtype == jnp.int8:
            both = keys, (*keys[:-1], "kernel_scale")
            where = places[both[0]], places[both[1]]
            pair = read_quantised(tensors, plan[path], value.shape, where, updates.get(path, ()))
            arrays |= dict(zip(both, pair, strict=True))
        elif path in plan:  # a scale is there with its kernel
            arrays[keys] = read_parameter(
                tensors,
                plan[path],
                value.shape,
                value.dtype,
                places[keys],
                is_stacked="{layer}" in table[path],
                is_kernel=_is_kernel(path),
            )
        if progress is not None:
            progress(sum(array.nbytes for array in arrays.values()), total)
    flat = [(keys, value.replace(arrays[keys])) for keys, value in values.items()]
    return nnx.merge(graph, nnx.from_flat_state(flat))


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
                continue
            plan[path].append(stored[name])
            if (found := tensors.shape(stored[name])) != shape:
                misshapen.append(f"{name} is {list(found)}, by the config {list(shape)}")
            else:
                tensors.check_dtype(stored[name])
    used = {name for names in plan.values() for name in names}
    known = [*ignored, *aliases, *(other for others in aliases.values() for other in others)]
    unexpected = [
        key
        for key in tensors.keys()
        if key not in used
        and not any(fnmatch.fnmatchcase(n, p) for n in (key, _PREFIX + key) for p in known)
    ]
    check_fit(
        tensors.folder, "config.json", missing=missing, misshapen=misshapen, unexpected=unexpected
    )
    return plan


def check_fit(
    folder: str,
    config: str,
    *,
    missing: Sequence[str],
    misshapen: Sequence[str],
    unexpected: Sequence[str],
) -> None:
    """ValueError if there is anything in the lists of tensors, told against the file `config`."""
    problems = {"missing": missing, "of another shape": misshapen, "unexpected": unexpected}
    if any(problems.values()):
        told = "; ".join(f"{what}: {_some(names)}" for what, names in problems.items() if names)
        raise ValueError(f"{folder}: its tensors are not those of its {config}; {told}")


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


# ------------------------------------------------------------------ out


def export_tensors(
    module: nnx.Module | nnx.State,
    table: KeyTable,
    *,
    merge_lora: bool = False,
    dtype: DTypeLike | None = None,
) -> list[OutTensor]:
    """Every tensor in the table, in torch's layout: the inverse of `load_into`.

    module: or a part of its state. merge_lora: adapters are added to their kernels, a tensor at a
    time when it is read. dtype: of the tensors; None = that of each parameter. Of several processes
    all must read all tensors, in the same order. ValueError for parameters that the table does not
    name, or in int8.
    """
    parameters = {_path(keys): value for keys, value in nnx.to_flat_state(nnx.state(module))}
    adapters = _adapters(module, parameters) if merge_lora else {}
    if any(path.endswith("kernel_scale") for path in parameters):
        raise ValueError("weights in int8 are not written; read the model in bfloat16 to write it")
    if unknown := sorted(parameters.keys() - table.keys()):
        raise ValueError(f"parameters without a Hugging Face name: {_some(unknown)} (merge LoRA?)")
    return [
        tensor
        for path, pattern in table.items()
        for tensor in _out(path, pattern, parameters[path][...], adapters.get(path), dtype)
    ]


def _adapters(
    module: nnx.Module | nnx.State, parameters: dict[str, nnx.Variable]
) -> dict[str, tuple[float, jax.Array, jax.Array]]:
    """(scale, A, B) by the path of the kernel; takes A and B out of `parameters`."""
    found = {}
    for keys, node in nnx.iter_graph(module):
        if isinstance(node, Linear) and node.lora_a is not None:
            lora_a, lora_b = (parameters.pop(_path((*keys, n))) for n in ("lora_a", "lora_b"))
            found[_path((*keys, "kernel"))] = node.lora_scale, lora_a[...], lora_b[...]
    return found


def _out(
    path: str,
    pattern: str,
    value: jax.Array,
    adapter: tuple[float, jax.Array, jax.Array] | None,
    dtype: DTypeLike | None,
) -> Iterator[OutTensor]:
    written = np.dtype(value.dtype if dtype is None else dtype)
    scale, *factors = adapter or (0.0,)

    def read(layer: int) -> np.ndarray:
        values = value, *factors
        if "{layer}" in pattern:
            values = _layer(values, np.int32(layer))
        one = _merged(*values, scale, dtype=written) if factors else values[0]
        array = _on_host(one).astype(written, copy=False)
        return array.T if _is_kernel(path) else array

    for layer, (name, shape) in enumerate(_tensors_of(path, pattern, value.shape)):
        yield OutTensor(name, shape, written, functools.partial(read, layer))


@jax.jit
def _layer(stacks: Any, layer: jax.Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), stacks)


_merged = jax.jit(lora.merged, static_argnames="dtype")


def _on_host(array: jax.Array) -> np.ndarray:
    """The whole array, wherever its parts lie."""
    if not array.is_fully_addressable:
        return multihost_utils.process_allgather(array, tiled=True)
    # An array keeps the host's copy of itself as long as it lives; this one does not live long.
    shards = [shard.data for shard in array.addressable_shards]
    return np.asarray(jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards))


def write_folder(
    folder: str | os.PathLike,
    config: Mapping[str, Any],
    tensors: Sequence[OutTensor],
    *,
    generation_config: Mapping[str, Any] | None = None,
    tokenizer_files_from: str | os.PathLike | None = None,
    replace: bool = False,
    max_shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """A folder with config.json, safetensors and, if named, another folder's tokenizer.

    tokenizer_files_from: local or remote. max_shard_bytes: larger weights are cut into several
    files. The rest is as in `new_folder`.
    """
    with new_folder(folder, replace=replace) as new:
        write_tensors(new, tensors, max_bytes=max_shard_bytes, progress=progress)
        if new is None:
            return
        write_json(new / "config.json", config)
        if generation_config is not None:
            write_json(new / "generation_config.json", generation_config)
        if tokenizer_files_from is not None:
            copy_tokenizer_files(tokenizer_files_from, new)


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike, *, replace: bool = False) -> Iterator[Path | None]:
    """A folder to be filled, which becomes `folder` at the end: whole, or not at all.

    Of several processes the first fills it and the others get None; all go on when it is complete.
    An error leaves nothing behind. A kill leaves a hidden folder beside `folder`, which the next
    attempt removes. ValueError if something stands there, unless `replace`, or for a remote folder.
    """
    if is_remote(folder):
        raise ValueError(f"{folder} is remote; models are written to local folders, to be copied")
    target = Path(os.path.abspath(folder))
    is_folder = target.is_dir()
    if target.exists() and not (is_folder and (replace or not any(target.iterdir()))):
        what = "is not empty" if is_folder else "is no folder"
        raise ValueError(f"{folder} exists and {what}; choose another folder")
    if jax.process_index() == 0:
        with _partial(target) as partial:
            yield partial
            old = partial.with_name(f"{partial.name}.old")
            if is_folder:
                target.rename(old)
            partial.rename(target)
            shutil.rmtree(old, ignore_errors=True)
    else:
        yield None
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"{target.name} is written")


@contextlib.contextmanager
def _partial(target: Path) -> Iterator[Path]:
    """A folder beside `target`, gone at the end if it still has its name.

    It is locked as long as it is written to: those without a lock are what killed processes left.
    """
    prefix = f".{target.name}-partial-"
    target.parent.mkdir(parents=True, exist_ok=True)
    for other in target.parent.glob(f"{glob.escape(prefix)}*"):
        with _locked(other) as is_ours:
            if is_ours:
                shutil.rmtree(other, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        partial.chmod(0o755)
        with _locked(partial):
            yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether this process has the lock of a folder; not if another has, or there are none."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # gone meanwhile, or another user's
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = True
        except OSError:  # some network file systems have no locks
            is_ours = False
        yield is_ours
    finally:
        os.close(descriptor)


def copy_tokenizer_files(source: str | os.PathLike, folder: Path) -> None:
    """Copies what the folder `source`, local or remote, has of a tokenizer's files.

    What transformers 4.57 would not read of its tokenizer_config.json is put in other words.
    """
    files = Files(source)
    names = set(files.names()).intersection(TOKENIZER_FILES)
    for name in names:
        (folder / name).write_bytes(files.read(name))
    if TOKENIZER_CONFIG in names:
        config = files.read_json(TOKENIZER_CONFIG)
        if (readable := readable_config(config)) != config:
            write_json(folder / TOKENIZER_CONFIG, readable)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON as Hugging Face's own files look."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ------------------------------------------------------------------ names


def _tensors_of(
    path: str, pattern: str, shape: tuple[int, ...]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and torch shape of the tensors that one parameter is made of."""
    stacked = "{layer}" in pattern
    one = shape[1:] if stacked else shape
    one = one[::-1] if _is_kernel(path) else one
    for layer in range(shape[0] if stacked else 1):
        yield pattern.replace("{layer}", str(layer)), one


def _stored(tensors: Tensors) -> dict[str, str]:
    """From a tensor's name, with the prefix and as it is, to its name on disk."""
    stored = {key: key for key in tensors.keys()}
    return stored | {_PREFIX + key: key for key in stored if not key.startswith(_PREFIX)}


def _is_kernel(path: str) -> bool:
    return path.endswith(("kernel", "lora_a", "lora_b"))


def _path(keys: tuple[Any, ...]) -> str:
    return ".".join(map(str, keys))


def _some(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
