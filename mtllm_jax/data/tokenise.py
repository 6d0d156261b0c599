"""Tokenizers of both sides, NLLB's `[src_lang] text </s>` and the LLM's, and training tiny ones.

What is trained is saved as a Hugging Face folder and read back through transformers,
so a tiny tokenizer and a published one take the same road.
"""

import contextlib
import io
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from mtllm_jax.languages import ENGLISH, check_language

_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0–3 in NLLB; sentencepiece has no <pad>
_MASK = "<mask>"
_CODE = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")
_SENTENCEPIECE_FILES = ("sentencepiece.bpe.model", "spiece.model", "tokenizer.model")

Ids = list[np.ndarray]  # one int32 array of token ids per text

# What transformers says at import about libraries that are absent is no concern of ours.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

# sentencepiece's random generator is one per process.
_sampling_lock = threading.Lock()


# ------------------------------------------------------------------ training


def train_nllb_tokenizer(
    texts: Iterable[str],
    language_codes: Sequence[str],
    vocab_size: int,
    folder: str | os.PathLike,
) -> None:
    """Trains a sentencepiece BPE model on `texts` and saves it in NLLB's layout.

    Ids: <s> 0, <pad> 1, </s> 2, <unk> 3, the pieces (sentencepiece's id + 1), one token for each of
    `language_codes` in their order, <mask>: at most `vocab_size` in all, fewer where the texts
    give no more pieces. Every character of `texts` is in the vocabulary; others are <unk>, as in
    NLLB. The same texts give the same files. ValueError if `vocab_size` is too small for the
    characters.
    """
    from transformers import NllbTokenizer

    codes = [check_language(code) for code in language_codes]
    with _new_folder(folder) as new, _quiet():
        # One <pad> and one <mask> more than sentencepiece knows.
        num_others = len(codes) + 2
        pieces = _train_pieces(texts, vocab_size, num_others, new / _SENTENCEPIECE_FILES[0])
        # From the model file alone transformers makes merges and normaliser, but puts <mask> before
        # the codes; NLLB has it last, so the ids are set in the file that it writes.
        NllbTokenizer.from_pretrained(new, extra_special_tokens=codes).save_pretrained(new)
        vocab = {token: i for i, token in enumerate((*_SPECIALS, *pieces[3:], *codes, _MASK))}
        _edit_json(new / "tokenizer.json", lambda content: _set_ids(content, vocab))
        _edit_json(new / "tokenizer_config.json", _drop_loading_traces)


def train_llama_tokenizer(texts: Iterable[str], vocab_size: int, folder: str | os.PathLike) -> None:
    """Trains a sentencepiece BPE model with byte fallback and saves it in Llama 2's layout.

    Ids: <unk> 0, <s> 1, </s> 2, the 256 bytes, the pieces: at most `vocab_size` in all. Texts begin
    with <s>; there is no padding token. Any text can be encoded and decoded back. Fewer pieces,
    and ValueError, as in `train_nllb_tokenizer`.
    """
    from transformers import LlamaTokenizer

    with _new_folder(folder) as new, _quiet():
        _train_pieces(
            texts,
            vocab_size,
            0,
            new / "tokenizer.model",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
        )
        LlamaTokenizer.from_pretrained(new, add_bos_token=True).save_pretrained(new)
        _edit_json(new / "tokenizer_config.json", _drop_loading_traces)


@contextlib.contextmanager
def _new_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """An empty folder that becomes `folder` at the end: whole, or after a kill not at all.

    Where `folder` is there already its files are moved over older ones: transformers would read
    those rather than the new model.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        if folder.exists():
            for file in new.iterdir():
                file.replace(folder / file.name)
        else:
            new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _train_pieces(
    texts: Iterable[str], vocab_size: int, num_others: int, file: Path, **options: Any
) -> list[str]:
    """Writes a model of at most `vocab_size - num_others` pieces; returns them by id."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",  # NLLB's and Llama's; transformers 5 reads no other kind for them
            vocab_size=vocab_size - num_others,
            hard_vocab_limit=False,  # fewer pieces where the texts have no more merges
            character_coverage=1.0,
            minloglevel=2,
            **options,
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(_misfit(str(error), vocab_size, num_others)) from None
    file.write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return [processor.id_to_piece(i) for i in range(len(processor))]


def _misfit(error: str, vocab_size: int, num_others: int) -> str:
    """Our sentence for sentencepiece's about a vocabulary too small."""
    if small := re.search(r"required_chars\. (\d+) vs (\d+)", error):
        least = vocab_size + int(small[2]) - int(small[1])
        return f"vocab_size is {vocab_size}; it must be {least} or more for these texts' characters"
    return f"vocab_size is {vocab_size}, with which no tokenizer could be trained: {error.strip()}"


def _edit_json(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _set_ids(tokenizer_json: dict[str, Any], vocab: dict[str, int]) -> None:
    tokenizer_json["model"]["vocab"] = vocab
    for token in tokenizer_json["added_tokens"]:
        token["id"] = vocab[token["content"]]
    tokenizer_json["added_tokens"].sort(key=lambda token: token["id"])
    for token in tokenizer_json["post_processor"]["special_tokens"].values():
        token["ids"] = [vocab[name] for name in token["tokens"]]


def _drop_loading_traces(config: dict[str, Any]) -> None:
    for key in ("is_local", "local_files_only"):
        config.pop(key, None)
    if config["tokenizer_class"] == "LlamaTokenizer":
        config.pop("extra_special_tokens", None)


# ------------------------------------------------------------------ using


class _Tokenizer:
    """What both sides share: a transformers tokenizer, encoding in batches, decoding."""

    def __init__(self, folder: str | os.PathLike, **options: Any):
        self._folder = os.fspath(folder)
        self._tokenizer = _load(self._folder, **options)
        if not hasattr(self._tokenizer, "backend_tokenizer"):
            kind = type(self._tokenizer).__name__
            raise ValueError(f"{folder} has a {kind}, which cannot be had as a tokenizer.json")
        self._backend = self._tokenizer.backend_tokenizer
        self._lock = threading.Lock()  # truncation is a state of the backend
        self.unk_id: int | None = self._tokenizer.unk_token_id

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._folder,)

    @property
    def vocab_size(self) -> int:
        """Number of token ids. An embedding may have more rows than that."""
        return len(self._tokenizer)

    def decode(self, rows: Iterable[Sequence[int] | np.ndarray]) -> list[str]:
        """Text of each row of token ids, without special tokens."""
        listed = [np.asarray(row).tolist() for row in rows]
        return self._tokenizer.batch_decode(listed, skip_special_tokens=True)

    def pieces(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """What each token id stands for, special tokens among them."""
        return self._tokenizer.convert_ids_to_tokens(np.asarray(ids).tolist())

    def _encode(
        self, texts: Sequence[str], text_pairs: Sequence[str] | None, max_length: int | None
    ) -> Ids:
        if text_pairs is not None and len(text_pairs) != len(texts):
            raise ValueError(f"text_pairs has {len(text_pairs)} texts; it must have {len(texts)}")
        least = self._backend.num_special_tokens_to_add(text_pairs is not None) + 1
        if max_length is not None and max_length < least:
            raise ValueError(f"max_length is {max_length}; it must be at least {least}")
        batch = list(texts) if text_pairs is None else list(zip(texts, text_pairs, strict=True))
        with self._lock:
            if max_length is None:
                self._backend.no_truncation()
            else:
                self._backend.enable_truncation(max_length)
            encodings = self._backend.encode_batch(batch)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]


class SourceTokenizer(_Tokenizer):
    """The MT model's tokenizer, of an NLLB folder: `[language] text </s>` on both of its sides.

    folder: a Hugging Face folder with an NLLB tokenizer. ValueError for another kind.
    """

    def __init__(self, folder: str | os.PathLike):
        super().__init__(folder, src_lang=ENGLISH, legacy_behaviour=False)
        added = self._tokenizer.get_added_vocab()
        self._ids_of_codes = {code: i for code, i in added.items() if _CODE.fullmatch(code)}
        self.eos_id: int = self._tokenizer.eos_token_id
        self.pad_id: int = self._tokenizer.pad_token_id
        # A tokenizer built without language codes would begin every text with <unk>, silently.
        ends = self._encode(["a"], None, None)[0][[0, -1]].tolist()
        if ends != [self._ids_of_codes.get(ENGLISH), self.eos_id]:
            raise ValueError(
                f"{folder} has no NLLB tokenizer: its texts are not [{ENGLISH}] text </s>"
            )
        self._pieces = self._load_pieces()

    @property
    def languages(self) -> tuple[str, ...]:
        """The FLORES-200 codes in the vocabulary, in its order."""
        return tuple(sorted(self._ids_of_codes, key=self._ids_of_codes.__getitem__))

    def language_id(self, code: str) -> int:
        """Token id of a language. ValueError naming the three nearest codes if it has none."""
        return self._ids_of_codes[check_language(code, self._ids_of_codes)]

    def encode(
        self,
        texts: Sequence[str],
        language: str | Sequence[str],
        *,
        text_pairs: Sequence[str] | None = None,
        max_length: int | None = None,
        sampling_alpha: float | None = None,
        seed: int = 0,
    ) -> Ids:
        """`[language] text </s>`, or `[language] text pair </s>`, as int32 arrays.

        language: one code, or one per text. max_length: tokens, the language and </s> among them;
        a longer text loses its end and keeps </s> (of a pair, the longer text is cut first).
        sampling_alpha: None for the one best segmentation; else drawn by sentencepiece, a merge
        being left out with this probability (BPE models, as NLLB's) or segmentations being drawn
        with their probability to this power (unigram models). The same texts and seed give the
        same ids. ValueError for a language that the vocabulary lacks, naming the three nearest;
        for sampling of pairs, or without a sentencepiece model file in the folder.
        """
        codes = [language] * len(texts) if isinstance(language, str) else list(language)
        if len(codes) != len(texts):
            raise ValueError(f"language has {len(codes)} codes; it must be one or {len(texts)}")
        ids_of_codes = {code: self.language_id(code) for code in set(codes)}
        if sampling_alpha is None:
            rows = self._encode(texts, text_pairs, max_length)
        elif text_pairs is None:
            rows = self._sample(texts, max_length, sampling_alpha, seed)
        else:
            raise ValueError(
                "sampling_alpha is set, which works on single texts, not on text_pairs"
            )
        for row, code in zip(rows, codes, strict=True):
            row[0] = ids_of_codes[code]
        return rows

    def encode_target(
        self, texts: Sequence[str], language: str = ENGLISH, *, max_length: int | None = None
    ) -> Ids:
        """Labels of the MT decoder: `[language] text </s>`.

        Its inputs are these, shifted right behind </s>: `</s> [language] text`. To translate, start
        with `[eos_id, language_id(language)]`.
        """
        return self.encode(texts, language, max_length=max_length)

    def _load_pieces(self) -> tuple[Any, np.ndarray] | None:
        """The folder's sentencepiece model, and the token id of each of its pieces."""
        files = [Path(self._folder) / name for name in _SENTENCEPIECE_FILES]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            return None
        processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
        pieces = [processor.id_to_piece(i) for i in range(len(processor))]
        return processor, np.array(self._tokenizer.convert_tokens_to_ids(pieces))

    def _sample(self, texts: Sequence[str], max_length: int | None, alpha: float, seed: int) -> Ids:
        if self._pieces is None:
            names = " or ".join(_SENTENCEPIECE_FILES)
            raise ValueError(f"sampling_alpha is {alpha}, but {self._folder} has no {names}")
        processor, id_of_piece = self._pieces
        if not 0 <= alpha <= 1:
            raise ValueError(f"sampling_alpha is {alpha}; it must be between 0 and 1")
        room = None if max_length is None else max_length - 2
        with _sampling_lock:
            sentencepiece.set_random_generator_seed(seed)
            rows = [
                processor.encode(text, enable_sampling=True, alpha=alpha, nbest_size=-1)[:room]
                for text in texts
            ]
        return [
            np.concatenate(([0], id_of_piece[np.array(row, int)], [self.eos_id]), dtype=np.int32)
            for row in rows
        ]


class TargetTokenizer(_Tokenizer):
    """The LLM's tokenizer, of any Hugging Face folder; texts begin with BOS where the LLM's do."""

    def __init__(self, folder: str | os.PathLike):
        super().__init__(folder)
        self.bos_id: int | None = self._tokenizer.bos_token_id
        self.eos_id: int = self._tokenizer.eos_token_id
        # Llama names no padding token. Padding is never attended to, so any id will do.
        pad = self._tokenizer.pad_token_id
        self.pad_id: int = self.eos_id if pad is None else pad

    def encode(
        self,
        texts: Sequence[str],
        *,
        text_pairs: Sequence[str] | None = None,
        max_length: int | None = None,
    ) -> Ids:
        """Token ids as int32 arrays, special tokens as the folder's tokenizer sets them.

        max_length: tokens with BOS; a longer text loses its end (of a pair, the longer first).
        """
        return self._encode(texts, text_pairs, max_length)


def _load(folder: str, **options: Any) -> Any:
    # transformers takes seconds to import: only where a tokenizer is opened.
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise ValueError(
            f"{folder} is not a folder; expected a Hugging Face folder with a tokenizer"
        )
    with _quiet():
        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)
        except Exception as error:  # what tokenizers raises for a damaged file is no subclass
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(": ")
            raise ValueError(
                f"{folder} has no tokenizer that transformers can read: {reason}"
            ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers without warnings and progress bars."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
