"""The run folder: what a run has written so far, and whose it is.

WORKDIR/config.json, one folder per stage (checkpoints/, metrics.jsonl, done.json), predictions/,
results.json and report.html. A folder belongs to one config for ever; files appear whole or not
at all; one run at a time works in it. Of several processes the first alone writes, and all see what
it wrote from the next `distributed.by_first` on.
"""

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

from etils import epath

from mtllm_jax import distributed

_LOCK = ".lock"
_ABSENT = object()
# Some network file systems have no locks; a run there is worth more than the refusal of a second.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class RunFolder:
    """The folder of one run, made or opened; held by this process until it ends or `close`, of
    several by the first."""

    def __init__(self, path: os.PathLike[str] | str, config: Mapping[str, Any]) -> None:
        """Open `path` for the run that `config` (plain values, ready for JSON) describes.

        Raises ValueError, before any file is written or changed, if the path is no folder, cannot
        be written to, holds files but no run, holds a run of another config, or is in use; or if
        this process does not see what the first one wrote.
        """
        self.path = epath.Path(path)
        self._lock: int | None = None
        distributed.by_first(lambda: self._open(config))
        if not (self.path / "config.json").exists():
            raise ValueError(
                f"workdir {self.path} does not hold what process 0 wrote to it; it must lie where"
                " all processes see it, on a shared file system or at gs://."
            )

    def _open(self, config: Mapping[str, Any]) -> None:
        _is_run_of(self.path, config)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if is_local(self.path):
                self._lock = _take_lock(self.path / _LOCK)
        except OSError as error:
            raise ValueError(
                f"workdir {self.path} cannot be written to: {error.strerror}."
            ) from None
        try:
            # Another process may have made the run between the first look and the lock.
            if not _is_run_of(self.path, config):
                self.write_json("config.json", config)
        except (OSError, ValueError):
            self.close()
            raise

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
    folder = epath.Path(path)
    last = ("results.json", "report.html")
    if not _is_run_of(folder, config) or not all((folder / name).exists() for name in last):
        return None
    results = read_json(folder / "results.json")
    return results if results.get("systems") else None


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
    path.parent.mkdir(parents=True, exist_ok=True)
    if not is_local(path):
        with path.open("wb") as file:  # object stores show an object when all of it is there
            yield file
        return
    # One name per file: a leftover of a killed process is written over, not heaped up.
    temporary = path.parent / f".{path.name}.unfinished"
    with open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


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


def is_local(path: os.PathLike[str] | str) -> bool:
    """Whether the path is one of a mounted file system, and no object store's."""
    return "://" not in os.fspath(path)


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
