"""The run folder: what a run has written so far, and whose it is.

WORKDIR/config.json, one folder per stage (checkpoints/, metrics.jsonl, done.json), predictions/,
results.json and report.html. A folder belongs to one config for ever; files appear whole or not
at all; one run at a time works in it. Of several processes the first alone writes, and all see what
it wrote from the next `distributed.by_first` on.
"""

import atexit
import contextlib
import errno
import fcntl
import functools
import importlib.util
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import fsspec.config
from etils import epath

from mtllm_jax import distributed

_LOCK = ".lock"
_ABSENT = object()
# Some network file systems have no locks; a run there is worth more than the refusal of a second.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)

# Between two copies of a file that grows to an object store: so many seconds, and so many times
# what the last one took.
_COPY_SECONDS, _COPY_SHARE = 60.0, 100.0

# gcsfs would remember what a folder held, and not see what tensorstore or another process adds.
fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False


class RunFolder:
    """The folder of one run, made or opened; held by this process until it ends or `close`, of
    several by the first. In an object store nothing is held: there are no locks."""

    def __init__(self, path: os.PathLike[str] | str, config: Mapping[str, Any]) -> None:
        """Open `path` for the run that `config` (plain values, ready for JSON) describes.

        Raises ValueError, before any file is written or changed, if the path is no folder, cannot
        be written to, holds files but no run, holds a run of another config, or is in use; or if
        this process does not see what the first one wrote.
        """
        self.path = run_path(path)
        self._lock: int | None = None
        distributed.by_first(lambda: self._open(config))
        if not (self.path / "config.json").exists():
            raise ValueError(
                f"workdir {self.path} does not hold what process 0 wrote to it; it must lie where"
                " all processes see it, on a shared file system or at gs://."
            )

    def _open(self, config: Mapping[str, Any]) -> None:
        with _admitted(self.path):
            _is_run_of(self.path, config)
            if not is_remote(self.path):
                self._hold()
            try:
                # Another process may have made the run between the first look and the lock.
                if not _is_run_of(self.path, config):
                    self.write_json("config.json", config)
            except (OSError, ValueError):
                self.close()
                raise

    def _hold(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _take_lock(self.path / _LOCK)
        except OSError as error:
            raise ValueError(
                f"workdir {self.path} cannot be written to: {error.strerror}."
            ) from None

    def close(self) -> None:
        """Let other processes use the folder; the end of the process does the same."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def stage(self, name: str) -> "StageFolder":
        """The folder of one stage, made if it is not there."""
        return StageFolder(self.path / name)

    def read_json(self, name: str) -> Any:
        return read_json(self.path / name)

    def write_json(self, name: str, value: Any) -> None:
        write_json(self.path / name, value)

    def read_jsonl(self, name: str) -> list[Any]:
        return read_jsonl(self.path / name)

    def write_jsonl(self, name: str, rows: Iterable[Any]) -> None:
        write_jsonl(self.path / name, rows)

    def write_text(self, name: str, text: str) -> None:
        write_text(self.path / name, text)


class StageFolder:
    """The folder of one stage: its checkpoints, its metrics, and whether it is done.

    notes: what the stage has to say of itself; goes into done.json.
    """

    def __init__(self, path: epath.Path) -> None:
        self.path = path
        self.notes: dict[str, Any] = {}
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        path.mkdir(parents=True, exist_ok=True)

    def is_done(self) -> bool:
        return (self.path / "done.json").exists()

    def finish(self, info: Mapping[str, Any]) -> None:
        """Mark the stage as done, so that later starts skip it; `info` and the notes are kept."""
        write_json(self.path / "done.json", {**info, **self.notes})

    def info(self) -> dict[str, Any]:
        """What `finish` was given, and the notes."""
        return dict(read_json(self.path / "done.json"))


def finished_results(
    path: os.PathLike[str] | str, config: Mapping[str, Any]
) -> dict[str, Any] | None:
    """results.json of the run in `path`; None while it is not finished, or not there at all.

    Writes nothing. Raises ValueError as `RunFolder` does for a folder that cannot be this run's.
    """
    folder = run_path(path)
    last = ("results.json", "report.html")
    with _admitted(folder):
        begun = _is_run_of(folder, config)
    if not begun or not all((folder / name).exists() for name in last):
        return None
    results = read_json(folder / "results.json")
    return results if results.get("systems") else None


def run_path(folder: os.PathLike[str] | str) -> epath.Path:
    """A --workdir as a path. ValueError for an object store that runs cannot be in."""
    path = epath.Path(folder)
    if is_remote(path):
        if not re.match("gs://[^/]", os.fspath(path)):
            raise ValueError(f"workdir {folder} must be a local folder or gs://BUCKET/FOLDER.")
        if importlib.util.find_spec("gcsfs") is None:
            raise ValueError(f"workdir {folder} needs gcsfs: pip install -e '.[gcs]'")
    return path


@contextlib.contextmanager
def _admitted(path: epath.Path) -> Iterator[None]:
    """Raise ValueError where an object store says that the user may not, or that there is no such
    bucket; whatever else keeps a run from it may be gone when it is started again."""
    try:
        yield
    except Exception as error:
        denied = str(error).startswith("Forbidden") or getattr(error, "code", None) == 401  # gcsfs
        if not is_remote(path) or not (denied or isinstance(error, FileNotFoundError)):
            raise
        why = "access is denied" if denied else "there is no such bucket"
        raise ValueError(f"workdir {path} cannot be used: {why}.") from None


def _is_run_of(path: epath.Path, config: Mapping[str, Any]) -> bool:
    """Whether the folder holds this run; False if it is new, ValueError if it is another's."""
    if not path.exists():
        return False
    if not path.is_dir():
        raise ValueError(f"workdir {path} is a file; it must be a folder, or a new name.")
    try:
        names = [entry.name for entry in path.iterdir()]
    except OSError as error:
        raise ValueError(f"workdir {path} cannot be read: {error.strerror}.") from None
    if "config.json" not in names:
        # A process killed on its way in leaves its lock, and perhaps an unfinished file.
        foreign = sorted(name for name in names if name != _LOCK and not _is_unfinished(name))
        if foreign:
            raise ValueError(
                f"workdir {path} holds {foreign[0]!r} but no config.json, so it is not a"
                " run; choose a new or empty folder with --workdir."
            )
        return False
    differences = differing_fields(read_json(path / "config.json"), _through_json(config))
    if differences:
        more = f" and {len(differences) - 6} more" if len(differences) > 6 else ""
        raise ValueError(
            f"workdir {path} holds a run of another config ("
            f"{', '.join(differences[:6])}{more}); choose another --workdir, or go on with that"
            f" run by --config={path / 'config.json'} --workdir={path}."
        )
    return True


def differing_fields(old: Any, new: Any) -> list[str]:
    """`dotted.field old → new` for each field in which two nested JSON values differ."""
    before, after = _flat(old), _flat(new)
    return [
        f"{name} {_show(before.get(name, _ABSENT))} → {_show(after.get(name, _ABSENT))}"
        for name in {**before, **after}
        if before.get(name, _ABSENT) != after.get(name, _ABSENT)
    ]


def changed_since(path: epath.Path, digests: Mapping[str, str], *, write: bool) -> list[str]:
    """The names of the digests that are others than those in the file of an earlier start.

    write: where there is no file, write it; without, its absence is a ValueError.
    """
    if write and not path.exists():
        write_json(path, digests)
        return []
    before = read_json(path)
    return [name for name in digests if digests[name] != before[name]]


def read_json(path: epath.Path) -> Any:
    """Read one JSON file; ValueError names the file, and the line if it is not JSON."""
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}, is not valid JSON: {error.msg}.") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None


def read_jsonl(path: epath.Path) -> list[Any]:
    """The JSON values of a file that `write_jsonl` has written."""
    # Not `splitlines`: it also ends lines at characters that JSON strings may hold.
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def write_json(path: epath.Path, value: Any) -> None:
    """Write indented JSON, whole or not at all. NaN is refused: other readers stop at it."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: epath.Path, rows: Iterable[Any]) -> None:
    """Write one JSON value per line, whole or not at all."""
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    write_text(path, "".join(lines))


def write_text(path: epath.Path, text: str) -> None:
    """Write a UTF-8 file so that a reader sees the old one or the new one, also after a crash; of
    several processes the first writes it."""
    if distributed.is_first():
        with new_file(path) as file:
            file.write(text.encode())


@contextlib.contextmanager
def new_file(path: epath.Path) -> Iterator[BinaryIO]:
    """A file to write, which has its name, or takes another's place, once all of it is there."""
    if is_remote(path):
        # Not the object itself: closed by an error halfway, it would be kept as far as it went.
        with tempfile.NamedTemporaryFile(suffix=path.suffix) as scratch:
            yield scratch  # type: ignore[misc]
            scratch.flush()
            upload(scratch.name, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # One name per file: a leftover of a killed process is written over, not heaped up.
    temporary = path.parent / f".{path.name}.unfinished"
    try:
        with naming(path):
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def naming(path: os.PathLike[str]) -> Iterator[None]:
    """Name the file in an error that does not, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


@contextlib.contextmanager
def made_locally(folder: os.PathLike[str] | str, last: str = "") -> Iterator[Path]:
    """Where to make a folder: there, if it is local, or else where it is copied from at the end.

    last: the file in it that is copied last: where that is, all of it is.
    """
    if not is_remote(folder):
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="mtllm-") as scratch:
        made = Path(scratch) / "made"
        yield made
        for name in sorted(files_below(made), key=last.__eq__):
            upload(made / name, f"{os.fspath(folder)}/{name}")


class Mirror:
    """A local folder, `path`, whose files grow and are copied to one in an object store, where
    nothing can be appended to. What is not copied when the process is killed is lost."""

    def __init__(self, folder: epath.Path) -> None:
        self._folder = folder
        self._made = tempfile.TemporaryDirectory(prefix="mtllm-")
        self.path = Path(self._made.name)
        self._due = time.monotonic() + _COPY_SECONDS

    def copy(self) -> None:
        began = time.monotonic()
        for name in files_below(self.path):
            upload(self.path / name, self._folder / name)
        ended = time.monotonic()
        self._due = ended + max(_COPY_SECONDS, _COPY_SHARE * (ended - began))

    def copy_if_due(self) -> None:
        """Once a minute, or less often where that would take more than a hundredth of the time.

        A copy that fails is left to the next: what keeps failing, `copy` tells.
        """
        if time.monotonic() > self._due:
            self._due = time.monotonic() + _COPY_SECONDS
            with contextlib.suppress(Exception):  # gcsfs and aiohttp have errors of many kinds
                self.copy()


@functools.cache
def scratch() -> Path:
    """A local folder of this process, gone when it ends."""
    folder = tempfile.mkdtemp(prefix="mtllm-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def upload(file: os.PathLike[str] | str, to: os.PathLike[str] | str) -> None:
    """Copy a local file to an object store, where it appears, or takes another's place, whole."""
    store, name = fsspec.url_to_fs(os.fspath(to))
    store.put_file(os.fspath(file), name)


def files_below(folder: os.PathLike[str] | str) -> list[str]:
    """The names of all files in a folder, local or not, and in those in it; relative to it."""
    store, root = fsspec.url_to_fs(os.fspath(folder))
    return sorted(name.removeprefix(f"{root}/") for name in store.find(root))


def _take_lock(path: epath.Path) -> int:
    """Hold the folder through an open file: the kernel lets go of it however the process ends."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 32).decode().strip() or "unknown"
        os.close(descriptor)
        raise ValueError(
            f"workdir {path.parent} is in use by another process ({holder}); wait for it or choose"
            " another --workdir."
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(descriptor)
            raise
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor


def is_remote(path: os.PathLike[str] | str) -> bool:
    """Whether the path is a URL, as in object stores, and none of a mounted file system."""
    return "://" in os.fspath(path)


def _is_unfinished(name: str) -> bool:
    return name.startswith(".") and name.endswith(".unfinished")


def _through_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _flat(value: Any, where: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {where: value}
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        flat |= _flat(inner, f"{where}.{name}" if where else name)
    return flat


def _show(value: Any) -> str:
    if value is _ABSENT:
        return "(absent)"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."
