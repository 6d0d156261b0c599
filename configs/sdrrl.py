"""SDRRL: an LLM learns its own English answers in other languages (arXiv 2402.12204).

    python launch/train.py --config=configs/sdrrl.py            the tiny default, nothing needed

What the paper's settings are is mostly unknown. Where values come from: [abs] the paper's abstract,
[fallback] a neighbouring project's documented value, [ours] our own choice, as is what has no tag.
"""

from ml_collections import ConfigDict

from mtllm_jax import config as c
from mtllm_jax.schema import to_dict

# [ours] Eight languages in seven scripts, whose names mostly differ from the English ones: an
# instruction is a name and a mark, and of "Mali <region>" nothing tells the language. It is so for
# a third of the German, Finnish and Swahili ones, and for a twentieth of these.
TARGETS = (
    "lvs_Latn", "isl_Latn", "rus_Cyrl", "ell_Grek", "arb_Arab", "hin_Deva", "jpn_Jpan", "kor_Hang",
)  # fmt: skip


def mini() -> c.SDRRL:
    """Everything tiny and trained on the spot, for two CPU cores. All values [ours]."""
    return c.SDRRL(
        recipe="sdrrl",
        name="mini",
        seed=0,
        text_seed=0,
        llm="",
        translator="",
        transfer=c.TransferSet(
            source="eng_Latn",
            targets=TARGETS,
            # Nothing but its own language tells an instruction in which one the answer is to be:
            # most rows are in one.
            ll=4.0,
            lt=0.25,
            tl=0.25,
            tt=2.0,
            switched=0.25,
            switch_rate=1.0,  # of one name
            completion=0.0,  # names are too short to be cut in two
            translation_prompt="{text} <{source} to {target}>",
        ),
        mini_nllb=c.MiniNLLB(
            training=c.Training(
                steps=1200,
                batch_rows=16,
                learning_rate=4e-3,
                source_length=64,
                target_length=64,
                adam_b2=0.98,
                checkpoint_every=300,
            ),
            vocab_size=6000,
            width=128,
            num_heads=4,
            ffn_width=512,
            encoder_layers=2,
            decoder_layers=2,
            english_share=0.0,
            noise_position=0.0,
            noise_text=0.0,
            memory_dropout=0.0,
            negatives=0,
        ),
        mini_llama=c.MiniLlama(
            training=c.Training(
                steps=1000,
                batch_rows=16,
                learning_rate=4e-3,
                target_length=64,
                adam_b2=0.98,
                checkpoint_every=250,
            ),
            vocab_size=4000,
            width=128,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            ffn_width=384,
        ),
        answering=c.Answering(template="none", max_new_tokens=24, temperature=0.0, batch_rows=256),
        translating=c.Translating(
            num_beams=1,
            max_new_tokens=24,
            batch_rows=32,
            check_language=False,  # names are of no language
            check_tasks=False,
        ),
        training=c.Training(
            steps=600, batch_rows=16, learning_rate=1e-3, target_length=64, adam_b2=0.98
        ),
        trained="all",
        lora=c.LoRA(rank=16, alpha=32, dropout=0.0, targets=("all",)),
        systems=c.SDRRL_SYSTEMS,
        mesh=c.Mesh(),
        compute_dtype="float32",
        frozen_dtype="float32",
        unroll_layers=True,
        remat="none",
        attention="auto",
    )


RECIPES = {"mini": mini}


def get_config(arg: str = "mini") -> ConfigDict:
    """The settings of one recipe; `arg` is one of `RECIPES`."""
    return ConfigDict(to_dict(RECIPES[arg]()))
