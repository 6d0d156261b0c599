"""What an LLM answers to the rows of a benchmark, in a folder that a stopped start goes on in.

B rows, C choices.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from mtllm_jax import distributed, sharding
from mtllm_jax.asking.tasks import Asked, Row
from mtllm_jax.data.formats import json_records
from mtllm_jax.data.templates import Template
from mtllm_jax.data.tokenise import TargetTokenizer
from mtllm_jax.generate import Decoding, generate
from mtllm_jax.hf.llama import load_llama
from mtllm_jax.metrics import Console
from mtllm_jax.models.llama import LlamaConfig
from mtllm_jax.parts import Parts, cut
from mtllm_jax.predict import mesh_of
from mtllm_jax.recipes.prompting import Scores
from mtllm_jax.runfolder import write_jsonl
from mtllm_jax.sampling import Sampling

_WINDOW = 256  # rows whose choices are scored together, and kept

# Of each row "answer"; where that is "" for a reason, "problem"; of what is written, "ended", False
# where it was cut.
Answers = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class LLM:
    """What is asked. folder: the model's. template: what stands around a prompt."""

    folder: str
    sizes: LlamaConfig
    tokenizer: TargetTokenizer
    template: Template
    template_name: str


@dataclasses.dataclass(frozen=True)
class Means:
    """How it is computed. batch_rows: prompts that each device answers at a time. fsdp: devices
    that each copy of the weights is cut over. dtype: of weights and computation."""

    batch_rows: int
    fsdp: int
    dtype: str


def filled(task: Asked, template: str, row: Row) -> str:
    """The prompt of a row."""
    return template.format(**{name: text(row) for name, text in task.fields.items()})


def fitted(llm: LLM, task: Asked, template: str, row: Row, max_new_tokens: int) -> tuple[str, bool]:
    """The prompt of a row, and whether `task.cut` lost its end so that it fits the context."""
    prompt, room = filled(task, template, row), llm.sizes.max_positions - max_new_tokens
    shorter = dict(row)
    while task.cut and shorter[task.cut] and (num := len(llm.template([prompt])[0])) > room:
        # Less than in proportion, so that a round or two are enough.
        kept = int(0.95 * len(shorter[task.cut]) * room / num)
        shorter[task.cut] = shorter[task.cut][: max(kept, 0)]
        prompt = filled(task, template, shorter)
    return prompt, shorter != row


def written(
    llm: LLM,
    prompts: Sequence[Mapping[str, str]],
    max_new_tokens: int,
    folder: Path,
    means: Means,
    console: Console,
) -> Answers:
    """What the LLM writes behind each prompt, always its likeliest token.

    prompts: "id", "language" and "prompt" of each row. All processes call it.
    """
    asked, answers = folder / "prompts.jsonl", folder / "answers.jsonl"
    if not distributed.by_first(answers.exists):
        if distributed.is_first():
            write_jsonl(epath.Path(asked), prompts)
        distributed.meet()
        how = Decoding(
            template=llm.template_name,
            system="",
            sampling=Sampling(temperature=0.0),
            max_new_tokens=max_new_tokens,
            stop=(),
            seed=0,
            batch_rows=means.batch_rows,
            dtype=means.dtype,
        )
        generate(
            llm.folder, os.fspath(asked), os.fspath(answers), how, fsdp=means.fsdp, console=console
        )
        distributed.meet()  # process 0 has written it
    found = {
        (row["id"], row["language"]): {"answer": row["answer"], "ended": row["ended"]}
        for _, row in json_records(answers)
    }
    rejects = answers.with_name(f"{answers.name}.rejects.jsonl")
    reasons = {
        (reject["row"]["id"], reject["row"]["language"]): reject["reason"]
        for _, reject in (json_records(rejects) if rejects.exists() else ())
    }
    every = [(row["id"], row["language"]) for row in prompts]
    return [
        found[key] if key in found else {"answer": "", "problem": reasons[key]} for key in every
    ]


def chosen(
    llm: LLM,
    prompts: Sequence[str],
    options: Sequence[Sequence[str]],
    folder: Path,
    means: Means,
    console: Console,
) -> Answers:
    """The number, from 1, of the likeliest of the texts that may follow each prompt: of the largest
    log-likelihood, summed over its tokens. All processes call it."""
    mesh = mesh_of(means.fsdp)
    batch_rows = sharding.rows_for(means.batch_rows * mesh.size, mesh)
    room = min(llm.sizes.max_positions, llm.sizes.sliding_window or llm.sizes.max_positions)
    rows, answers = [], []
    for prompt, texts in zip(prompts, options, strict=True):
        ids, following = llm.template.followed(prompt, texts)
        longest = len(ids) + max(map(len, following))
        if longest > room:
            reason = f"prompt and choice have {longest} tokens; the context has room for {room}"
            answers.append({"answer": "", "problem": reason})
            continue
        rows.append({"prompt": ids.tolist(), "following": [each.tolist() for each in following]})
        answers.append({"answer": "?"})
    if not rows:
        raise ValueError(f"none of the rows can be answered: {answers[0]['problem']}.")
    about = {"model": llm.folder, "dtype": means.dtype}
    parts = Parts(folder / "parts", about)
    score = Scores(
        load_llama(
            llm.folder, means.dtype, mesh=mesh, progress=console.progress_of_bytes("reading")
        ),
        llm.tokenizer.pad_id,
        batch_rows,
        dtype=means.dtype,
        mesh=mesh,
    )

    def run(window: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """float32 [B, C]."""
        return score(
            [
                (
                    np.array(row["prompt"], np.int32),
                    [np.array(f, np.int32) for f in row["following"]],
                )
                for row in window
            ]
        )

    index, count = jax.process_index(), jax.process_count()
    mine = sum(window.size for window in cut(rows, _WINDOW) if window.place % count == index)
    what = "answering" if count == 1 else f"answering, process {index} of {count}"
    with console.progress(mine, what, unit="rows") as progress:
        parts.fill(cut(rows, _WINDOW), run, progress.update)
    scores_C = iter([each for window in cut(rows, _WINDOW) for each in parts.read(window)])
    return [one if "problem" in one else _likeliest(next(scores_C)) for one in answers]


def _likeliest(scores_C: np.ndarray) -> dict[str, Any]:
    if not np.isfinite(scores_C).all():
        return {"answer": "", "problem": "the model's logits for it are no numbers"}
    return {"answer": str(int(np.argmax(scores_C)) + 1)}
