"""Evaluation in pieces: what is kept of them, and how long systems are timed."""

import io

import pytest

from mtllm_jax import evaluation
from mtllm_jax.metrics import Console
from mtllm_jax.runfolder import RunFolder
from mtllm_jax.tasks.task import Task

LANGUAGES = ("eng_Latn", "deu_Latn", "jpn_Jpan")


def task(rows_of_each):
    rows = [
        {"id": str(i), "text": f"{code} {i}", "language": code, "label": "ab"[i % 2]}
        for code in LANGUAGES
        for i in range(rows_of_each)
    ]
    return Task("letters", ("a", "b"), rows[:2], {"seen": rows}, dev=[], prompt="")


def answered(folder, predict, piece_rows, rows_of_each=10, timed=None):
    run = RunFolder(folder, {})
    try:
        systems = {"mt_llm": evaluation.System(predict, timed)}
        return evaluation.evaluate(
            task(rows_of_each),
            lambda seed: systems,
            [0],
            english="eng_Latn",
            run=run,
            console=Console(io.StringIO()),
            piece_rows=piece_rows,
        )
    finally:
        run.close()


def right_but_in_german(rows):
    return ["a" if row["language"] == "deu_Latn" else row["label"] for row in rows]


@pytest.mark.parametrize("piece_rows", [1, 7, 30, 1000])
def test_pieces_change_nothing(piece_rows, tmp_path):
    asked = []

    def predict(rows):
        asked.append(len(rows))
        return right_but_in_german(rows)

    whole = answered(tmp_path / "whole", right_but_in_german, 1000)
    assert answered(tmp_path / "run", predict, piece_rows) == whole
    assert whole["systems"]["mt_llm"]["languages"] == {"deu_Latn": 0.5, "jpn_Jpan": 1.0}
    assert sum(asked) == 30 and max(asked) == min(piece_rows, 30)
    files = [tmp_path / name / "predictions" / "mt_llm.jsonl" for name in ("run", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not (tmp_path / "run" / "evaluation" / "pieces" / "mt_llm").exists()


def test_an_evaluation_that_was_stopped_goes_on(tmp_path):
    asked = []

    def stopped(rows):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append([row["text"] for row in rows])
        return right_but_in_german(rows)

    with pytest.raises(KeyboardInterrupt):
        answered(tmp_path / "run", stopped, 7)
    before, asked[:] = list(asked), []

    def predict(rows):
        asked.append([row["text"] for row in rows])
        return right_but_in_german(rows)

    found = answered(tmp_path / "run", predict, 7)
    assert found == answered(tmp_path / "whole", right_but_in_german, 1000)
    texts = [text for piece in before + asked for text in piece]
    assert texts == [row["text"] for row in task(10).tests["seen"]]


@pytest.mark.parametrize(("long", "most"), [(False, 2400), (True, 240)])
def test_a_slow_system_is_timed_on_few_rows(long, most, monkeypatch, tmp_path):
    """Of 2400 foreign rows, every tenth; both passes are over the same rows."""
    monkeypatch.setattr(evaluation, "_LONG_SECONDS", -1.0 if long else 1e9)
    asked = []

    def timed(rows):
        asked.append([row["text"] for row in rows])
        return right_but_in_german(rows)

    found = answered(tmp_path / "run", right_but_in_german, 5000, 1200, timed)
    assert asked[-1] == asked[-2] and len(asked[-1]) == most
    assert found["cost"]["mt_llm"]["sequences_per_second"] > 0
