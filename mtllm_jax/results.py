"""How results.json is shown: what systems, tests and languages are called, and the table."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import rich.box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mtllm_jax.languages import LANGUAGES
from mtllm_jax.metrics import LOG_WIDTH, duration, number

SYSTEM_NAMES = {
    "mt_llm": "MT-LLM (stacked)",
    "llm_zero_shot": "LLM zero-shot",
    "mt_encoder": "Encoder + head",
    "encoder_linear": "Frozen encoder, linear",
    "translate_test": "Translate-test",
    "translate_train": "Translate-train",
    "llm_prompted": "LLM prompted",
    "base": "LLM as it is",
    "sft": "SFT",
    "t_sft": "T-SFT",
    "cross_lingual": "Cross-lingual tuning",
    "sdft": "SDFT",
    "sdrrl": "SDRRL",
    "sdrrl_without_own_answers": "SDRRL without own answers",
    "sdrrl_without_ll": "SDRRL without LL",
    "sdrrl_without_lt": "SDRRL without LT",
    "sdrrl_without_tl": "SDRRL without TL",
    "sdrrl_without_tt": "SDRRL without TT",
    "sdrrl_without_switched": "SDRRL without switched words",
    "sdrrl_without_translation": "SDRRL without translation",
    "sdrrl_without_completion": "SDRRL without completion",
    "on_policy": "On-policy SDRRL",
}
# Above the columns of a terminal's table: words that are short.
_HEADINGS = {
    "mt_llm": "MT-LLM stacked",
    "mt_encoder": "MT encoder",
    "encoder_linear": "frozen encoder",
    "translate_test": "translate test",
    "translate_train": "translate train",
    "cross_lingual": "cross- lingual tuning",
}
TEST_NAMES = {"systems": "A: seen names, new pairs", "systems_unseen": "B: unseen names"}

# A system of results.json: {"english", "mean", "languages"}, and as `scores.entry` makes it
# "interval", "intervals", "macro_f1" and with several seeds "std"; of answers in words
# "chrf", the same of another measure.
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
    """Whether a code of a language and a script, known or not, is one of Latin script."""
    return code.endswith("_Latn")


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


def common_languages(entries: Sequence[Entry]) -> list[str]:
    """Codes that every system has a value for, in the order of the first one's."""
    return [
        code
        for code in entries[0]["languages"]
        if all(entry["languages"].get(code) is not None for entry in entries)
    ]


def compared_languages(entries: Sequence[Entry]) -> tuple[list[str], bool]:
    """The languages that means of a test's systems are compared over, those common to all, and
    whether some system has others too. [] and True: no two means are over the same languages."""
    every = {code for entry in entries for code in entry["languages"]}
    common = common_languages(entries)
    return common, len(common) < len(every)


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


def next_steps(
    run_folder: Path, recipe: str = "mtllm", systems: Sequence[str] = ()
) -> list[tuple[str, str]]:
    """What one can do with a finished run: (aim, what to open or type). systems: those of SDRRL."""
    train = "python launch/train.py --config="
    if recipe == "sdrrl":
        trained = [name for name in (*systems, "sdrrl") if name in systems and name != "base"]
        tuned = trained[-1] if trained else "SYSTEM"
        model = f"{run_folder}/{tuned}/model"
        return [
            ("report", f"{run_folder}/report.html"),
            ("answers", f"{run_folder}/predictions/*.jsonl"),
            ("trained on", f"{run_folder}/transfer/{tuned}/sample.html"),
            ("ask", f"python launch/generate.py --model={model} --input=FILE --output=FILE"),
            ("benchmark", f"python launch/evaluate.py --model={model} --task=NAME --data=DIR"),
            ("other seed", f"{train}{run_folder}/config.json --workdir=NEW --config.seed=1"),
            ("repeat", f"{train}{run_folder}/config.json --workdir=NEW"),
        ]
    return [
        ("report", f"{run_folder}/report.html"),
        ("answers", f"{run_folder}/predictions/*.jsonl"),
        ("in Python", f"mtllm_jax.load('{run_folder}').encode(['Kenia'], 'deu_Latn')"),
        ("label", f"python launch/predict.py --model={run_folder} --input=FILE --output=FILE"),
        ("evaluate", f"python launch/evaluate.py --model={run_folder} --test=FILE"),
        ("to torch", f"python launch/export.py --workdir={run_folder} --to=DIR"),
        ("own LLM", f"{train}configs/mtllm.py --workdir=NEW --config.llm=DIR"),
        ("own encoder", f"{train}configs/mtllm.py --workdir=NEW --config.encoder=DIR"),
        ("other seed", f"{train}{run_folder}/config.json --workdir=NEW --config.seed=1"),
        ("repeat", f"{train}{run_folder}/config.json --workdir=NEW"),
    ]


def results_table(
    results: Mapping[str, Any], run_folder: Path | None = Path("RUN"), width: int = LOG_WIDTH
) -> RenderableType:
    """results.json as tables of at most `width` columns, and of a run what one can do next.

    A column a system, a row a language; where there are two tests a cell holds both, A before B, or
    if the systems do not fit so, each test has a table. Those that still do not fit beside the
    others go to a further one. Beside what every results.json
    has, "majority_unseen" (of test B) and "cost" ({system: {"sequences_per_second": x,
    "flops_per_example": y}}) are shown when there.
    """
    tests = list(tests_of(results))
    whole = [(tests, systems) for systems in _beside(results, tests, width)]
    each = [([test], systems) for test in tests for systems in _beside(results, [test], width)]
    parts: list[RenderableType] = [
        _table(results, *chosen) for chosen in (whole if len(whole) == 1 else each)
    ]
    for table in _further_tables(results):
        parts += _plain_tables(*table, width)
    if run_folder is None:
        return Group(*parts, *_notes(results))
    # Commands stay on one line however long they are: they are there to be copied.
    steps = [
        Text(f"  {aim:<11} {command}", no_wrap=True, overflow="ignore")
        for aim, command in next_steps(
            run_folder, results.get("recipe", "mtllm"), [*results.get("systems", ())]
        )
    ]
    return Group(*parts, *_notes(results), Text(), Text("What next", style="bold"), *steps)


def _further_tables(results: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    return [*probe_tables(results), *chrf_tables(results), *bits_tables(results)]


def probe_tables(
    results: Mapping[str, Any],
) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, columns and rows of what was asked without labels; none where nothing was."""
    probes = results.get("probes")
    if not probes:
        return []
    systems = probes["systems"]
    codes = languages_of({"systems": systems})
    means = [f"{100 * entry['mean']:.1f}" for entry in systems.values()]
    rows = [[f"mean of {len(codes)} languages", *means]]
    rows += [
        [_label(code), *(f"{100 * entry['languages'][code]:.1f}" for entry in systems.values())]
        for code in codes
    ]
    title = f"Retrieval of English translations, {probes['bitext']}, accuracy in %"
    return [(title, ["", *systems], rows)]


def chrf_tables(
    results: Mapping[str, Any],
) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, columns and rows of chrF, where answers are texts; none where they are not."""
    if not results.get("chrf"):
        return []
    found = {name: entry["chrf"] for name, entry in results["systems"].items()}
    codes = languages_of({"systems": found})

    def row(label: str, pick: Callable[[Entry], float | None]) -> list[str]:
        values = (pick(entry) for entry in found.values())
        return [label, *("–" if value is None else f"{100 * value:.1f}" for value in values)]

    rows = [
        row("English", lambda entry: entry["english"]),
        row(f"mean of {len(codes)} languages", lambda entry: entry["mean"]),
        row("± 95 %, over rows", half_interval),
        *(row(_label(code), partial(_value, code)) for code in codes),
    ]
    return [(f"chrF ({results['chrf']})", ["", *map(system_name, found)], rows)]


def bits_tables(
    results: Mapping[str, Any],
) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, columns and rows of bits per character, and of what each system changes in them; none
    where texts were not read but answered."""
    if not results.get("bits_per_character"):
        return []
    about = results["bits_per_character"]
    found, changes = about["systems"], about["changes"]
    codes = languages_of({"systems": found})

    def row(
        label: str,
        value: Callable[[Entry], float | None],
        interval: Callable[[Entry], Sequence[float] | None],
    ) -> list[str]:
        cells = ["–" if value(entry) is None else f"{value(entry):.3f}" for entry in found.values()]
        for entry in changes.values():
            bounds = interval(entry)
            told = "–" if bounds is None else f" ({bounds[0]:+.3f} to {bounds[1]:+.3f})"
            cells.append(told if bounds is None else f"{value(entry):+.3f}{told}")
        return [label, *cells]

    def of_language(code: str, value: Callable[[Entry], float | None]) -> list[str]:
        return row(_label(code), value, lambda entry: entry["intervals"].get(code))

    rows = [
        of_language(about["source"], lambda entry: entry["english"]),
        row(
            f"mean of {len(codes)} languages",
            lambda entry: entry["mean"],
            lambda entry: entry["interval"],
        ),
        *(of_language(code, partial(_value, code)) for code in codes),
    ]
    columns = [*map(system_name, found), *(f"{system_name(x)}, change, 95 %" for x in changes)]
    return [("Bits per character (fewer: likelier)", ["", *columns], rows)]


def _plain_tables(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], width: int
) -> list[Table]:
    """One table, or as many as it takes, headings cut between words; the first column in each."""
    cells = list(zip(columns, zip(*rows, strict=True), strict=True))
    sizes: list[int | None] = [None] * len(columns)
    shown = [list(range(1, len(columns)))]
    if sum(3 + max(map(len, (heading, *column))) for heading, column in cells) > width:
        least = [max(map(len, (*heading.split(), *column))) for heading, column in cells]
        room = whole = width - least[0] - 3
        sizes, shown = [*least], [[]]
        for place, size in enumerate(least[1:], 1):
            room -= size + 3
            if room < 0 and shown[-1]:
                shown.append([])
                room = whole - size - 3
            shown[-1].append(place)
    tables = []
    for places in ([0, *places] for places in shown):
        table = Table(
            title=title, title_style="bold", title_justify="left", box=rich.box.SIMPLE_HEAD
        )
        for place in places:
            justify: Literal["left", "right"] = "right" if place else "left"
            table.add_column(columns[place], justify=justify, width=sizes[place])
        for row in rows:
            table.add_row(*(row[place] for place in places))
        tables.append(table)
    return tables


def _beside(results: Mapping[str, Any], tests: Sequence[str], width: int) -> list[list[str]]:
    """The systems of some tests, cut into those whose columns fit beside each other."""
    label_width = max([20, *(len(_label(code)) for code in languages_of(results))])
    tables: list[list[str]] = [[]]
    room = whole = width - label_width - 4
    for system in (name for name in systems_of(results) if any(name in results[t] for t in tests)):
        room -= _column_width(system, tests) + 2
        if room < 0 and tables[-1]:
            tables.append([])
            room = whole - _column_width(system, tests) - 2
        tables[-1].append(system)
    return tables


def _heading(system: str) -> str:
    return _HEADINGS.get(system, system_name(system))


def _column_width(system: str, tests: Sequence[str]) -> int:
    """Six columns a test; more where the heading has a longer word."""
    return max(6 * len(tests), *(len(word) for word in _heading(system).split()))


def _label(code: str) -> str:
    name = language_name(code)
    return name if name == code else f"{name} {code}"


def _table(results: Mapping[str, Any], shown: Sequence[str], systems: Sequence[str]) -> Table:
    """shown: the tests of it."""
    factor, languages = percent_factor(results), languages_of(results)
    tests = {test: results[test] for test in shown}
    alone = len(tests) < len(tests_of(results))
    title = f"{results['task']}, {TEST_NAMES[shown[0]]}" if alone else results["task"]
    table = Table(
        title=title,
        title_style="bold",
        title_justify="left",
        box=rich.box.SIMPLE_HEAD,
        collapse_padding=True,
    )
    table.add_column("")
    letters = "".join(f"{TEST_NAMES[test][0]:>6}" for test in tests) if len(tests) > 1 else ""
    for system in systems:
        table.add_column(
            f"{_heading(system)}\n{letters}".rstrip(),
            justify="right",
            vertical="bottom",
            width=_column_width(system, shown),
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
    # Of all systems, those of further tables too, so that their rows say one thing.
    common, differ = compared_languages([e for there in tests.values() for e in there.values()])
    if differ:
        if common:
            row(f"mean of {len(common)} in common", lambda entry: mean_over(entry, common))
        row("mean of its own", lambda entry: entry["mean"], compare=False)
    else:
        row(f"mean of {len(languages)} languages", lambda entry: entry["mean"])
    entries = [entry for systems_there in tests.values() for entry in systems_there.values()]
    if any(entry.get("interval") for entry in entries):
        row("± 95 %, over rows", half_interval, compare=False)
    if any("std" in entry for entry in entries):
        row("± over seeds", lambda entry: entry.get("std"), compare=False)
    if any("macro_f1" in entry for entry in entries):
        row("macro-F1, mean", lambda entry: entry.get("macro_f1", {}).get("mean"), compare=False)
    groups = [[code for code in languages if is_latin(code) == latin] for latin in (True, False)]
    if all(set(group) & set(common) for group in groups):
        latin, other = ([code for code in group if code in common] for group in groups)
        row("mean, Latin script", lambda entry: mean_over(entry, latin))
        row("mean, other scripts", lambda entry: mean_over(entry, other))
    for group in filter(None, groups):
        table.add_section()
        for code in group:
            row(_label(code), partial(_value, code))
    cost = results.get("cost", {})
    if any(system in cost for system in systems):
        table.add_section()
        rates = [cost.get(system, {}).get("sequences_per_second") for system in systems]
        table.add_row("sequences/s", *("–" if rate is None else number(rate) for rate in rates))
        flops = [cost.get(system, {}).get("flops_per_example") for system in systems]
        if any(flops):
            shares = ("–" if each is None else f"{each / 1e9:.2g}" for each in flops)
            table.add_row("GFLOP an example", *shares)
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
    lines += results.get("gains", ())
    metric = f"{results['metric']}{' in %' if factor == 100 else ''}"
    lines.append(f"{metric}, {seeds_text(results)}, {duration(sum(results['seconds'].values()))}")
    return [Text(f" {line}", style="dim") for line in lines]
