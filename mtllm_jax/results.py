"""How results.json is shown: what systems, tests and languages are called, and the table."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import rich.box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mtllm_jax.languages import LANGUAGES
from mtllm_jax.metrics import LOG_WIDTH, duration, number

SYSTEM_NAMES = {
    "mt_llm": "MT-LLM (stacked)",
    "llm_zero_shot": "LLM zero-shot",
    "mt_encoder": "MT encoder + head",
    "encoder_linear": "Frozen encoder, linear",
    "translate_test": "Translate-test",
    "llm_prompted": "LLM prompted",
}
TEST_NAMES = {"systems": "A: seen names, new pairs", "systems_unseen": "B: unseen names"}

# A system of results.json: {"english", "mean", "languages"}, and as `scores.entry` makes it
# "interval", "intervals", "macro_f1" and with several seeds "std".
Entry = Mapping[str, Any]


def system_name(system: str) -> str:
    """The name shown for a system; one that has none here is shown by its key."""
    return SYSTEM_NAMES.get(system, system)


def language_name(code: str) -> str:
    """English name of a FLORES-200 code, without the script that the code beside it tells."""
    return LANGUAGES[code].name.split(" (")[0] if code in LANGUAGES else code


def script_name(code: str) -> str:
    """English name of a FLORES-200 code's script (deu_Latn: Latin); "" for an unknown code."""
    return LANGUAGES[code].script if code in LANGUAGES else ""


def is_latin(code: str) -> bool:
    """Whether a FLORES-200 code is one of Latin script."""
    return script_name(code) == "Latin"


def tests_of(results: Mapping[str, Any]) -> dict[str, dict[str, Entry]]:
    """The tests there are: {"systems": {system: entry}} and, where there, "systems_unseen"."""
    return {test: results[test] for test in TEST_NAMES if results.get(test)}


def systems_of(results: Mapping[str, Any]) -> list[str]:
    """All systems, in the order of results.json."""
    return list(dict.fromkeys(system for test in tests_of(results).values() for system in test))


def languages_of(results: Mapping[str, Any]) -> list[str]:
    """Codes of all languages: those in Latin script first, then by English name."""
    entries = [entry for test in tests_of(results).values() for entry in test.values()]
    codes = {code for entry in entries for code in entry["languages"]}
    return sorted(codes, key=lambda code: (not is_latin(code), language_name(code), code))


def mean_over(entry: Entry, codes: Iterable[str]) -> float | None:
    """Mean of a system's values over those of `codes` it has one for; None where it has none."""
    present = [value for code in codes if (value := entry["languages"].get(code)) is not None]
    return sum(present) / len(present) if present else None


def half_interval(entry: Entry) -> float | None:
    """Half the width of the 95 % interval of a system's mean; None where there is none."""
    interval = entry.get("interval")
    return None if interval is None else (interval[1] - interval[0]) / 2


def percent_factor(results: Mapping[str, Any]) -> int:
    """100 where all values lie in [0, 1] (accuracy, F1: per cent), else 1 (BLEU, chrF++)."""
    entries = [entry for test in tests_of(results).values() for entry in test.values()]
    values = [
        value
        for entry in entries
        for value in (entry["english"], entry["mean"], *entry["languages"].values())
        if value is not None
    ]
    return 100 if all(0 <= value <= 1 for value in values) else 1


def seeds_text(results: Mapping[str, Any]) -> str:
    """ "seed 0", or "seeds 0, 1, 2"; "seed unknown" where the model does not say."""
    seeds = results["seeds"]
    if not seeds:
        return "seed unknown"
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(str(seed) for seed in seeds)}"


def next_steps(run_folder: Path) -> list[tuple[str, str]]:
    """What one can do with a finished run: (aim, what to open or type)."""
    train = "python launch/train.py --config="
    return [
        ("report", f"{run_folder}/report.html"),
        ("answers", f"{run_folder}/predictions/*.jsonl"),
        ("in Python", f"mtllm_jax.load('{run_folder}').encode(['Kenia'], 'deu_Latn')"),
        ("label", f"python launch/predict.py --model={run_folder} --input=FILE --output=FILE"),
        ("evaluate", f"python launch/evaluate.py --model={run_folder} --test=FILE"),
        ("to torch", f"python launch/export.py --workdir={run_folder} --to=DIR"),
        ("own LLM", f"{train}configs/mtllm.py --workdir=NEW --config.llm=DIR"),
        ("own encoder", f"{train}configs/mtllm.py --workdir=NEW --config.encoder=DIR"),
        ("other seed", f"{train}configs/mtllm.py --workdir=NEW --config.seed=1"),
        ("repeat", f"{train}{run_folder}/config.json --workdir=NEW"),
    ]


def results_table(
    results: Mapping[str, Any], run_folder: Path | None = Path("RUN"), width: int = LOG_WIDTH
) -> RenderableType:
    """results.json as tables of at most `width` columns, and of a run what one can do next.

    A column a system, a row a language; where there are two tests a cell holds both, A before B.
    Systems that do not fit beside the others go to a further table. Beside what every results.json
    has, "majority_unseen" (of test B) and "cost" ({system: {"sequences_per_second": x}}) are shown
    when there.
    """
    systems = systems_of(results)
    label_width = max([20, *(len(_label(code)) for code in languages_of(results))])
    column_width = max(_column_width(results, system) for system in systems)
    beside = max(1, (width - label_width - 4) // (column_width + 3))
    parts: list[RenderableType] = [
        _table(results, systems[start : start + beside]) for start in range(0, len(systems), beside)
    ]
    if run_folder is None:
        return Group(*parts, *_notes(results))
    # Commands stay on one line however long they are: they are there to be copied.
    steps = [
        Text(f"  {aim:<11} {command}", no_wrap=True, overflow="ignore")
        for aim, command in next_steps(run_folder)
    ]
    return Group(*parts, *_notes(results), Text(), Text("What next", style="bold"), *steps)


def _column_width(results: Mapping[str, Any], system: str) -> int:
    """Six columns a test; more where the system's name has a longer word."""
    return max(6 * len(tests_of(results)), *(len(word) for word in system_name(system).split()))


def _label(code: str) -> str:
    name = language_name(code)
    return name if name == code else f"{name} {code}"


def _table(results: Mapping[str, Any], systems: Sequence[str]) -> Table:
    factor, tests, languages = percent_factor(results), tests_of(results), languages_of(results)
    table = Table(
        title=results["task"], title_style="bold", title_justify="left", box=rich.box.SIMPLE_HEAD
    )
    table.add_column("")
    letters = "".join(f"{TEST_NAMES[test][0]:>6}" for test in tests) if len(tests) > 1 else ""
    for system in systems:
        table.add_column(
            f"{system_name(system)}\n{letters}".rstrip(),
            justify="right",
            vertical="bottom",
            width=_column_width(results, system),
        )

    def row(label: str, pick: Callable[[Entry], float | None], compare: bool = True) -> None:
        """What `pick` finds in each system's entry, test by test; the best of a test in bold."""
        cells = [Text() for _ in systems]
        for entries in tests.values():
            values = [pick(entries[system]) if system in entries else None for system in systems]
            best = max((value for value in values if value is not None), default=None)
            for cell, value in zip(cells, values, strict=True):
                shown = "–" if value is None else f"{value * factor:.1f}"
                cell.append(f"{shown:>6}", style="bold" if compare and value == best else "")
        table.add_row(label, *cells)

    row("English", lambda entry: entry["english"])
    row(f"mean of {len(languages)} languages", lambda entry: entry["mean"])
    entries = [entry for systems_there in tests.values() for entry in systems_there.values()]
    if any(entry.get("interval") for entry in entries):
        row("± 95 %, over rows", half_interval, compare=False)
    if any("std" in entry for entry in entries):
        row("± over seeds", lambda entry: entry.get("std"), compare=False)
    if any("macro_f1" in entry for entry in entries):
        row("macro-F1, mean", lambda entry: entry.get("macro_f1", {}).get("mean"), compare=False)
    groups = [[code for code in languages if is_latin(code) == latin] for latin in (True, False)]
    if all(groups):
        row("mean, Latin script", lambda entry: mean_over(entry, groups[0]))
        row("mean, other scripts", lambda entry: mean_over(entry, groups[1]))
    for group in filter(None, groups):
        table.add_section()
        for code in group:
            row(_label(code), partial(_value, code))
    cost = results.get("cost", {})
    if any(system in cost for system in systems):
        table.add_section()
        rates = [cost.get(system, {}).get("sequences_per_second") for system in systems]
        table.add_row("sequences/s", *("–" if rate is None else number(rate) for rate in rates))
    return table


def _value(code: str, entry: Entry) -> float | None:
    return entry["languages"].get(code)


def _notes(results: Mapping[str, Any]) -> list[Text]:
    tests, factor = tests_of(results), percent_factor(results)
    majority = [results.get(key) for key in ("majority", "majority_unseen")][: len(tests)]
    lines = []
    if len(tests) > 1:
        lines.append("   ".join(TEST_NAMES[test] for test in tests))
    shown = " and ".join(f"{value * factor:.1f}" for value in majority if value is not None)
    if shown:
        lines.append(f"always the most frequent class: {shown}")
    metric = f"{results['metric']}{' in %' if factor == 100 else ''}"
    lines.append(f"{metric}, {seeds_text(results)}, {duration(sum(results['seconds'].values()))}")
    return [Text(f" {line}", style="dim") for line in lines]
