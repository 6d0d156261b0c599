"""Every setting of a run, with its unit. Resolved once, checked once, then only read.

Where a value comes from stands in the recipe that sets it (`configs/`), with its tag: [code] the
authors' public code, [abs] the paper's abstract, [fallback] a neighbouring project's documented
value, [ours] our own choice.
"""

import contextlib
import dataclasses
import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from mtllm_jax.languages import check_language
from mtllm_jax.schema import nearest


def require(condition: bool, field: str, value: object, allowed: str) -> None:
    """Raise the one-sentence error of a setting that cannot be."""
    if not condition:
        raise ValueError(f"config.{field} is {value!r}; it must be {allowed}.")


@contextlib.contextmanager
def naming(field: str, before: str = "config.") -> Iterator[None]:
    """Put a field's name before what was found to be wrong with its value; with "--", a flag's."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{before}{field}: {str(error).rstrip('.')}.") from None


def _require_sizes(where: str, group: object, names: tuple[str, ...]) -> None:
    for name in names:
        size = getattr(group, name)
        require(size >= 1, f"{where}.{name}", size, "at least 1")


def _require_divisor(where: str, group: object, name: str, of: str) -> None:
    value, whole = getattr(group, name), getattr(group, of)
    require(whole % value == 0, f"{where}.{name}", value, f"a divisor of {of}, {whole}")


def _require_noise(where: str, position: float, text: float) -> None:
    require(position >= 0, f"{where}.noise_position", position, "0 (none) or above")
    require(text >= 0, f"{where}.noise_text", text, "0 (none) or above")


@dataclass(frozen=True)
class Training:
    """How one stage is trained: AdamW with a warmed-up schedule over packed rows."""

    steps: int  # optimizer updates
    batch_rows: int  # rows per update, over all devices
    learning_rate: float  # peak
    source_length: int = 0  # encoder tokens per row; 0 = the stage has no encoder side
    target_length: int = 0  # decoder tokens per row; 0 = the stage has no decoder side
    packing: bool = True  # several texts per row, or one
    warmup: float = 0.1  # fraction of steps
    schedule: Literal["linear", "cosine"] = "cosine"
    final_rate: float = 0.05  # where the decay ends after the last step, as a fraction of the peak
    weight_decay: float = 0.01  # on matrices; norms and biases are not decayed
    adam_b2: float = 0.999  # decay of the second moment
    clip_norm: float = 1.0  # global gradient norm; 0 = no clipping
    accumulation: int = 1  # micro-batches a batch is cut into
    checkpoint_every: int = 200  # steps
    keep_last: int = 2  # checkpoints that are kept, the newest
    keep_every: int = 0  # steps whose multiples' checkpoints are kept for good; 0 = none are
    workers: int = 0  # processes that read rows, in each that trains; 0 = threads of it
    evaluate_every: int = 0  # steps, and at the end, on English development data; 0 = never
    # The weights that the stage ends with: the last; those of the best evaluation, by accuracy and
    # then by loss; or the mean of those at the last checkpoints.
    chosen: Literal["last", "best", "average"] = "last"
    averaged: int = 5  # checkpoints that "average" is the mean of; each is one more copy held
    patience: int = (
        0  # evaluations in a row, none the best so far, that training ends after; 0 = off
    )

    @property
    def copies(self) -> int:
        """Of the weights, that are held beside those in training for the choice among them."""
        return {"last": 0, "best": 1, "average": self.averaged}[self.chosen]

    def check(self, where: str, sides: tuple[str, ...]) -> None:
        """Raise ValueError for what cannot be; `sides` are those that the stage reads."""
        least = 0 if where in SKIPPABLE else 1
        require(self.steps >= least, f"{where}.steps", self.steps, f"at least {least}")
        require(self.batch_rows >= 1, f"{where}.batch_rows", self.batch_rows, "at least 1")
        require(self.learning_rate > 0, f"{where}.learning_rate", self.learning_rate, "above 0")
        require(0 <= self.warmup <= 1, f"{where}.warmup", self.warmup, "a fraction from 0 to 1")
        final_rate = self.final_rate
        require(0 <= final_rate <= 1, f"{where}.final_rate", final_rate, "a fraction from 0 to 1")
        require(self.weight_decay >= 0, f"{where}.weight_decay", self.weight_decay, "0 or above")
        require(0 <= self.adam_b2 < 1, f"{where}.adam_b2", self.adam_b2, "from 0 to below 1")
        require(self.clip_norm >= 0, f"{where}.clip_norm", self.clip_norm, "0 (off) or above")
        for name in ("accumulation", "checkpoint_every", "keep_last"):
            value = getattr(self, name)
            require(value >= 1, f"{where}.{name}", value, "at least 1")
        require(
            self.keep_every >= 0 and self.keep_every % self.checkpoint_every == 0,
            f"{where}.keep_every",
            self.keep_every,
            f"0 (none) or a multiple of checkpoint_every, {self.checkpoint_every}",
        )
        require(self.workers >= 0, f"{where}.workers", self.workers, "0 (threads) or above")
        require(self.averaged >= 1, f"{where}.averaged", self.averaged, "at least 1")
        every = self.evaluate_every
        require(every >= 0, f"{where}.evaluate_every", every, "0 (never) or above")
        require(self.patience >= 0, f"{where}.patience", self.patience, "0 (off) or above")
        for name, looks in (("chosen", self.chosen == "best"), ("patience", self.patience > 0)):
            require(
                not looks or every > 0,
                f"{where}.evaluate_every",
                every,
                f"at least 1 where {where}.{name} is {getattr(self, name)!r}",
            )
        require(
            self.batch_rows % self.accumulation == 0,
            f"{where}.accumulation",
            self.accumulation,
            f"a divisor of batch_rows, {self.batch_rows}",
        )
        for side in sides:
            length = getattr(self, f"{side}_length")
            require(length >= 4, f"{where}.{side}_length", length, "at least 4 tokens")


@dataclass(frozen=True)
class TextSizes:
    """Rows of the embedded text; names and their translations are always all there."""

    train_pairs: int = 3000  # labelled English lists
    test_pairs: int = 300  # items of each test split
    dev_pairs: int = 300  # items of each dev split; fewer where the concepts allow no more
    lists_per_language: int = 800  # mixed lists in the parallel text
    english: int = 12000  # rows of the LLM's text
    adaptation: int = 16000  # rows of stage 1


@dataclass(frozen=True)
class MiniNLLB:
    """The tiny encoder–decoder that the default run trains for itself, NLLB's shape."""

    training: Training
    vocab_size: int  # pieces, language codes and special tokens at most; texts may give fewer
    width: int
    num_heads: int
    ffn_width: int
    encoder_layers: int
    decoder_layers: int
    english_share: float  # of the training pairs that are English → English
    noise_position: float  # std of Gaussian noise on the encoder output (rms 1), per position
    noise_text: float  # the same, one draw per text
    memory_dropout: float  # fraction of encoder positions hidden from the decoder
    negatives: int  # pieces that never occur in targets, sampled per step into the softmax

    def check(self) -> None:
        sizes = (
            "vocab_size",
            "width",
            "num_heads",
            "ffn_width",
            "encoder_layers",
            "decoder_layers",
        )
        _require_sizes("mini_nllb", self, sizes)
        require(self.width % 2 == 0, "mini_nllb.width", self.width, "an even number")
        _require_divisor("mini_nllb", self, "num_heads", "width")
        share, hidden = self.english_share, self.memory_dropout
        require(0 <= share < 1, "mini_nllb.english_share", share, "from 0 to below 1")
        require(0 <= hidden <= 1, "mini_nllb.memory_dropout", hidden, "a fraction from 0 to 1")
        require(self.negatives >= 0, "mini_nllb.negatives", self.negatives, "0 or above")
        _require_noise("mini_nllb", self.noise_position, self.noise_text)


@dataclass(frozen=True)
class MiniLlama:
    """The tiny LLM that the default run trains for itself, Llama's shape."""

    training: Training
    vocab_size: int  # bytes, pieces and special tokens at most; texts may give fewer
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_width: int

    def check(self) -> None:
        sizes = ("vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "ffn_width")
        _require_sizes("mini_llama", self, sizes)
        _require_divisor("mini_llama", self, "num_heads", "width")
        _require_divisor("mini_llama", self, "num_kv_heads", "num_heads")
        require(
            self.width // self.num_heads % 2 == 0,
            "mini_llama.width",
            self.width,
            f"an even number for each of {self.num_heads} heads",
        )


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters of the LLM (where they are what learns) and of the MT encoder baseline."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]  # names of the linears, or ("all",)
    start: str = ""  # PEFT folder that the student's adapter begins as, of these sizes; "" = afresh

    def check(self) -> None:
        require(self.rank >= 1, "lora.rank", self.rank, "at least 1")
        require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "from 0 to below 1")


@dataclass(frozen=True)
class Bridge:
    """What stands between encoder and LLM: a linear map [code], or more."""

    hidden: int = 0  # width between two linear maps with GELU, as 1024; 0 = one linear map
    stride: int = 1  # encoder positions in one of the LLM; above 1 a convolution shortens texts

    def check(self) -> None:
        require(self.hidden >= 0, "bridge.hidden", self.hidden, "0 (one linear map) or above")
        require(self.stride >= 1, "bridge.stride", self.stride, "1 (as it is) or above")


@dataclass(frozen=True)
class Objective:
    """Weights of what is minimised, between the student's vector of a text and the teacher's; 0 =
    is no part of it. `objectives.py` has the formulas."""

    mse: float = 1.0  # mean squared error [code]
    cosine: float = 0.0  # 1 − cosine
    contrastive: float = 0.0  # InfoNCE, the texts of a (micro-)batch against each other
    temperature: float = 0.05  # of the contrastive term

    def weights(self) -> dict[str, float]:
        """By the terms' names."""
        others = ("temperature", "logits_temperature")
        return {name: x for name, x in dataclasses.asdict(self).items() if name not in others}

    def check(self, where: str) -> None:
        weights = self.weights()
        for name, weight in weights.items():
            require(weight >= 0, f"{where}.{name}", weight, "0 (no part of the loss) or above")
        require(any(weights.values()), where, weights, "of at least one weight above 0")
        require(self.temperature > 0, f"{where}.temperature", self.temperature, "above 0")


@dataclass(frozen=True)
class TextObjective(Objective):
    """The same where both sides read the same text."""

    # Mean squared error of the states of tokens of both sides that end at the same character.
    per_token: float = 0.0


@dataclass(frozen=True)
class TaskObjective(Objective):
    """The same where the task has a head."""

    logits_kl: float = 0.0  # KL of what the teacher's head says of both vectors
    logits_temperature: float = 1.0  # of that term

    def check(self, where: str) -> None:
        super().check(where)
        temperature = self.logits_temperature
        require(temperature > 0, f"{where}.logits_temperature", temperature, "above 0")


@dataclass(frozen=True)
class MaskedPrediction:
    """LLM preparation: tokens are hidden, and predicted by the LLM reading both ways.

    Adapters are trained, of the sizes of `lora`, and merged. training.steps = 0: left out.
    """

    training: Training = Training(steps=0, batch_rows=32, learning_rate=5e-5, target_length=512)
    share: float = 0.2  # of the tokens of a text that are predicted
    blank: float = 0.8  # of these, that are read as a blank
    random: float = 0.1  # of these, that are read as another token; the rest are as they are

    def check(self) -> None:
        _require_steps("mntp", self.training)
        share, shown = self.share, 1 - self.blank
        require(0 < share <= 1, "mntp.share", share, "a fraction above 0, up to 1")
        require(0 <= self.blank <= 1, "mntp.blank", self.blank, "a fraction from 0 to 1")
        allowed = "from 0 to what mntp.blank leaves of 1"
        require(-1e-9 <= self.random <= shown + 1e-9, "mntp.random", self.random, allowed)


@dataclass(frozen=True)
class Contrastive:
    """LLM preparation: a text read twice is to be more like itself than like the batch's others.

    As MaskedPrediction, and after it.
    """

    training: Training = Training(steps=0, batch_rows=128, learning_rate=3e-5, target_length=128)
    dropout: float = 0.3  # of the attention's weights, beside lora.dropout
    temperature: float = 0.05  # that cosines are divided by

    def check(self) -> None:
        _require_steps("simcse", self.training)
        require(0 <= self.dropout < 1, "simcse.dropout", self.dropout, "from 0 to below 1")
        require(self.temperature > 0, "simcse.temperature", self.temperature, "above 0")
        # Cut into micro-batches, each would have its own texts alone to compare with.
        accumulation = self.training.accumulation
        allowed = "1, as a text is compared with all of its batch"
        require(accumulation == 1, "simcse.training.accumulation", accumulation, allowed)


def _require_steps(where: str, training: Training) -> None:
    steps = training.steps
    require(steps >= 0, f"{where}.training.steps", steps, "at least 1, or 0 to leave it out")


@dataclass(frozen=True)
class Adaptation:
    """Stage 1: the stack learns the LLM's pooled state of English text."""

    training: Training  # 0 steps: the stage is left out, the stack begins the task as it was made
    objective: TextObjective = TextObjective()
    noise_position: float = 0.0  # std of Gaussian noise on the encoder output, per position
    noise_text: float = 0.0  # the same, one draw per text
    subword_sampling: float = 0.0  # sentencepiece's alpha for the encoder side; 0 = none
    samplings: int = 1  # segmentations of each text
    # Of config.adaptation_text's sources: how many of the texts that are drawn are of each, in
    # proportion; () = every text is drawn once.
    mixture: tuple[float, ...] = ()
    # What the bridge is before the first step. "embeddings": the linear map that is nearest from
    # the encoder's states to the LLM's embeddings of tokens that end at the same character.
    bridge_start: Literal["random", "embeddings"] = "random"
    bridge_batches: int = 100  # of stage 1's batches, that it is solved from
    dev_texts: int = 500  # held out of the English text, where training.evaluate_every is not 0

    def check(self) -> None:
        self.objective.check("adaptation.objective")
        _require_noise("adaptation", self.noise_position, self.noise_text)
        alpha = self.subword_sampling
        require(0 <= alpha <= 1, "adaptation.subword_sampling", alpha, "from 0 to 1")
        require(self.samplings >= 1, "adaptation.samplings", self.samplings, "at least 1")
        weights = self.mixture
        require(all(w > 0 for w in weights), "adaptation.mixture", weights, "weights above 0")
        require(self.dev_texts >= 1, "adaptation.dev_texts", self.dev_texts, "at least 1")
        batches = self.bridge_batches
        require(batches >= 1, "adaptation.bridge_batches", batches, "at least 1")
        if self.aligned_by:
            why = f"0 with adaptation.{self.aligned_by}, as sampled pieces do not tell their place"
            require(not alpha, "adaptation.subword_sampling", alpha, why)

    @property
    def aligned_by(self) -> str:
        """The field that asks which tokens of both sides end together; "" = none does."""
        if self.objective.per_token:
            return "objective.per_token"
        return "" if self.bridge_start == "random" else "bridge_start"


@dataclass(frozen=True)
class Distillation:
    """Stage 2b: the stack learns the task teacher's pooled state of the task's English texts, or
    their labels."""

    training: Training
    start: Literal["stage1", "stage1+teacher"]  # the latter adds what the teacher learnt in 2a
    objective: TaskObjective = TaskObjective()
    noise_position: float = 0.0
    noise_text: float = 0.0
    # "labels": by cross-entropy, with a head of the stack's own; the teacher is then nothing but a
    # baseline.
    learns: Literal["teacher", "labels"] = "teacher"

    def check(self) -> None:
        require(
            self.learns == "teacher" or self.start == "stage1",
            "distillation.start",
            self.start,
            "'stage1' where distillation.learns is 'labels'",
        )
        self.objective.check("distillation.objective")
        _require_noise("distillation", self.noise_position, self.noise_text)


# What a transfer set's rows are, beside translation and completion: languages of the instruction
# and of the answer, L the resource-rich one, T a target.
COMBINATIONS = ("LL", "LT", "TL", "TT")
_KINDS = (*(name.lower() for name in COMBINATIONS), "switched", "translation", "completion")

# What SDRRL can be without, and what it is called then.
SDRRL_PARTS = ("own_answers", *_KINDS)
WITHOUT = "sdrrl_without_"

# Baselines: whose answers they learn, and the weights of the kinds that they have. Fine-tuning on
# the data as it is, in L; translated; cross-lingual instruction tuning, which is both, and
# translation; and self-distillation fine-tuning, on references in the model's own words, in L.
_BASELINES: dict[str, tuple[str, dict[str, float]]] = {
    "sft": ("reference", {"ll": 1.0}),
    "t_sft": ("reference", {"tt": 1.0}),
    "cross_lingual": ("reference", {"ll": 1.0, "tt": 1.0, "translation": 1.0}),
    "sdft": ("rewritten", {"ll": 1.0}),
}


@dataclass(frozen=True)
class TransferSet:
    """Which rows an LLM is trained on to answer in other languages: SDRRL's, or a baseline's.

    The kinds' weights say how often each row of a kind is there: 0 none, 0.5 half of them, drawn by
    the seed, 2 each twice. That there are these kinds is known second-hand; every number is ours.
    """

    source: str  # FLORES-200 code of L. [abs] English or French
    targets: tuple[str, ...]  # FLORES-200 codes of the languages T
    seed: int = 0  # of weights' draws, words, prefixes and the rows' order
    # Whose answers: the model's own [abs], the data's, or the data's in the model's words (SDFT).
    answers: Literal["answer", "reference", "rewritten"] = "answer"
    # Which own answers are kept, by their reference. [ours] whether there is any filter is unknown
    answer_filter: Literal["none", "exact", "similarity"] = "none"
    least_similarity: float = 0.7  # [ours] cosine of an answer and its reference
    ll: float = 1.0  # weight of instructions in L with answers in L [ours]
    lt: float = 1.0  # [ours]
    tl: float = 1.0  # [ours]
    tt: float = 1.0  # [ours]
    switched: float = 1.0  # weight of code-switched copies of rows, one for each target [ours]
    switched_from: tuple[str, ...] = ("LL", "LT")  # [ours] combinations that are copied so
    switched_sides: Literal["prompt", "answer", "both"] = "prompt"  # [ours]
    switch_rate: float = 0.3  # [ours] probability that a word which the lexicon has is replaced
    translation: float = 1.0  # weight of instructions to translate, both directions [ours]
    completion: float = 1.0  # weight of instructions to go on with a text in T [ours]
    parallel_pairs: int = 0  # of the parallel corpus for each target; 0 = all [ours]
    prefix: tuple[float, float] = (0.3, 0.7)  # [ours] share of a text that is given to complete
    # [ours] of rows in two languages, which else teach to answer in one that nobody asked for.
    # {prompt}: the instruction; {language}: name of the answer's.
    crossed_prompt: str = "{prompt}\n\nAnswer in {language}."
    # [ours] {source}, {target}: names of the languages; {text}: the text, or what is given of it.
    translation_prompt: str = "Translate the following {source} text into {target}.\n\n{text}"
    completion_prompt: str = "Continue the following {target} text.\n\n{text}"
    # [ours] What asks for an answer in the model's words, where these are trained on.
    rewriting_prompt: str = (
        "{prompt}\n\nA correct answer is given below. Answer in your own words, saying the same."
        "\n\n{reference}"
    )

    @property
    def translates(self) -> bool:
        """Whether a row is made of a translation."""
        switched = self.switched and any("T" in name for name in self.switched_from)
        return bool(self.lt or self.tl or self.tt or switched)

    @property
    def weights(self) -> dict[str, float]:
        """By kind."""
        combinations = {name: getattr(self, name.lower()) for name in COMBINATIONS}
        others = ("switched", "translation", "completion")
        return combinations | {name: getattr(self, name) for name in others}

    def of(self, system: str) -> "TransferSet":
        """What a system is trained on where `sdrrl` is trained on this: a baseline's set, or this
        one without one of its SDRRL_PARTS; without own answers it has the references. ValueError
        for a system of another name."""
        if system == "sdrrl":
            return self
        part = system.removeprefix(WITHOUT)
        if system not in _BASELINES and (part == system or part not in SDRRL_PARTS):
            parts = ", ".join(f"{WITHOUT}{part}" for part in SDRRL_PARTS)
            raise ValueError(
                f"{system!r} is no system that is trained on a set; it must be one of"
                f" {', '.join(_BASELINES)}, sdrrl, {parts}."
            )
        changed: dict[str, Any] = {part: 0.0}
        if part == "own_answers":
            changed = {"answers": "reference", "answer_filter": "none"}
        if system in _BASELINES:
            answers, weights = _BASELINES[system]
            none = dict.fromkeys(_KINDS, 0.0)
            changed = {"answers": answers, "answer_filter": "none"} | none | weights
        return dataclasses.replace(self, **changed)

    def check(self) -> None:
        with naming("transfer.source"):
            check_language(self.source)
        with naming("transfer.targets"):
            for code in self.targets:
                check_language(code)
        targets = self.targets
        require(
            len(set(targets)) == len(targets) > 0 and self.source not in targets,
            "transfer.targets",
            targets,
            f"codes other than {self.source}, at least one, none twice",
        )
        for kind, weight in self.weights.items():
            require(weight >= 0, f"transfer.{kind.lower()}", weight, "0 (none) or above")
        require(any(self.weights.values()), "transfer", self.weights, "a weight above 0 somewhere")
        require(
            self.answers == "answer" or self.answer_filter == "none",
            "transfer.answer_filter",
            self.answer_filter,
            "'none' where answers are not the model's own",
        )
        least = self.least_similarity
        require(-1 <= least <= 1, "transfer.least_similarity", least, "from -1 to 1")
        known = set(self.switched_from) <= set(COMBINATIONS) and self.switched_from
        allowed = f"some of {', '.join(COMBINATIONS)}"
        require(bool(known), "transfer.switched_from", self.switched_from, allowed)
        rate = self.switch_rate
        require(0 < rate <= 1, "transfer.switch_rate", rate, "above 0, to 1")
        require(self.parallel_pairs >= 0, "transfer.parallel_pairs", self.parallel_pairs, "0 (all)")
        low, high = self.prefix
        allowed = "two shares between 0 and 1, the lower first"
        require(0 < low <= high < 1, "transfer.prefix", self.prefix, allowed)
        crossed = _fields_of(self.crossed_prompt)
        require(
            crossed in ({"prompt"}, {"prompt", "language"}),
            "transfer.crossed_prompt",
            self.crossed_prompt,
            "a text with {prompt}, and perhaps {language}",
        )
        for name, fields in (
            ("translation_prompt", {"source", "target", "text"}),
            ("completion_prompt", {"target", "text"}),
            ("rewriting_prompt", {"prompt", "reference"}),
        ):
            prompt = getattr(self, name)
            allowed = f"a text with {{{'}, {'.join(sorted(fields))}}}"
            require(_fields_of(prompt) == fields, f"transfer.{name}", prompt, allowed)


def _fields_of(template: str) -> set[str | None] | None:
    """What stands in braces; None for a text that is no template."""
    try:
        return {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError:
        return None


@dataclass(frozen=True)
class Mesh:
    """Devices along each axis; at most one -1, which takes what is left."""

    data: int = -1  # rows of a batch; every device along it holds the same weights
    fsdp: int = 1  # rows of a batch, and the weights
    tensor: int = 1  # heads, feed-forward, vocabulary
    context: int = 1  # positions of a row, for rows beyond some 8000 tokens
    slices: int = 1  # of TPUs, joined by the data-centre network; data runs over them

    def check(self) -> None:
        sizes = dataclasses.asdict(self)
        require(self.slices >= 1, "mesh.slices", self.slices, "at least 1")
        require(
            all(n >= 1 or n == -1 for n in sizes.values()) and list(sizes.values()).count(-1) <= 1,
            "mesh",
            sizes,
            "positive sizes with at most one -1",
        )


@dataclass(frozen=True)
class TaskSource:
    """What the systems are trained for and compared on; the embedded task where nothing is named.

    A published benchmark, or a user's own JSONL, CSV, TSV or Parquet files with the columns text
    (and text_pair), label, language.
    """

    benchmark: str = ""  # the name of a published one: sib200, nusax, …; "" = own files
    data: str = ""  # folder of the benchmark, a clone of its repository or the hub's files
    english_data: str = ""  # folder of its English training rows, where it has none itself
    translations: str = ""  # folder of published translations, for translate-test to read
    train: str = ""  # own English training rows
    test: str = ""  # own rows to evaluate on
    dev: str = ""  # own English rows, where a stage of the task has evaluate_every above 0
    languages: tuple[str, ...] = ()  # FLORES-200 codes that are evaluated; () = all that there are
    limit: int = 0  # test rows of each language, labels in proportion; 0 = all
    name: str = ""  # in tables and the report; "" = the benchmark's, or the training file's name

    @property
    def given(self) -> bool:
        """Whether this is a task of the user's choice."""
        return bool(self.benchmark or self.train)

    def check(self) -> None:
        require(
            bool(self.train) == bool(self.test),
            "task",
            {"train": self.train, "test": self.test},
            "both files or neither",
        )
        require(
            not (self.benchmark and self.train),
            "task.train",
            self.train,
            "empty where task.benchmark is given",
        )
        require(
            bool(self.benchmark) == bool(self.data),
            "task.data",
            self.data,
            "the folder of task.benchmark, and empty without one",
        )
        for field in ("english_data", "translations"):
            value = getattr(self, field)
            allowed = "empty where task.benchmark names none"
            require(bool(self.benchmark) or not value, f"task.{field}", value, allowed)
        require(
            bool(self.train) or not self.dev,
            "task.dev",
            self.dev,
            "empty where task.train is, as benchmarks bring their own",
        )
        require(self.limit >= 0, "task.limit", self.limit, "0 (all rows) or above")


# The systems of a comparison, by their names in results.json and in its order.
SYSTEMS = (
    "mt_llm",
    "llm_zero_shot",
    "mt_encoder",
    "translate_test",
    "translate_train",
    "llm_prompted",
    "encoder_linear",
)


@dataclass(frozen=True)
class Evaluation:
    """What the systems are compared on."""

    split: Literal["test", "dev"]  # of the embedded task; settings are chosen on dev
    batch_rows: int  # texts per forward pass
    max_length: int  # tokens of a text, both sides; longer ones are cut
    max_new_tokens: int  # of a translation
    num_beams: int = 1  # hypotheses of a translation that are searched over; 1 = greedy
    # That the LLM reads in its own tokens (zero-shot); () = all. Scripts that its tokenizer cuts
    # into bytes make it many times as slow as the stack.
    llm_languages: tuple[str, ...] = ()
    # Those that are compared, where they can be; mt_encoder and translate_train are not trained
    # where they are not among them. The latter, which trains the LLM on the task once more, is to
    # be asked for.
    systems: tuple[str, ...] = tuple(name for name in SYSTEMS if name != "translate_train")
    # What llm_prompted reads: a text with the names of columns in braces, and {labels}; "" = the
    # task's own, or that of its kind (tasks/prompt.py).
    prompt: str = ""
    prompt_score: Literal["sum", "mean"] = "sum"  # of the log-likelihoods of a label's tokens

    def check(self) -> None:
        for name, least in (("batch_rows", 1), ("max_length", 4), ("max_new_tokens", 1)):
            value = getattr(self, name)
            require(value >= least, f"evaluation.{name}", value, f"at least {least}")
        beams = self.num_beams
        require(1 <= beams <= 8, "evaluation.num_beams", beams, "from 1 to 8")
        for name in self.systems:
            near = nearest(name, SYSTEMS, 1) or SYSTEMS
            told = f"names among {', '.join(SYSTEMS)} (nearest to {name!r}: {near[0]})"
            require(name in SYSTEMS, "evaluation.systems", self.systems, told)
        several = len(set(self.systems)) == len(self.systems) > 0
        require(several, "evaluation.systems", self.systems, "a list without repetitions")


@dataclass(frozen=True)
class Probe:
    """What encoder, stack and LLM are asked without labels, after stage 1; nothing by default."""

    bitext: Literal["", "tatoeba", "ntrex"] = ""  # whose translations are to be found
    data: str = ""  # folder of its files, a clone of its repository
    limit: int = 0  # lines of each language; 0 = all

    def check(self) -> None:
        together = "the folder of probe.bitext, and empty without one"
        require(bool(self.bitext) == bool(self.data), "probe.data", self.data, together)
        require(self.limit >= 0, "probe.limit", self.limit, "0 (all lines) or above")


@dataclass(frozen=True)
class MTLLM:
    """MT-LLM, from checkpoints to the table."""

    recipe: Literal["mtllm"]
    name: str  # of the settings: mini, llama3-8b, …
    seed: int  # of all that training draws
    # Of the embedded text and its splits, apart from `seed`: runs of several seeds share one test,
    # and none of it lies in the dev split that settings were chosen on.
    text_seed: int
    encoder: str  # Hugging Face folder of an NLLB, M2M100, BERT or XLM-R; "" = the mini NLLB
    llm: str  # Hugging Face folder of the LLM; "" = train the mini Llama
    english: str  # FLORES-200 code of the language the LLM is adapted and trained in
    languages: tuple[str, ...]  # FLORES-200 codes of the embedded text beside English
    # Sources of English text for stage 1, as data/sources.py reads them; () = the embedded text.
    adaptation_text: tuple[str, ...]
    task: TaskSource
    # None: these settings are for checkpoints, texts and tasks of the user's own.
    text: TextSizes | None
    mini_nllb: MiniNLLB | None
    mini_llama: MiniLlama | None
    bidirectional: bool  # the LLM's attention in stages 1 and 2; as LLM2Vec makes it
    # What of the LLM learns: adapters, all its layers (teacher: a copy), or "bridge", nothing: the
    # bridge alone is trained in stages 1 and 2b, and the teacher of 2a has adapters.
    trained: Literal["lora", "all", "bridge"]
    lora: LoRA
    adaptation: Adaptation
    teacher: Training
    distillation: Distillation
    mt_encoder: Training
    evaluation: Evaluation
    mesh: Mesh
    compute_dtype: Literal["float32", "bfloat16"]
    # Of encoder and LLM as they are read. int8: their linear maps, the rest bfloat16.
    frozen_dtype: Literal["float32", "bfloat16", "int8"]
    unroll_layers: bool  # a Python loop over layers instead of lax.scan
    remat: Literal["none", "full", "dots"]  # what the backward pass recomputes
    attention: Literal["auto", "xla", "cudnn", "splash"]  # by what; ops/attention.py has the table
    # Folder of the NLLB model that translate-test translates with; "" = the encoder, where it can.
    translator: str = ""
    llm_adapters: tuple[str, ...] = ()  # PEFT folders, merged into the LLM in turn as it is read
    # Of the task, instead of `seed`: stages 2a and 2b and the encoder baseline are trained with
    # each, from one stage 1; () = `seed` alone.
    seeds: tuple[int, ...] = ()
    # A run's folder: its models and its stage 1 are what the task begins with; or that of an
    # exported stage 1, beside the encoder and the LLM that it began with; "" = one of its own.
    stage1: str = ""
    probe: Probe = Probe()
    legacy_source_order: bool = False  # NLLB's sources as transformers had them before April 2023
    bridge: Bridge = Bridge()
    encoder_layers: int = 0  # last ones of the encoder that learn in stages 1 and 2b; 0 = frozen
    # What makes the LLM read both ways before stage 1, on its text, after `llm_adapters`: LLM2Vec.
    mntp: MaskedPrediction = MaskedPrediction()
    simcse: Contrastive = Contrastive()

    def __post_init__(self) -> None:
        with naming("english"):
            check_language(self.english)
        with naming("languages"):
            for code in self.languages:
                check_language(code)
        require(len(self.languages) > 0, "languages", self.languages, "at least one code")
        require(
            len(set(self.languages)) == len(self.languages),
            "languages",
            self.languages,
            "a list without repetitions",
        )
        require(
            self.english not in self.languages,
            "languages",
            self.languages,
            f"languages other than {self.english}",
        )
        texts, weights = self.adaptation_text, self.adaptation.mixture
        distinct = len(set(texts)) == len(texts)
        require(distinct, "adaptation_text", texts, "a list without repetitions")
        require(
            len(weights) in (0, len(texts)),
            "adaptation.mixture",
            weights,
            f"() or {len(texts)} weights, one for each source of config.adaptation_text",
        )
        distinct = len(set(self.seeds)) == len(self.seeds)
        require(distinct, "seeds", self.seeds, "a list without repetitions")
        if self.text is not None:
            for name, size in dataclasses.asdict(self.text).items():
                require(size >= 1, f"text.{name}", size, "at least 1")
        for group in (
            self.task,
            self.mini_nllb,
            self.mini_llama,
            self.mntp,
            self.simcse,
            self.bridge,
            self.adaptation,
            self.distillation,
            self.evaluation,
            self.probe,
        ):
            if group is not None:
                group.check()
        for where, training in self.stages().items():
            training.check(where, SIDES[where])
            if where.startswith(("mini_", "mntp", "simcse")):
                every, none = training.evaluate_every, "0: there is no development data for it"
                require(every == 0, f"{where}.evaluate_every", every, none)
        if self.evaluates_task:
            where = "where a stage of the task has evaluate_every above 0"
            file = f"a file of labelled English rows {where}"
            require(bool(self.task.dev or not self.task.train), "task.dev", self.task.dev, file)
            split, other = self.evaluation.split, f"'test' {where}, as dev decides"
            require(self.task.given or split == "test", "evaluation.split", split, other)
        self.mesh.check()
        if self.frozen_dtype == "int8":  # what learns, or is added to, is no weight in int8
            why = "with frozen_dtype 'int8'"
            require(self.trained != "all", "trained", self.trained, f"'lora' or 'bridge' {why}")
            require(not self.encoder_layers, "encoder_layers", self.encoder_layers, f"0 {why}")
            start = self.distillation.start
            require(start == "stage1", "distillation.start", start, f"'stage1' {why}")
        layers, stride = self.encoder_layers, self.bridge.stride
        require(layers >= 0, "encoder_layers", layers, "0 (all are frozen) or above")
        context = self.mesh.context
        require(stride == 1 or context == 1, "bridge.stride", stride, "1 where mesh.context is not")
        if self.adaptation.objective.per_token:
            why = (
                "1 with adaptation.objective.per_token, which compares the encoder's own positions"
            )
            require(stride == 1, "bridge.stride", stride, why)
        if self.adaptation.bridge_start != "random":
            why = "with adaptation.bridge_start, which solves for one linear map"
            require(stride == 1, "bridge.stride", stride, f"1 {why}")
            require(self.bridge.hidden == 0, "bridge.hidden", self.bridge.hidden, f"0 {why}")
        if "mntp.training" in self.stages():
            steps, allowed = self.mntp.training.steps, "0 where config.bidirectional is False"
            require(self.bidirectional, "mntp.training.steps", steps, allowed)
        if "simcse.training" in self.stages():
            drops = self.simcse.dropout > 0 or self.lora.dropout > 0
            allowed = "above 0 where lora.dropout is not: a text would be read twice alike"
            require(drops, "simcse.dropout", self.simcse.dropout, allowed)
        self.lora.check()

    @property
    def task_seeds(self) -> tuple[int, ...]:
        """The seeds that the task is trained with; results are means over them."""
        return self.seeds or (self.seed,)

    @property
    def evaluates_task(self) -> bool:
        """Whether a stage of the task asks for the task's English development rows."""
        of_task = ("teacher", "distillation.training", "mt_encoder")
        return any(t.evaluate_every for where, t in self.stages().items() if where in of_task)

    @property
    def reads_english(self) -> bool:
        """Whether a stage learns from English text: stage 1, or what prepares the LLM for it."""
        learning = (self.mntp, self.simcse, self.adaptation)
        steps = any(group.training.steps for group in learning)
        return not self.stage1 and (steps or self.adaptation.bridge_start != "random")

    def uses_embedded_text(self) -> bool:
        """Whether anything is trained or evaluated on the text that comes with this package."""
        text = self.adaptation_text or not self.reads_english
        own = self.stage1 or (self.encoder and self.llm and text)
        return not (own and self.task.given)

    def stages(self) -> dict[str, Training]:
        """The settings of the stages that are trained, by dotted name and in their order."""
        found: dict[str, Training] = {}
        if not self.stage1:
            if self.mini_nllb is not None and not self.encoder:
                found["mini_nllb.training"] = self.mini_nllb.training
            if self.mini_llama is not None and not self.llm:
                found["mini_llama.training"] = self.mini_llama.training
            for name, training in (("mntp", self.mntp.training), ("simcse", self.simcse.training)):
                if training.steps:
                    found[f"{name}.training"] = training
            found["adaptation.training"] = self.adaptation.training
        found |= {"teacher": self.teacher, "distillation.training": self.distillation.training}
        if "mt_encoder" in self.evaluation.systems:
            found["mt_encoder"] = self.mt_encoder
        return found

    def steps(self) -> dict[str, int]:
        """Those of what is trained, by the names of their folders in a run."""
        return {name.split(".")[0]: training.steps for name, training in self.stages().items()}


# The stages that may have no steps.
SKIPPABLE = ("adaptation.training",)

# What each stage reads: texts as the MT encoder tokenises them, and as the LLM does.
SIDES = {
    "mini_nllb.training": ("source", "target"),
    "mini_llama.training": ("target",),
    "mntp.training": ("target",),
    "simcse.training": ("target",),
    "adaptation.training": ("source", "target"),
    "teacher": ("target",),
    "distillation.training": ("source",),
    "mt_encoder": ("source",),
    "training": ("target",),
    "on_policy.training": ("target",),
}


@dataclass(frozen=True)
class Answering:
    """How an LLM answers: what stands around a prompt, and how the next token is drawn."""

    template: Literal["chat", "alpaca", "llama2", "none"]
    max_new_tokens: int  # [fallback] 512
    system: str = ""  # what the LLM is told before all prompts; "" = nothing
    temperature: float = 0.95  # [fallback]; 0 = always the likeliest token
    top_k: int = 50  # [fallback]; 0 = all tokens
    top_p: float = 0.7  # [fallback]
    repetition_penalty: float = 1.0
    batch_rows: int = 32  # prompts that each device answers at a time

    def check(self) -> None:
        for name in ("max_new_tokens", "batch_rows"):
            value = getattr(self, name)
            require(value >= 1, f"answering.{name}", value, "at least 1")
        for name, is_good, allowed in (
            ("temperature", self.temperature >= 0, "0 (the likeliest token) or above"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or above"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        ):
            require(is_good, f"answering.{name}", getattr(self, name), allowed)
        has_place = self.template in ("chat", "llama2")
        allowed = f"empty where answering.template is {self.template!r}"
        require(has_place or not self.system, "answering.system", self.system, allowed)


@dataclass(frozen=True)
class Translating:
    """How instructions and answers are translated, and which translations are dropped."""

    num_beams: int  # hypotheses that are searched over [ours]; 1 = greedy
    max_new_tokens: int  # of a sentence
    batch_rows: int = 64  # sentences in one pass
    check_language: bool = True  # drop what is in another language, where that can be told [ours]
    check_tasks: bool = True  # drop instructions that a translation spoils [ours]

    def check(self) -> None:
        for name in ("num_beams", "max_new_tokens", "batch_rows"):
            value = getattr(self, name)
            require(value >= 1, f"translating.{name}", value, "at least 1")


@dataclass(frozen=True)
class OwnText:
    """What a run of SDRRL reads beside its models; nothing: the embedded instructions."""

    # File of training instructions in the source language: prompt, and perhaps id and reference.
    prompts: str = ""
    tests: str = ""  # file of held-out ones in all languages: id, language, prompt, reference
    lexicons: str = ""  # folder of word lists of the source and each target, GATITOS' or MUSE's
    parallel: Literal["", "ntrex", "seed", "tatoeba"] = ""  # corpus of sentences in both languages
    parallel_data: str = ""  # folder of its files, a clone of its repository
    # Files or folders of published evaluations: what says one of their texts is not trained on.
    evaluations: tuple[str, ...] = ()
    # Sentences that are not trained on, nor is the rest of their documents where the corpus names
    # them: without `tests` the systems are compared by how likely they find those.
    held_out_pairs: int = 100

    def check(self) -> None:
        others = self.tests or self.lexicons or self.parallel or self.evaluations
        allowed = "a file of instructions where another field of own names something"
        require(bool(self.prompts) or not others, "own.prompts", self.prompts, allowed)
        allowed = "the folder of own.parallel, and empty without one"
        given = bool(self.parallel_data)
        require(bool(self.parallel) == given, "own.parallel_data", self.parallel_data, allowed)
        count = self.held_out_pairs
        require(count >= 1, "own.held_out_pairs", count, "at least 1")
        judged = bool(self.tests or self.parallel or not self.prompts)
        allowed = "a file of held-out instructions where own.parallel has no sentences to judge by"
        require(judged, "own.tests", self.tests, allowed)


@dataclass(frozen=True)
class OnPolicy:
    """A step beyond the paper [ours]: what `sdrrl` became is asked in the targets, and each token
    of its own answers drawn to what it says where it has the instruction in the source too.

    A round samples answers of the model as it is and then trains on them, its teacher being itself
    as the round began; the loss is KL(teacher ‖ student) over the vocabulary.
    """

    training: Training  # of a round; target_length: tokens of a row, instructions and answers
    teacher_length: int  # tokens of the row that the teacher reads, with both instructions
    rounds: int = 2  # each leaves a model of its own
    instructions: int = 1024  # asked in a round, of all targets together, by lot; 0 = all
    temperature: float = 1.0  # of sampling; 1 = on policy; 0 = always the likeliest token
    # What the teacher is asked. {source}: the instruction in the source, {prompt}: in the target.
    context: str = "The same request in another language: {source}\n\n{prompt}"

    def check(self) -> None:
        for name in ("rounds", "teacher_length"):
            value = getattr(self, name)
            require(value >= 1, f"on_policy.{name}", value, "at least 1")
        count = self.instructions
        require(count >= 0, "on_policy.instructions", count, "0 (all) or above")
        value, allowed = self.temperature, "0 (the likeliest token) or above"
        require(value >= 0, "on_policy.temperature", value, allowed)
        is_good = _fields_of(self.context) == {"source", "prompt"}
        require(is_good, "on_policy.context", self.context, "a text with {prompt} and {source}")


# The systems of a run of SDRRL, by their names in results.json: the LLM as it is; tuned on what
# `TransferSet.of` says; and tuned further.
SDRRL_SYSTEMS = (
    "base",
    *_BASELINES,
    "sdrrl",
    *(f"{WITHOUT}{part}" for part in SDRRL_PARTS),
    "on_policy",
)


@dataclass(frozen=True)
class SDRRL:
    """SDRRL: an LLM's own answers in a resource-rich language teach it to answer in others."""

    recipe: Literal["sdrrl"]
    name: str  # of the settings: mini
    seed: int  # of all that training and sampling draw
    text_seed: int  # of what is held out and of which rows are taken; and of the mini LLM's text
    llm: str  # Hugging Face folder of the LLM; "" = train the mini Llama
    translator: str  # that of an NLLB or M2M100 model; "" = train the mini NLLB, both ways
    transfer: TransferSet  # source, targets, and what the training rows of `sdrrl` are
    # None: these settings are for models of the user's own.
    mini_nllb: MiniNLLB | None
    mini_llama: MiniLlama | None
    answering: Answering
    translating: Translating
    training: Training  # of each system; target_length: tokens of a row, prompts and answers
    trained: Literal["lora", "all"]  # adapters, or all weights
    lora: LoRA
    systems: tuple[str, ...]  # of SDRRL_SYSTEMS, those that are compared
    on_policy: OnPolicy  # of the system of this name
    mesh: Mesh
    compute_dtype: Literal["float32", "bfloat16"]
    frozen_dtype: Literal["float32", "bfloat16"]  # of the LLM as it is read
    unroll_layers: bool  # a Python loop over layers instead of lax.scan
    remat: Literal["none", "full", "dots"]  # what the backward pass recomputes
    attention: Literal["auto", "xla", "cudnn", "splash"]  # by what; ops/attention.py has the table
    own: OwnText = OwnText()
    train_instructions: int = 0  # that the LLM answers; 0 = all
    test_instructions: int = 0  # held-out ones that the systems are asked in each language; 0 = all

    def __post_init__(self) -> None:
        for name in ("train_instructions", "test_instructions"):
            count = getattr(self, name)
            require(count >= 0, name, count, "0 (all) or above")
        groups = (
            self.transfer,
            self.mini_nllb,
            self.mini_llama,
            self.answering,
            self.translating,
            self.lora,
            self.mesh,
            self.own,
            self.on_policy,
        )
        for group in groups:
            if group is not None:
                group.check()
        self._check_systems()
        for where, training in self.stages().items():
            training.check(where, SIDES[where])
            every, none = training.evaluate_every, "0: there is no development data for it"
            require(every == 0, f"{where}.evaluate_every", every, none)
        start = self.lora.start
        require(not start, "lora.start", start, "empty: adapters begin afresh in this recipe")
        kept = self.transfer.answer_filter
        allowed = "'none' or 'exact' in this recipe, which has no model of similarity"
        require(kept != "similarity", "transfer.answer_filter", kept, allowed)

    def _check_systems(self) -> None:
        names = self.systems
        known = set(names) <= set(SDRRL_SYSTEMS) and len(set(names)) == len(names) > 0
        allowed = f"some of {', '.join(SDRRL_SYSTEMS)}, none twice"
        require(known, "systems", names, allowed)
        for name, found in self.sets.items():
            allowed = f"without {name}, as config.transfer has nothing of that part"
            require(name == "sdrrl" or found != self.transfer, "systems", names, allowed)
            allowed = f"without {name}, as config.transfer has nothing but that part"
            require(any(found.weights.values()), "systems", names, allowed)
        if "on_policy" in names:
            allowed = "a list with 'sdrrl', which on_policy goes on from"
            require("sdrrl" in names, "systems", names, allowed)

    @property
    def english(self) -> str:
        """The resource-rich language."""
        return self.transfer.source

    @property
    def languages(self) -> tuple[str, ...]:
        """The targets."""
        return self.transfer.targets

    @property
    def sets(self) -> dict[str, TransferSet]:
        """What each system learns that is trained on a set."""
        trained = (name for name in self.systems if name not in ("base", "on_policy"))
        return {name: self.transfer.of(name) for name in trained}

    @property
    def translates(self) -> bool:
        """Whether some system learns from translations."""
        made = any(settings.translates for settings in self.sets.values())
        return made or "on_policy" in self.systems

    def stages(self) -> dict[str, Training]:
        """The settings of what is trained, by dotted name and in their order."""
        found: dict[str, Training] = {}
        if self.mini_nllb is not None and not self.translator and self.translates:
            found["mini_nllb.training"] = self.mini_nllb.training
        if self.mini_llama is not None and not self.llm:
            found["mini_llama.training"] = self.mini_llama.training
        found["training"] = self.training
        if "on_policy" in self.systems:
            found["on_policy.training"] = self.on_policy.training
        return found

    def steps(self) -> dict[str, int]:
        """Those of what is trained, by the names of their folders in a run."""
        own = {name.split(".")[0]: training.steps for name, training in self.stages().items()}
        del own["training"]
        tuned = dict.fromkeys(self.sets, self.training.steps)
        if own.pop("on_policy", None) is None:
            return own | tuned
        rounds = (f"on_policy/{i}" for i in range(1, self.on_policy.rounds + 1))
        return own | tuned | dict.fromkeys(rounds, self.on_policy.training.steps)
