"""Checkpoints that survive what happens to a run: kills, full disks, flipped bytes, other devices.

The only file that knows orbax. A folder holds one sub-folder per step; orbax writes the arrays and
the position of the data, and `checksums.json` comes last: SHA-256 per file, the leaves, the hash of
the frozen weights. What has no such file was never finished; what does not match it is damaged.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from etils import epath

from mtllm_jax import distributed
from mtllm_jax.runfolder import files_below, write_text

Tree = TypeVar("Tree")

_CHECKSUMS = "checksums.json"
_NEWEST = "newest"  # the last finished step: tells a lost checkpoint from one that never was
_STEP_FOLDER = re.compile(r"(\d+)(\.orbax-checkpoint-tmp.*)?")
_ORBAX_SOURCE = f"{os.sep}orbax{os.sep}checkpoint{os.sep}"

# Orbax prints the traceback of each of its threads before it raises the very same error.
logging.getLogger("absl").addFilter(lambda record: _ORBAX_SOURCE not in record.pathname)


class Position(Protocol):
    """A data iterator whose position is a JSON value, such as grain's DatasetIterator."""

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


class _Unusable(Exception):
    """Why a checkpoint cannot be read: it is damaged, or was never finished."""


class Checkpointer:
    """The checkpoints of one stage. Use as a context manager, or call `close`.

    All processes make the same calls; process 0 alone reads and writes checksums, and deletes.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        *,
        keep_last: int = 2,
        keep_every: int = 0,
        warn: Callable[[str], None] = print,
    ):
        """folder: local or gs://, made by the first save; keep_last: newest checkpoints kept;
        keep_every: so are those of its multiples, 0 = none; warn: told in one sentence when
        `restore` had to leave checkpoints aside."""
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}; it must be at least 1.")
        if keep_every < 0:
            raise ValueError(f"keep_every is {keep_every}; it must be 0 or above.")
        self._folder = _absolute(folder)
        self._keep_last, self._keep_every = keep_last, keep_every
        self._warn = warn
        self._newest: int | None = None  # saved or restored by this object
        self._unusable: set[int] = set()
        self._pending: tuple[int, Future[None]] | None = None
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def save(
        self, step: int, state: Any, iterator: Position, *, frozen_hash: str | None = None
    ) -> None:
        """Save `state`, any pytree of arrays, and the position of `iterator`, as of this call.

        Returns once the state is copied to the host, so its buffers may be donated; writing goes on
        in the background. Saving the step just saved or restored again does nothing.

        Raises OSError if this save or the one before could not be written; what was there before
        is still whole. Raises ValueError where a save would push out what was not read: `folder`
        holds checkpoints but `restore` was not called, or `step` lies before the newest.
        """
        self.wait()
        if step == self._newest:
            return
        newest = self.latest_step() if distributed.is_first() else None
        if newest is not None and (self._newest is None or step < newest):
            raise ValueError(
                f"{self._folder} holds a checkpoint of step {newest} that this run did not go on "
                f"from: restore it, or choose another folder, to save step {step}."
            )
        about = {"step": step, "frozen_hash": frozen_hash, "leaves": _leaves(state)}
        items = {"state": state, "iterator": iterator.get_state()}
        try:
            response = _start(self._folder / str(step), items)
        except Exception as error:
            self._give_up(step, error)
            raise
        self._pending = step, self._background.submit(self._finish, step, response, about)

    def restore(
        self, abstract_state: Tree, iterator: Position, *, frozen_hash: str | None = None
    ) -> tuple[Tree, int] | None:
        """The newest checkpoint that is whole, as (state, step); None if there never was one.

        abstract_state: leaves with shape, dtype and sharding (arrays or jax.ShapeDtypeStruct); the
        state comes back in these shardings, whatever it was saved from, and `iterator` is set to
        the position saved with it. Damaged and unfinished ones are named to `warn` and passed over.

        Raises ValueError if none of the checkpoints is whole, or if it belongs to other frozen
        weights or holds other leaves.
        """
        self.wait()
        newest = distributed.by_first(self._newest_whole)
        if newest is None:
            return None
        step, about = newest
        path = self._folder / str(step)
        if about["frozen_hash"] != frozen_hash:
            raise ValueError(
                f"{path} was trained on frozen weights {_short(about['frozen_hash'])}, but those "
                f"of this run are {_short(frozen_hash)}: use the same model folders, or another "
                "workdir."
            )
        _compare(path, about["leaves"], _leaves(abstract_state))
        loaded = _load(path, {"state": _abstract(abstract_state), "iterator": None})
        iterator.set_state(loaded["iterator"])
        self._newest = step
        return loaded["state"], step

    def latest_step(self) -> int | None:
        """The newest finished step in the folder that `restore` did not find damaged."""
        return max(self._finished(), default=None)

    def wait(self) -> None:
        """Wait until the last save is on disk. Raises OSError if it could not be written."""
        if self._pending is None:
            return
        step, future = self._pending
        self._pending = None
        try:
            future.result()
        except Exception as error:
            self._give_up(step, error)
            raise
        self._newest = step

    def close(self) -> None:
        """Wait for the last save and let go of the background thread."""
        try:
            self.wait()
        finally:
            self._background.shutdown()

    def _newest_whole(self) -> tuple[int, dict[str, Any]] | None:
        """The newest step that passes its checksums, and what they came with; else as `restore`."""
        passed_over = []
        for step in sorted(self._steps(), reverse=True):
            try:
                about = _verify(self._folder / str(step))
            except _Unusable as reason:
                self._unusable.add(step)
                passed_over.append(f"the checkpoint of step {step} {reason}")
                continue
            if passed_over:
                self._warn(f"{'; '.join(passed_over)}: going on from step {step}.")
            return step, about
        finished_before = any(
            path.exists()
            for path in (
                self._folder / _NEWEST,
                *(self._folder / str(step) / _CHECKSUMS for step in self._unusable),
            )
        )
        if finished_before:
            raise ValueError(
                f"no checkpoint in {self._folder} can be read: "
                f"{'; '.join(passed_over) or 'all are gone'}. Put one back, or delete this folder "
                "to start from the beginning."
            )
        if passed_over:
            self._warn(f"{'; '.join(passed_over)}: starting from the beginning.")
        return None

    def _finish(self, step: int, response: ocp.AsyncResponse[None], about: dict[str, Any]) -> None:
        response.result()
        if not distributed.is_first():
            return
        _seal(self._folder / str(step), about)
        write_text(self._folder / _NEWEST, str(step))
        self._unusable.discard(step)
        finished = sorted(self._finished())
        kept = finished[-self._keep_last :]
        if self._keep_every:
            kept += [each for each in finished if each % self._keep_every == 0]
        for other, paths in self._steps().items():
            if other not in kept:
                _remove(paths)

    def _give_up(self, step: int, error: Exception) -> None:
        """Remove what a failed save left; raises OSError, one sentence, if the system is why."""
        before = self.latest_step()
        if distributed.is_first() and step != before:
            _remove(self._steps().get(step, []))
        if (code := _errno(error)) is not None:
            left = "there is none before it" if before is None else f"that of step {before} is kept"
            raise OSError(
                code,
                f"the checkpoint of step {step} could not be written ({os.strerror(code)}); {left}",
                str(self._folder),
            ) from error

    def _steps(self) -> dict[int, list[epath.Path]]:
        """Every step with a folder, finished or not, and its folders."""
        steps: dict[int, list[epath.Path]] = {}
        for path in self._folder.iterdir() if self._folder.exists() else ():
            if match := _STEP_FOLDER.fullmatch(path.name):
                steps.setdefault(int(match[1]), []).append(path)
        return steps

    def _finished(self) -> list[int]:
        return [
            step
            for step in self._steps()
            if step not in self._unusable and (self._folder / str(step) / _CHECKSUMS).exists()
        ]


def save_params(folder: epath.PathLike, tree: Any) -> None:
    """Write a tree of arrays as a checkpoint of its own, in place of what lies in `folder`. It is
    there for all processes after the next `distributed.by_first`."""
    path = _absolute(folder)
    _start(path, {"state": tree}).result()
    if distributed.is_first():
        _seal(path, {"leaves": _leaves(tree)})


def has_params(folder: epath.PathLike) -> bool:
    """Whether `save_params` finished here."""
    return (_absolute(folder) / _CHECKSUMS).exists()


def load_params(folder: epath.PathLike, abstract: Tree) -> Tree:
    """Read what `save_params` wrote, in the shardings of `abstract`.

    Raises ValueError if it is missing or damaged, or has other leaves, shapes or dtypes.
    """
    path = _absolute(folder)
    try:
        about = distributed.by_first(lambda: _verify(path))
    except _Unusable as reason:
        raise ValueError(f"the weights in {path} cannot be read: that folder {reason}.") from None
    _compare(path, about["leaves"], _leaves(abstract))
    return _load(path, {"state": _abstract(abstract)})["state"]


def tree_hash(tree: Any) -> str:
    """A digest of the leaves' names, dtypes, shapes and bits, however they are cut over devices and
    processes.

    The bits are mixed and summed where they lie, the rest is SHA-256: it tells weights apart by
    accident or mistake, and does not withstand an attack.
    """
    named = sorted(_named_leaves(tree), key=lambda named: named[0])
    sums = jax.device_get(_bit_sums([leaf for _, leaf in named]))
    total = hashlib.sha256()
    for (name, leaf), numbers in zip(named, sums, strict=True):
        total.update(f"{name} {_kind(leaf)} {numbers.tolist()}\n".encode())
    return total.hexdigest()


@jax.jit
def _bit_sums(leaves: list[Any]) -> list[Any]:
    """Four sums over the mixed bits and places of each leaf's elements, uint32 [4].

    Sums of integers modulo 2**32 do not depend on their order, and so on no mesh.
    """

    def sums(leaf: Any) -> Any:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        width = jnp.dtype(leaf.dtype).itemsize * 8
        bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{width}")).astype(jnp.uint32)
        place = jnp.zeros(leaf.shape, jnp.uint32)
        for dim, size in enumerate(leaf.shape):
            along = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, dim)
            place = place * jnp.uint32(size) + along
        return jnp.stack(
            [
                jnp.sum(_mixed(bits ^ _mixed(place + np.uint32(i << 30))), dtype=jnp.uint32)
                for i in range(4)
            ]
        )

    return [sums(leaf) for leaf in leaves]


def _mixed(x: Any) -> Any:
    """MurmurHash3's last step for 32 bits: each bit of x changes half of the result's."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _absolute(folder: epath.PathLike) -> epath.Path:
    """orbax refuses relative paths. What has a scheme, gs://, is absolute as it stands."""
    path = epath.Path(folder)
    return path if "://" in os.fspath(path) else path.absolute()


def _context() -> ocp.Context:
    context = ocp.Context()
    # One readable file, and one position for all processes. The iterator's own handler would write
    # a file per process, which another number of processes cannot read.
    context.checkpointables.registry = ocp.handlers.local_registry()
    context.checkpointables.registry.add(ocp.handlers.JsonHandler, checkpointable_name="iterator")
    return context


def _start(path: epath.Path, items: dict[str, Any]) -> ocp.AsyncResponse[None]:
    """Copy to the host and begin to write, in place of anything that lies at `path`."""
    with _context():
        return ocp.save_checkpointables_async(path, items, overwrite=True)


def _load(path: epath.Path, items: dict[str, Any]) -> dict[str, Any]:
    with _context():
        return ocp.load_checkpointables(path, items)


def _abstract(tree: Tree) -> Tree:
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def of(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None) or default
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(of, tree)


def _named_leaves(tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(p, simple=True, separator="/"), leaf) for p, leaf in leaves]


def _kind(leaf: Any) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _leaves(tree: Any) -> dict[str, str]:
    """{name: dtype[shape]}."""
    return {name: _kind(leaf) for name, leaf in _named_leaves(tree)}


def _compare(path: epath.Path, saved: dict[str, str], wanted: dict[str, str]) -> None:
    # Orbax casts another dtype without a word.
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            raise ValueError(
                f"{path} does not fit this run: {name} is {saved.get(name, 'absent')} there and "
                f"{wanted.get(name, 'absent')} here."
            )


def _seal(path: epath.Path, about: dict[str, Any]) -> None:
    """Finish a checkpoint: write the checksums of its files, beside what else is known of it."""
    files = {name: _sha256(path / name) for name in files_below(path) if name != _CHECKSUMS}
    text = json.dumps({**about, "files": files}, sort_keys=True)
    own = hashlib.sha256(text.encode()).hexdigest()
    write_text(path / _CHECKSUMS, f'{{"sha256": "{own}", "checkpoint": {text}}}\n')


def _verify(path: epath.Path) -> dict[str, Any]:
    """What `_seal` wrote. Raises _Unusable unless every file is there and unchanged."""
    if not (path / _CHECKSUMS).exists():
        raise _Unusable("was never finished")
    try:
        sealed = json.loads((path / _CHECKSUMS).read_bytes())
        about = sealed["checkpoint"]
        text = json.dumps(about, sort_keys=True)
        sound = hashlib.sha256(text.encode()).hexdigest() == sealed["sha256"]
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise _Unusable(f"is damaged ({_CHECKSUMS} does not match itself)")
    for name, checksum in about["files"].items():
        try:
            found = _sha256(path / name)
        except FileNotFoundError:
            raise _Unusable(f"is damaged ({name} is missing)") from None
        if found != checksum:
            raise _Unusable(f"is damaged ({name} does not match its checksum)")
    return about


def _sha256(path: epath.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(folders: list[epath.Path]) -> None:
    for folder in folders:
        # First, so that a kill halfway leaves an unfinished checkpoint and not a damaged one.
        (folder / _CHECKSUMS).unlink(missing_ok=True)
        folder.rmtree(missing_ok=True)


def _short(frozen_hash: str | None) -> str:
    return "(none)" if frozen_hash is None else frozen_hash[:12]


def _errno(error: Exception) -> int | None:
    """The system's error number, which tensorstore gives in its text alone."""
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"os_error_code='(\d+)'", str(error))
    return int(match[1]) if match else None
