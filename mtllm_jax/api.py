"""A finished run in Python: texts in any language of its MT encoder → vectors and labels.

M texts, D LLM width, C classes.
"""

import os
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath

from mtllm_jax import sharding
from mtllm_jax.config import MTLLM, Mesh
from mtllm_jax.inference import Vectors
from mtllm_jax.recipes import stacking
from mtllm_jax.runfolder import read_json
from mtllm_jax.schema import resolve


class Model:
    """The stack of a finished run and its head. Made by `load`.

    labels: the task's, in the order of their ids. languages: the FLORES-200 codes that texts may
    be in, those of the MT encoder; how well it reads each is another matter.
    """

    def __init__(
        self,
        config: MTLLM,
        parts: stacking.Parts,
        student: stacking.StackClassifier,
        labels: Sequence[str],
        batch_rows: int,
    ):
        self.labels = tuple(labels)
        self.languages = parts.source.languages
        self._tokenizer = parts.source
        self._max_length = config.evaluation.max_length
        self._head_DC = np.asarray(student.head.kernel[...], np.float32)
        self._run = Vectors(
            *stacking.stack_forward(config, student),
            pad_id=parts.source.pad_id,
            batch_rows=batch_rows,
            mesh=sharding.make_mesh(Mesh(1, 1, 1), jax.devices()[:1]),
        )

    def encode(self, texts: Sequence[str], lang: str | Sequence[str]) -> np.ndarray:
        """The stack's pooled state of each text, float32 [M, D].

        lang: one FLORES-200 code, or one for each text. A text of more tokens than the run's
        evaluation.max_length loses its end. Raises ValueError for a language that the encoder does
        not know, naming the three nearest, and for texts that are not a list of str.
        """
        if isinstance(texts, str):
            raise ValueError(f"texts is {texts!r}; it must be a list of texts.")
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"texts[{i}] is {text!r}; it must be a str.")
        tokens = self._tokenizer.encode(texts, lang, max_length=self._max_length)
        if not tokens:
            return np.empty((0, len(self._head_DC)), np.float32)
        return self._run(tokens)

    def classify(self, texts: Sequence[str], lang: str | Sequence[str]) -> list[dict[str, float]]:
        """For each text the probability of every label, the likeliest first; as `encode`."""
        logits_MC = self.encode(texts, lang) @ self._head_DC
        odds_MC = np.exp(logits_MC - logits_MC.max(axis=1, keepdims=True, initial=-np.inf))
        answers = []
        for share_C in odds_MC / odds_MC.sum(axis=1, keepdims=True):
            order = np.argsort(-share_C, kind="stable")
            answers.append({self.labels[i]: float(share_C[i]) for i in order})
        return answers


def load(folder: str | os.PathLike[str], *, batch_rows: int = 32) -> Model:
    """Open a run that has finished its training, on the first device.

    folder: the run's --workdir. batch_rows: texts in one forward pass. Raises ValueError for what
    is not the folder of such a run, or where weights or model folders are missing or damaged.
    """
    path = epath.Path(folder)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; it must be the folder of a finished run.")
    if not (path / "config.json").exists():
        raise ValueError(f"{path} holds no config.json, so it is not the folder of a run.")
    values = read_json(path / "config.json")
    if not isinstance(values, dict) or values.get("recipe") != "mtllm":
        raise ValueError(f"{path / 'config.json'} is not the config of a run of MT-LLM.")
    if not (path / "distillation" / "done.json").exists():
        raise ValueError(
            f"{path} is a run that has not finished its training; go on with it by python"
            f" launch/train.py --config={path / 'config.json'} --workdir={path}."
        )
    config = resolve(MTLLM, values)
    about = read_json(path / "model.json")
    # A folder inside the run is named relative to it, so that the run can be moved.
    encoder_folder, llm_folder = path / about["encoder"], path / about["llm"]
    parts = stacking.load_parts(config, encoder_folder, llm_folder)
    student = stacking.load_student(path, config, parts, len(about["labels"]))
    return Model(config, parts, student, about["labels"], batch_rows)
