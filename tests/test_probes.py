"""Retrieval without labels: by hand, and by the models of a run."""

import io

import jax
import numpy as np
import pytest

from configs.mtllm import get_config
from mtllm_jax import cli, config, sharding
from mtllm_jax.data.benchmarks import Bitext
from mtllm_jax.metrics import Console
from mtllm_jax.recipes import stacking
from mtllm_jax.recipes.finished import begun, open_run
from mtllm_jax.recipes.inputs import read_inputs
from mtllm_jax.recipes.job import Job
from mtllm_jax.recipes.probes import accuracy, retrieval
from mtllm_jax.results import probe_tables
from mtllm_jax.runfolder import RunFolder
from mtllm_jax.schema import plain, to_dict

NAMES = ("Kenya", "Peru", "Ghana and Togo", "Chile", "Cuba")


def test_the_nearest_by_cosine():
    english = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [3.0, 2.0]])
    foreign = np.array([[5.0, 0.1], [1.0, 9.0], [1.0, 0.0], [2.0, 2.0]])
    # The third finds the first; the fourth finds the third, which says the same as its own.
    assert accuracy(foreign, english, ["a", "b", "c", "c"]) == 0.75
    assert accuracy(foreign, english, ["a", "b", "c", "d"]) == 0.5


@pytest.mark.slow
def test_english_is_found_by_itself(mini_run, tmp_path):
    run = open_run(mini_run)
    settings = cli.resolve(config.MTLLM, to_dict(run.given) | {"stage1": str(mini_run)})
    settings, mesh = begun(settings), sharding.make_mesh(config.Mesh(), jax.devices()[:1])
    folder = RunFolder(tmp_path / "run", to_dict(settings))
    job = Job(settings, folder, Console(io.StringIO()), mesh, 0)
    parts = run.load_parts(mesh)
    adapted = stacking.load_adapted(settings, parts, mesh)
    pairs = {"eng_Latn": (NAMES, NAMES), "deu_Latn": (NAMES, NAMES[::-1])}
    found = retrieval(job, parts, adapted, Bitext("mine", pairs, "none"))
    assert list(found["systems"]) == ["encoder", "stack", "llm"]
    for entry in found["systems"].values():
        german = entry["languages"]["deu_Latn"]
        assert entry["languages"]["eng_Latn"] == 1.0 and german <= 0.6  # they are in other places
        assert entry["mean"] == (1 + german) / 2
    assert retrieval(job, parts, adapted, Bitext("mine", {}, "none")) == found  # as it was left
    job.run.close()


def test_what_is_shown():
    entry = {"mean": 0.5, "languages": {"jpn_Jpan": 0.25, "deu_Latn": 0.75}}
    found = {"bitext": "ntrex", "systems": {"encoder": entry, "llm": entry}}
    ((title, columns, rows),) = probe_tables({"probes": found})
    assert "ntrex" in title and columns == ["", "encoder", "llm"]
    assert rows == [
        ["mean of 2 languages", "50.0", "50.0"],
        ["German deu_Latn", "75.0", "75.0"],
        ["Japanese jpn_Jpan", "25.0", "25.0"],
    ]
    assert probe_tables({}) == []


def test_a_bitext_is_read_at_the_door(tmp_path):
    folder = tmp_path / "data" / "tatoeba" / "v1"
    folder.mkdir(parents=True)
    for code in ("deu", "fra"):
        for side in (code, "eng"):
            (folder / f"tatoeba.{code}-eng.{side}").write_text("a\nb\nc\n")
    values = plain(get_config()) | {"languages": ["deu_Latn", "jpn_Jpan"]}
    probe = {"bitext": "tatoeba", "data": str(tmp_path), "limit": 2}
    inputs = read_inputs(cli.resolve(config.MTLLM, values | {"probe": probe}))
    assert inputs.bitext is not None  # in the languages that the encoder will know
    assert {code: len(a) for code, (a, _) in inputs.bitext.pairs.items()} == {"deu_Latn": 2}
    with pytest.raises(ValueError, match=r"config\.probe\.data: .* holds no ntrex"):
        read_inputs(cli.resolve(config.MTLLM, values | {"probe": probe | {"bitext": "ntrex"}}))
    with pytest.raises(ValueError, match=r"config\.probe\.data is ''; it must be the folder of"):
        cli.resolve(config.MTLLM, values | {"probe": probe | {"data": ""}})
