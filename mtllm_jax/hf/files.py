"""The files of a model's folder, local or remote: whole small ones, byte ranges of large ones.

A folder is a path or a URL that fsspec opens, such as gs://bucket/path (with gcsfs installed) or
s3://bucket/path (with s3fs). fsspec alone does the reading, so both take the same road.
"""

import functools
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec

from mtllm_jax.runfolder import is_remote

TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    "tokenizer.json", TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json",
    "sentencepiece.bpe.model", "spiece.model", "tokenizer.model", "vocab.json", "merges.txt",
    "vocab.txt", "chat_template.jinja",
)  # fmt: skip


class Files:
    """The files of one folder, by name. Opening it reads nothing."""

    def __init__(self, folder: str | os.PathLike):
        """ValueError for a URL of a kind that fsspec does not know or that needs a package."""
        self.folder = os.fspath(folder)
        self.is_remote = is_remote(folder)
        try:
            if self.is_remote:
                self._system, self._root = fsspec.url_to_fs(self.folder)
            else:
                self._system, self._root = fsspec.filesystem("file"), os.path.abspath(self.folder)
        except (ImportError, ValueError) as error:
            raise ValueError(f"{self.folder} cannot be opened: {_one_line(error)}") from None

    def is_folder(self) -> bool:
        return bool(self._system.isdir(self._root))

    def names(self) -> list[str]:
        """What lies in the folder, sorted; nothing where there is no such folder."""
        if not self.is_folder():
            return []
        paths = self._system.ls(self._root, detail=False)
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in paths)

    def has(self, name: str) -> bool:
        return bool(self._system.isfile(f"{self._root}/{name}"))

    def size(self, name: str) -> int:
        """In bytes."""
        return int(self._system.size(f"{self._root}/{name}"))

    def read(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        """Bytes `begin` to `end` of a file, of which no others are fetched; fewer if it ends."""
        return bytes(self._system.cat_file(f"{self._root}/{name}", start=begin, end=end))

    def read_json(self, name: str) -> Any:
        """ValueError names the file if it is not JSON."""
        try:
            return json.loads(self.read(name).decode("utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{self.path(name)} is not JSON ({error})") from None

    def path(self, name: str) -> str:
        """The file as messages name it."""
        return os.path.join(self.folder, name)


def local_files(
    folder: str | os.PathLike, names: Sequence[str] = ("config.json", *TOKENIZER_FILES)
) -> Path:
    """A local folder with those of the files `names` that `folder` has, for who needs a path.

    names: they may lie in sub-folders. The result is `folder` itself where that is local, else a
    copy that lasts as long as the process.
    """
    if not is_remote(folder):
        return Path(folder)
    return Path(_copy(os.fspath(folder), tuple(names)).name)


@functools.cache
def _copy(folder: str, names: tuple[str, ...]) -> tempfile.TemporaryDirectory:
    """The object removes its folder when the process ends."""
    files, copy = Files(folder), tempfile.TemporaryDirectory(prefix="mtllm-")
    for name in names:
        if files.has(name):
            path = Path(copy.name) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files.read(name))
    return copy


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
