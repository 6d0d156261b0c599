"""The README's table of faults names tests that are there."""

import re
from pathlib import Path

HERE = Path(__file__).parent


def test_each_line_of_the_readme_names_a_test():
    text = (HERE.parents[1] / "README.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"\| fault \|.*?\n\n", text, re.DOTALL)
    lines = table.splitlines()[2:-1]
    assert len(lines) > 10
    for line in lines:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", line)
        assert named or line.endswith("| the same |"), line
        for file, test in named:
            assert f"\ndef {test}(" in (HERE / file).read_text(encoding="utf-8"), line
