"""A step beyond SDRRL: a model learns, on its own answers in the targets, what it would have said
next had it seen the instruction in the resource-rich language too.

In rounds: the student as it is answers instructions in the targets; it is then trained, at each
token of those answers, to say what its teacher says there, which is itself as the round began and
is given the instruction in both languages. What was sampled is never a label.

B rows, N texts per row, T positions of the student's rows, S of the teacher's, D width.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mtllm_jax.config import SDRRL, OnPolicy
from mtllm_jax.data.formats import json_records
from mtllm_jax.data.packing import ALIGNED, Rows, pack
from mtllm_jax.data.templates import Template
from mtllm_jax.data.tokenise import TargetTokenizer
from mtllm_jax.data.transfer import rows
from mtllm_jax.data.transfer.held_out import HeldOut
from mtllm_jax.hf.files import local_files
from mtllm_jax.models.llama import Llama
from mtllm_jax.objectives import Terms, aligned_places
from mtllm_jax.ops.vocab_loss import divergence_of_rows
from mtllm_jax.recipes import transferring
from mtllm_jax.recipes.job import Job
from mtllm_jax.recipes.tuning import said_by, tell_rejects, tuned_on
from mtllm_jax.runfolder import StageFolder, write_jsonl
from mtllm_jax.sampling import Sampling
from mtllm_jax.train import Objective

_TEACHER = "teacher"  # the stream that the teacher reads

Texts = list[dict[str, np.ndarray]]


def on_policy(
    job: Job[SDRRL], folder: str, instructions: Sequence[Mapping[str, str]], title: str
) -> str:
    """Every round, from the LLM of a folder on; returns the folder of what it became.

    instructions: of `both_languages`.
    """
    how = job.config.on_policy
    for number in range(1, how.rounds + 1):
        name = f"on_policy/{number}"
        with job.stage(name, f"{title}, round {number} of {how.rounds}") as stage:
            folder = _round(job, stage, name, folder, instructions)
    return folder


def both_languages(
    answers: Path, translations: Path, targets: Sequence[str], held_out: HeldOut
) -> list[dict[str, str]]:
    """Instructions in the targets, "id", "language" and "prompt", and the same in the resource-rich
    language, "source"; none that is held out. ValueError where there is none.

    answers, translations: files of rows with "prompt" in the one language and in the others.
    """
    read, _ = rows.read_rows(answers, ())
    read, _ = rows.read_translations(translations, read, (), targets)
    found = [
        {"id": row.id, "language": code, "prompt": prompt, "source": row.texts["prompt"]}
        for row in read
        for code in targets
        if (prompt := row.translations.get(code, {}).get("prompt", ""))
        and not any(map(held_out.holds, (prompt, row.texts["prompt"])))
    ]
    if not found:
        raise ValueError("no instruction was translated, which the system on_policy asks for.")
    return found


def drawn(
    instructions: Sequence[Mapping[str, str]], how: OnPolicy, seed: int
) -> list[Mapping[str, str]]:
    """Those that are asked in a round, in their order."""
    count = min(how.instructions or len(instructions), len(instructions))
    chosen = np.random.default_rng(seed).permutation(len(instructions))[:count]
    return [instructions[i] for i in np.sort(chosen)]


def _round(
    job: Job[SDRRL],
    stage: StageFolder,
    name: str,
    folder: str,
    instructions: Sequence[Mapping[str, str]],
) -> str:
    config, how = job.config, job.config.on_policy
    prompts = stage.path / "prompts.jsonl"
    write_jsonl(prompts, drawn(instructions, how, job.stage_seed(name)))
    answers = transferring.answered(
        job,
        folder,
        prompts,
        stage.path / "answers.jsonl",
        seed=job.stage_seed(f"{name}/answers"),
        sampling=Sampling(how.temperature),
        keep_ids=True,
    )
    tokenizer = TargetTokenizer(local_files(folder))
    template = Template(config.answering.template, tokenizer, config.answering.system)

    def read() -> Rows:
        said = [row for _, row in json_records(answers)]
        lengths = {"target": how.training.target_length, _TEACHER: how.teacher_length}
        texts, rejects = both_sides(template, how.context, said, lengths)
        tell_rejects(job, stage, rejects)
        if not texts:
            raise ValueError(
                "config.on_policy.training.target_length and teacher_length are"
                f" {lengths['target']} and {lengths[_TEACHER]}; no instruction has room in so many"
                " tokens."
            )
        packed = pack(
            texts,
            lengths | {ALIGNED: lengths["target"]},
            {"target": tokenizer.pad_id, _TEACHER: tokenizer.pad_id, ALIGNED: 0},
            packing=how.training.packing,
        )
        job.console.print(packed.told())
        return packed

    def divergence(llm: Llama, graph: nnx.GraphDef, kept: nnx.State) -> tuple[Objective, Any]:
        teacher_graph, teacher = nnx.split(llm)
        frozen = frozen_of(config, kept, teacher)
        return teacher_divergence(config, graph, teacher_graph), frozen

    return tuned_on(job, stage, name, folder, how.training, divergence, rows=read)


def both_sides(
    template: Template,
    context: str,
    said: Sequence[Mapping[str, Any]],
    lengths: Mapping[str, int],
) -> tuple[Texts, list[dict[str, Any]]]:
    """What student and teacher read of each answer, and which of their tokens are compared; and the
    answers left out, as there is no room for what is asked: id, reason.

    said: instructions of `both_languages` with "answer_ids". lengths: of both streams. Compared is
    what is said at each token of the answer and behind its last. An answer that one of them has no
    room for loses its end.
    """
    asked = {
        "target": template([row["prompt"] for row in said]),
        _TEACHER: template(
            [context.format(source=row["source"], prompt=row["prompt"]) for row in said]
        ),
    }
    texts: Texts = []
    rejects = []
    for place, row in enumerate(said):
        prompts = {stream: ids[place] for stream, ids in asked.items()}
        room = min(lengths[stream] - len(ids) for stream, ids in prompts.items())
        if room < 0:
            sizes = ", ".join(f"{len(ids)} of {lengths[name]}" for name, ids in prompts.items())
            reason = f"the prompts of student and teacher have {sizes} tokens of a row"
            rejects.append({"id": row["id"], "language": row["language"], "reason": reason})
            continue
        answer = np.array(row["answer_ids"][:room], np.int32)
        text = {stream: np.concatenate([ids, answer]) for stream, ids in prompts.items()}
        # The last token of a prompt says the answer's first.
        compared = len(prompts[_TEACHER]) + np.arange(1 + len(answer), dtype=np.int32)
        before = np.zeros(len(prompts["target"]) - 1, np.int32)
        texts.append(text | {ALIGNED: np.concatenate([before, compared])})
    return texts, rejects


def frozen_of(config: SDRRL, kept: nnx.State, teacher: nnx.State) -> dict[str, nnx.State]:
    """What a round only reads. But for its adapters the student is the teacher: held once."""
    return {"student": kept, "teacher": teacher} if config.trained == "all" else {"student": kept}


def teacher_divergence(
    config: SDRRL, graph: nnx.GraphDef, teacher_graph: nnx.GraphDef
) -> Objective:
    """KL(teacher ‖ student) of the next token, at the student's tokens that have one of the
    teacher's beside them, "aligned_ids". The objective's `frozen` is what `frozen_of` gives."""
    dtype = jnp.dtype(config.compute_dtype)

    def objective(trainable: nnx.State, frozen: Any, batch: dict[str, Array], key: Array) -> Terms:
        student: Llama = nnx.merge(graph, trainable, frozen["student"])
        teacher: Llama = nnx.merge(teacher_graph, frozen.get("teacher", frozen["student"]))
        segments_BT, segments_BS = batch["target_segments"], batch[f"{_TEACHER}_segments"]
        is_compared_BT, place_BT = aligned_places(
            batch[f"{ALIGNED}_ids"], segments_BT, segments_BS, batch["example"].shape[1]
        )
        embedded_BTD = student.embed(batch["target_ids"], dtype)
        h_BTD = student.hidden(embedded_BTD, segments_BT, causal=True, dropout_key=key)
        given_BSD = teacher.embed(batch[f"{_TEACHER}_ids"], dtype)
        teacher_BSD = teacher.hidden(given_BSD, segments_BS, causal=True)
        teacher_BTD = jnp.take_along_axis(teacher_BSD, place_BT[:, :, None], axis=1)
        own_VD, given_VD = said_by(student, dtype), said_by(teacher, dtype)
        return {"loss": divergence_of_rows(h_BTD, own_VD, teacher_BTD, given_VD, is_compared_BT)}

    return objective
