"""The peer: what a careful user would run instead, in PyTorch, with transformers and PEFT.

    python benchmarks/peer_torch.py --row=train_grouped --shape=cpu --folder=FOLDER --data=DATA

Written from the recipe of MT-LLM: transformers' M2M100 encoder, a linear map, a Llama that reads
both ways with PEFT's LoRA on all linear maps; the teacher is the same LLM with its adapters off;
AdamW. SDPA attention, bfloat16 on GPUs, frozen parts without gradients, the encoder and the teacher
under no_grad, a thread for each core. `run.py` starts it and says when to measure; see `sides.py`
for what is said.
"""

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shapes import SHAPES, Shape, batches_of, sentences, texts_to_embed
from sides import Work, serve
from torch import Tensor, nn

LONGEST = 512


def device_of(shape: Shape) -> str:
    """Where a shape is measured."""
    return "cuda" if shape.name == "h200" else "cpu"


class Stack(nn.Module):
    """Encoder, linear map, LLM; `teacher` is the LLM on its own tokens without adapters.

    compiled: encoder and LLM go through torch.compile.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: str, *, compiled: bool):
        super().__init__()
        from peft import PeftModel
        from transformers import (
            AutoModelForCausalLM,
            AutoTokenizer,
            M2M100ForConditionalGeneration,
        )

        options = {"dtype": dtype, "attn_implementation": "sdpa"}
        translator = M2M100ForConditionalGeneration.from_pretrained(folder / "encoder", **options)
        self.encoder = translator.model.encoder.requires_grad_(False)
        llm = AutoModelForCausalLM.from_pretrained(folder / "llm", **options)
        self.llm = PeftModel.from_pretrained(llm, folder / "adapter", is_trainable=True)
        weights = np.load(folder / "bridge.npz")
        self.bridge = nn.Linear(*weights["kernel"].shape)
        self.bridge.weight.data = torch.tensor(weights["kernel"].T.copy())
        self.bridge.bias.data = torch.tensor(weights["bias"])
        self.source = AutoTokenizer.from_pretrained(folder / "encoder", src_lang="eng_Latn")
        self.target = AutoTokenizer.from_pretrained(folder / "llm")
        self.dtype = dtype
        self.to(device)
        self.read, self.layers = self.encoder.forward, self.llm.base_model.model.model.forward
        if compiled:
            self.read = torch.compile(self.read, dynamic=True)
            self.layers = torch.compile(self.layers, dynamic=True)

    def student(self, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """[B, D], float32: the LLM's pooled state of what it reads through the encoder."""
        with torch.no_grad():
            states = self.read(input_ids=ids_BS, attention_mask=mask_BS).last_hidden_state
        inputs = self.bridge(states.to(self.bridge.weight.dtype)).to(self.dtype)
        return self._pooled(mask_BS, inputs_embeds=inputs)

    def teacher(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """The same of what it reads itself, without adapters."""
        with torch.no_grad(), self.llm.disable_adapter():
            return self._pooled(mask_BT, input_ids=ids_BT)

    def _pooled(self, mask_BS: Tensor, **inputs: Tensor) -> Tensor:
        # A mask [B, 1, S, S] stands in the place of the causal one: all tokens see each other.
        rows, length = mask_BS.shape
        seen = (mask_BS > 0)[:, None, None].expand(rows, 1, length, length)
        hidden = self.layers(attention_mask=seen, use_cache=False, **inputs).last_hidden_state
        return mean(hidden, mask_BS)


def mean(hidden_BSD: Tensor, mask_BS: Tensor) -> Tensor:
    """Over the tokens of each row, float32 [B, D]."""
    weight = mask_BS[:, :, None].float()
    return (hidden_BSD.float() * weight).sum(1) / weight.sum(1)


def padded(rows: Sequence[list[int]], pad_id: int, device: str) -> tuple[Tensor, Tensor]:
    """Ids and mask, as long as the longest row."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad_id)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids.to(device), mask.to(device)


class Training(Work):
    """Steps of stage 1, or of task distillation with stored teacher vectors."""

    def __init__(self, options: Any):
        shape = SHAPES[options.shape]
        self.device, self.pieces, self.steps = device_of(shape), shape.pieces, shape.steps[1]
        self.stack = Stack(
            options.folder, getattr(torch, shape.dtype), self.device, compiled=options.compiled
        )
        texts = sentences(options.data)
        cut = {"truncation": True, "max_length": LONGEST}
        self.sources = self.stack.source(texts, **cut)["input_ids"]
        self.targets = self.stack.target(texts, **cut)["input_ids"]
        lengths = [len(row) for row in self.sources]
        grouped = options.row.endswith("grouped")
        self.order = itertools.cycle(batches_of(lengths, shape.rows, grouped=grouped))
        self.learnt = [p for p in self.stack.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learnt, lr=2e-4, weight_decay=0.01, fused=True)
        self.vectors = None
        if options.row.startswith("distil"):
            self.vectors = np.load(options.folder / "teacher.npy")

    def loss(self, places: np.ndarray) -> tuple[Tensor, int]:
        """Mean squared error of these sentences, and how many tokens were read."""
        sources = [self.sources[i] for i in places]
        read = sum(map(len, sources))
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            if self.vectors is not None:
                teacher = torch.tensor(self.vectors[places], device=self.device)
            else:
                targets = [self.targets[i] for i in places]
                read += sum(map(len, targets))
                teacher = self.stack.teacher(*padded(targets, 0, self.device))
            student = self.stack.student(*padded(sources, 1, self.device))
        return (student - teacher).square().mean(), read

    def facts(self) -> dict[str, Any]:
        """The loss of the first 64 sentences."""
        with torch.no_grad():
            loss, _ = self.loss(np.arange(64))
        return {"loss": loss.item()}

    def first(self) -> None:
        """One step."""
        self._step()

    def measure(self) -> dict[str, float]:
        """Steps of other sentences each time."""
        start = time.perf_counter()
        read = sum(self._step() for _ in range(self.steps))
        if self.device == "cuda":
            torch.cuda.synchronize()
        return {"seconds": time.perf_counter() - start, "useful": read}

    def _step(self) -> int:
        self.optimizer.zero_grad(set_to_none=True)
        read = 0
        for places in self._pieces(next(self.order)):
            loss, tokens = self.loss(places)
            (loss / self.pieces).backward()
            read += tokens
        torch.nn.utils.clip_grad_norm_(self.learnt, 1.0)
        self.optimizer.step()
        return read

    def _pieces(self, places: np.ndarray) -> Iterator[np.ndarray]:
        """Of one step: longer sentences apart from shorter ones where there are several."""
        ordered = sorted(places, key=lambda i: len(self.sources[i])) if self.pieces > 1 else places
        yield from np.split(np.asarray(ordered), self.pieces)


class Embedding(Work):
    """Sentences of many languages through a text encoder, tokenised on the way, mean pooled."""

    def __init__(self, options: Any):
        from transformers import AutoModel, AutoTokenizer

        folder = options.models / "multilingual-e5-small"
        self.model = AutoModel.from_pretrained(folder, attn_implementation="sdpa").eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.texts = texts_to_embed(options.folder)

    @torch.inference_mode()
    def vectors(self) -> tuple[np.ndarray, int]:
        """Of all texts, [texts, E], and the number of tokens read."""
        ids = self.tokenizer(self.texts, truncation=True, max_length=LONGEST)["input_ids"]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        found = np.empty((len(ids), self.model.config.hidden_size), np.float32)
        for begin in range(0, len(order), 32):
            places = order[begin : begin + 32]
            rows, mask = padded([ids[i] for i in places], 1, "cpu")
            hidden = self.model(input_ids=rows, attention_mask=mask).last_hidden_state
            found[places] = mean(hidden, mask).numpy()
        return found, sum(map(len, ids))

    def facts(self) -> dict[str, Any]:
        """The mean square of all vectors, in the place of a loss."""
        vectors, read = self.vectors()
        return {"loss": float(np.square(vectors).mean()), "read": read}

    def measure(self) -> dict[str, float]:
        """All texts."""
        start = time.perf_counter()
        _, read = self.vectors()
        return {"seconds": time.perf_counter() - start, "useful": read}


class Translating(Work):
    """Beam search of exactly so many new tokens."""

    def __init__(self, options: Any):
        from transformers import AutoTokenizer, M2M100ForConditionalGeneration

        folder = options.folder / "encoder"
        shape = SHAPES[options.shape]
        self.device, self.new_tokens = device_of(shape), shape.new_tokens["translate"]
        model: Any = M2M100ForConditionalGeneration.from_pretrained(
            folder, dtype=getattr(torch, shape.dtype), attn_implementation="sdpa"
        )
        self.model = model.to(self.device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, src_lang="eng_Latn")
        self.texts = sentences(options.data)[:64]

    @torch.inference_mode()
    def translate(self) -> np.ndarray:
        """The tokens after the language's, [B, new_tokens]."""
        rows = padded(self.tokenizer(self.texts)["input_ids"], 1, self.device)
        out = self.model.generate(
            input_ids=rows[0],
            attention_mask=rows[1],
            num_beams=5,
            do_sample=False,
            # The language's token, which is forced, is one of generate's new ones.
            min_new_tokens=self.new_tokens + 1,
            max_new_tokens=self.new_tokens + 1,
            forced_bos_token_id=self.tokenizer.convert_tokens_to_ids("deu_Latn"),
            forced_eos_token_id=None,
        )
        return out[:, 2:].cpu().numpy()

    def facts(self) -> dict[str, Any]:
        """All tokens."""
        return {"tokens": self.translate().tolist()}

    def measure(self) -> dict[str, float]:
        """The same texts again."""
        start = time.perf_counter()
        ids = self.translate()
        return {"seconds": time.perf_counter() - start, "useful": ids.size}


class Sampling(Work):
    """Answers of exactly so many tokens of a real LLM."""

    def __init__(self, options: Any):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = options.models / "smollm2-135m-instruct"
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.eos_token
        self.texts = sentences(options.data)[:32]
        self.new_tokens = SHAPES[options.shape].new_tokens["sample"]

    @torch.inference_mode()
    def sample(self) -> tuple[int, int]:
        """Tokens of prompts, and of answers."""
        rows = self.tokenizer(self.texts, return_tensors="pt", padding=True)
        out = self.model.generate(
            **rows,
            do_sample=True,
            temperature=0.95,
            top_k=50,
            top_p=0.7,
            min_new_tokens=self.new_tokens,
            max_new_tokens=self.new_tokens,
            pad_token_id=self.tokenizer.eos_token_id,
        )
        new = out.shape[1] - rows["input_ids"].shape[1]
        return int(rows["attention_mask"].sum()), out.shape[0] * new

    def facts(self) -> dict[str, Any]:
        """Draws differ; what is read and how much is said must not."""
        read, made = self.sample()
        return {"read": read, "made": made}

    def measure(self) -> dict[str, float]:
        """The same prompts again."""
        start = time.perf_counter()
        _, made = self.sample()
        return {"seconds": time.perf_counter() - start, "useful": made}


class Loading(Work):
    """A real LLM read into memory."""

    def __init__(self, options: Any):
        self.folder = options.models / "smollm2-135m-instruct"

    def load(self) -> int:
        """Bytes of the arrays that stay, each of them read once, as some lie in a file's pages."""
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        stay = {p.data_ptr(): p.detach() for p in self.model.parameters()}
        for array in stay.values():
            array.max()
        return sum(array.nbytes for array in stay.values())


WORK: dict[str, Callable[[Any], Work]] = {
    "train_grouped": Training,
    "train_random": Training,
    "distil_grouped": Training,
    "embed": Embedding,
    "translate": Translating,
    "sample": Sampling,
    "load_memory": Loading,
}

if __name__ == "__main__":
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    serve(WORK)
