"""Texts → rows: two token streams of the same texts, packed under matching segment ids.

B rows, S encoder positions, T decoder positions, N texts per row at most.

A text is a dict of token arrays by stream, "source" (encoder side) and "target" (decoder side) or
one of them. Rows are packed in the global order, before anything is split over processes: a packed
row is then an element of a random-access data set, and one number says where a run stands. They
are packed a window of texts at a time, so that what a window becomes depends on nothing else.

A row is kept as a record, the same in memory and on disk: little-endian int32, without padding. For
n texts and streams in the order of `lengths`: n; the n numbers of the texts; for each stream the n
numbers of tokens; for each stream its tokens, text after text.
"""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

_WINDOW = 10_000  # texts packed together at most: more fill better, and take more memory
_INT = "<i4"
_SIDES = {"source": "encoder side", "target": "LLM side"}

# A stream beside them: for each source token the number, from 1, of the token of its text's target
# that ends where it does, or 0.
ALIGNED = "aligned"


@dataclasses.dataclass(frozen=True)
class Counts:
    """What became of texts on their way into rows; `+` joins those of several windows."""

    texts: int = 0  # read; as often as they are segmented
    dropped: int = 0  # of these, with nothing in them for one of the sides
    truncated: Mapping[str, int] = dataclasses.field(default_factory=dict)  # by stream
    rows: int = 0
    tokens: Mapping[str, int] = dataclasses.field(default_factory=dict)  # in the rows, by stream

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.texts + other.texts,
            self.dropped + other.dropped,
            _sum(self.truncated, other.truncated),
            self.rows + other.rows,
            _sum(self.tokens, other.tokens),
        )


def _sum(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in {**one, **other}}


@dataclasses.dataclass(frozen=True)
class Rows:
    """Packed rows, as grain's random-access sources are.

    A row is {stream}_ids and {stream}_segments, int32 [length] (segment 0 = padding, else 1..N),
    and example, int32 [N]: the number of the text in each segment, from 1 (0 = no text).
    """

    records: Sequence[bytes]  # in memory, or read from files
    lengths: Mapping[str, int]  # positions of a row, by stream
    pad_ids: Mapping[str, int]
    most_texts: int  # N
    counts: Counts
    digest: str  # SHA-256 of the records, or of what a manifest says of their files

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        record = np.frombuffer(self.records[row], _INT)
        num_texts, place = record[0], 1 + record[0]
        arrays = {"example": np.zeros(self.most_texts, np.int32)}
        arrays["example"][:num_texts] = record[1:place]
        sizes = record[place : place + num_texts * len(self.lengths)].reshape(-1, num_texts)
        place += sizes.size
        for (stream, length), sizes_N in zip(self.lengths.items(), sizes, strict=True):
            filled = sizes_N.sum()
            ids = np.full(length, self.pad_ids[stream], np.int32)
            ids[:filled] = record[place : place + filled]
            segments = np.zeros(length, np.int32)
            segments[:filled] = np.repeat(np.arange(1, num_texts + 1), sizes_N)
            arrays |= {f"{stream}_ids": ids, f"{stream}_segments": segments}
            place += filled
        return arrays

    @property
    def fill(self) -> dict[str, float]:
        """Useful positions ÷ all positions, of each side that there is."""
        tokens, lengths = self.counts.tokens, self.lengths
        return {
            name: tokens[name] / (len(self) * length)
            for name, length in lengths.items()
            if name in _SIDES
        }

    def notes(self) -> dict[str, Any]:
        """The counts and the fill, for JSON."""
        fill = {stream: round(share, 4) for stream, share in self.fill.items()}
        return dataclasses.asdict(self.counts) | {"fill": fill}

    def told(self) -> str:
        """The same as a line for the terminal."""
        counts = self.counts
        filled = ", ".join(f"{_SIDES[name]} {share:.1%} full" for name, share in self.fill.items())
        cut = ", ".join(f"{_SIDES[name]} {count}" for name, count in counts.truncated.items())
        return (
            f"{counts.texts} texts in {counts.rows} rows: {filled}; {counts.dropped} empty ones"
            f" dropped" + (f"; cut: {cut}" if cut else "")
        )


def pack(
    texts: Sequence[Mapping[str, np.ndarray]],
    lengths: Mapping[str, int],
    pad_ids: Mapping[str, int],
    *,
    packing: bool = True,
) -> Rows:
    """Rows of `lengths[stream]` positions, in memory; texts are numbered in their order.

    With packing=False a row holds one text. Raises ValueError for a text longer than its row:
    truncate when tokenising.
    """
    if not texts:
        raise ValueError("there are no texts to pack.")
    records: list[bytes] = []
    counts = Counts()
    for window in windows(len(texts)):
        numbers = np.arange(window.start, window.stop)
        made, counted = pack_window([texts[i] for i in window], numbers, lengths, packing=packing)
        records += made
        counts += counted
    return in_memory(records, lengths, pad_ids, counts)


def in_memory(
    records: Sequence[bytes], lengths: Mapping[str, int], pad_ids: Mapping[str, int], counts: Counts
) -> Rows:
    """Rows from the records of all windows."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(record)
    most = most_texts(records)
    return Rows(records, dict(lengths), dict(pad_ids), most, counts, digest.hexdigest())


def most_texts(records: Sequence[bytes]) -> int:
    """Texts in the record that holds most."""
    return max((int(np.frombuffer(record, _INT, 1)[0]) for record in records), default=0)


def counts_of(records: Sequence[bytes], streams: Collection[str]) -> Counts:
    """What records hold, as far as they tell."""
    texts, tokens = 0, np.zeros(len(streams), np.int64)
    for record in records:
        numbers = np.frombuffer(record, _INT)
        num_texts = int(numbers[0])
        sizes = numbers[1 + num_texts :][: num_texts * len(streams)]
        texts += num_texts
        tokens += sizes.reshape(len(streams), num_texts).sum(1)
    by_stream = dict(zip(streams, tokens.tolist(), strict=True))
    return Counts(texts=texts, rows=len(records), tokens=by_stream)


def windows(num_texts: int) -> list[range]:
    """The places of texts that are packed together: windows of like size, in their order."""
    num = -(-num_texts // _WINDOW)
    ends = [num_texts * i // num for i in range(num + 1)]
    return [range(begin, end) for begin, end in itertools.pairwise(ends)]


def pack_window(
    texts: Sequence[Mapping[str, np.ndarray]],
    numbers: np.ndarray,
    lengths: Mapping[str, int],
    *,
    packing: bool,
) -> tuple[list[bytes], Counts]:
    """The records of one window's rows. numbers: of the texts, from 0. ValueError as `pack`."""
    sizes_MS = np.array([[len(text[stream]) for stream in lengths] for text in texts])
    for number, sizes in zip(numbers, sizes_MS, strict=True):
        for (stream, length), size in zip(lengths.items(), sizes, strict=True):
            if size > length:
                raise ValueError(f"text {number} has {size} {stream} tokens, a row holds {length}.")
    rows = (
        _best_fit(sizes_MS, list(lengths.values())) if packing else [[i] for i in range(len(texts))]
    )
    tokens = dict(zip(lengths, sizes_MS.sum(0).tolist(), strict=True))
    counts = Counts(texts=len(texts), rows=len(rows), tokens=tokens)
    return [_record([texts[i] for i in row], numbers[row] + 1, lengths) for row in rows], counts


def _record(
    texts: Sequence[Mapping[str, np.ndarray]], numbers: np.ndarray, streams: Mapping[str, int]
) -> bytes:
    sizes = [[len(text[stream]) for text in texts] for stream in streams]
    tokens = [text[stream] for stream in streams for text in texts]
    return np.concatenate([[len(texts)], numbers, *sizes, *tokens]).astype(_INT).tobytes()


def _best_fit(sizes_MS: np.ndarray, lengths: Sequence[int]) -> list[list[int]]:
    """Which texts lie in a row together: rows of places, each in order.

    grain's packers, first fit and best fit by the sum of what is left, keep room in one of two
    streams where texts differ in their ratio (benchmarks/packing.py). Here a text goes where the
    room that is left is most of its own shape (the smallest angle between the two), the longest
    texts first, among as few rows as could hold all; texts without a place begin again in rows of
    their own.
    """
    whole = math.lcm(*lengths)  # of each stream: its parts are then whole numbers, and exact
    shares_MS = sizes_MS * (whole // np.array(lengths))
    left = np.argsort(-shares_MS.max(1), kind="stable").tolist()
    rows: list[list[int]] = []
    while left:
        num_rows = max(1, -(-int(shares_MS[left].sum(0).max()) // whole))
        room_SR = np.full((len(lengths), num_rows), whole)
        norm_R = np.full(num_rows, float(len(lengths)) * whole**2)
        members: list[list[int]] = [[] for _ in range(num_rows)]
        homeless = []
        for text in left:
            share_S = shares_MS[text]
            fits_R = np.all(room_SR >= share_S[:, None], axis=0)
            along_R = (share_S @ room_SR).astype(float)
            row = int(np.argmax(np.where(fits_R, along_R * along_R / norm_R, -1.0)))
            if not fits_R[row]:
                homeless.append(text)
                continue
            members[row].append(text)
            room_SR[:, row] -= share_S
            norm_R[row] = max(1.0, float(room_SR[:, row] @ room_SR[:, row]))
        rows += [sorted(row) for row in members if row]
        left = homeless
    return rows


def fitting_lengths(tokens: Mapping[str, int], lengths: Mapping[str, int]) -> dict[str, int]:
    """Row lengths that fill alike: the longest for the stream of most tokens, others by ratio.

    tokens: of the same texts, by stream. Multiples of 8, those that leave least open.
    """
    longest, most = max(lengths.values()), max(tokens.values())

    def fitted(exact: float) -> int:
        below = max(8, int(exact) // 8 * 8)
        return min((below, below + 8), key=lambda length: max(exact / length, length / exact))

    return {
        stream: longest if count == most else min(longest, fitted(longest * count / most))
        for stream, count in tokens.items()
    }


def padded_length(longest: int, ways: int = 1) -> int:
    """Rounded up to a multiple of 8, of 32 beyond 64: few lengths mean few programs to compile.

    ways: what the length is a multiple of too, as it is cut into so many parts.
    """
    return longest + -longest % math.lcm(8 if longest <= 64 else 32, ways)


def padded(
    texts: Sequence[np.ndarray], stream: str, pad_id: int, *, rows: int, ways: int = 1
) -> dict[str, np.ndarray]:
    """One text per row, padded on the right to `rows` rows.

    Returns {stream}_ids and {stream}_segments, int32 [rows, length]: the longest text's
    `padded_length`.
    """
    length = padded_length(max(len(text) for text in texts), ways)
    ids = np.full((rows, length), pad_id, np.int32)
    segments = np.zeros((rows, length), np.int32)
    for i, text in enumerate(texts):
        ids[i, : len(text)] = text
        segments[i, : len(text)] = 1
    return {f"{stream}_ids": ids, f"{stream}_segments": segments}
