"""An LLM learns to answer as examples do: the loss is on the answers' tokens alone.

B rows, N texts per row, T positions, D width, V vocabulary.
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike

from mtllm_jax import distributed, flops, sharding
from mtllm_jax.config import SDRRL, Training
from mtllm_jax.data.packing import Rows, pack
from mtllm_jax.data.pipeline import Batch, add_by_example
from mtllm_jax.data.templates import Template
from mtllm_jax.data.tokenise import Ids, TargetTokenizer
from mtllm_jax.data.transfer.build import Example
from mtllm_jax.hf.files import Files, local_files
from mtllm_jax.hf.llama import save_llama
from mtllm_jax.models import lora
from mtllm_jax.models.layers import LoRAParam, positions_in_segment, split, weight
from mtllm_jax.models.llama import Llama, LlamaConfig
from mtllm_jax.objectives import Terms, next_tokens
from mtllm_jax.ops.vocab_loss import cross_entropy_of_rows, positions_at_once
from mtllm_jax.recipes import stacking
from mtllm_jax.recipes.job import Job
from mtllm_jax.runfolder import StageFolder, made_locally, write_jsonl
from mtllm_jax.train import Objective, fit


def conversations(
    tokenizer: TargetTokenizer, template: Template, examples: Sequence[Example], length: int
) -> tuple[Ids, np.ndarray, list[dict[str, Any]]]:
    """Token ids of prompt, answer and end as one text each; int32 [texts], how many of them are the
    prompt's; and the examples left out, as `length` tokens hold no answer behind the prompt: id,
    reason. A longer answer loses its end."""
    asked = template([example["prompt"] for example in examples])
    said = tokenizer.encode([example["answer"] for example in examples])
    end = np.array([tokenizer.eos_id], np.int32)
    texts, num_asked, rejects = [], [], []
    for example, prompt, answer in zip(examples, asked, said, strict=True):
        if len(prompt) >= length:
            reason = f"the prompt has {len(prompt)} tokens, and a row {length}"
            rejects.append({"id": example["id"], "reason": reason})
            continue
        begins = len(answer) > 0 and answer[0] == tokenizer.bos_id
        texts.append(np.concatenate([prompt, answer[int(begins) :], end])[:length])
        num_asked.append(len(prompt))
    return texts, np.array(num_asked, np.int32), rejects


def split_for(config: SDRRL, model: Llama) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """(graph, what learns, what is frozen) of an LLM with its adapters, if any."""
    # All weights are all of them, the embeddings too: the LLM reads and says tokens.
    learns = LoRAParam if config.trained == "lora" else nnx.Param
    return split(model, learns)


def said_by(model: Llama, dtype: DTypeLike) -> Array:
    """The kernel of a model's logits, [V, D], whole over fsdp: left cut, devices would be sent
    each other's logits."""
    return weight(model.embedding if model.output is None else model.output, dtype)


def answer_likelihood(config: SDRRL, graph: nnx.GraphDef) -> Objective:
    """Negative log-likelihood of the answers' tokens, given what stands before them.

    A batch has "prompt_tokens", int32 [B, N], beside its texts.
    """
    dtype = jnp.dtype(config.compute_dtype)

    def objective(trainable: nnx.State, frozen: Any, batch: dict[str, Array], key: Array) -> Terms:
        model: Llama = nnx.merge(graph, trainable, frozen)
        ids_BT, segments_BT = batch["target_ids"], batch["target_segments"]
        labels_BT, valid_BT = next_tokens(ids_BT, segments_BT)
        # Of the text that each position belongs to.
        num_asked_BT = jnp.take_along_axis(
            batch["prompt_tokens"], jnp.maximum(segments_BT - 1, 0), axis=1
        )
        is_asked_BT = positions_in_segment(segments_BT) + 1 < num_asked_BT
        h_BTD = model.hidden(model.embed(ids_BT, dtype), segments_BT, causal=True, dropout_key=key)
        is_said_BT = valid_BT & ~is_asked_BT
        loss = cross_entropy_of_rows(h_BTD, said_by(model, dtype), labels_BT, is_said_BT)
        return {"loss": loss}

    return objective


def logits_at_once(training: Training, llm: LlamaConfig, mesh: Mesh | AbstractMesh) -> int:
    """Positions of all rows of a micro-batch whose logits are there together."""
    rows, length = training.batch_rows // training.accumulation, training.target_length
    return sharding.on(mesh, positions_at_once)(rows, length, llm.vocab_size)


def step_flops(
    training: Training,
    trainable: Any,
    frozen: Any,
    llm: LlamaConfig,
    mesh: Mesh | AbstractMesh,
    *,
    texts: float,
    fill: float = 1.0,
) -> flops.Flops:
    """Of a step of `answer_likelihood`. texts: of a row. fill: share of it that holds tokens."""
    length = training.target_length
    batch = flops.Batch(training.batch_rows, target_length=length, texts=texts, target_fill=fill)
    in_pieces = logits_at_once(training, llm, mesh) < length
    return flops.tuning_flops(trainable, frozen, llm, batch, in_pieces=in_pieces)


def tune(job: Job[SDRRL], name: str, title: str, folder: str, examples: Sequence[Example]) -> str:
    """Train the LLM of a folder on examples; returns the folder of what it became."""
    config = job.config
    training = config.training
    with job.stage(name, title) as stage:
        tokenizer = TargetTokenizer(local_files(folder))
        template = Template(config.answering.template, tokenizer, config.answering.system)

        @functools.cache
        def read() -> tuple[Rows, np.ndarray]:
            all_of_them = [examples[i] for i in range(len(examples))]
            length = training.target_length
            texts, num_asked, rejects = conversations(tokenizer, template, all_of_them, length)
            tell_rejects(job, stage, rejects)
            if not texts:
                raise ValueError(
                    f"config.training.target_length is {length}; no example has room for its answer"
                    " in so many tokens."
                )
            packed = pack(
                [{"target": ids} for ids in texts],
                {"target": length},
                {"target": tokenizer.pad_id},
                packing=training.packing,
            )
            job.console.print(packed.told())
            return packed, num_asked

        def likelihood(llm: Llama, graph: nnx.GraphDef, frozen: nnx.State) -> tuple[Objective, Any]:
            return answer_likelihood(config, graph), frozen

        def of_step(
            packed: Rows, trainable: nnx.State, frozen: nnx.State, llm: LlamaConfig
        ) -> flops.Flops:
            texts, fill = packed.counts.texts / packed.counts.rows, packed.fill["target"]
            return step_flops(training, trainable, frozen, llm, job.mesh, texts=texts, fill=fill)

        return tuned_on(
            job,
            stage,
            name,
            folder,
            training,
            likelihood,
            rows=lambda: read()[0],
            add=lambda: add_by_example({"prompt_tokens": read()[1]}),
            flops_of=of_step,
        )


def tell_rejects(job: Job[SDRRL], stage: StageFolder, rejects: Sequence[Mapping[str, Any]]) -> None:
    """Write down what a row has no room for."""
    if rejects:
        write_jsonl(stage.path / "rejects.jsonl", rejects)
        job.console.warn(
            f"examples without room for an answer: {len(rejects)};"
            f" {stage.path / 'rejects.jsonl'} names them"
        )


def tuned_on(
    job: Job[SDRRL],
    stage: StageFolder,
    name: str,
    folder: str,
    training: Training,
    objective_of: Callable[[Llama, nnx.GraphDef, nnx.State], tuple[Objective, Any]],
    *,
    rows: Callable[[], Rows],
    add: Callable[[], Callable[[Batch], Batch]] | None = None,
    flops_of: Callable[[Rows, nnx.State, nnx.State, LlamaConfig], flops.Flops] | None = None,
) -> str:
    """Train the LLM of a folder in a stage, as `config.trained` says; returns the folder of what it
    became.

    objective_of: the LLM as it is, the graph of the one that learns and the state of it that does
    not → what is minimised, and what that is given as frozen. rows, add: as of `fit`. flops_of:
    rows, both states of the LLM that learns and its sizes → those of a step.
    """
    config, seed = job.config, job.stage_seed(name)
    tuned_folder = os.fspath(stage.path / "model")
    if distributed.by_first(lambda: Files(tuned_folder).has("config.json")):
        return tuned_folder
    llm = stacking.load_llm(config, folder, (), job.mesh, job.console)
    model = stacking.with_adapters(config, llm, seed)
    graph, trainable, kept = split_for(config, model)
    objective, frozen = objective_of(llm, graph, kept)
    trained = fit(
        stage,
        name,
        training,
        objective=objective,
        trainable=trainable,
        frozen=frozen,
        rows=rows,
        mesh=job.mesh,
        seed=seed,
        console=job.console,
        watch=job.watch,
        add=add,
        flops=None
        if flops_of is None
        else lambda packed: flops_of(packed, trainable, kept, llm.config),
    )
    tuned = nnx.merge(graph, trained, kept)
    lora.merge(tuned)
    with made_locally(tuned_folder, "config.json") as new:
        save_llama(tuned, new, tokenizer_files_from=folder)
    return tuned_folder
