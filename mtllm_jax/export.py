"""A finished run as a Hugging Face folder: the stack, its adapter, or a model it started from."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from mtllm_jax.card import model_card
from mtllm_jax.hf.encoder import has_decoder
from mtllm_jax.hf.llama import save_llama
from mtllm_jax.hf.nllb import load_nllb, save_nllb
from mtllm_jax.hf.peft import difference_as_lora, save_peft
from mtllm_jax.hf.stack import save_stack
from mtllm_jax.metrics import Console
from mtllm_jax.models import lora
from mtllm_jax.recipes import stacking
from mtllm_jax.recipes.finished import FinishedRun, open_run
from mtllm_jax.runfolder import is_remote


def export(
    run_folder: str | os.PathLike[str],
    to: str | os.PathLike[str],
    format: str,
    *,
    adapters: str,
    rank: int | None,
    dtype: str | None,
    console: Console,
    stage: str = "distillation",
) -> None:
    """Write the folder `to`, whole or not at all, and say how it is loaded.

    format: "hf" (the stack with its head), "peft" (what the student's LLM learnt, as an adapter
    of the LLM it started from), "llama" or "nllb" (that LLM, that MT model). adapters, of "hf":
    LoRA "merged" into the weights or "kept". rank, of "peft" where all layers were trained; None
    = full. dtype: of the tensors written; None = as in the run. stage, of "hf": what the stack has
    learnt, "distillation" or "adaptation", stage 1 alone, without a head. ValueError for what does
    not fit the run, before any weight is read.
    """
    if is_remote(to):
        raise ValueError(f"--to={to} is remote; it must be a local folder, to be copied from.")
    folder = Path(to)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "is a file" if folder.is_file() else "is not empty"
        raise ValueError(f"--to={to} exists and {what}; choose another folder.")
    if stage == "adaptation" and format != "hf":
        raise ValueError(f"--stage is 'adaptation'; --format is {format!r} and must be 'hf'.")
    run = open_run(run_folder, stage)
    if run.config.frozen_dtype == "int8":
        floats = dataclasses.replace(run.config, frozen_dtype="bfloat16")
        run = dataclasses.replace(run, config=floats)
    if run.config.trained != "lora" and adapters == "kept":
        learnt = "all layers" if run.config.trained == "all" else "the bridge alone"
        raise ValueError(f"--adapters is 'kept', but {run.path} trained {learnt} and has none.")
    if format == "peft" and _as_it_was(run):
        raise ValueError(f"--format is 'peft', but {run.path} left the student's LLM as it was.")
    if run.config.trained != "all" and rank is not None:
        raise ValueError(
            f"--rank is {rank}, but {run.path} trained adapters, which are written as they are."
        )
    if rank is not None and rank < 1:
        raise ValueError(f"--rank is {rank}; it must be at least 1.")
    if format == "nllb" and not has_decoder(run.config.encoder):
        raise ValueError(
            f"--format is 'nllb', but the encoder of {run.path} is no translation model."
        )
    with console.stage(f"{format}: {run.path} → {folder}"):
        match format:
            case "hf":
                how = _stack(run, folder, stage, adapters, dtype, console)
            case "peft":
                how = _adapter(run, folder, rank, dtype, console)
            case "llama":
                how = _llm(run, folder, dtype, console)
            case "nllb":
                how = _mt_model(run, folder, dtype, console)
            case _:
                raise ValueError(f"--format is {format!r}; it may be hf, peft, llama or nllb.")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    console.print(f"{folder}: {size / 1e6:.1f} MB. Load it with")
    console.print(f"  {how}")


def _as_it_was(run: FinishedRun) -> bool:
    """Whether the student's LLM is the one that the run began with."""
    return (run.config.trained, run.config.distillation.start) == ("bridge", "stage1")


def _stack(
    run: FinishedRun,
    folder: Path,
    stage: str,
    adapters: str,
    dtype: str | None,
    console: Console,
) -> str:
    parts = run.load_parts(console=console)
    task: dict[str, Any] = {}
    if stage == "adaptation":
        stack = stacking.load_stage_1(run.path, run.config, parts)
    else:
        _, student = run.load_trained(parts)
        stack = student.stack
        task = {
            "head": student.head,
            "labels": () if run.num_choices else run.labels,
            "kind": "multiple_choice" if run.num_choices else "classification",
            "card": model_card(run, parts.source.languages),
        }
    save_stack(
        folder,
        stack,
        **task,
        bidirectional=run.config.bidirectional,
        max_length=run.config.evaluation.max_length,
        languages=parts.source.languages,
        encoder_tokenizer_from=run.config.encoder,
        llm_tokenizer_from=run.config.llm,
        legacy_source_order=run.config.legacy_source_order,
        lora=adapters,
        dtype=dtype,
        progress=console.progress_of_bytes("writing the stack"),
    )
    if stage == "adaptation":
        return f"--config.stage1={folder} of launch/train.py, or mtllm_jax.load({str(folder)!r})"
    auto = "MultipleChoice" if run.num_choices else "SequenceClassification"
    return (
        f"transformers.AutoModelFor{auto}.from_pretrained({str(folder)!r}, trust_remote_code=True)"
    )


def _adapter(
    run: FinishedRun, folder: Path, rank: int | None, dtype: str | None, console: Console
) -> str:
    parts = run.load_parts(console=console)
    teacher, student = run.load_trained(parts)
    tuned, lost = student.stack.llm, 0.0
    if run.config.trained == "all":
        tuned, lost = difference_as_lora(parts.llm, tuned, rank)
    elif run.config.trained == "bridge":
        tuned = teacher.llm
    elif run.config.distillation.start == "stage1+teacher":
        tuned = lora.joined(parts.llm, teacher.llm, tuned)
    base = run.first.llm or run.config.llm
    if run.adapters:
        # Not a model's name: what takes it for one must fail, not adapt the plain LLM.
        base += f" with {', '.join(run.adapters)} merged, as --format=llama writes it"
    save_peft(folder, parts.llm, tuned, base_name=base, dtype=dtype)
    if lost:
        console.print(f"rank {rank} leaves out up to {lost:.1%} of what a linear map has learnt")
    return f"peft.PeftModel.from_pretrained(LLM, {str(folder)!r})  # LLM: {base}"


def _llm(run: FinishedRun, folder: Path, dtype: str | None, console: Console) -> str:
    save_llama(
        run.load_parts(console=console).llm,
        folder,
        tokenizer_files_from=run.config.llm,
        dtype=dtype,
        progress=console.progress_of_bytes("writing the LLM"),
    )
    return f"transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})"


def _mt_model(run: FinishedRun, folder: Path, dtype: str | None, console: Console) -> str:
    model = load_nllb(
        run.config.encoder,
        dtype=jnp.dtype(run.config.frozen_dtype),
        progress=console.progress_of_bytes("reading the MT model"),
    )
    save_nllb(
        model,
        folder,
        tokenizer_files_from=run.config.encoder,
        dtype=dtype,
        progress=console.progress_of_bytes("writing the MT model"),
    )
    return f"transformers.AutoModelForSeq2SeqLM.from_pretrained({str(folder)!r})"
