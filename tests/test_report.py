"""The page and the table that a finished run shows."""

import html
import io
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import fake_results
import pandas as pd
import pytest

from mtllm_jax.metrics import Console
from mtllm_jax.report import write_report
from mtllm_jax.results import compared_languages, results_table

VOID = {"meta", "link", "br", "hr", "img", "input", "col", "wbr"}


class Page(HTMLParser):
    """Tags with their attributes, rows of cells by section, and what is never closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: dict[str, list[list[str]]] = {}
        self.section = ""
        self.text = ""
        self.feed(text)
        self.close()

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = dict(attrs).get("id") or ""
        elif tag == "tr":
            self.rows.setdefault(self.section, []).append([])
        elif tag in ("td", "th"):
            self.rows[self.section][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if "td" in self.open or "th" in self.open:
            self.rows[self.section][-1][-1] += data


def report(folder: Path, results=None, config=None, curves=None, facts=None) -> Page:
    path = write_report(
        folder,
        fake_results.results() if results is None else results,
        fake_results.config() if config is None else config,
        fake_results.curves() if curves is None else curves,
        fake_results.facts() if facts is None else facts,
    )
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def printed(results, width=100) -> str:
    file = io.StringIO()
    Console(file).print(results_table(results, Path("runs/mini"), width))
    return file.getvalue()


def shown(value: float) -> str:
    return f"{100 * value:.1f}"


def test_every_number_is_in_its_place(tmp_path):
    results = fake_results.results()
    page = report(tmp_path, results)
    for test in ("systems", "systems_unseen"):
        rows = {row[0].split(" ")[-1]: row[1:] for row in page.rows[test]}
        entries = list(results[test].values())
        for code in fake_results.LANGUAGES:
            assert rows[code] == [shown(entry["languages"][code]) for entry in entries]
        assert rows["English"] == [shown(entry["english"]) for entry in entries]
        means = [f"{shown(entry['mean'])} ± {shown(entry['std'])}" for entry in entries]
        assert means in [row[1:] for row in page.rows[test]]
    for value in (results["majority"], results["majority_unseen"]):
        assert f"{shown(value)}\N{NO-BREAK SPACE}%" in page.text
    for figure in ("1834", "213", "3 min 09 s", "7 min 11 s", "seeds 0, 1, 2", "CLDR 48", "1.9 GB"):
        assert figure in page.text


def test_script_means(tmp_path):
    results = fake_results.results()
    languages = results["systems"]["mt_llm"]["languages"]
    rows = {row[0]: row[1] for row in report(tmp_path, results).rows["systems"]}
    latin = [value for code, value in languages.items() if code.endswith("_Latn")]
    other = [value for code, value in languages.items() if not code.endswith("_Latn")]
    cyrillic = [languages["rus_Cyrl"], languages["ukr_Cyrl"]]
    assert rows["Latin script 11"] == shown(sum(latin) / 11)
    assert rows["other scripts 13"] == shown(sum(other) / 13)
    assert rows["Cyrillic 2"] == shown(sum(cyrillic) / 2)
    assert not any(row.startswith("Thai 1") for row in rows)


def test_headline_in_words(tmp_path):
    results = fake_results.results()
    systems = results["systems"]
    systems["mt_llm"]["mean"], systems["llm_zero_shot"]["mean"] = 0.9, 0.4
    systems["mt_encoder"]["mean"], systems["translate_test"]["mean"] = 0.9, 0.925
    text = " ".join(report(tmp_path, results).text.replace("\N{NO-BREAK SPACE}", " ").split())
    assert (
        "With labels in English alone, MT-LLM (stacked) reaches 90.0 % on average over 24 "
        "languages it saw no label in (100.0 % in English): 50.0 points above LLM zero-shot, "
        "level with Encoder + head and 2.5 points below Translate-test." in text
    )
    assert "+50.0" in text
    assert "−2.5" in text
    assert "8.62×" in text


def test_well_formed_and_self_contained(tmp_path):
    page = report(tmp_path)
    assert page.open == []
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert not {"script", "link", "img", "iframe", "base"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            value = attributes.get(name) or "#"
            assert value.startswith("#") or (tag == "a" and value.startswith("https://arxiv.org/"))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    referenced = set(re.findall(r"url\(#([^)]+)\)", text))
    assert referenced
    assert referenced <= set(ids)
    assert re.findall(r"url\((?!#)|@import|@font-face", text) == []


def test_same_input_same_file(tmp_path):
    report(tmp_path)
    first = (tmp_path / "report.html").read_bytes()
    report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_foreign_text_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>"
    results = fake_results.results() | {"task": evil}
    results["systems"][evil] = results["systems"]["mt_llm"]
    page = report(
        tmp_path,
        results,
        config={"name": evil},
        curves={evil: fake_results.curves()["mini NLLB"]},
        facts={evil: evil, "scope": evil, "versions": {evil: evil}},
    )
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(evil) > 8


def test_other_recipes_and_gaps(tmp_path):
    """Another recipe's systems, one test, one seed, no cost, a score that is no share."""

    def entry(**languages):
        return {"english": 41.25, "mean": 30.0, "languages": languages}

    results = {
        "task": "translation",
        "metric": "chrF++",
        "majority": None,
        "seeds": [7],
        "systems": {
            "base": entry(deu_Latn=40.0, jpn_Jpan=20.0),
            "sdrrl": entry(deu_Latn=50.5, jpn_Jpan=None),
            "t_sft": entry(jpn_Jpan=25.0),
        },
        "seconds": {},
    }
    page = report(tmp_path, results, config={}, curves={}, facts={})
    rows = {row[0]: row[1:] for row in page.rows["systems"]}
    assert rows["German deu_Latn"] == ["40.0", "50.5", "–"]
    assert rows["Japanese jpn_Jpan"] == ["20.0", "–", "25.0"]
    assert "SDRRL reaches 30.0 on average over 2 languages (41.2 in English)" in page.text
    assert "%" not in page.text
    assert "SDRRL" in printed(results)


def test_scope_says_whose_models_they_are(tmp_path):
    facts = fake_results.facts()
    assert "trained from scratch in this run" in report(tmp_path).text.replace("\n", " ")
    own = fake_results.config() | {"encoder": "nllb-200-distilled-600M"}
    assert "trained from scratch" not in report(tmp_path, config=own).text
    begun = fake_results.config() | {"stage1": "runs/first"}
    assert "trained from scratch" not in report(tmp_path, config=begun).text
    assert "ours." in report(tmp_path, facts=facts | {"scope": "ours."}).text


def test_systems_are_said_to_be_what_they_are(tmp_path):
    words = {
        "encoder": ("text", "MT encoder, frozen", "text encoder, frozen"),
        "translations": ("given", "token by token", "published as files"),
        "stage_2b": ("labels", "LLM, learns on English", "learnt from its labels"),
    }
    plain = " ".join(report(tmp_path).text.split())
    for key, (value, usual, other) in words.items():
        text = " ".join(report(tmp_path, fake_results.results() | {key: value}).text.split())
        assert usual in plain and other not in plain and other in text
    changed = fake_results.config() | {"trained": "bridge", "encoder_layers": 2}
    text = report(tmp_path, config=changed).text
    assert "LLM, frozen" in text and "MT encoder, its last layers learn" in text


def test_curves_that_are_hard_to_draw(tmp_path):
    nan = float("nan")
    page = report(
        tmp_path,
        curves={
            "one point": pd.DataFrame({"step": [1], "time": [0.0], "loss": [2.0]}),
            "no number": pd.DataFrame({"step": [1], "time": [0.0], "loss": [nan]}),
            "no loss": pd.DataFrame({"step": [1], "time": [0.0]}),
            "negative": pd.DataFrame({"step": [1, 2], "time": [0.0, 1.0], "loss": [-1.0, 2.0]}),
            "long": pd.DataFrame({"step": range(20_000), "time": 0.0, "loss": 3.0, "fvu": 0.0}),
        },
    )
    assert sum(tag == "svg" for tag, _ in page.tags) == 4
    assert (tmp_path / "report.html").stat().st_size < 150_000


def test_table_holds_every_number():
    results = fake_results.results()
    text = printed(results)
    assert max(map(len, text.splitlines())) <= 100
    rows = {line.split("  ")[1]: line for line in text.splitlines() if line.startswith("  ")}
    for code, name in (("deu_Latn", "German"), ("zho_Hans", "Chinese"), ("tam_Taml", "Tamil")):
        cells = rows[f"{name} {code}"].split()[2:]
        assert cells == [
            shown(results[test][system]["languages"][code])
            for system in results["systems"]
            for test in ("systems", "systems_unseen")
        ]
    mine = results["systems"]["mt_llm"]
    assert rows["mean of 24 languages"].split()[4] == shown(mine["mean"])
    assert rows["± over seeds"].split()[3] == shown(mine["std"])
    assert rows["± 95 %, over rows"].split()[5] == "1.1"
    assert rows["macro-F1, mean"].split()[2] == shown(mine["mean"] - 0.02)
    latin = [value for code, value in mine["languages"].items() if code.endswith("_Latn")]
    assert rows["mean, Latin script"].split()[3] == shown(sum(latin) / len(latin))
    assert rows["sequences/s"].split()[1:] == ["1834", "–", "–", "213"]
    assert rows["GFLOP an example"].split()[3:] == ["0.034", "–", "–", "2.9"]
    assert "always the most frequent class: 32.3 and 23.7" in text
    assert "runs/mini/report.html" in text
    assert "--config.encoder=DIR" in text


@pytest.mark.parametrize("width", [40, 60, 80, 100])
def test_table_fits(width):
    """Systems that do not fit go below: each is there once, and no number is lost."""
    results = fake_results.results(seeds=1, unseen=False)
    for name in ("base", "sft", "t_sft", "my_method", "a_system_with_quite_a_long_name"):
        results["systems"][name] = results["systems"]["mt_encoder"]
    text = printed(results, width).split("What next")[0]
    assert text.count("100.0") >= 9
    assert text.count("my_method") == 1
    table = [line for line in text.splitlines() if "_Latn" in line or "English" in line]
    assert max(map(len, table)) <= max(width, 2 + 24 + 3 + 31 + 2)
    assert sum(len(re.findall(r"\d+\.\d", line)) for line in table) == 9 * 12


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

MEASURE = """
<body style="margin:0">
<iframe id="frame" style="width:{width}px;height:800px;border:0" srcdoc="{page}"></iframe>
<script>
const frame = document.getElementById("frame");
frame.onload = () => {{
  const page = frame.contentDocument;
  const wide = [...page.querySelectorAll("main *")].filter(
    (each) => !each.closest(".scroll, pre, svg") && each.getBoundingClientRect().right > {width}
  );
  document.title = JSON.stringify({{
    width: frame.contentWindow.innerWidth,
    scroll: page.documentElement.scrollWidth,
    wide: wide.map((each) => each.outerHTML.slice(0, 80)),
    cut: [...page.querySelectorAll(".scroll")].filter(
      (each) => each.scrollWidth > each.clientWidth
    ).length,
    bars: [...page.querySelectorAll(".fill")].every((each) => each.offsetHeight > 0),
  }});
}};
</script>
"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("made_by", ["write_report", "a run"])
def test_in_a_browser(request, tmp_path, width, made_by):
    """Nothing sticks out at a phone's width or a desk's, and the console stays silent."""
    if made_by == "write_report":
        report(tmp_path, seven_systems())
    folder = request.getfixturevalue("mini_run") if made_by == "a run" else tmp_path
    page = (folder / "report.html").read_text(encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(MEASURE.format(width=width, page=html.escape(page)), encoding="utf-8")
    ran = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
            f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900",
            "--enable-logging=stderr", "--virtual-time-budget=10000", "--dump-dom",
            frame.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", ran.stdout, re.DOTALL)
    assert title, ran.stderr
    # dump-dom shows the frame's source too; the outer document's title is the one with a result.
    measured = json.loads(html.unescape(re.search(r"<title>(\{.*?\})</title>", ran.stdout)[1]))
    assert measured == {"width": width, "scroll": width, "wide": [], "cut": 0, "bars": True}
    assert "CONSOLE" not in ran.stderr


def test_std_of_one_system_only(tmp_path):
    results = fake_results.results(seeds=1)
    assert "over seeds" not in report(tmp_path, results).text
    assert "over seeds" not in printed(results)
    assert not math.isnan(results["systems"]["mt_llm"]["mean"])


def seven_systems():
    results = fake_results.results(seeds=1)
    for test in ("systems", "systems_unseen"):
        there = results[test]
        for name in ("translate_train", "llm_prompted", "encoder_linear"):
            there[name] = dict(there["mt_encoder"])
        few = {code: there["llm_zero_shot"]["languages"][code] for code in ("deu_Latn", "tha_Thai")}
        there["llm_zero_shot"] = there["llm_zero_shot"] | {
            "languages": few, "mean": sum(few.values()) / 2,
        }  # fmt: skip
    return results


def test_seven_systems_fit_and_means_are_over_the_languages_in_common(tmp_path):
    results = seven_systems()
    text = printed(results).split("What next")[0]
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("zero-shot") == text.count("Thai tha_Thai") == 2  # a table for each test
    rows = [line for line in reversed(text.splitlines()) if line.startswith("  ") and line.strip()]
    lines = {line.split("  ")[1]: line.split() for line in rows}
    means = []
    for entry in results["systems"].values():
        both = [entry["languages"][code] for code in ("deu_Latn", "tha_Thai")]
        means.append(shown(sum(both) / 2))
    assert lines["mean of 2 in common"][5:] == means
    assert lines["mean of its own"][4:] == [shown(e["mean"]) for e in results["systems"].values()]
    assert lines["Greek ell_Grek"][3] == "–"
    page = report(tmp_path, results)
    rows = {row[0]: row[1:] for row in page.rows["systems"]}
    assert rows["languages in common 2"] == means
    assert rows["its own languages"] == [shown(e["mean"]) for e in results["systems"].values()]
    assert "points, same 2 languages" in page.text and "points, same 24 languages" in page.text


def test_means_over_different_languages_are_not_compared(tmp_path):
    results = fake_results.results(seeds=1)
    for test in ("systems", "systems_unseen"):
        for place, entry in enumerate(results[test].values()):
            codes = list(entry["languages"])[place::4]
            entry["languages"] = {code: entry["languages"][code] for code in codes}
    assert compared_languages(list(results["systems"].values())) == ([], True)
    text = printed(results)
    assert "mean of its own" in text and "in common" not in text and " languages " not in text
    rows = {row[0] for row in report(tmp_path, results).rows["systems"]}
    assert "its own languages" in rows and "Latin script" not in rows
    assert not any("in common" in row or row.startswith("all languages") for row in rows)
