"""A row as the beginning of a text that its label, or one of its choices, goes on.

A template is Python's, with the names of columns in braces, and {labels} for the names of all
labels; what is scored stands behind it after a space.
"""

import string
from collections.abc import Sequence

from mtllm_jax.tasks.task import Row

# [ours]
PROMPTS = {
    "text": "Text: {text}\nLabels: {labels}\nLabel:",
    "pair": "Text 1: {text}\nText 2: {text_pair}\nLabels: {labels}\nLabel:",
    "choice": "{context}\nQuestion: {question}\nAnswer:",
}

_COLUMNS = {
    "text": ("text",),
    "pair": ("text", "text_pair"),
    "choice": ("context", "question"),
}


def kind_of(row: Row) -> str:
    """What its task is: "text", "pair" or "choice"."""
    return "choice" if "choices" in row else "pair" if "text_pair" in row else "text"


def check_prompt(template: str, kind: str) -> None:
    """Raise ValueError, a sentence, for a template that the rows of a kind do not fill."""
    columns = _COLUMNS[kind]
    try:
        fields = [field[1:] for field in string.Formatter().parse(template)]
    except ValueError as error:
        raise ValueError(f"{template!r} is no template: {error}") from None
    names = [name for name, _, _ in fields if name is not None]
    allowed = columns if kind == "choice" else (*columns, "labels")
    if unknown := [name for name in names if name not in allowed]:
        shown = ", ".join(f"{{{name}}}" for name in allowed)
        raise ValueError(f"{template!r} names {{{unknown[0]}}}; it may name {shown}")
    if any(how or conversion for _, how, conversion in fields):
        raise ValueError(f"{template!r} has more than a name in braces")
    if columns[-1] not in names:
        raise ValueError(f"{template!r} must name {{{columns[-1]}}}")
    if template != template.rstrip():
        raise ValueError(f"{template!r} ends with white space; a space is put behind it anyway")


def prompts(template: str, rows: Sequence[Row], labels: Sequence[str]) -> list[tuple[str, str]]:
    """The prompt of each row in two parts, of which the end of the first is cut where it is too
    long: it ends with the last text, or with the context of multiple choice."""
    columns = ("context", "text_pair", "text", "question")
    cut = next(f"{{{name}}}" for name in columns if f"{{{name}}}" in template)
    end = template.rindex(cut) + len(cut)
    named = {"labels": ", ".join(labels)}
    return [
        (template[:end].format(**row, **named), template[end:].format(**row, **named))
        for row in rows
    ]


def last_words(template: str) -> str:
    """What every prompt ends with, from the start of its last line or the last name on."""
    literal, name, _, _ = list(string.Formatter().parse(template))[-1]
    return literal.rpartition("\n")[2] if name is None else ""
