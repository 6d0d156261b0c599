"""A stack: a text encoder's states go through a bridge into an LLM, which reads them as text.

B rows, S positions, P of them for the LLM, D width of the LLM, C classes or choices.

    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    vectors = model.encode(["Japan und Kenia"], "deu_Latn")
"""

import difflib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoTokenizer, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MultipleChoiceModelOutput,
    SequenceClassifierOutput,
)
from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder

from .configuration_mtllm import MTLLMConfig
from .multiple_choice import choice_segments, choice_text, kept_tokens


class LoRALinear(nn.Module):
    """A linear map and its low-rank update: W x + alpha / r · B A x."""

    def __init__(self, base_layer: nn.Linear, r: int, alpha: float):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, r, bias=False)
        self.lora_B = nn.Linear(r, base_layer.out_features, bias=False)
        self.scaling = alpha / r

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.scaling * self.lora_B(self.lora_A(x))


class MTLLMModel(PreTrainedModel):
    """Encoder, bridge and LLM: texts of many languages become vectors of the LLM."""

    config_class = MTLLMConfig
    _supports_sdpa = True
    # The folder may hold a head, which this class has no use for.
    _keys_to_ignore_on_load_unexpected = [r"^score\."]  # noqa: RUF012

    def __init__(self, config: MTLLMConfig):
        super().__init__(config)
        source, llm = config.encoder_config, config.llm_config
        if source.model_type == "m2m_100":
            self.encoder = M2M100Encoder(source)
        else:
            self.encoder = AutoModel.from_config(source, add_pooling_layer=False)
        width = config.bridge_stride * source.hidden_size
        self.bridge_in = nn.Linear(width, config.bridge_hidden) if config.bridge_hidden else None
        self.up_proj = nn.Linear(config.bridge_hidden or width, llm.hidden_size)
        self.llm = AutoModel.from_config(llm)
        for layer in self.llm.layers:
            for block in (layer.self_attn, layer.mlp):
                for name, adapter in (config.lora or {}).items():
                    if hasattr(block, name):
                        setattr(block, name, LoRALinear(getattr(block, name), **adapter))
        self._tokenizer: Any = None
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> BaseModelOutputWithPooling:
        """Token ids [B, S] → the LLM's states [B, P, D], and their means, float32 [B, D].

        Rows may be padded on either side. P is S, unless the bridge shortens texts: then the states
        of each begin at the first position.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        # BERT counts padding too unless it is told; M2M100 and RoBERTa know padding by its id.
        told = {"position_ids": positions} if self.encoder.config.model_type == "bert" else {}
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **told)
        inputs = states.last_hidden_state
        if self.config.bridge_stride > 1:
            inputs, attention_mask = windows(inputs, attention_mask, self.config.bridge_stride)
            positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        if self.bridge_in is not None:
            inputs = nn.functional.gelu(self.bridge_in(inputs))
        inputs = self.up_proj(inputs)
        mask = attention_mask
        if self.config.bidirectional:
            # A mask [B, 1, S, S] is added to the scores as it is, instead of the causal one.
            lowest = torch.finfo(inputs.dtype).min
            mask = ((attention_mask == 0) * lowest).to(inputs.dtype)
            mask = mask[:, None, None].expand(-1, 1, mask.shape[1], -1)
        hidden = self.llm(
            inputs_embeds=inputs, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        pooled = mean_by_segment(hidden, (attention_mask > 0).long(), 1)[:, 0]
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled)

    @torch.no_grad()
    def encode(
        self,
        texts: Sequence[str],
        lang: str | Sequence[str],
        batch_size: int = 32,
        pairs: Sequence[str] | None = None,
    ) -> Tensor:
        """The vector of each text, float32 [texts, D] on the CPU.

        lang: a code of `config.languages`, or one for each text; an encoder that is told none reads
        all alike. pairs: a second text for each. A text of more than `config.max_source_length`
        tokens loses its end (of a pair, the longer text first).
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        length = self.config.max_source_length
        options = {"text_pair": list(pairs)} if pairs else {}
        encoding = self._tokenized(texts, lang, truncation=True, max_length=length, **options)
        rows = encoding["input_ids"]
        vectors = torch.empty(len(rows), self.config.hidden_size)
        for places in by_length(rows, batch_size):
            ids, mask = self._padded([rows[i] for i in places])
            vectors[places] = MTLLMModel.forward(self, ids, mask).pooler_output.cpu()
        return vectors

    @property
    def tokenizer(self) -> Any:
        """The encoder's, read from the model's own folder when it is first needed."""
        if self._tokenizer is None:
            # Given the config, it need not run the folder's code once more to know it.
            self._tokenizer = AutoTokenizer.from_pretrained(self.name_or_path, config=self.config)
        return self._tokenizer

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As any model, and the tokenizer with it."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.name_or_path:  # "" for a model that was not read from a folder
            self.tokenizer.save_pretrained(save_directory)

    def _tokenized(
        self, texts: Sequence[str], lang: str | Sequence[str], **options: Any
    ) -> dict[str, Any]:
        """Token ids of each text, told its language, and what else `options` ask for."""
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"texts is {texts!r}; it must be a list of str")
        codes = [lang] * len(texts) if isinstance(lang, str) else list(lang)
        if len(codes) != len(texts):
            raise ValueError(f"lang has {len(codes)} codes; it must be one or {len(texts)}")
        known = self.config.languages
        for code in codes:
            if code not in known:
                nearest = ", ".join(difflib.get_close_matches(str(code), known, cutoff=0.0))
                raise ValueError(f"lang is {code!r}; of {len(known)} codes the nearest: {nearest}")
        encoding = self.tokenizer(list(texts), **options) if texts else {"input_ids": []}
        if self.config.language_ids is not None:
            ids = dict(zip(known, self.config.language_ids, strict=True))
            for row, code in zip(encoding["input_ids"], codes, strict=True):
                if row[0] not in ids.values():
                    raise ValueError(f"the tokenizer of {self.name_or_path} tells no language")
                row[0] = ids[code]
        if self.config.language_at_end:
            encoding = {k: [[*row[1:], row[0]] for row in rows] for k, rows in encoding.items()}
        return encoding

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token ids and their mask, both [B, S]."""
        ids = [torch.tensor(row, device=self.device) for row in rows]
        mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        pad_id = self.config.encoder_config.pad_token_id
        return pad_sequence(ids, batch_first=True, padding_value=pad_id), mask


class MTLLMForSequenceClassification(MTLLMModel):
    """The stack with a linear head on the mean of a text's states."""

    def __init__(self, config: MTLLMConfig):
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Logits, float32 [B, C]; with labels [B] the mean cross-entropy too."""
        logits = self._logits(super().forward(input_ids, attention_mask).pooler_output)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def classify(
        self,
        texts: Sequence[str],
        lang: str | Sequence[str],
        batch_size: int = 32,
        pairs: Sequence[str] | None = None,
    ) -> list[dict[str, float]]:
        """For each text the probability of every label, the likeliest first; as `encode`."""
        vectors = self.encode(texts, lang, batch_size, pairs).to(self.device)
        answers = []
        for shares in self._logits(vectors).softmax(-1).tolist():
            order = sorted(range(len(shares)), key=lambda i, shares=shares: -shares[i])
            answers.append({self.config.id2label[i]: shares[i] for i in order})
        return answers

    def _logits(self, pooled: Tensor) -> Tensor:
        return self.score(pooled.to(self.score.weight.dtype)).float()


class MTLLMForMultipleChoice(MTLLMModel):
    """The stack with a score for each choice, from the mean of the states at its tokens.

    A row is "context question", then each choice on a line of its own behind its number, from 1:
    it is read once, and the choices see each other.
    """

    def __init__(self, config: MTLLMConfig):
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        choice_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> MultipleChoiceModelOutput:
        """Logits, float32 [B, C], −inf for choices that a row does not have.

        choice_ids: [B, S], 1 … C at the tokens of a choice, 0 elsewhere. labels: [B], from 0.
        """
        num = int(choice_ids.max())
        hidden = super().forward(input_ids, attention_mask).last_hidden_state
        vectors = mean_by_segment(hidden, choice_ids, num).to(self.score.weight.dtype)
        absent = choice_ids.amax(-1, keepdim=True) <= torch.arange(num, device=self.device)
        logits = self.score(vectors)[..., 0].float().masked_fill(absent, -torch.inf)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return MultipleChoiceModelOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def choose(
        self,
        contexts: Sequence[str],
        questions: Sequence[str],
        choices: Sequence[Sequence[str]],
        lang: str | Sequence[str],
        batch_size: int = 32,
    ) -> list[list[float]]:
        """The probability of each choice, in the order given; lang as of `encode`.

        What is beyond `config.max_source_length` tokens is cut from the end of the context.
        """
        rows = list(zip(contexts, questions, choices, strict=True))
        made = [choice_text(*row) for row in rows]
        encoding = self._tokenized([text for text, _ in made], lang, return_offsets_mapping=True)
        ids, marks = [], []
        for i, row in enumerate(encoding["input_ids"]):
            offsets = encoding["offset_mapping"][i]
            kept = kept_tokens(offsets, len(contexts[i]), self.config.max_source_length)
            ids.append([row[j] for j in kept])
            segments = choice_segments([offsets[j] for j in kept], made[i][1])
            marks.append(torch.tensor(segments, device=self.device))
        answers: list[list[float]] = [[] for _ in rows]
        for places in by_length(ids, batch_size):
            tokens, mask = self._padded([ids[i] for i in places])
            segments = pad_sequence([marks[i] for i in places], batch_first=True)
            shares = self(tokens, segments, mask).logits.softmax(-1).tolist()
            for i, row_shares in zip(places, shares, strict=True):
                answers[i] = row_shares[: len(choices[i])]
        return answers


def windows(states: Tensor, mask: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Each `stride` positions of a text side by side, from its first on, and their mask [B, P].

    The last window of a text is filled up with zeros.
    """
    rows, length, width = states.shape
    slots = -(-length // stride) * stride
    row, place = (mask > 0).nonzero(as_tuple=True)
    slot = (mask > 0).long().cumsum(-1)[row, place] - 1
    packed = states.new_zeros(rows, slots, width).index_put((row, slot), states[row, place])
    firsts = mask.new_zeros(rows, slots).index_put((row, slot), mask[row, place])[:, ::stride]
    return packed.reshape(rows, -1, stride * width), firsts


def mean_by_segment(hidden: Tensor, segments: Tensor, num: int) -> Tensor:
    """Mean of [B, S, D] over the positions marked 1 … num in [B, S]: float32 [B, num, D]."""
    member = segments[:, None] == torch.arange(1, num + 1, device=segments.device)[:, None]
    sums = member.float() @ hidden.float()
    return sums / member.sum(-1, keepdim=True).clamp(min=1)


def by_length(rows: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Places of rows of like length, `size` at a time."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    return (order[i : i + size] for i in range(0, len(order), size))
