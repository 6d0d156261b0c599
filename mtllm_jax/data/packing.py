"""Texts → rows: two token streams of the same texts, packed under matching segment ids.

B rows, S encoder positions, T decoder positions, N texts per row at most.

A text is a dict of token arrays by stream, "source" (encoder side) and "target" (decoder side) or
one of them. Rows are packed once, in the global order, before anything is split over processes: a
packed row is then an element of a random-access data set, and one number says where a run stands.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import grain
import numpy as np

_OPEN_ROWS = 32  # rows that first-fit keeps open: more fill better, and mix order further


@dataclasses.dataclass(frozen=True)
class Rows:
    """Packed rows in memory, as grain's random-access sources are.

    arrays: {stream}_ids and {stream}_segments int32 [rows, length] (segment 0 = padding, else
    1..N), and example int32 [rows, N]: the text in each segment, as its place in the sequence
    plus 1 (0 = no text). fill: useful positions ÷ all positions, by stream.
    """

    arrays: dict[str, np.ndarray]
    fill: dict[str, float]

    def __len__(self) -> int:
        return len(self.arrays["example"])

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        return {name: array[row] for name, array in self.arrays.items()}


def pack(
    texts: Sequence[Mapping[str, np.ndarray]],
    lengths: Mapping[str, int],
    pad_ids: Mapping[str, int],
    *,
    packing: bool = True,
) -> Rows:
    """First-fit packing of texts into rows of `lengths[stream]` positions.

    With packing=False a row holds one text. Raises ValueError for a text longer than its row:
    truncate when tokenising.
    """
    for i, text in enumerate(texts):
        for stream, length in lengths.items():
            if len(text[stream]) > length:
                raise ValueError(
                    f"text {i} has {len(text[stream])} {stream} tokens, a row holds {length}."
                )
    if not texts:
        raise ValueError("there are no texts to pack.")
    shortest = {stream: min(len(text[stream]) for text in texts) for stream in lengths}
    most = min(length // max(1, shortest[stream]) for stream, length in lengths.items())
    most = max(1, most) if packing else 1
    elements = [
        {**{stream: text[stream] for stream in lengths}, "example": np.array([i + 1], np.int32)}
        for i, text in enumerate(texts)
    ]
    packed = grain.experimental.FirstFitPackIterDataset(
        grain.MapDataset.source(elements).to_iter_dataset(
            grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        ),
        length_struct={**lengths, "example": most},
        padding_struct={**{stream: pad_ids[stream] for stream in lengths}, "example": 0},
        num_packing_bins=_OPEN_ROWS,
        max_sequences_per_bin=most,
        shuffle_bins=False,
    )
    return _stack(packed, lengths)


def _stack(packed: Iterable[dict[str, np.ndarray]], lengths: Mapping[str, int]) -> Rows:
    rows = list(packed)
    arrays = {"example": np.stack([row["example"] for row in rows]).astype(np.int32)}
    fill = {}
    for stream in lengths:
        arrays[f"{stream}_ids"] = np.stack([row[stream] for row in rows]).astype(np.int32)
        segments = np.stack([row[f"{stream}_segment_ids"] for row in rows]).astype(np.int32)
        arrays[f"{stream}_segments"] = segments
        fill[stream] = float(np.mean(segments > 0))
    # Trailing segments that no row uses would only cost compute.
    used = int(np.max(np.sum(arrays["example"] > 0, axis=1)))
    arrays["example"] = np.ascontiguousarray(arrays["example"][:, :used])
    return Rows(arrays, fill)


def padded(
    texts: Sequence[np.ndarray], stream: str, pad_id: int, *, rows: int
) -> dict[str, np.ndarray]:
    """One text per row, padded on the right to `rows` rows.

    Returns {stream}_ids and {stream}_segments, int32 [rows, length]: the longest text's, rounded
    up to a multiple of 8, of 32 beyond 64. Few lengths mean few programs to compile.
    """
    longest = max(len(text) for text in texts)
    length = longest + -longest % (8 if longest <= 64 else 32)
    ids = np.full((rows, length), pad_id, np.int32)
    segments = np.zeros((rows, length), np.int32)
    for i, text in enumerate(texts):
        ids[i, : len(text)] = text
        segments[i, : len(text)] = 1
    return {f"{stream}_ids": ids, f"{stream}_segments": segments}
