"""What a run was trained on is changed between two starts: it does not go on with anything else."""

import shutil
import signal

import jax.numpy as jnp
import numpy as np
import pytest
import reduced
from processes import Processes
from saved import flip_a_byte, make_iterator, make_state, restore

from mtllm_jax.checkpoint import Checkpointer, tree_hash
from mtllm_jax.data.packing import pack
from mtllm_jax.data.pipeline import add_by_example, batches


def test_other_frozen_weights_are_refused(tmp_path):
    one, other = tree_hash({"w": jnp.zeros(3)}), tree_hash({"w": jnp.ones(3)})
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1), make_iterator(), frozen_hash=one)
    assert restore(tmp_path, frozen_hash=one)[0][1] == 1
    with pytest.raises(ValueError, match=f"{one[:12]}.*{other[:12]}"):
        restore(tmp_path, frozen_hash=other)
    with pytest.raises(ValueError, match=f"{one[:12]}.*none"):
        restore(tmp_path)


def position(texts, tables):
    """An iterator over these texts, a row each, and tables."""
    rows = pack(texts, {"source": 8}, {"source": 0}, packing=False)
    return batches(rows, batch_rows=2, seed=0, add=add_by_example(tables))


def test_other_texts_or_labels_are_refused():
    texts = [{"source": np.arange(3, 7 + i, dtype=np.int32)} for i in range(4)]
    labels = {"label": np.array([0, 1, 1, 0], np.int32)}
    there = position(texts, labels)
    next(there)
    position(texts, labels).set_state(there.get_state())
    token = [*texts[:3], {"source": np.array([3, 4, 5, 6, 7, 8, 8], np.int32)}]
    label = {"label": np.array([0, 1, 1, 1], np.int32)}
    for other in (
        position(token, labels),
        position(texts[::-1], labels),
        position(texts[:3], labels),
        position(texts, label),
        position(texts, {}),
    ):
        with pytest.raises(ValueError, match="the data is not what it was at the last checkpoint"):
            other.set_state(there.get_state())


def put(old, new):
    """What changes a file's first `old` into `new`."""
    return lambda path: path.write_text(path.read_text().replace(old, new, 1))


def alter(weights):
    """A number in the midst of the file, in its exponent too: less would be lost in bfloat16."""
    middle = weights.stat().st_size // 2
    for at in range(middle, middle + 4):
        flip_a_byte(weights, at)


@pytest.mark.slow
def test_a_run_whose_text_task_or_model_was_changed(mini_run, tmp_path):
    """Refused in a sentence and left as it is; put back, the same command goes on."""
    models = shutil.copytree(mini_run / "mini_llama" / "model", tmp_path / "llm")
    fields = reduced.own_fields(tmp_path, mini_run) | {"llm": models}
    fields |= {"adaptation.training.steps": 1000}
    command = (
        reduced.ROOT / "launch" / "train.py",
        *reduced.ARGUMENTS,
        *reduced.flags(fields),
        "--workdir=run",
    )
    metrics = tmp_path / "run" / "adaptation" / "metrics.jsonl"
    with Processes(1, *command, cwd=tmp_path, devices=1) as processes:
        processes.signal_at(metrics, 25, 0, signal.SIGKILL)
        processes.ended(200)
    before = metrics.read_bytes()

    weights = models / "model.safetensors"
    for changed, change, said in (
        (tmp_path / "t.txt", put("Kenya", "Chile"), "the data is not what it was"),
        (
            tmp_path / "a.tsv",
            put("Kenya\tAfrica", "Kenya\tAmerica"),
            "the task's training rows are",
        ),
        (tmp_path / "b.jsonl", put("Kenya", "Chile"), "the task's test rows are not those"),
        (weights, alter, "the weights of llm are not those that"),
    ):
        kept = changed.read_bytes()
        change(changed)
        with Processes(1, *command, cwd=tmp_path, devices=1) as processes:
            codes, _, (err,) = processes.ended()
        changed.write_bytes(kept)
        assert codes == [2] and said in err and err.count("\n") == 1, err
        assert metrics.read_bytes() == before and not (metrics.parent / "params").exists()

    with Processes(1, *command, cwd=tmp_path, devices=1) as processes:
        processes.wait_until(lambda: "going on from step " in processes.said(0)[0], "restart")
