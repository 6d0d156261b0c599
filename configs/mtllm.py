"""MT-LLM: an LLM that reads through a machine-translation encoder (arXiv 2406.12739).

    python launch/train.py --config=configs/mtllm.py              the tiny default, nothing needed
    python launch/train.py --config=configs/mtllm.py:llama3-8b \\
        --config.encoder=NLLB --config.llm=LLAMA --config.llm_adapters=MNTP,SIMCSE \\
        --config.adaptation_text=TEXT --config.task.train=TRAIN --config.task.test=TEST
    python launch/train.py --config=configs/mtllm.py:llama3-8b-24gb …  the same on one GPU of 24 GB
    …:mini-all                           the tiny default in all languages of CLDR
    …:llama2-7b, mistral-7b, qwen3-8b    other LLMs; smollm2, e5-smollm2    small real ones
    … --config.trained=bridge            an ablation; the README has the fields of all of them

Where values come from: [code] the authors' public code, [ours] our own choice, as is what has no
tag.
"""

import dataclasses

from ml_collections import ConfigDict

from mtllm_jax import config as c
from mtllm_jax.languages import ENGLISH
from mtllm_jax.languages import LANGUAGES as LANGUAGE_TABLE
from mtllm_jax.schema import to_dict

# [ours] 24 languages in 12 scripts that CLDR covers well.
LANGUAGES = (
    "deu_Latn", "fra_Latn", "spa_Latn", "por_Latn", "pol_Latn", "fin_Latn",
    "hun_Latn", "tur_Latn", "vie_Latn", "ind_Latn", "swh_Latn", "rus_Cyrl",
    "ukr_Cyrl", "ell_Grek", "arb_Arab", "heb_Hebr", "pes_Arab", "hin_Deva",
    "ben_Beng", "tam_Taml", "tha_Thai", "jpn_Jpan", "kor_Hang", "zho_Hans",
)  # fmt: skip


def mini() -> c.MTLLM:
    """Everything tiny and trained on the spot, for two CPU cores. All values [ours]."""
    return c.MTLLM(
        recipe="mtllm",
        name="mini",
        seed=0,
        text_seed=0,
        encoder="",
        llm="",
        english="eng_Latn",
        languages=LANGUAGES,
        adaptation_text=(),
        task=c.TaskSource(),
        text=c.TextSizes(),
        mini_nllb=c.MiniNLLB(
            training=c.Training(
                steps=2000,
                batch_rows=16,
                learning_rate=4e-3,
                source_length=64,
                target_length=48,
                adam_b2=0.98,
                checkpoint_every=500,
            ),
            vocab_size=12_000,
            width=128,
            num_heads=4,
            ffn_width=512,
            encoder_layers=2,
            decoder_layers=1,
            english_share=0.2,
            noise_position=1.5,
            noise_text=1.0,
            memory_dropout=0.7,
            negatives=512,
        ),
        mini_llama=c.MiniLlama(
            training=c.Training(
                steps=500, batch_rows=16, learning_rate=4e-3, target_length=64, adam_b2=0.98
            ),
            vocab_size=1024,
            width=128,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            ffn_width=384,
        ),
        bidirectional=True,
        trained="all",
        lora=c.LoRA(rank=16, alpha=32, dropout=0.0, targets=("all",)),
        adaptation=c.Adaptation(
            training=c.Training(
                steps=2000,
                batch_rows=8,
                learning_rate=2e-3,
                source_length=64,
                target_length=64,
                adam_b2=0.98,
                checkpoint_every=500,
            ),
            noise_position=0.3,
            noise_text=0.4,
        ),
        teacher=c.Training(steps=150, batch_rows=8, learning_rate=5e-4, target_length=64),
        distillation=c.Distillation(
            training=c.Training(
                steps=450, batch_rows=16, learning_rate=1e-3, source_length=64, adam_b2=0.98
            ),
            start="stage1+teacher",
            noise_position=0.3,
            noise_text=0.4,
        ),
        mt_encoder=c.Training(steps=300, batch_rows=8, learning_rate=2e-3, source_length=64),
        evaluation=c.Evaluation(
            split="test", batch_rows=256, max_length=128, max_new_tokens=24, systems=c.SYSTEMS
        ),
        mesh=c.Mesh(),
        compute_dtype="float32",
        frozen_dtype="float32",
        unroll_layers=True,
        remat="none",
        attention="auto",
        # Both are left out, until their training.steps are set.
        mntp=c.MaskedPrediction(
            training=c.Training(steps=0, batch_rows=16, learning_rate=2e-3, target_length=64)
        ),
        simcse=c.Contrastive(
            training=c.Training(steps=0, batch_rows=8, learning_rate=1e-3, target_length=64)
        ),
    )


def mini_all() -> c.MTLLM:
    """`mini` in all languages that CLDR has names in, some 140. All values [ours].

    More of everything that has to hold more languages: pieces and steps of the MT model.
    """
    tiny = mini()
    assert tiny.mini_nllb is not None
    training = dataclasses.replace(tiny.mini_nllb.training, steps=6000)
    return dataclasses.replace(
        tiny,
        name="mini-all",
        languages=tuple(x for x, names in LANGUAGE_TABLE.items() if names.locale and x != ENGLISH),
        text=c.TextSizes(test_pairs=100, lists_per_language=300),
        mini_nllb=dataclasses.replace(tiny.mini_nllb, training=training, vocab_size=32_000),
    )


def llama3_8b() -> c.MTLLM:
    """The authors' settings for NLLB-200-distilled-600M and Llama-3-8B-Instruct.

    The LLM is to have LLM2Vec's adapters merged, MNTP and then SimCSE [code]. Either they are
    there, by `llm_adapters` or merged in the folder that `llm` names, or they are trained here
    first, with --config.mntp.training.steps=1000 --config.simcse.training.steps=1000 [code]: at
    these two stages that is LLM2Vec's, with its settings for this LLM. Differences that remain:
    AdamW in float32 rather than 8 bit, and frozen weights in bfloat16 (or int8, `llama3_8b_24gb`)
    rather than NF4 [ours].
    """
    tiny = mini()
    return dataclasses.replace(
        tiny,
        name="llama3-8b",
        text=None,
        mini_nllb=None,
        mini_llama=None,
        lora=c.LoRA(rank=16, alpha=32, dropout=0.05, targets=("all",)),  # [code], LLM2Vec's too
        trained="lora",  # [code]
        mntp=c.MaskedPrediction(
            training=c.Training(
                steps=0,  # see above
                batch_rows=32,  # [code]
                learning_rate=5e-5,  # [code]: its trainer's default, as are warm-up and decay
                target_length=512,  # [code]
                packing=True,  # [ours]; there texts are joined, and cut into rows
                warmup=0.0,  # [code]
                schedule="linear",  # [code]
                final_rate=0.95,  # [ours]; there it ends 1000 steps into three epochs
                weight_decay=0.0,  # [code]
            ),
            share=0.2,  # [code]
            blank=0.8,  # [code]
            random=0.1,  # [code]
        ),
        simcse=c.Contrastive(
            training=c.Training(
                steps=0,  # see above
                batch_rows=128,  # [code]
                learning_rate=3e-5,  # [code]
                target_length=128,  # [code]
                packing=False,  # [code]
                warmup=0.0,  # [code]
                schedule="linear",  # [code]
                final_rate=0.95,  # [ours]; as in MNTP
                weight_decay=0.0,  # [code]
            ),
            dropout=0.3,  # [code]
            temperature=0.05,  # [code]
        ),
        adaptation=c.Adaptation(
            training=c.Training(
                steps=10_000,  # [code]
                batch_rows=256,  # [code]
                learning_rate=2e-4,  # [code]
                source_length=512,  # [code]
                target_length=512,  # [code]
                packing=False,  # [code]; packed rows hold several texts, and so a larger batch
                warmup=0.01,  # [code]
                schedule="linear",  # [code]
                final_rate=0.0,  # [code]
                weight_decay=0.01,  # [code]
                checkpoint_every=1000,  # [code]
            ),
        ),
        teacher=c.Training(
            steps=36_816,  # [code] 3 epochs of MNLI's 392,702 rows at batch 32
            batch_rows=32,  # [code]
            learning_rate=1e-4,  # [code]
            target_length=256,  # [code]
            packing=False,
            schedule="linear",
            final_rate=0.0,
            checkpoint_every=1000,
        ),
        distillation=c.Distillation(
            training=c.Training(
                steps=36_816,  # [code]
                batch_rows=32,  # [code]
                learning_rate=1e-4,  # [code]
                source_length=256,  # [code]
                packing=False,
                schedule="linear",
                final_rate=0.0,
                checkpoint_every=1000,
            ),
            start="stage1",  # [code]
        ),
        mt_encoder=c.Training(
            steps=36_816,
            batch_rows=32,
            learning_rate=1e-4,
            source_length=256,
            packing=False,
            schedule="linear",
            final_rate=0.0,
            checkpoint_every=1000,
        ),
        evaluation=c.Evaluation(
            split="test", batch_rows=64, max_length=512, max_new_tokens=512, num_beams=5
        ),
        mesh=c.Mesh(data=1, fsdp=-1, tensor=1),  # [ours]
        compute_dtype="bfloat16",  # [code]
        frozen_dtype="bfloat16",  # [ours]
        unroll_layers=False,  # [ours]
        remat="full",  # [ours]
    )


def llama3_8b_24gb() -> c.MTLLM:
    """`llama3_8b` on one GPU of 24 GB: the same updates, by smaller pieces. All changes [ours]."""
    whole = llama3_8b()

    def in_pieces(training: c.Training, accumulation: int) -> c.Training:
        return dataclasses.replace(training, accumulation=accumulation)

    return dataclasses.replace(
        whole,
        name="llama3-8b-24gb",
        frozen_dtype="int8",
        # 4096 tokens at a time in stage 1 and MNTP, and 2048 in the others. SimCSE compares a text
        # with those that are read at the same time, so that its batch is a smaller one.
        mntp=dataclasses.replace(whole.mntp, training=in_pieces(whole.mntp.training, 4)),
        simcse=dataclasses.replace(
            whole.simcse, training=dataclasses.replace(whole.simcse.training, batch_rows=32)
        ),
        adaptation=dataclasses.replace(
            whole.adaptation, training=in_pieces(whole.adaptation.training, 32)
        ),
        teacher=in_pieces(whole.teacher, 4),
        distillation=dataclasses.replace(
            whole.distillation, training=in_pieces(whole.distillation.training, 4)
        ),
        mt_encoder=in_pieces(whole.mt_encoder, 4),
        evaluation=dataclasses.replace(whole.evaluation, batch_rows=16),
    )


def llama2_7b() -> c.MTLLM:
    """`llama3_8b`'s settings for Llama-2-7B-Chat; the choice of LLM is [ours].

    LLM2Vec's adapters of that model: McGill-NLP/LLM2Vec-Llama-2-7b-chat-hf-mntp and
    …-mntp-unsup-simcse.
    """
    return dataclasses.replace(llama3_8b(), name="llama2-7b")


def mistral_7b() -> c.MTLLM:
    """`llama3_8b`'s settings for Mistral-7B-Instruct-v0.2; the choice of LLM is [ours].

    LLM2Vec's adapters of that model: McGill-NLP/LLM2Vec-Mistral-7B-Instruct-v2-mntp and
    …-mntp-unsup-simcse. For this model its MNTP hides more, and always by the blank.
    """
    large = llama3_8b()
    mntp = dataclasses.replace(large.mntp, share=0.8, blank=1.0, random=0.0)  # [code]
    return dataclasses.replace(large, name="mistral-7b", mntp=mntp)


def qwen3_8b() -> c.MTLLM:
    """`llama3_8b`'s settings for Qwen3-8B; the choice of LLM is [ours]."""
    return dataclasses.replace(llama3_8b(), name="qwen3-8b")


def smollm2() -> c.MTLLM:
    """NLLB-200-distilled-600M under SmolLM2-135M-Instruct, on one GPU. All values [ours].

    The LLM is read causally, as it was trained: so small a model is soon spoilt otherwise.
    """
    large = llama3_8b()

    def smaller(training: c.Training, steps: int, rate: float) -> c.Training:
        return dataclasses.replace(
            training,
            steps=steps,
            batch_rows=64,
            learning_rate=rate,
            source_length=256 if training.source_length else 0,
            target_length=256 if training.target_length else 0,
            packing=True,
            checkpoint_every=200,
        )

    return dataclasses.replace(
        large,
        name="smollm2",
        bidirectional=False,
        adaptation=c.Adaptation(training=smaller(large.adaptation.training, 4000, 1e-3)),
        teacher=smaller(large.teacher, 1000, 5e-4),
        distillation=c.Distillation(
            training=smaller(large.distillation.training, 1000, 5e-4), start="stage1+teacher"
        ),
        mt_encoder=smaller(large.mt_encoder, 1000, 1e-3),
        evaluation=dataclasses.replace(large.evaluation, max_new_tokens=256),
        remat="none",
    )


def e5_smollm2() -> c.MTLLM:
    """Two small real models on two CPU cores: multilingual-e5-small and SmolLM2-135M-Instruct.

    A multilingual encoder in place of NLLB: what it shows is the method, not the paper's figures.
    All values [ours].
    """
    training = c.Training(
        steps=120,
        batch_rows=8,
        learning_rate=1e-3,
        source_length=128,
        target_length=128,
        adam_b2=0.99,
        checkpoint_every=20,
    )
    task = dataclasses.replace(training, steps=100, learning_rate=5e-4)
    return dataclasses.replace(
        smollm2(),
        name="e5-smollm2",
        lora=c.LoRA(rank=16, alpha=32, dropout=0.0, targets=("all",)),
        adaptation=c.Adaptation(training=training, bridge_start="embeddings"),
        teacher=dataclasses.replace(task, steps=60),
        distillation=c.Distillation(training=task, start="stage1+teacher"),
        mt_encoder=dataclasses.replace(task, learning_rate=1e-3),
        evaluation=c.Evaluation(split="test", batch_rows=64, max_length=256, max_new_tokens=128),
        mesh=c.Mesh(),
        compute_dtype="float32",
        frozen_dtype="float32",
    )


RECIPES = {
    "mini": mini,
    "mini-all": mini_all,
    "llama3-8b": llama3_8b,
    "llama3-8b-24gb": llama3_8b_24gb,
    "llama2-7b": llama2_7b,
    "mistral-7b": mistral_7b,
    "qwen3-8b": qwen3_8b,
    "smollm2": smollm2,
    "e5-smollm2": e5_smollm2,
}


def get_config(arg: str = "mini") -> ConfigDict:
    """The settings of one recipe; `arg` is one of `RECIPES`."""
    return ConfigDict(to_dict(RECIPES[arg]()))
