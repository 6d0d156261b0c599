"""SDRRL's default made small: a whole run, and one that goes on."""

import json
import shutil

import pytest
import reduced


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, and what it printed."""
    folder = tmp_path_factory.mktemp("sdrrl")
    done = train(folder)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return folder / "run", done.stdout


def train(folder, *flags):
    config = f"--config={reduced.ROOT}/configs/sdrrl.py"
    return reduced.train(config, *reduced.flags(reduced.SDRRL), "--workdir=run", *flags, cwd=folder)


@pytest.mark.slow
def test_a_whole_run_leaves_its_results(finished):
    run, printed = finished
    results = json.loads((run / "results.json").read_text())
    assert list(results["systems"]) == ["base", "sft", "t_sft", "sdrrl"]
    for entry in results["systems"].values():
        assert set(entry["languages"]) == {"deu_Latn", "jpn_Jpan"}
        assert 0 <= entry["mean"] <= 1 and entry["english"] is not None
        assert set(entry["chrf"]["languages"]) == set(entry["languages"])
    assert "SDRRL" in printed and "chrF" in printed
    assert "SDRRL" in (run / "report.html").read_text()
    for system in ("sft", "t_sft", "sdrrl"):
        assert (run / "transfer" / system / "sample.html").exists()
        assert (run / system / "model" / "config.json").exists()
    counts = json.loads((run / "transfer" / "sdrrl" / "manifest.json").read_text())["counts"]
    assert {"LL", "LT", "TL", "TT", "switched", "translation"} <= counts.keys()


@pytest.mark.slow
def test_a_run_that_lost_its_end_goes_on_to_the_same_results(finished):
    run, _ = finished
    before = json.loads((run / "results.json").read_text())
    said = (run / "predictions" / "sdrrl.jsonl").read_bytes()
    for path in (
        run / "results.json",
        run / "evaluation" / "done.json",
        run / "sdrrl" / "done.json",
    ):
        path.unlink()
    (run / "predictions" / "sdrrl.jsonl").unlink()
    shutil.rmtree(run / "sdrrl" / "model")
    done = train(run.parent)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert "done before" in done.stdout
    assert (run / "predictions" / "sdrrl.jsonl").read_bytes() == said
    assert json.loads((run / "results.json").read_text())["systems"] == before["systems"]
