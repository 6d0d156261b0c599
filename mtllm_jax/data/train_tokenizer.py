"""Training tiny tokenizers, NLLB's and Llama's, saved as Hugging Face folders.

They are read back through transformers, so a tiny tokenizer and a published one take the same
road (`tokenise.py`).
"""

import contextlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from mtllm_jax.data.tokenise import SENTENCEPIECE_FILES, quiet
from mtllm_jax.languages import check_language

_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0–3 in NLLB; sentencepiece has no <pad>
_MASK = "<mask>"


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
    with _new_folder(folder) as new, quiet():
        # One <pad> and one <mask> more than sentencepiece knows.
        num_others = len(codes) + 2
        pieces = _train_pieces(texts, vocab_size, num_others, new / SENTENCEPIECE_FILES[0])
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

    with _new_folder(folder) as new, quiet():
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
