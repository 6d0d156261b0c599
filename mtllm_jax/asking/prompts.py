"""Prompt templates: files of text with the names of a benchmark's fields in braces."""

import string
from collections.abc import Collection
from pathlib import Path

_FOLDER = Path(__file__).parents[1] / "prompts"


def read_prompt(task: str, name: str, file: str, fields: Collection[str]) -> str:
    """The template of a task: of `file`, or the package's own `name` where that is "".

    White space at its end is left off. fields: what it may name; the first it must. ValueError for
    a file that cannot be read or is no such template.
    """
    path = Path(file) if file else _FOLDER / name
    try:
        template = path.read_text(encoding="utf-8").rstrip()
    except (OSError, UnicodeDecodeError) as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise ValueError(f"--prompt={file} cannot be read: {reason}.") from None
    try:
        parsed = [field[1:] for field in string.Formatter().parse(template)]
    except ValueError as error:
        raise ValueError(f"--prompt={file} is no template: {error}.") from None
    names = [name for name, _, _ in parsed if name is not None]
    shown = ", ".join(f"{{{field}}}" for field in fields)
    if unknown := [name for name in names if name not in fields]:
        raise ValueError(
            f"--prompt={file} names {{{unknown[0]}}}; of --task={task} it may name {shown}, and"
            " other braces stand twice."
        )
    if any(how or conversion for _, how, conversion in parsed):
        raise ValueError(f"--prompt={file} has more than a name in braces.")
    first = next(iter(fields))
    if first not in names:
        raise ValueError(f"--prompt={file} must name {{{first}}}.")
    return template
