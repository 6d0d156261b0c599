"""Hugging Face folders of a few thousand random weights, with tokenizers trained on given texts."""

import io
import json
from collections.abc import Iterable
from pathlib import Path

import jax
import sentencepiece
from flax import nnx
from tokenizers import BertWordPieceTokenizer, ByteLevelBPETokenizer

from mtllm_jax.data.tokenise import TargetTokenizer, source_tokenizer
from mtllm_jax.data.train_tokenizer import train_llama_tokenizer
from mtllm_jax.hf.bert import save_bert
from mtllm_jax.hf.llama import save_llama
from mtllm_jax.hf.nllb import save_nllb
from mtllm_jax.models.bert import Bert, BertConfig
from mtllm_jax.models.llama import Llama, LlamaConfig
from mtllm_jax.models.nllb import NLLB, NLLBConfig


def _rngs() -> nnx.Rngs:
    return nnx.Rngs(jax.random.key(0, impl="rbg"))  # compiles fastest


def _pieces(texts: Iterable[str], kind: str, size: int, file: Path) -> list[str]:
    """Writes a sentencepiece model; returns its pieces by id."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type=kind,
        vocab_size=size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        minloglevel=2,
    )
    file.write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return [processor.id_to_piece(i) for i in range(len(processor))]


def m2m100_tokenizer(folder: Path, texts: Iterable[str], size: int = 2000) -> None:
    """As M2M100's checkpoints have it: sentencepiece's pieces behind four special tokens."""
    folder.mkdir()
    pieces = _pieces(texts, "bpe", size, folder / "sentencepiece.bpe.model")
    tokens = ("<s>", "<pad>", "</s>", "<unk>", *pieces[3:])
    _write(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    _write(folder / "tokenizer_config.json", {"tokenizer_class": "M2M100Tokenizer"})
    _write(folder / "config.json", {"model_type": "m2m_100"})


def xlmr_tokenizer(folder: Path, texts: Iterable[str], size: int = 1500) -> None:
    """A unigram sentencepiece model alone, as XLM-R's oldest folders."""
    folder.mkdir()
    _pieces(texts, "unigram", size, folder / "sentencepiece.bpe.model")
    _write(folder / "config.json", {"model_type": "xlm-roberta"})


def bert_tokenizer(folder: Path, texts: Iterable[str], size: int = 1500) -> None:
    """WordPiece in a vocab.txt alone."""
    folder.mkdir()
    trained = BertWordPieceTokenizer(lowercase=False)
    trained.train_from_iterator(texts, vocab_size=size, show_progress=False)
    trained.save_model(str(folder))
    _write(folder / "tokenizer_config.json", {"do_lower_case": False})
    _write(folder / "config.json", {"model_type": "bert"})


def roberta_tokenizer(folder: Path, texts: Iterable[str], size: int = 1500) -> None:
    """BPE of bytes in vocab.json and merges.txt."""
    folder.mkdir()
    trained = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator(texts, size, special_tokens=special, show_progress=False)
    trained.save_model(str(folder))
    _write(folder / "config.json", {"model_type": "roberta"})


def xlmr(folder: Path, texts: Iterable[str]) -> None:
    """An encoder without language tokens, 32 wide, for texts of up to 130 tokens."""
    xlmr_tokenizer(tokenizer := folder.with_name(f"{folder.name}-tokenizer"), texts)
    config = BertConfig(
        vocab_size=source_tokenizer(tokenizer).vocab_size,
        width=32,
        num_layers=1,
        num_heads=2,
        ffn=64,
        num_positions=132,
        pad_id=1,
        family="xlm-roberta",
    )
    save_bert(Bert(config, _rngs()), folder, tokenizer_files_from=tokenizer)


def m2m100(folder: Path, texts: Iterable[str]) -> None:
    """An encoder–decoder with M2M100's tokenizer."""
    m2m100_tokenizer(tokenizer := folder.with_name(f"{folder.name}-tokenizer"), texts)
    size = source_tokenizer(tokenizer).vocab_size + 8  # unused rows, as M2M100's checkpoints have
    config = NLLBConfig(size, 16, 1, 1, 2, 2, 32, 32)
    save_nllb(NLLB(config, _rngs()), folder, tokenizer_files_from=tokenizer)


def llama(folder: Path, texts: Iterable[str]) -> None:
    """An LLM, 32 wide."""
    train_llama_tokenizer(texts, 500, tokenizer := folder.with_name(f"{folder.name}-tokenizer"))
    config = LlamaConfig(
        vocab_size=TargetTokenizer(tokenizer).vocab_size,
        width=32,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_width=16,
        ffn_width=64,
    )
    save_llama(Llama(config, _rngs()), folder, tokenizer_files_from=tokenizer)


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
