"""A file of texts in any language → a file of labels or vectors: what `launch/predict.py` does.

The input is read three times, a window of rows at a time: once to know at the door what is wrong
with it, once for the model, whose arrays go to OUTPUT.parts (`parts`), and once to be written out
with them. No more than a window is in memory, and a stopped start loses no more than one.

M rows, C classes, D width.
"""

import contextlib
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from mtllm_jax import api, distributed, sharding
from mtllm_jax.answers import check_output, json_line, new_answers, parts_of, rejects_of
from mtllm_jax.config import Mesh
from mtllm_jax.data.unlabelled import Scan, Window, scan, windows
from mtllm_jax.metrics import Console
from mtllm_jax.parts import Parts
from mtllm_jax.recipes.stacking import WEIGHTS
from mtllm_jax.runfolder import new_file

STANDARD_INPUT = "-"
_SUFFIXES = (".jsonl", ".parquet")
_DIGITS = 6  # of a probability

Cells = dict[str, Any]


def predict(
    model: str,
    rows: str,
    output: str,
    *,
    vectors: bool,
    language: str,
    batch_rows: int,
    fsdp: int,
    console: Console,
) -> None:
    """Answer the rows of a file, going on where an earlier start stopped.

    model: as of `api.load`. rows: the file, or "-" for JSON lines on standard input. output: .jsonl
    or .parquet, to hold the rows as they were with "prediction" and "probabilities", or with
    "vector". Rows that have no answer go to OUTPUT.rejects.jsonl with the reason. language: of rows
    that do not say theirs; "" = they must. batch_rows, fsdp: as of `open_model`. All processes of a
    job call it: each answers its share of windows, and process 0 writes.

    Raises ValueError, naming the flag or the file and the line, before the model is read where a
    file or flag can be no good, and in the end where no row could be answered.
    """
    target = Path(output)
    source = (
        target.with_name(f"{target.name}.stdin.jsonl") if rows == STANDARD_INPUT else Path(rows)
    )
    scans: list[Scan] = []

    def look() -> int:
        check_output(output, _SUFFIXES)
        if rows == STANDARD_INPUT:
            _keep_standard_input(source)
        try:
            columns = ["vector"] if vectors else ["prediction", "probabilities"]
            required = ["text"] if language else ["text", "language"]
            instead = {"text": "context"}  # of multiple choice
            found = scan(source, required=required, reserved=columns, instead=instead)
            scans.append(found)
        except ValueError:
            _forget_standard_input(rows, source)
            raise
        return scans[0].rows

    fingerprint = check_model(model)
    total = distributed.by_first(look)
    opened = open_model(model, batch_rows=batch_rows, fsdp=fsdp)
    if not vectors and opened.kind == "none":
        raise ValueError(f"--model={model} has no head; --vectors has its vectors.")
    answers = "vectors" if vectors else "probabilities"
    parts = Parts(parts_of(target), {"model": fingerprint, "answers": answers})

    def all_windows() -> Iterator[Window]:
        choices = opened.kind == "multiple_choice" and not vectors
        return windows(
            source,
            api.WINDOW,
            language=language,
            readable=opened.languages,
            refusal=opened.refusal if choices else None,
        )

    answer(opened, parts, all_windows(), total, vectors=vectors, console=console)
    if not distributed.is_first():
        return
    with console.progress(total, "writing", unit="rows") as progress:
        rejects = _write_out(
            target,
            opened,
            all_windows(),
            parts,
            scans[0],
            vectors=vectors,
            told=progress.update,
        )
    parts.remove()
    _forget_standard_input(rows, source)
    console.print(f"{target}: {total - rejects} rows")
    if rejects:
        console.warn(f"rows without an answer: {rejects}; {rejects_of(target)} says why")


def check_model(folder: str) -> str:
    """A digest that tells a model from others. ValueError for a folder of none."""
    path = epath.Path(folder)
    if not (path / "config.json").exists():
        raise ValueError(
            f"--model={folder} holds no config.json; it must be the folder of a finished run, or"
            " what launch/export.py wrote of one."
        )
    told = hashlib.sha256((path / "config.json").read_bytes())
    for weights in sorted(path.glob("*.safetensors")):
        about = weights.stat()
        told.update(f"{weights.name} {about.length} {about.mtime}".encode())
    # Of a run: what was trained, and what the models' weights were, which opening it compares.
    for name in ("distillation/done.json", WEIGHTS):
        if (path / name).exists():
            told.update((path / name).read_bytes())
    return told.hexdigest()[:16]


def open_model(folder: str, *, batch_rows: int, fsdp: int) -> api.Model:
    """A model on all devices of this process.

    batch_rows: texts in a forward pass, rounded up to what the devices can share. fsdp: devices
    that each copy of the weights is cut over. ValueError as of `api.load`.
    """
    if batch_rows < 1:
        raise ValueError(f"--batch_rows is {batch_rows}; it must be at least 1.")
    mesh = mesh_of(fsdp)
    return api.load(folder, batch_rows=sharding.rows_for(batch_rows, mesh), mesh=mesh)


def mesh_of(fsdp: int) -> jax.sharding.Mesh:
    """All devices of this process. fsdp: those that each copy of the weights is cut over."""
    devices = jax.local_devices()
    if fsdp < 1:
        raise ValueError(f"--fsdp is {fsdp}; it must be at least 1.")
    if len(devices) % fsdp:
        raise ValueError(f"--fsdp is {fsdp}; it must divide the {len(devices)} devices.")
    return sharding.make_mesh(Mesh(data=-1, fsdp=fsdp), devices)


def answer(
    model: api.Model,
    parts: Parts,
    all_windows: Iterator[Any],
    total: int,
    *,
    vectors: bool,
    console: Console,
) -> None:
    """Have the model's array for each window in `parts`: `row_shares`, or [M, D] of `vectors`."""

    def run(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
        return model.encode(*api.columns(rows)) if vectors else model.row_shares(rows)

    count = jax.process_count()
    what = "answering" if count == 1 else f"answering, process 0 of {count}"
    begins = range(jax.process_index() * api.WINDOW, total, count * api.WINDOW)
    mine = sum(min(api.WINDOW, total - begin) for begin in begins)
    with console.progress(mine, what, unit="rows") as progress:
        parts.fill(all_windows, run, progress.update)


def _keep_standard_input(path: Path) -> None:
    """A copy of it, as it is read three times, and by other processes."""
    with new_file(epath.Path(path)) as file:
        shutil.copyfileobj(sys.stdin.buffer, file)


def _forget_standard_input(rows: str, path: Path) -> None:
    if rows == STANDARD_INPUT:
        path.unlink()


def _write_out(
    target: Path,
    model: api.Model,
    all_windows: Iterator[Window],
    parts: Parts,
    found: Scan,
    *,
    vectors: bool,
    told: Callable[[int], None],
) -> int:
    """Write OUTPUT and its rejects. Returns the number of rejects. ValueError as `new_answers`."""
    with new_answers(target, found.rows) as out, contextlib.ExitStack() as files:
        if target.suffix == ".parquet":
            table = _Table(model, found, vectors=vectors)
            writer = files.enter_context(pq.ParquetWriter(out.file, table.schema))
        for window in all_windows:
            values = parts.read(window)
            if target.suffix == ".parquet":
                writer.write_batch(table.batch(window.rows, values))
            else:
                answers = _vectors(values) if vectors else _labels(model, window.rows, values)
                pairs = zip(window.rows, answers, strict=True)
                out.file.writelines(json_line(row | answer) for row, answer in pairs)
            out.answered += len(window.rows)
            for entry in window.entries:
                if entry.problem:
                    out.reject(entry, entry.problem)
            told(out.rows)
    return out.rejected


def _labels(model: api.Model, rows: Sequence[Cells], share_MC: np.ndarray) -> Iterator[Cells]:
    for row, share_C in zip(rows, share_MC, strict=True):
        answer = model.answer(row, share_C)
        shares = answer["probabilities"].items()
        yield answer | {"probabilities": {name: round(share, _DIGITS) for name, share in shares}}


def _vectors(h_MD: np.ndarray) -> Iterator[Cells]:
    for h_D in h_MD:
        # By way of text: the fewest digits that tell a float32, not those of a double.
        yield {"vector": [float(text) for text in h_D.astype(str)]}


class _Table:
    """Rows and their answers as Arrow has them, of one schema for all windows.

    A column of the input keeps its type where it is text, whole numbers, numbers or true and false;
    another, or a mixed one, becomes JSON as text. Probabilities are in the order of labels; of
    choices they are a list in theirs.
    """

    def __init__(self, model: api.Model, found: Scan, *, vectors: bool):
        self._model, self._as_vectors = model, vectors
        types = {name: _arrow_type(name, kinds) for name, kinds in found.types.items()}
        types.setdefault("language", pa.string())
        self._columns = dict(types)
        if vectors:
            types["vector"] = pa.list_(pa.float32(), model.width)
        else:
            types["prediction"] = pa.string()
            by_label = pa.struct([(label, pa.float32()) for label in model.labels])
            choices = model.kind == "multiple_choice"
            types["probabilities"] = pa.list_(pa.float32()) if choices else by_label
        self.schema = pa.schema(list(types.items()))

    def batch(self, rows: Sequence[Cells], values: np.ndarray) -> pa.RecordBatch:
        arrays = [
            pa.array([_arrow_cell(row.get(name), kind) for row in rows], kind)
            for name, kind in self._columns.items()
        ]
        if self._as_vectors:
            flat = pa.array(values.reshape(-1), pa.float32())
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, self._model.width))
        else:
            pairs = zip(rows, values, strict=True)
            answers = [self._model.answer(row, share_C) for row, share_C in pairs]
            shares = [answer["probabilities"] for answer in answers]
            if self._model.kind == "multiple_choice":
                shares = [[each[name] for name in sorted(each, key=int)] for each in shares]
            best = [answer["prediction"] for answer in answers]
            arrays += [pa.array(best, pa.string()), pa.array(shares, self.schema.types[-1])]
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)


def _arrow_type(name: str, kinds: set[type]) -> pa.DataType:
    if name in ("text", "text_pair", "language"):
        return pa.string()
    if kinds == {bool}:
        return pa.bool_()
    if kinds == {int}:
        return pa.int64()
    return pa.float64() if kinds in ({float}, {int, float}) else pa.string()


def _arrow_cell(cell: Any, kind: pa.DataType) -> Any:
    if cell is None or kind != pa.string():
        return cell
    text = cell if isinstance(cell, str) else json.dumps(cell, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode()
