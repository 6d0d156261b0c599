"""Stage 1's English text → packed rows: on the fly, or once and for all into a folder.

Both go the same way, so that the rows are the same: texts are drawn into one global order, which is
cut into windows, and each window is tokenised and packed by itself. A shard of a folder
(`prepared`) is the rows of one or several windows. It appears whole or not at all, and then a note
says what it is: `prepare` begun again makes what is missing or damaged, and nothing else.
"""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from mtllm_jax.config import MTLLM
from mtllm_jax.data import packing, prepared
from mtllm_jax.data.packing import Counts, Rows
from mtllm_jax.data.pipeline import begin_worker
from mtllm_jax.data.prepared import MANIFEST, Prepared, shard_name
from mtllm_jax.data.texts import Texts
from mtllm_jax.data.tokenise import (
    Ids,
    Marked,
    SourceTokenizer,
    TargetTokenizer,
    aligned,
    encode_cut,
)
from mtllm_jax.runfolder import differing_fields, write_json
from mtllm_jax.schema import to_dict

_MOST_SHARDS = 1000
_PROBES = ("Hello, world!", "naïve  café 3.14\t東京 Ωμέγα नमस्ते", "")

AnyTexts = Texts | Sequence[str]
Window = tuple[int, list[str], np.ndarray]  # its place, texts, and their numbers
Task = tuple[int, Path, list[Window]]  # a shard's place, file and windows


@dataclasses.dataclass(frozen=True)
class Maker:
    """All that decides what rows texts become, but the texts."""

    source: SourceTokenizer
    target: TargetTokenizer
    english: str
    legacy_source_order: bool
    source_length: int  # tokens of a row
    target_length: int
    packing: bool
    subword_sampling: float
    samplings: int
    seed: int
    mixture: tuple[float, ...] = ()  # weights of the texts' sources; () = by their sizes
    aligns: bool = False  # whether rows tell which tokens of both sides end together

    @property
    def lengths(self) -> dict[str, int]:
        beside = {packing.ALIGNED: self.source_length} if self.aligns else {}
        return {"source": self.source_length, "target": self.target_length} | beside

    @property
    def pad_ids(self) -> dict[str, int]:
        beside = {packing.ALIGNED: 0} if self.aligns else {}
        return {"source": self.source.pad_id, "target": self.target.pad_id} | beside

    def window(self, window: Window) -> tuple[list[bytes], Counts]:
        """Tokenise and pack one window. Texts with nothing in them for one side are left out."""
        place, texts, numbers = window
        if self.aligns:
            sides, (cut_sources, cut_targets) = self._encode_aligned(texts)
        else:
            sources, cut_sources = encode_cut(
                self._encode_source(place), texts, self.source_length, len
            )
            targets, cut_targets = encode_cut(self._encode_target, texts, self.target_length, len)
            sides = {"source": sources, "target": targets}
        # What stands around every text, a language or BOS, is no text.
        frames = self.source.encode([""], self.english) + self.target.encode([""])
        kept = [
            i
            for i, both in enumerate(zip(sides["source"], sides["target"], strict=True))
            if all(len(ids) > len(frame) for ids, frame in zip(both, frames, strict=True))
        ]
        counts = Counts(
            texts=len(texts),
            dropped=len(texts) - len(kept),
            truncated={"source": cut_sources, "target": cut_targets},
        )
        if not kept:
            return [], counts
        records, packed = packing.pack_window(
            [{stream: ids[i] for stream, ids in sides.items()} for i in kept],
            numbers[kept],
            self.lengths,
            packing=self.packing,
        )
        return records, dataclasses.replace(counts, rows=packed.rows, tokens=packed.tokens)

    def _encode_source(self, place: int) -> Callable[[Sequence[str], int], Ids]:
        alpha = self.subword_sampling or None
        seed = zlib.crc32(f"{self.seed}/{place}".encode())
        return lambda texts, length: self.source.encode(
            texts, self.english, sampling_alpha=alpha, seed=seed, max_length=length
        )

    def _encode_target(self, texts: Sequence[str], length: int) -> Ids:
        return self.target.encode(texts, max_length=length)

    def _encode_aligned(self, texts: Sequence[str]) -> tuple[dict[str, Ids], tuple[int, int]]:
        """Both sides and what of them ends together; how many texts were cut on each."""

        def source(texts: Sequence[str], length: int) -> list[tuple[np.ndarray, np.ndarray]]:
            return _zipped(self.source.encode_ends(texts, self.english, max_length=length))

        def target(texts: Sequence[str], length: int) -> list[tuple[np.ndarray, np.ndarray]]:
            return _zipped(self.target.encode_ends(texts, max_length=length))

        def size(text: tuple[np.ndarray, np.ndarray]) -> int:
            return len(text[0])

        sources, cut_sources = encode_cut(source, texts, self.source_length, size)
        targets, cut_targets = encode_cut(target, texts, self.target_length, size)
        sides = {
            "source": [ids for ids, _ in sources],
            "target": [ids for ids, _ in targets],
            packing.ALIGNED: [
                aligned(ours, theirs)
                for (_, ours), (_, theirs) in zip(sources, targets, strict=True)
            ],
        }
        return sides, (cut_sources, cut_targets)

    def fitted(self, texts: AnyTexts) -> "Maker":
        """The same with lengths in the ratio of the texts' tokens, judged by the first window."""
        longest = max(self.lengths.values())
        both = dataclasses.replace(self, source_length=longest, target_length=longest)
        _, counts = both.window(next(_windows(_order(both, texts), texts)))
        _check_some(counts)
        fitted = packing.fitting_lengths(counts.tokens, self.lengths)
        return dataclasses.replace(
            self, source_length=fitted["source"], target_length=fitted["target"]
        )

    def describe(self) -> dict[str, Any]:
        """All of it as JSON values, tokenizers by what they do."""
        fields = [field.name for field in dataclasses.fields(self)]
        about = {name: getattr(self, name) for name in fields if name not in ("source", "target")}
        read = self.source.encode(_PROBES, self.english), self.target.encode(_PROBES)
        return about | {
            "mixture": list(self.mixture),
            "source_tokenizer": _fingerprint(self.source, read[0]),
            "target_tokenizer": _fingerprint(self.target, read[1]),
            "pad_ids": self.pad_ids,
        }


def maker_of(config: MTLLM, source: SourceTokenizer, target: TargetTokenizer, seed: int) -> Maker:
    """How a config wants stage 1's rows. seed: the stage's own."""
    adaptation, training = config.adaptation, config.adaptation.training
    return Maker(
        source=source,
        target=target,
        english=config.english,
        legacy_source_order=config.legacy_source_order,
        source_length=training.source_length,
        target_length=training.target_length,
        packing=training.packing,
        subword_sampling=adaptation.subword_sampling,
        samplings=adaptation.samplings,
        seed=seed,
        mixture=adaptation.mixture,
        aligns=bool(adaptation.aligned_by),
    )


def _zipped(marked: Marked) -> list[tuple[np.ndarray, np.ndarray]]:
    return list(zip(*marked, strict=True))


def _fingerprint(tokenizer: SourceTokenizer | TargetTokenizer, ids: Ids) -> str:
    vocabulary = sorted(tokenizer.vocabulary.items(), key=lambda entry: (entry[1], entry[0]))
    about = [vocabulary, [row.tolist() for row in ids], tokenizer.pad_id]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _order(maker: Maker, texts: AnyTexts) -> np.ndarray:
    return order_of(texts, maker.seed, maker.mixture, maker.samplings)


def order_of(
    texts: AnyTexts, seed: int, mixture: Sequence[float] = (), samplings: int = 1
) -> np.ndarray:
    """The global order: the numbers of the texts, each as often as it is drawn."""
    rng, num_texts = np.random.default_rng(seed), len(texts)
    if not mixture or not isinstance(texts, Texts):
        return rng.permutation(num_texts * samplings) % num_texts
    all_draws = draws_of(texts, mixture, samplings)
    drawn, begin = [], 0
    for size, draws in zip(texts.sizes, all_draws, strict=True):
        rounds, rest = divmod(draws, size)
        numbers = [np.tile(np.arange(size), rounds), rng.permutation(size)[:rest]]
        drawn.append(begin + np.concatenate(numbers))
        begin += size
    return rng.permutation(np.concatenate(drawn))


def draws_of(texts: Texts, mixture: Sequence[float], samplings: int) -> list[int]:
    """How many texts are drawn of each source.

    They are as many in all as without a mixture: the texts of all sources, times samplings. Each
    source gives its weight's share of them, rounded so that the sum is exact. What is drawn of a
    source are all its texts as often as that goes, and of what is left a random choice: no text of
    it is drawn more than once more than another.
    """
    total = len(texts) * samplings
    if not mixture:
        return [size * samplings for size in texts.sizes]
    exact = np.array(mixture) / sum(mixture) * total
    draws = np.floor(exact).astype(np.int64)
    most_cut = np.argsort(draws - exact, kind="stable")
    draws[most_cut[: total - draws.sum()]] += 1
    return draws.tolist()


def _windows(
    order: np.ndarray, texts: AnyTexts, places: Iterable[int] | None = None
) -> Iterator[Window]:
    """The windows of the global order, or those at `places`."""
    windows = packing.windows(len(order))
    for place in range(len(windows)) if places is None else places:
        numbers = order[windows[place].start : windows[place].stop]
        yield place, [texts[i] for i in numbers], numbers


# ---------------------------------------------------------------- on the fly


def make_rows(maker: Maker, texts: AnyTexts) -> Rows:
    """The rows of all texts, in memory. ValueError where no text holds anything."""
    records: list[bytes] = []
    counts = Counts()
    for window in _windows(_order(maker, texts), texts):
        made, counted = maker.window(window)
        records += made
        counts += counted
    _check_some(counts)
    return packing.in_memory(records, maker.lengths, maker.pad_ids, counts)


def _check_some(counts: Counts) -> None:
    if not counts.rows:
        raise ValueError(f"none of the {counts.texts} texts of stage 1 holds a token.")


# ---------------------------------------------------------------- once and for all


def prepare(
    folder: str | os.PathLike[str],
    maker: Maker,
    texts: Texts,
    *,
    workers: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Prepared:
    """Write the rows of all texts, or what of them is not there yet, and open them.

    workers: processes that tokenise and pack; 0 = this one. progress: told (texts done, in all).
    Raises ValueError for a folder of something else, or of other rows.
    """
    path = Path(folder)
    order = _order(maker, texts)
    num_windows = len(packing.windows(len(order)))
    made_from = {"texts": [to_dict(read) for read in texts.reads], **maker.describe()}
    manifest = _begun(path, made_from, num_windows)
    shards = manifest["shards"]
    files = [path / shard_name(i, len(shards)) for i in range(len(shards))]
    for i, file in enumerate(files):
        shard = shards[i] or prepared.read_note(file)
        shards[i] = shard if shard and prepared.is_whole(file, shard) else None

    def tasks() -> Iterator[Task]:
        for i in [i for i, shard in enumerate(shards) if shard is None]:
            first, end = (num_windows * n // len(shards) for n in (i, i + 1))
            yield i, files[i], list(_windows(order, texts, range(first, end)))

    def show() -> None:
        progress(sum(shard["counts"]["texts"] for shard in shards if shard), len(order))

    show()
    for i, shard in _made(maker, tasks(), workers):
        shards[i] = shard
        show()
    counts = sum((Counts(**shard["counts"]) for shard in shards), Counts())
    _check_some(counts)
    manifest |= {"finished": True, "counts": dataclasses.asdict(counts)}
    write_json(epath.Path(path / MANIFEST), manifest)
    for leftover in (*path.glob(".*.unfinished"), *map(prepared.note_of, files)):
        leftover.unlink(missing_ok=True)
    return Prepared(path)


def _begun(path: Path, made_from: dict[str, Any], num_windows: int) -> dict[str, Any]:
    """The manifest of an earlier start, or a new one."""
    if prepared.is_prepared(path):
        manifest = prepared.read_manifest(path)
        if differences := differing_fields(manifest["made_from"], made_from):
            raise ValueError(
                f"{path} holds rows of other texts or settings ({', '.join(differences[:3])});"
                " choose another --to."
            )
        return manifest
    try:
        path.mkdir(parents=True, exist_ok=True)
        foreign = sorted(file.name for file in path.iterdir() if not file.name.startswith("."))
        if foreign:
            raise ValueError(f"{path} holds {foreign[0]!r}; --to must be a new or empty folder.")
        manifest = {
            "format": prepared.FORMAT,
            "finished": False,
            "made_from": made_from,
            "shards": [None] * min(num_windows, _MOST_SHARDS),
        }
        write_json(epath.Path(path / MANIFEST), manifest)
    except OSError as error:
        raise ValueError(f"--to {path} cannot be written to: {error.strerror}.") from None
    return manifest


def _made(
    maker: Maker, tasks: Iterable[Task], workers: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Shards as they are finished: their places and lines of the manifest."""
    if not workers:
        for place, file, windows in tasks:
            yield place, _write_shard(maker, file, windows)
        return
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _begin_worker, (maker,)
    )
    running: dict[Future[dict[str, Any]], int] = {}
    try:
        for place, file, windows in tasks:
            running[pool.submit(_work, file, windows)] = place
            if len(running) > workers:
                yield from _finished(running)
        while running:
            yield from _finished(running)
    except BrokenProcessPool:
        raise ValueError(
            f"one of the {workers} --workers was killed, as happens where memory is short; the same"
            " command goes on, with fewer if need be."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(running: dict[Future[Any], int]) -> Iterator[tuple[int, Any]]:
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        place = running.pop(future)
        try:
            yield place, future.result()
        except ValueError as error:  # raised anew, as one of this process
            raise ValueError(str(error)) from None


_worker_maker: Maker  # in a worker: tokenizers are read once


def _begin_worker(maker: Maker) -> None:
    global _worker_maker
    begin_worker()
    _worker_maker = maker


def _work(file: Path, windows: list[Window]) -> dict[str, Any]:
    return _write_shard(_worker_maker, file, windows)


def _write_shard(maker: Maker, file: Path, windows: list[Window]) -> dict[str, Any]:
    """Write one shard, whole or not at all; returns its line of the manifest."""
    counts = Counts()
    most_texts = 0
    # By process: should two prepare the same folder, each renames what it has finished itself.
    unfinished = file.parent / f".{file.name}.{os.getpid()}.unfinished"
    try:
        writer = ArrayRecordWriter(os.fspath(unfinished), "group_size:1")
        for window in windows:
            records, counted = maker.window(window)
            for record in records:
                writer.write(record)
            counts += counted
            most_texts = max(most_texts, packing.most_texts(records))
        writer.close()
    except RuntimeError as error:
        raise ValueError(f"{file} cannot be written ({str(error).splitlines()[0]}).") from None
    about = {
        "rows": counts.rows,
        "most_texts": most_texts,
        "bytes": unfinished.stat().st_size,
        "sha256": prepared.sha256(unfinished),
        "counts": dataclasses.asdict(counts),
    }
    os.replace(unfinished, file)
    write_json(epath.Path(prepared.note_of(file)), about)
    return about
