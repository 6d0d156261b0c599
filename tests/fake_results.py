"""Results, configuration, curves and facts as a finished run has them, all made up."""

from typing import Any

import numpy as np
import pandas as pd

LANGUAGES = (
    "deu_Latn fra_Latn spa_Latn por_Latn pol_Latn rus_Cyrl ukr_Cyrl ell_Grek tur_Latn fin_Latn "
    "hun_Latn arb_Arab heb_Hebr pes_Arab hin_Deva ben_Beng tam_Taml tha_Thai vie_Latn ind_Latn "
    "swh_Latn jpn_Jpan kor_Hang zho_Hans"
).split()

# (English, Latin, other) of test A, then of test B
LEVELS = {
    "mt_llm": ((1.0, 0.967, 0.890), (0.71, 0.669, 0.581)),
    "llm_zero_shot": ((1.0, 0.591, 0.256), (0.983, 0.460, 0.189)),
    "mt_encoder": ((1.0, 0.864, 0.656), (0.687, 0.580, 0.507)),
    "translate_test": ((1.0, 0.971, 0.909), (0.980, 0.915, 0.830)),
}

STAGES = (
    "mini NLLB",
    "mini Llama",
    "stage 1 general adaptation",
    "stage 2a teacher",
    "stage 2b task distillation",
    "Encoder + head",
)


def results(seeds: int = 3, unseen: bool = True) -> dict[str, Any]:
    """results.json of the default run."""
    rng = np.random.default_rng(0)

    def entry(levels: tuple[float, float, float]) -> dict[str, Any]:
        english, latin, other = levels
        languages = {
            code: round(
                float(np.clip((latin if code.endswith("Latn") else other) + noise, 0, 1)), 4
            )
            for code, noise in zip(LANGUAGES, rng.normal(0, 0.04, len(LANGUAGES)), strict=True)
        }
        mean = round(sum(languages.values()) / len(languages), 4)
        spread = {"std": round(float(rng.uniform(0.002, 0.02)), 4)} if seeds > 1 else {}
        intervals = {code: [max(x - 0.04, 0), min(x + 0.03, 1)] for code, x in languages.items()}
        return {
            "english": english,
            "mean": mean,
            **spread,
            "languages": languages,
            "interval": [mean - 0.011, mean + 0.011],
            "intervals": intervals | {"eng_Latn": [english - 0.02, english]},
            "macro_f1": {"english": english, "mean": mean - 0.02, "languages": languages},
        }

    made = {
        "task": "region of a short list of names",
        "metric": "accuracy",
        "majority": 0.323,
        "seeds": list(range(seeds)),
        "systems": {system: entry(a) for system, (a, _) in LEVELS.items()},
        "seconds": dict(zip(STAGES, (189.2, 56.1, 60.4, 8.2, 41.7, 7.3), strict=True))
        | {"evaluation": 68.0},
        "cost": {
            "mt_llm": {"sequences_per_second": 1834.2, "flops_per_example": 3.4e7},
            "translate_test": {"sequences_per_second": 212.7, "flops_per_example": 2.9e9},
        },
    }
    if unseen:
        made["systems_unseen"] = {system: entry(b) for system, (_, b) in LEVELS.items()}
        made["majority_unseen"] = 0.237
    return made


def config() -> dict[str, Any]:
    """A few fields of config.json."""
    return {
        "recipe": "mtllm",
        "name": "mini",
        "seed": 0,
        "encoder": "",
        "llm": "",
        "english": "eng_Latn",
        "languages": LANGUAGES,
        "task": {"train": "", "test": ""},
        "mini_nllb": {"vocab_size": 3000, "width": 128, "training": {"steps": 800}},
        "adaptation": {"training": {"steps": 700, "learning_rate": 0.005}},
    }


def curves() -> dict[str, pd.DataFrame]:
    """metrics.jsonl of every stage; two stages have an FVU too, and one loss that is no number."""
    rng = np.random.default_rng(1)
    frames = {}
    for stage, steps, start, end in zip(
        STAGES, (800, 300, 700, 150, 450, 150), (8.0, 6.0, 1.2, 1.6, 0.9, 1.6),
        (0.9, 1.4, 0.11, 0.02, 0.05, 0.03), strict=True,
    ):  # fmt: skip
        step = np.arange(10, steps + 1, 10)
        decay = np.exp(-5 * step / steps)
        loss = (end + (start - end) * decay) * np.exp(rng.normal(0, 0.06, len(step)))
        frame = pd.DataFrame({"step": step, "time": 1.7e9 + step * 0.06, "loss": loss})
        if stage.startswith(("stage 1", "stage 2b")):
            frame["fvu"] = 0.12 + 0.88 * decay + rng.normal(0, 0.01, len(step))
            frame.loc[3, "loss"] = float("nan")
        frames[stage] = frame
    return frames


def facts() -> dict[str, Any]:
    """What a run knows of itself beside its results."""
    return {
        "versions": {"python": "3.11.9", "jax": "0.10.2", "flax": "0.12.8", "CLDR": "48"},
        "device": "cpu, 2 cores",
        "peak memory": "1.9 GB",
        "concepts": "368 in 5 regions",
    }
