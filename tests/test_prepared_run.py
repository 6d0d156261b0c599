"""A run on prepared rows is, bit for bit, the run that packs the same text itself."""

import json

import pytest
import reduced


def launch(script, *arguments, cwd):
    code, printed, err = reduced.launch(script, *arguments, cwd=cwd)
    assert code == 0 and err == "", printed + err
    return printed


def losses(run):
    lines = (run / "adaptation" / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"], line["grad_norm"]) for line in map(json.loads, lines)]


@pytest.mark.slow
def test_stage_1_on_prepared_rows(tmp_path, own_run):
    config = f"--config={own_run}/config.json"
    said = launch("prepare.py", config, "--to=rows", "--workers=1", cwd=tmp_path)
    assert said.endswith("Train on it with --config.adaptation_text=rows\n")
    launch("train.py", config, "--config.adaptation_text=rows", "--workdir=run", cwd=tmp_path)
    assert losses(tmp_path / "run") == losses(own_run)
    notes = [
        json.loads((run / "adaptation/done.json").read_text())
        for run in (own_run, tmp_path / "run")
    ]
    assert notes[0]["packing"] == notes[1]["packing"]
    assert notes[0]["packing"]["texts"] == 40 and notes[0]["packing"]["dropped"] == 0
