"""Files of answers: OUTPUT has the rows with theirs, OUTPUT.rejects.jsonl those without one."""

import contextlib
import json
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from etils import epath

from mtllm_jax.data.unlabelled import Entry
from mtllm_jax.runfolder import is_remote, new_file


def check_output(output: str, suffixes: Collection[str]) -> Path:
    """ValueError for an --output that cannot be written, or is there already."""
    if is_remote(output):
        raise ValueError(f"--output={output} is remote; it must be local, to be copied from.")
    target = Path(output)
    if target.suffix not in suffixes:
        raise ValueError(f"--output={output} must end in {' or '.join(suffixes)}.")
    # With its parts it was being written when it was stopped: the rest is to remove them.
    if target.exists() and not parts_of(target).exists():
        raise ValueError(f"--output={output} exists; choose another file, or remove it.")
    return target


def parts_of(target: Path) -> Path:
    """The folder of what is not yet in one file."""
    return target.with_name(f"{target.name}.parts")


def rejects_of(target: Path) -> Path:
    """The file of rows without an answer."""
    return target.with_name(f"{target.name}.rejects.jsonl")


class Answers:
    """OUTPUT and its rejects while they are written. Made by `new_answers`.

    file: OUTPUT. answered: rows written to it, which who writes them counts. rejected: the others.
    """

    def __init__(self, files: contextlib.ExitStack, target: Path):
        self.answered, self.rejected = 0, 0
        self.first = ""  # what is wrong with the first reject
        self.file: BinaryIO = files.enter_context(new_file(epath.Path(target)))
        self._files, self._path = files, epath.Path(rejects_of(target))
        self._rejects: BinaryIO | None = None

    @property
    def rows(self) -> int:
        """All so far."""
        return self.answered + self.rejected

    def reject(self, entry: Entry, reason: str) -> None:
        """Keep a row that has no answer."""
        if self._rejects is None:
            self.first = f"line {entry.line}: {reason}"
            self._rejects = self._files.enter_context(new_file(self._path))
        self._rejects.write(json_line({"line": entry.line, "reason": reason, "row": entry.cells}))
        self.rejected += 1


@contextlib.contextmanager
def new_answers(target: Path, total: int) -> Iterator[Answers]:
    """OUTPUT and, where rows have no answer, its rejects, each written whole or not at all.

    total: rows that there must be. ValueError in the end where there are others, or none has an
    answer.
    """
    with contextlib.ExitStack() as files:
        answers = Answers(files, target)
        yield answers
        if answers.rows != total:
            raise ValueError(f"the rows have changed: they were {total}; start again.")
        if not answers.answered:
            shutil.rmtree(parts_of(target))  # which hold nothing, so that the input can be mended
            raise ValueError(
                f"none of the {total} rows can be answered; the first, {answers.first}."
            )
    if not answers.rejected:
        rejects_of(target).unlink(missing_ok=True)  # of an output that was removed since


def json_line(value: Any) -> bytes:
    """A line of JSON in UTF-8."""
    # Half a surrogate pair, which UTF-8 has not, stays the escape that JSON spells it by.
    text = json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode("utf-8", "backslashreplace")
