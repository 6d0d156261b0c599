"""What a compiled program sends between chips, read off its text (HLO).

A loop's body counts as often as it runs: the number stands in the loop's condition, as compilers
write it, `i < N` from 0.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?(?P<name>[^\s(]+) \(.*\{$")
_SHAPE = re.compile(r"\b(?P<type>[a-z]+\d*\w*)\[(?P<sizes>[\d,]*)\]")
_CALLED = re.compile(r"(?P<how>body|calls|to_apply|branch_computations)=\{?(?P<names>[^,{}\s)]+)")
_COLLECTIVE = re.compile(
    rf" = (?P<shape>.*?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\((?!.*-done\()"
)
_CONDITION = re.compile(r"\bcondition=%?(?P<name>[^,\s)]+)")
_NUMBER = re.compile(r" = [su](?:8|16|32|64)\[\]\S* constant\((?P<number>\d+)\)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program. `bytes`: what a chip receives each time; `times` in a step;
    `op`: where in the model it comes from, as jax names it."""

    kind: str
    bytes: float
    times: int
    group: int
    op: str


def collectives(text: str) -> list[Collective]:
    """All collectives of a compiled module's text."""
    computations = _computations(text)
    times = _times(computations)
    found = {}
    for name, lines in computations.items():
        for line in lines:
            match = _COLLECTIVE.search(line)
            if match is None or not times[name]:
                continue
            # A collective that runs beside other work is written down in each piece of that work.
            channel = re.search(r"channel_id=(\d+)", line)
            key = channel[1] if channel else line.split(" = ")[0]
            if key in found:
                continue
            group = _group(line)
            size = _received(match["kind"], match["shape"], bool(match["start"]), group)
            op = re.search(r'op_name="([^"]*)"', line)
            found[key] = Collective(match["kind"], size, times[name], group, op[1] if op else "")
    return list(found.values())


def by_kind(found: list[Collective]) -> dict[str, float]:
    """Bytes that a chip receives in a step, by kind of collective."""
    total: dict[str, float] = collections.defaultdict(float)
    for one in found:
        total[one.kind] += one.bytes * one.times
    return dict(total)


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation by name, that of the program itself as "ENTRY"."""
    found: dict[str, list[str]] = {}
    lines: list[str] | None = None
    for line in text.splitlines():
        if lines is None:
            if match := _COMPUTATION.match(line):
                lines = found["ENTRY" if match[1] else match["name"]] = []
        elif line == "}":
            lines = None
        else:
            lines.append(line)
    return found


def _times(computations: dict[str, list[str]]) -> dict[str, int]:
    """How often each computation runs."""
    times: dict[str, int] = collections.defaultdict(int)

    def visit(name: str, runs: int) -> None:
        times[name] += runs
        for line in computations.get(name, ()):
            for called, is_body in _calls(line):
                visit(called, runs * (_trips(line, computations) if is_body else 1))

    visit("ENTRY", 1)
    return times


def _calls(line: str) -> Iterator[tuple[str, bool]]:
    for match in _CALLED.finditer(line):
        for name in match["names"].split(","):
            yield name.strip().lstrip("%"), match["how"] == "body"


def _trips(line: str, computations: dict[str, list[str]]) -> int:
    """Of a `while`. 1 where its condition compares with no constant: a search, not our layers."""
    condition = _CONDITION.search(line)
    numbers = [
        int(match["number"])
        for inner in computations.get(condition["name"] if condition else "", ())
        if (match := _NUMBER.search(inner))
    ]
    return numbers[0] if len(numbers) == 1 else 1


def _group(line: str) -> int:
    """Chips that take part in one instance of a collective."""
    if mesh := re.search(r"replica_groups=mesh\[(?P<sizes>[^\]]*)\] \{(?P<axes>[^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh["sizes"]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh["axes"]))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(iota[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return listed[1].count(",") + 1
    return 1  # collective-permute: a pair


def _received(kind: str, shape: str, start: bool, group: int) -> float:
    """Bytes that a chip receives; `shape` is of the result, beside the operands for a start."""
    # Scalars beside a start's arrays are its own state.
    arrays = [x for x in _SHAPE.finditer(shape) if x["sizes"] or not start]
    size = float(sum(map(_bytes, arrays)))
    if kind == "collective-permute":
        return size / 2 if start else size
    if kind == "all-reduce":
        return 2 * size * (group - 1) / group
    if kind == "reduce-scatter":
        return (size / (group + 1) if start else size) * (group - 1)
    if kind == "all-gather" and start:
        size *= group / (group + 1)
    if kind == "all-to-all" and start:
        size /= 2
    return size * (group - 1) / group


def _bytes(shape: re.Match[str]) -> int:
    bits = re.search(r"\d+", shape["type"])
    if shape["type"] == "pred" or bits is None:
        width = 8 if shape["type"] == "pred" else 0  # tokens hold nothing
    else:
        width = int(bits[0])
    sizes = [int(n) for n in shape["sizes"].split(",") if n]
    return math.prod(sizes) * width // 8
