"""Tokenizers of both sides, the encoder's and the LLM's, read from Hugging Face folders.

What begins and ends a text is the model's business: NLLB and M2M100 read `[language] text </s>`,
BERT and its kin know no language and have tokens of their own at both ends, LLMs mostly a BOS.
"""

import contextlib
import functools
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import numpy as np
import sentencepiece

from mtllm_jax.languages import ENGLISH, LANGUAGES, check_language
from mtllm_jax.tasks.multiple_choice import choice_segments, choice_text, kept_tokens
from mtllm_jax.tasks.task import Row

SENTENCEPIECE_FILES = ("sentencepiece.bpe.model", "spiece.model", "tokenizer.model")

_CODE = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")

# What M2M100 calls a language is CLDR's id of it, but for these. Its Breton (br) and Western
# Frisian (fy) are not in FLORES-200.
_M2M100_NAMES = {
    "bak_Cyrl": "ba",
    "ilo_Latn": "ilo",
    "nob_Latn": "no",
    "nso_Latn": "ns",
    "ssw_Latn": "ss",
    "sun_Latn": "su",
    "tgl_Latn": "tl",
    "tsn_Latn": "tn",
}

Text = TypeVar("Text")
Tokens = TypeVar("Tokens")
Ids = list[np.ndarray]  # one int32 array of token ids per text
Marked = tuple[Ids, list[np.ndarray]]  # ids, and a number at each token

# What transformers says at import about libraries that are absent is no concern of ours.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

# sentencepiece's random generator is one per process.
_sampling_lock = threading.Lock()


def source_tokenizer(
    folder: str | os.PathLike, *, legacy_source_order: bool = False
) -> "SourceTokenizer":
    """The tokenizer of an encoder's folder: NLLB's, M2M100's, or any other without languages.

    legacy_source_order: NLLB's sources as `text </s> [language]`, as transformers had them before
    April 2023; the others have one order. ValueError for a folder without a tokenizer.
    """
    tokenizer = _load(os.fspath(folder))
    if type(tokenizer).__name__ == "M2M100Tokenizer":
        return M2M100Tokenizer(folder, tokenizer)
    if any(map(_CODE.fullmatch, tokenizer.get_added_vocab())):
        return NllbTokenizer(folder, tokenizer, legacy_source_order=legacy_source_order)
    return SourceTokenizer(folder, tokenizer)


def translation_tokenizer(
    folder: str | os.PathLike, *, legacy_source_order: bool = False
) -> "TranslationTokenizer":
    """The same, of a model that translates. ValueError for a tokenizer without languages."""
    tokenizer = source_tokenizer(folder, legacy_source_order=legacy_source_order)
    if not isinstance(tokenizer, TranslationTokenizer):
        raise ValueError(f"{folder} has no tokenizer of NLLB or M2M100: it knows no languages")
    return tokenizer


def encode_cut(
    encode: Callable[[Sequence[Text], int], list[Tokens]],
    texts: Sequence[Text],
    length: int,
    size: Callable[[Tokens], int],
) -> tuple[list[Tokens], int]:
    """Tokens of each text, `length` at most, and how many texts have more of them.

    texts: of any kind that `encode` reads, (texts, most tokens) → tokens. One that is too long is
    encoded again. size: the number of tokens in what `encode` gives for a text.
    """
    rows = encode(texts, length + 1)
    long = [i for i, row in enumerate(rows) if size(row) > length]
    for i, row in zip(long, encode([texts[i] for i in long], length), strict=True):
        rows[i] = row
    return rows, len(long)


def aligned(source_ends: np.ndarray, target_ends: np.ndarray) -> np.ndarray:
    """For each token of one side the number, from 1, of the other's that ends at the same place.

    source_ends, target_ends: of `encode_ends`, of one text. 0 where none does. Of several that end
    there, as the bytes of one character may, the last stand for it on both sides.
    """
    numbers = {end: i for i, end in enumerate(target_ends.tolist(), 1) if end}
    places = {end: i for i, end in enumerate(source_ends.tolist()) if end}
    result = np.zeros(len(source_ends), np.int32)
    for end, place in places.items():
        result[place] = numbers.get(end, 0)
    return result


class _Tokenizer:
    """What all share: a transformers tokenizer, encoding in batches, decoding."""

    _in_python = False  # whether one without a tokenizer.json is taken

    def __init__(self, folder: str | os.PathLike, tokenizer: Any):
        self._folder = os.fspath(folder)
        self._tokenizer = tokenizer
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is None and not self._in_python:
            kind = type(tokenizer).__name__
            raise ValueError(f"{folder} has a {kind}, which cannot be had as a tokenizer.json")
        self._lock = threading.Lock()  # truncation is a state of the backend
        self.unk_id: int | None = tokenizer.unk_token_id

    @property
    def vocab_size(self) -> int:
        """Number of token ids. An embedding may have more rows than that."""
        return len(self._tokenizer)

    @property
    def vocabulary(self) -> dict[str, int]:
        """Token ids by what they stand for, special tokens among them."""
        return self._tokenizer.get_vocab()

    def decode(self, rows: Iterable[Sequence[int] | np.ndarray]) -> list[str]:
        """Text of each row of token ids, without special tokens."""
        listed = [np.asarray(row).tolist() for row in rows]
        # transformers makes one empty text of no rows.
        return self._tokenizer.batch_decode(listed, skip_special_tokens=True) if listed else []

    def pieces(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """What each token id stands for, special tokens among them."""
        return self._tokenizer.convert_ids_to_tokens(np.asarray(ids).tolist())

    def _encode(
        self, texts: Sequence[str], text_pairs: Sequence[str] | None, max_length: int | None
    ) -> Ids:
        """With the special tokens that the folder's tokenizer puts."""
        if text_pairs is not None and len(text_pairs) != len(texts):
            raise ValueError(f"text_pairs has {len(text_pairs)} texts; it must have {len(texts)}")
        least = self._tokenizer.num_special_tokens_to_add(text_pairs is not None) + 1
        if max_length is not None and max_length < least:
            raise ValueError(f"max_length is {max_length}; it must be at least {least}")
        with self._lock:
            rows = self._encode_batch(texts, text_pairs, max_length)
        return [np.array(row, np.int32) for row in rows]

    def _encode_ends(self, texts: Sequence[str], max_length: int | None) -> Marked:
        """Ids as `_encode` has them, and where in its text each token ends."""
        if self._backend is None:
            raise ValueError(
                f"{self._folder} has no tokenizer.json, which tells where tokens lie in a text"
            )
        with self._lock:
            self._truncate(max_length)
            encoded = self._backend.encode_batch(list(texts))
        ids = [np.array(encoding.ids, np.int32) for encoding in encoded]
        ends = [
            np.array([end if end > start else 0 for start, end in encoding.offsets], np.int32)
            for encoding in encoded
        ]
        return ids, ends

    def _encode_choices(self, rows: Sequence[Row], max_length: int | None) -> Marked:
        """Rows of multiple choice, each as one text of its context, question and choices."""
        if self._backend is None:
            raise ValueError(
                f"{self._folder} has no tokenizer.json, which tells where choices stand in a text"
            )
        made = [choice_text(row["context"], row["question"], row["choices"]) for row in rows]
        with self._lock:
            self._backend.no_truncation()
            encoded = self._backend.encode_batch([text for text, _ in made])
        ids, marks = [], []
        for row, (_, spans), encoding in zip(rows, made, encoded, strict=True):
            kept = list(range(len(encoding.ids)))
            try:
                if max_length is not None:
                    kept = kept_tokens(encoding.offsets, len(row["context"]), max_length)
                segments = choice_segments([encoding.offsets[i] for i in kept], spans)
            except ValueError as error:
                raise ValueError(f"row {row['id']!r} in {row['language']}: {error}") from None
            ids.append(np.array([encoding.ids[i] for i in kept], np.int32))
            marks.append(np.array(segments, np.int32) + 1)
        return ids, marks

    def _encode_batch(
        self, texts: Sequence[str], text_pairs: Sequence[str] | None, max_length: int | None
    ) -> list[list[int]]:
        """By the backend itself: transformers' own call takes many times as long."""
        self._truncate(max_length)
        batch = list(texts) if text_pairs is None else list(zip(texts, text_pairs, strict=True))
        return [encoding.ids for encoding in self._backend.encode_batch(batch)]

    def _truncate(self, max_length: int | None) -> None:
        if max_length is None:
            self._backend.no_truncation()
        else:
            self._backend.enable_truncation(max_length)


class SourceTokenizer(_Tokenizer):
    """An encoder's tokenizer. This class itself is of encoders that are told no language, as BERT.

    Made by `source_tokenizer`.
    """

    def __init__(self, folder: str | os.PathLike, tokenizer: Any):
        super().__init__(folder, tokenizer)
        # Padding is never attended to, so any id will do where none is named.
        self.pad_id: int = tokenizer.pad_token_id or 0
        # What stands around a text: the first of it before, the others behind.
        (self._frame,) = self._encode([""], None, None)
        self._pieces = self._load_pieces()

    def __reduce__(self) -> tuple[Any, ...]:
        return source_tokenizer, (self._folder,)

    @property
    def languages(self) -> tuple[str, ...]:
        """The FLORES-200 codes that `encode` takes."""
        return tuple(LANGUAGES)

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
        """Token ids of each text, or of each text and its pair, as int32 arrays.

        language: one code, or one per text. max_length: tokens, special ones among them; a longer
        text loses its end and keeps what closes it (of a pair, the longer text is cut first).
        sampling_alpha: None for the one best segmentation; else drawn by sentencepiece, a merge
        being left out with this probability (BPE models, as NLLB's) or segmentations being drawn
        with their probability to this power (unigram models). The same texts and seed give the
        same ids. ValueError for a language that is not one of `languages`, naming the three
        nearest; for sampling of pairs, or without a sentencepiece model file in the folder.
        """
        codes = [language] * len(texts) if isinstance(language, str) else list(language)
        if len(codes) != len(texts):
            raise ValueError(f"language has {len(codes)} codes; it must be one or {len(texts)}")
        for code in set(codes):
            check_language(code, self.languages)
        if sampling_alpha is None:
            rows = self._encode(texts, text_pairs, max_length)
        elif text_pairs is None:
            rows = self._sample(texts, max_length, sampling_alpha, seed)
        else:
            raise ValueError(
                "sampling_alpha is set, which works on single texts, not on text_pairs"
            )
        return self._told(rows, codes)

    def encode_choices(
        self, rows: Sequence[Row], language: str | Sequence[str], *, max_length: int | None = None
    ) -> Marked:
        """Token ids of rows of multiple choice, and at each token 1, or 1 + the number of the
        choice it belongs to.

        A longer row loses the end of its context. ValueError as `encode`, and for a row whose
        question and choices alone are longer.
        """
        codes = [language] * len(rows) if isinstance(language, str) else list(language)
        for code in set(codes):
            check_language(code, self.languages)
        ids, marks = self._encode_choices(rows, max_length)
        return self._told(ids, codes), marks

    def encode_ends(
        self, texts: Sequence[str], language: str, *, max_length: int | None = None
    ) -> Marked:
        """Token ids of each text in a language, as `encode`, and at each token where in the text it
        ends: the number of characters before that, 0 for what is no part of it.

        ValueError as `encode`, and for a tokenizer without a tokenizer.json.
        """
        check_language(language, self.languages)
        ids, ends = self._encode_ends(texts, max_length)
        return self._told(ids, [language] * len(ids)), ends

    def _told(self, rows: Ids, codes: Sequence[str]) -> Ids:
        """The rows with what says their languages, here nothing."""
        return rows

    def _load_pieces(self) -> tuple[Any, np.ndarray] | None:
        """The folder's sentencepiece model, and the token id of each of its pieces."""
        files = [Path(self._folder) / name for name in SENTENCEPIECE_FILES]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            return None
        processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
        pieces = [processor.id_to_piece(i) for i in range(len(processor))]
        return processor, np.array(self._tokenizer.convert_tokens_to_ids(pieces))

    def _sample(self, texts: Sequence[str], max_length: int | None, alpha: float, seed: int) -> Ids:
        if self._pieces is None:
            names = " or ".join(SENTENCEPIECE_FILES)
            raise ValueError(f"sampling_alpha is {alpha}, but {self._folder} has no {names}")
        processor, id_of_piece = self._pieces
        if not 0 <= alpha <= 1:
            raise ValueError(f"sampling_alpha is {alpha}; it must be between 0 and 1")
        room = None if max_length is None else max_length - len(self._frame)
        with _sampling_lock:
            sentencepiece.set_random_generator_seed(seed)
            rows = [
                processor.encode(text, enable_sampling=True, alpha=alpha, nbest_size=-1)[:room]
                for text in texts
            ]
        before, behind = self._frame[:1], self._frame[1:]
        return [
            np.concatenate((before, id_of_piece[np.array(row, int)], behind), dtype=np.int32)
            for row in rows
        ]


class TranslationTokenizer(SourceTokenizer):
    """A translation model's tokenizer, on both of its sides: `[language] text </s>`."""

    _ids_of_codes: dict[str, int]

    def __init__(self, folder: str | os.PathLike, tokenizer: Any):
        super().__init__(folder, tokenizer)
        self.eos_id: int = tokenizer.eos_token_id

    @property
    def languages(self) -> tuple[str, ...]:
        """The FLORES-200 codes in the vocabulary, in its order."""
        return tuple(sorted(self._ids_of_codes, key=self._ids_of_codes.__getitem__))

    def language_id(self, code: str) -> int:
        """Token id of a language. ValueError naming the three nearest codes if it has none."""
        return self._ids_of_codes[check_language(code, self._ids_of_codes)]

    def encode_target(
        self, texts: Sequence[str], language: str = ENGLISH, *, max_length: int | None = None
    ) -> Ids:
        """Labels of the MT decoder: `[language] text </s>`.

        Its inputs are these, shifted right behind </s>: `</s> [language] text`. To translate, start
        with `[eos_id, language_id(language)]`.
        """
        rows = self._encode(texts, None, max_length)
        return self._begun(rows, [self.language_id(language)] * len(rows))

    def _told(self, rows: Ids, codes: Sequence[str]) -> Ids:
        return self._begun(rows, [self._ids_of_codes[code] for code in codes])

    def _begun(self, rows: Ids, language_ids: Sequence[int]) -> Ids:
        for row, language_id in zip(rows, language_ids, strict=True):
            row[0] = language_id
        return rows


class NllbTokenizer(TranslationTokenizer):
    """NLLB's tokenizer: the FLORES-200 codes are tokens of its vocabulary.

    legacy_source_order: `encode` gives `text </s> [language]`. ValueError for a tokenizer that does
    not put a language before its texts.
    """

    def __init__(
        self, folder: str | os.PathLike, tokenizer: Any, *, legacy_source_order: bool = False
    ):
        added = tokenizer.get_added_vocab()
        self._ids_of_codes = {code: i for code, i in added.items() if _CODE.fullmatch(code)}
        self._legacy_source_order = legacy_source_order
        if hasattr(tokenizer, "legacy_behaviour"):
            tokenizer.legacy_behaviour = False
            # A code that is not in the vocabulary would be <unk> before every text, silently.
            tokenizer.src_lang = next(iter(self._ids_of_codes))
        super().__init__(folder, tokenizer)
        first, *behind = self._frame.tolist()
        if first not in self._ids_of_codes.values() or behind != [self.eos_id]:
            raise ValueError(
                f"{folder} has no NLLB tokenizer: its texts are not [{ENGLISH}] text </s>"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        make = functools.partial(source_tokenizer, legacy_source_order=self._legacy_source_order)
        return make, (self._folder,)

    def encode_choices(
        self, rows: Sequence[Row], language: str | Sequence[str], *, max_length: int | None = None
    ) -> Marked:
        ids, marks = super().encode_choices(rows, language, max_length=max_length)
        return ids, [np.roll(row, -1) for row in marks] if self._legacy_source_order else marks

    def encode_ends(
        self, texts: Sequence[str], language: str, *, max_length: int | None = None
    ) -> Marked:
        ids, ends = super().encode_ends(texts, language, max_length=max_length)
        return ids, [np.roll(row, -1) for row in ends] if self._legacy_source_order else ends

    def _told(self, rows: Ids, codes: Sequence[str]) -> Ids:
        rows = super()._told(rows, codes)
        return [np.roll(row, -1) for row in rows] if self._legacy_source_order else rows


class M2M100Tokenizer(TranslationTokenizer):
    """M2M100's tokenizer, which transformers has in Python alone: language tokens like `__de__`."""

    _in_python = True

    def __init__(self, folder: str | os.PathLike, tokenizer: Any):
        ids_of_names = tokenizer.lang_code_to_id
        names = {code: _M2M100_NAMES.get(code, LANGUAGES[code].locale) for code in LANGUAGES}
        self._ids_of_codes = {
            code: ids_of_names[name] for code, name in names.items() if name in ids_of_names
        }
        self._language_ids = frozenset(ids_of_names.values())
        super().__init__(folder, tokenizer)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, languages among them, which M2M100 adds behind its vocabulary."""
        return max(self._language_ids) + 1

    def decode(self, rows: Iterable[Sequence[int] | np.ndarray]) -> list[str]:
        """Text of each row of token ids, without special tokens and languages."""
        listed = (np.asarray(row).tolist() for row in rows)
        return super().decode([i for i in row if i not in self._language_ids] for row in listed)

    def _encode_batch(
        self, texts: Sequence[str], text_pairs: Sequence[str] | None, max_length: int | None
    ) -> list[list[int]]:
        if not texts:
            return []
        pairs = None if text_pairs is None else list(text_pairs)
        with quiet():
            return self._tokenizer(
                list(texts), pairs, truncation=max_length is not None, max_length=max_length
            ).input_ids


class TargetTokenizer(_Tokenizer):
    """The LLM's tokenizer, of any Hugging Face folder; texts begin with BOS where the LLM's do."""

    def __init__(self, folder: str | os.PathLike):
        super().__init__(folder, _load(os.fspath(folder)))
        self.bos_id: int | None = self._tokenizer.bos_token_id
        self.eos_id: int = self._tokenizer.eos_token_id
        # Llama names no padding token. Padding is never attended to, so any id will do.
        pad = self._tokenizer.pad_token_id
        self.pad_id: int = self.eos_id if pad is None else pad

    def __reduce__(self) -> tuple[Any, ...]:
        return TargetTokenizer, (self._folder,)

    @property
    def special_ids(self) -> list[int]:
        """Tokens that are no text: BOS, EOS and what else the folder names."""
        return sorted(self._tokenizer.all_special_ids)

    def mask_id(self) -> int:
        """What stands for a token that is to be guessed: the tokenizer's own mask, else "_".

        An LLM's tokenizer has no mask, and a token added as one would have an embedding that
        nothing has trained; "_" is a blank in the texts that the LLM has read (LLM2Vec takes it
        too). ValueError without either.
        """
        if self._tokenizer.mask_token_id is not None:
            return int(self._tokenizer.mask_token_id)
        vocabulary = self.vocabulary
        for token in ("_", "<0x5F>"):  # the latter is its byte, in vocabularies of sentencepiece
            if token in vocabulary:
                return vocabulary[token]
        raise ValueError(f"{self._folder} has neither a mask token nor '_' in its vocabulary")

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

    def encode_ends(self, texts: Sequence[str], *, max_length: int | None = None) -> Marked:
        """Token ids, and where each token ends, as `SourceTokenizer.encode_ends` has them."""
        return self._encode_ends(texts, max_length)

    @property
    def has_chat_template(self) -> bool:
        """Whether the folder says how the LLM reads a conversation."""
        return self._tokenizer.chat_template is not None

    def encode_chats(self, chats: Sequence[Sequence[Mapping[str, str]]]) -> Ids:
        """Token ids of conversations by the folder's chat template, up to where an answer begins.

        A conversation is messages of {"role", "content"}. ValueError where the template refuses
        one.
        """
        try:
            texts = [
                self._tokenizer.apply_chat_template(
                    list(chat), tokenize=False, add_generation_prompt=True
                )
                for chat in chats
            ]
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses it: {error}.") from None
        with self._lock:
            self._backend.no_truncation()
            encoded = self._backend.encode_batch(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encoded]

    def encode_choices(self, rows: Sequence[Row], *, max_length: int | None = None) -> Marked:
        """Rows of multiple choice, as `SourceTokenizer.encode_choices` has them."""
        return self._encode_choices(rows, max_length)

    def encode_prompts(self, prompts: Sequence[tuple[str, str]], *, max_length: int) -> Ids:
        """Token ids of texts that are to be gone on with, each given as two parts: nothing closes
        them, and of one longer than `max_length` tokens the first part loses its end."""
        with self._lock:
            self._backend.no_truncation()
            encoded = self._backend.encode_batch([first + second for first, second in prompts])
        rows = []
        for (first, _), encoding in zip(prompts, encoded, strict=True):
            num = _unclosed(encoding)
            kept = sum(start < len(first) for start, _ in encoding.offsets[:num])
            ids = encoding.ids[: min(kept, max(0, max_length - num + kept))]
            rows.append(np.array(ids + encoding.ids[kept:num], np.int32))
        return rows

    def encode_continuations(self, before: str, texts: Sequence[str]) -> tuple[int, Ids]:
        """Token ids that each text adds to one that ends with `before`, behind a space; and how
        many of that one's last tokens they stand for too, mostly none."""
        with self._lock:
            self._backend.no_truncation()
            alone, *longer = self._backend.encode_batch([before, *(f"{before} {t}" for t in texts)])
        whole = [encoding.ids[: _unclosed(encoding)] for encoding in longer]
        ids = alone.ids[: _unclosed(alone)]
        common = len(ids)
        while any(one[:common] != ids[:common] for one in whole):
            common -= 1
        return len(ids) - common, [np.array(one[common:], np.int32) for one in whole]


def _unclosed(encoding: Any) -> int:
    """Tokens of a text without the special ones that close it."""
    num = len(encoding.ids)
    while num and encoding.special_tokens_mask[num - 1]:
        num -= 1
    return num


def _load(folder: str) -> Any:
    # transformers takes seconds to import: only where a tokenizer is opened.
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise ValueError(
            f"{folder} is not a folder; expected a Hugging Face folder with a tokenizer"
        )
    with quiet():
        try:
            # Code in the folder is neither run nor asked about: tokenizers here need none.
            return AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # what tokenizers raises for a damaged file is no subclass
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(": ")
            raise ValueError(
                f"{folder} has no tokenizer that transformers can read: {reason}"
            ) from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers without warnings and progress bars."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
