"""A result file: dated, with the command, the machine, the versions and the commit behind it."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parents[1]


def table(frame: pd.DataFrame) -> str:
    """A Markdown table."""
    lines = [list(frame.columns), ["---"] * len(frame.columns), *frame.astype(str).to_numpy()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(title: str, command: str, packages: Sequence[str], body: str) -> str:
    """The whole file. packages: those whose versions matter to it."""
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next(line for line in lines if "model name" in line).split(":")[1].strip()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return f"""# {title} ({datetime.date.today().isoformat()})

    {command}

{len(os.sched_getaffinity(0))} CPU cores ({cpu}), Python {platform.python_version()},
{versions}; commit {commit[:12]}.
Load average at the end: {os.getloadavg()[1]:.0f}; where other work runs, seconds are upper bounds.

{body.strip()}
"""


def write(name: str, text: str) -> None:
    """Leave `text` as YYYY-MM-DD-name.md beside the scripts."""
    path = Path(__file__).parent / f"{datetime.date.today().isoformat()}-{name}.md"
    path.write_text(text, encoding="utf-8")
    print(f"{path.relative_to(ROOT)} written")
