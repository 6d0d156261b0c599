"""report.html: what a run gained, language by language, in one file that needs nothing else.

Bars and heat maps are drawn by the page's own style sheet, so that they stay sharp and readable on
a phone; training curves are inlined SVG. The same input gives the same file, byte for byte.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from etils import epath

from mtllm_jax.config import SDRRL_PARTS, WITHOUT
from mtllm_jax.curves import curve_figures
from mtllm_jax.metrics import duration, number
from mtllm_jax.results import (
    TEST_NAMES,
    Entry,
    common_languages,
    compared_languages,
    is_latin,
    language_name,
    languages_of,
    mean_over,
    next_steps,
    percent_factor,
    script_name,
    seeds_text,
    system_name,
    systems_of,
    tests_of,
)
from mtllm_jax.runfolder import write_text

# What a report is about, in the recipes' order of preference; otherwise the first system there is.
HEADLINERS = ("mt_llm", "sdrrl")

SYSTEM_NOTES = {
    "mt_llm": "The encoder reads the text and a trained bridge hands it to the LLM, which learnt "
    "to read it on English text alone. Nothing is translated.",
    "llm_zero_shot": "The LLM, tuned for the task on English, reads the foreign text as it is.",
    "mt_encoder": "The MT encoder with a classification head, both tuned for the task on English.",
    "encoder_linear": "A logistic regression on the vectors of the encoder as it is, fitted on "
    "English.",
    "translate_test": "The MT model first translates into English, token by token; the LLM, tuned "
    "for the task on English, reads the translation.",
    "translate_train": "The LLM, tuned for the task on English rows that the MT model translated, "
    "each into one of the languages, reads the foreign text.",
    "llm_prompted": "The LLM as it is, trained on no label: the answer is the label, or the "
    "choice, that is likeliest to go on from a prompt with the foreign text.",
    "base": "The LLM before any tuning.",
    "sft": "The LLM tuned on instructions and reference answers in English.",
    "t_sft": "The LLM tuned on the same, translated into the targets.",
    "cross_lingual": "The LLM tuned on both of these and on translation.",
    "sdft": "The LLM tuned on instructions and reference answers in English that it has put in its "
    "own words.",
    "sdrrl": "The LLM tuned on its own answers in English and, as far as config.transfer says, on "
    "what is made of them, translations in all combinations of languages and code-switched copies, "
    "and on translation and completion.",
    **{f"{WITHOUT}{part}": "As SDRRL, without one of its parts." for part in SDRRL_PARTS},
    f"{WITHOUT}own_answers": "As SDRRL, with reference answers in the place of its own.",
    "on_policy": "SDRRL's LLM, drawn to what it says itself, token by token of its own answers in "
    "the targets, where it is given the English instruction too.",
}

# Of a text encoder in the MT encoder's place, of translations that were read from files, and of a
# stack that learnt the task's labels.
ENCODER_NOTE = "The encoder with a classification head, both tuned for the task on English."
GIVEN_NOTE = (
    "Machine translations into English that are published as files, not made here; the LLM, tuned "
    "for the task on English, reads them."
)
LABELS_NOTE = " The task it learnt from its labels, not from the LLM that was tuned for it."

# Colours that colour-blind readers tell apart (Okabe and Ito), and a second sign beside them.
SYSTEM_COLOURS = {
    "mt_llm": "#0072b2",
    "llm_zero_shot": "#8c8c8c",
    "mt_encoder": "#e69f00",
    "encoder_linear": "#cc79a7",
    "translate_test": "#009e73",
    "translate_train": "#56b4e9",
    "llm_prompted": "#d55e00",
    "base": "#8c8c8c",
    "sft": "#e69f00",
    "t_sft": "#009e73",
    "sdrrl": "#0072b2",
}
OTHER_COLOURS = ("#0072b2", "#d55e00", "#cc79a7", "#56b4e9", "#8f6bbd", "#a8642a")
MARKS = ("●", "◆", "■", "▲", "✚", "★", "▼")

Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]  # title, columns, rows

MINI_SCOPE = (
    "It shows the mechanism at work: how far labels in English alone carry into other languages "
    "when a frozen translation encoder is stacked under an LLM, beside what each of the two does "
    "alone and what translating first does. It does not show how good the method is on real text. "
    "The texts are short names and lists of names, both models are tiny and were trained from "
    "scratch in this run, and the translation model was trained on these same names, though on no "
    "label. Pretrained models on natural text will give other numbers, and perhaps another order."
)
OWN_SCOPE = (
    "These numbers hold for the models, the task and the rows of this run. Texts of the test may "
    "have been part of what the models were pretrained on; nothing here rules that out. "
    "Differences between systems that are smaller than the spread over seeds, or that rest on few "
    "rows per language, should not be read as differences between methods."
)

_HEAT = (0.03, 0.72)  # opacity of the worst and the best cell; text stays readable on both


def write_report(
    run_folder: epath.Path,
    results: Mapping[str, Any],
    config: Mapping[str, Any],
    curves: Mapping[str, pd.DataFrame],
    facts: Mapping[str, Any],
    tables: Sequence[Table] = (),
    steps: Sequence[tuple[str, str]] | None = None,
    texts: Sequence[tuple[str, str]] = (),
) -> epath.Path:
    """Write run_folder/report.html, replacing an earlier one, and return its path.

    results: what results.json holds; also, where there, "majority_unseen" and "cost", and what
      changes a system's note: "encoder", "translations", "stage_2b".
    config: what config.json holds.
    curves: metrics of each stage by its name, with columns step, loss and perhaps fvu.
    facts: "versions" ({name: version}), "scope" (a paragraph on what the results do and do not
      show; by default one for the embedded run, or one for a run on the user's own models or
      task), and anything else worth a line in "This run".
    tables: shown behind the tests.
    steps: how to go on, as `next_steps` has them, which are those of a finished run.
    texts: titles and texts that are shown as they are written, behind the tables.
    """
    folder = Path(__file__).parent / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        _context(run_folder, results, config, curves, facts)
        | {"tables": tables, "texts": texts, **({} if steps is None else {"steps": steps})}
    )
    path = run_folder / "report.html"
    write_text(path, page)
    return path


def _context(
    run_folder: epath.Path,
    results: Mapping[str, Any],
    config: Mapping[str, Any],
    curves: Mapping[str, pd.DataFrame],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    page = _Page(results)
    brought = ("encoder", "llm", "stage1")
    own = any(config.get(name) for name in brought) or _own_task(config)
    other_facts = {name: facts[name] for name in facts if name not in ("scope", "versions")}
    return {
        "subject": page.subject,
        "flow": _flow(results, config.get("model", config)),
        "task": results["task"],
        "metric": page.metric,
        "num_languages": len(page.languages),
        "num_scripts": len({script_name(code) for code in page.languages} - {""}),
        "systems": [page.system(system) for system in page.systems],
        "sentences": page.sentences(),
        "cards": page.cards(),
        "tests": [page.test(test) for test in page.tests],
        "costs": page.costs(),
        "figures": curve_figures(curves),
        "seconds": _times(results["seconds"]),
        "total": duration(sum(results["seconds"].values())),
        "seeds": seeds_text(results),
        "facts": {str(name): str(value) for name, value in other_facts.items()},
        "versions": {str(name): str(value) for name, value in facts.get("versions", {}).items()},
        "config": json.dumps(config, indent=2, ensure_ascii=False),
        "scope": facts.get("scope") or (OWN_SCOPE if own else MINI_SCOPE),
        "steps": [step for step in next_steps(run_folder) if step[0] != "report"],
    }


def _flow(results: Mapping[str, Any], config: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """What a text goes through in the stack, and whether each of it learns. config: of the run."""
    encoder = "text encoder" if results.get("encoder") == "text" else "MT encoder"
    layers, frozen = config.get("encoder_layers", 0), config.get("trained") == "bridge"
    return [
        ("text in any language", False),
        (f"{encoder}, {'its last layers learn' if layers else 'frozen'}", bool(layers)),
        ("bridge, learns", True),
        ("LLM, frozen" if frozen else "LLM, learns on English", not frozen),
        ("answer", False),
    ]


def _own_task(config: Mapping[str, Any]) -> bool:
    task = config.get("task", {})
    return bool(task.get("train") or task.get("benchmark"))


class _Page:
    """results.json as what the template draws: names, shown numbers, positions and opacities."""

    def __init__(self, results: Mapping[str, Any]) -> None:
        self.results = results
        self.tests = tests_of(results)
        self.systems = systems_of(results)
        self.languages = languages_of(results)
        self.subject = next((name for name in HEADLINERS if name in self.systems), self.systems[0])
        self.factor = percent_factor(results)
        self.metric = f"{results['metric']}{', %' if self.factor == 100 else ''}"
        self.majority = {
            "systems": results.get("majority"),
            "systems_unseen": results.get("majority_unseen"),
        }
        named = [SYSTEM_COLOURS[name] for name in self.systems if name in SYSTEM_COLOURS]
        spare = itertools.cycle(colour for colour in OTHER_COLOURS if colour not in named)
        self.colours = {name: SYSTEM_COLOURS.get(name) or next(spare) for name in self.systems}
        self.notes = dict(SYSTEM_NOTES)
        if results.get("encoder") == "text":
            self.notes["mt_encoder"] = ENCODER_NOTE
        if results.get("translations") == "given":
            self.notes["translate_test"] = GIVEN_NOTE
        if results.get("stage_2b") == "labels":
            self.notes["mt_llm"] += LABELS_NOTE

    def shown(self, value: float | None) -> str:
        return "–" if value is None else f"{value * self.factor:.1f}"

    def unit(self, value: float | None) -> str:
        """The value with its unit, between them a space that does not break."""
        return self.shown(value) + ("\N{NO-BREAK SPACE}%" if self.factor == 100 else "")

    def system(self, name: str) -> dict[str, str]:
        return {
            "key": name,
            "name": system_name(name),
            "note": self.notes.get(name, ""),
            "colour": self.colours[name],
            "mark": MARKS[self.systems.index(name) % len(MARKS)],
        }

    def heading(self, test: str) -> str:
        return f"Test {TEST_NAMES[test]}" if len(self.tests) > 1 else "Language by language"

    def sentences(self) -> list[tuple[str, str]]:
        """The headline numbers in words, a sentence or two for each test, under its name."""
        name = system_name(self.subject)
        lines: list[tuple[str, str]] = []
        for test, entries in self.tests.items():
            mine = entries.get(self.subject)
            if mine is None:
                continue
            where = f"{len(mine['languages'])} languages"
            if not lines and self.subject == "mt_llm":
                start = f"With labels in English alone, {name} reaches"
                where += " it saw no label in"
            else:
                start = f"{name} reaches"
            english = f" ({self.unit(mine['english'])} in English)" if mine["english"] else ""
            line = f"{start} {self.unit(mine['mean'])} on average over {where}{english}"
            versus = [
                f"{self.difference(*self.compared(entries, other)[:2])} {system_name(other)}"
                for other in entries
                if other != self.subject
            ]
            line += f": {_and(versus)}." if versus else "."
            if self.majority[test] is not None:
                line += (
                    f" The most frequent class alone would give {self.unit(self.majority[test])}."
                )
            lines.append((f"{self.heading(test)}." if len(self.tests) > 1 else "", line))
        return lines

    def compared(self, entries: Mapping[str, Entry], other: str) -> tuple[float, float, int]:
        """Means of the subject and of another system over the languages that both have, and how
        many these are; their own means where there is none."""
        both = entries[self.subject], entries[other]
        codes = common_languages(both)
        mine, theirs = (mean_over(entry, codes) for entry in both)
        alike = both[0]["languages"].keys() == both[1]["languages"].keys()
        if alike or mine is None or theirs is None:
            return both[0]["mean"], both[1]["mean"], len(codes)
        return mine, theirs, len(codes)

    def difference(self, mine: float, other: float) -> str:
        points = round((mine - other) * self.factor, 1)
        if points == 0:
            return "level with"
        return f"{abs(points):.1f} points {'above' if points > 0 else 'below'}"

    def cards(self) -> list[dict[str, str]]:
        cards = []
        for test, entries in self.tests.items():
            mine = entries.get(self.subject)
            if mine is None:
                continue
            letter = f"{TEST_NAMES[test]}" if len(self.tests) > 1 else "mean over languages"
            note = f"{system_name(self.subject)}, mean of {len(mine['languages'])} languages"
            if mine.get("interval") is not None:
                low, high = mine["interval"]
                note += f"; 95 % of resamples: {self.shown(low)} to {self.shown(high)}"
            if mine.get("std") is not None:
                note += f"; ± {self.shown(mine['std'])} over {len(self.results['seeds'])} seeds"
            cards.append({"title": letter, "figure": self.unit(mine["mean"]), "note": note})
            # The first test is the headline: only there is each baseline worth a card.
            for other in entries if len(cards) == 1 else ():
                if other != self.subject:
                    ours, theirs, count = self.compared(entries, other)
                    figure = f"{(ours - theirs) * self.factor:+.1f}".replace("-", "−")
                    title = f"against {system_name(other)}"
                    note = f"points, same {count} languages" if count else "points, other languages"
                    cards.append({"title": title, "figure": figure, "note": note})
        cost = self.results.get("cost", {})
        if self.subject in cost and "translate_test" in cost:
            rates = [
                cost[name]["sequences_per_second"] for name in (self.subject, "translate_test")
            ]
            note = f"sequences a second: {number(rates[0])} to {number(rates[1])}"
            figure = f"{number(rates[0] / rates[1])}×"
            title = f"speed against {system_name('translate_test')}"
            cards.append({"title": title, "figure": figure, "note": note})
        return cards

    def test(self, test: str) -> dict[str, Any]:
        entries = self.tests[test]
        systems = [name for name in self.systems if name in entries]
        majority = self.majority[test]
        return {
            "id": test,
            "heading": self.heading(test),
            "systems": [self.system(name) for name in systems],
            "subject": systems.index(self.subject) if self.subject in systems else 0,
            "bars": self.bars(entries),
            "majority": None if majority is None else self.place(majority),
            "majority_shown": self.unit(majority),
            "ends": (self.shown(0.0), self.unit(self.top())),
            "summary": self.summary(entries, systems),
            "heat": self.heat(entries, systems),
        }

    def top(self) -> float:
        """The right end of the bars: all of it in per cent, else a little beyond the best value."""
        if self.factor == 100:
            return 1.0
        entries = [entry for test in self.tests.values() for entry in test.values()]
        values = [value for entry in entries for value in entry["languages"].values()]
        return 10 * math.ceil(max(value for value in values if value is not None) / 10)

    def place(self, value: float) -> str:
        """Where on the axis, in per cent of its length."""
        return f"{100 * min(max(value / self.top(), 0.0), 1.0):.2f}"

    def bars(self, entries: Mapping[str, Entry]) -> list[dict[str, Any]]:
        """A row per language, best first: the subject's bar and a mark for each other system."""
        subject = (
            self.subject
            if self.subject in entries
            else next(name for name in self.systems if name in entries)
        )
        values = entries[subject]["languages"]
        order = sorted(values, key=lambda code: (-(values[code] or 0.0), language_name(code), code))
        return [
            {
                "name": language_name(code),
                "code": code,
                "shown": self.shown(values[code]),
                "place": self.place(values[code] or 0.0),
                "colour": self.colours[subject],
                "interval": self.interval(entries[subject], code),
                "marks": [
                    self.system(name) | {"place": self.place(value), "shown": self.shown(value)}
                    for name, entry in entries.items()
                    if name != subject and (value := entry["languages"].get(code)) is not None
                ],
            }
            for code in order
        ]

    def interval(self, entry: Entry, code: str) -> dict[str, str] | None:
        """Where the 95 % interval of a language begins and how long it is; None without one."""
        if code not in entry.get("intervals", {}):
            return None
        low, high = entry["intervals"][code]
        width = f"{float(self.place(high)) - float(self.place(low)):.2f}"
        return {
            "left": self.place(low),
            "width": width,
            "shown": f"{self.shown(low)} to {self.shown(high)}",
        }

    def summary(self, entries: Mapping[str, Entry], systems: Sequence[str]) -> list[dict[str, Any]]:
        """English, the mean, Latin script against the others, then scripts of several languages."""
        rows = [self.row("English", "", [entries[name]["english"] for name in systems], entries)]
        common, differ = compared_languages(list(entries.values()))
        if differ and common:
            values = [mean_over(entries[name], common) for name in systems]
            shared = self.row("languages in common", len(common), values, entries)
            rows.append(shared | {"strong": True})
        label, count = ("its own languages", "") if differ else ("all languages", len(common))
        means = self.row(label, count, [entries[n]["mean"] for n in systems], entries)
        for cell, name in zip(means["cells"], systems, strict=True):
            std = entries[name].get("std")
            cell["spread"] = "" if std is None else f"± {self.shown(std)}"
        rows.append(means | {"strong": not differ})
        common_too = [code for code in self.languages if code in common]
        groups = {
            "Latin script": [code for code in common_too if is_latin(code)],
            "other scripts": [code for code in common_too if not is_latin(code)],
        }
        if not all(groups.values()):
            groups = {}
        for script in sorted({script_name(code) for code in common_too} - {"", "Latin"}):
            codes = [code for code in common_too if script_name(code) == script]
            if len(codes) > 1:
                groups[script] = codes
        for label, codes in groups.items():
            values = [mean_over(entries[name], codes) for name in systems]
            rows.append(self.row(label, len(codes), values, entries))
        return rows

    def heat(self, entries: Mapping[str, Entry], systems: Sequence[str]) -> list[dict[str, Any]]:
        """A row per language, in the order of the terminal's table."""
        rows = []
        for code in self.languages:
            values = [entries[name]["languages"].get(code) for name in systems]
            note = "" if language_name(code) == code else code
            rows.append(self.row(language_name(code), note, values, entries))
        return rows

    def row(
        self,
        label: str,
        note: object,
        values: Sequence[float | None],
        entries: Mapping[str, Entry],
    ) -> dict[str, Any]:
        """A row of coloured cells; one colour scale for the whole of a test."""
        scale = [
            value
            for entry in entries.values()
            for value in entry["languages"].values()
            if value is not None
        ]
        low, high = min(scale), max(scale)
        cells = []
        for value in values:
            share = 0.0 if value is None or high == low else (value - low) / (high - low)
            heat = _HEAT[0] + (_HEAT[1] - _HEAT[0]) * min(max(share, 0.0), 1.0)
            cells.append({"shown": self.shown(value), "heat": f"{heat:.3f}", "spread": ""})
        return {"label": label, "note": str(note), "cells": cells, "strong": False}

    def costs(self) -> list[tuple[str, list[dict[str, str]]]]:
        """Titles, with sequences a second of the systems measured, the fastest first, and with
        their FLOPs, the cheapest first."""
        found = []
        for title, key, scale, order in (
            ("Inference, sequences a second", "sequences_per_second", 1.0, -1),
            ("GFLOP an example, paddings left out", "flops_per_example", 1e-9, 1),
        ):
            cost = self.results.get("cost", {})
            values = {name: cost[name][key] for name in self.systems if key in cost.get(name, {})}
            most = max(values.values(), default=1.0)
            bars = [
                self.system(name)
                | {"shown": number(scale * value), "place": f"{100 * value / most:.2f}"}
                for name, value in sorted(values.items(), key=lambda item: order * item[1])
            ]
            found += [(title, bars)] if bars else []
        return found


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _times(seconds: Mapping[str, float]) -> list[dict[str, str]]:
    longest = max(seconds.values(), default=1.0) or 1.0
    return [
        {"name": name, "shown": duration(value), "place": f"{100 * value / longest:.2f}"}
        for name, value in seconds.items()
    ]
