"""A task that begins with an exported stage 1 is the one that begins with the run's."""

import json
import shutil

import numpy as np
import pytest
import reduced
from flax import nnx

from mtllm_jax import cli, config, sharding
from mtllm_jax.export import export
from mtllm_jax.hf.stack import is_stack
from mtllm_jax.metrics import Console
from mtllm_jax.recipes import stacking
from mtllm_jax.recipes.finished import begun, open_run


def exported(run, folder, adapters="merged", stage="adaptation", dtype=None):
    export(
        run, folder, "hf", adapters=adapters, rank=None, dtype=dtype, console=Console(), stage=stage
    )
    return folder


def given(run, stage1, **changes):
    """The config of a task on the run's own models, with a stage 1 of another name."""
    opened = open_run(run, "adaptation")
    values = json.loads((run / "config.json").read_text()) | {"stage1": str(stage1)}
    values |= {"encoder": opened.config.encoder, "llm": opened.config.llm, "adaptation_text": []}
    return cli.resolve(config.MTLLM, values | changes)


def adapted(settings, run):
    """What stage 1 left, by path."""
    mesh = sharding.make_mesh(settings.mesh)
    parts = open_run(run, "adaptation").load_parts(mesh)
    found = stacking.load_adapted(settings, parts, mesh)
    return {path: np.asarray(v[...]) for path, v in nnx.to_flat_state(found)}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "adapters"), [("mini_run", "merged"), ("own_run", "kept")])
def test_what_was_learnt_comes_back_bit_for_bit(request, tmp_path, name, adapters):
    run = request.getfixturevalue(name)
    settings = given(run, exported(run, tmp_path / "out", adapters))
    assert begun(settings) == settings and is_stack(tmp_path / "out")
    found, wanted = adapted(settings, run), adapted(given(run, run), run)
    assert found.keys() == wanted.keys() and found
    for path, value in wanted.items():
        assert found[path].dtype == value.dtype
        np.testing.assert_array_equal(found[path], value, err_msg=str(path))


@pytest.mark.slow
def test_a_run_from_an_exported_stage_1_is_the_run(mini_run, tmp_path):
    exported(mini_run, tmp_path / "out")
    models = {"encoder": mini_run / "mini_nllb/model", "llm": mini_run / "mini_llama/model"}
    flags = reduced.flags({"stage1": "out", "evaluation.systems": "mt_llm", **models})
    done = reduced.train(*reduced.ARGUMENTS, *flags, "--workdir=run", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    name = "predictions/mt_llm.jsonl"
    assert (tmp_path / "run" / name).read_bytes() == (mini_run / name).read_bytes()


@pytest.mark.slow
def test_a_stack_that_is_no_stage_1_of_these_models_is_refused(mini_run, own_run, tmp_path):
    def refusal(run, stage1, **changes):
        with pytest.raises(ValueError, match=r"[^.]\.$") as raised:
            begun(given(run, stage1, **changes))
        return str(raised.value)

    stage_1 = exported(mini_run, tmp_path / "all")
    assert "config.encoder is ''; it must be" in refusal(mini_run, stage_1, encoder="")
    assert "bidirectional" in refusal(mini_run, stage_1, bidirectional=False)
    assert "frozen_dtype is 'int8'" in refusal(
        mini_run, stage_1, frozen_dtype="int8", trained="bridge", distillation=started(mini_run)
    )
    task = exported(mini_run, tmp_path / "task", stage="distillation")
    assert "has a head and so has learnt a task" in refusal(mini_run, task)
    merged = exported(own_run, tmp_path / "merged")
    assert "keeps the adapters none (by map: rank, alpha)" in refusal(own_run, merged)
    kept = exported(own_run, tmp_path / "kept", "kept")
    assert "config.trained is 'all'; export it by --adapters=merged" in refusal(
        own_run, kept, trained="all"
    )
    # Another LLM of the same shape, and a coarser dtype.
    other = tmp_path / "other"
    shutil.copytree(mini_run / "mini_llama" / "model", other)
    change_a_weight(other)
    parts_of_others = given(own_run, kept, llm=str(other))
    mesh = sharding.make_mesh(parts_of_others.mesh)
    parts = stacking.load_parts(parts_of_others, parts_of_others.encoder, str(other), mesh)
    with pytest.raises(ValueError, match=r"has other weights than config\.llm where stage 1"):
        stacking.load_adapted(parts_of_others, parts, mesh)
    coarse = given(own_run, exported(own_run, tmp_path / "coarse", "kept", dtype="bfloat16"))
    with pytest.raises(ValueError, match=r"has other weights than config\.encoder"):
        adapted(coarse, own_run)


def started(run):
    values = json.loads((run / "config.json").read_text())["distillation"]
    return values | {"start": "stage1"}


def change_a_weight(folder):
    from safetensors.numpy import load_file, save_file

    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    name = next(name for name in tensors if "q_proj" in name)
    tensors[name][0, 0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
