"""Prepared rows: those of the same texts on the fly, however they were made, and nothing else."""

import dataclasses
import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import reduced
from babel import Locale

from mtllm_jax.cli import load_config
from mtllm_jax.config import MTLLM
from mtllm_jax.data import packing
from mtllm_jax.data.packing import Counts
from mtllm_jax.data.pipeline import batches
from mtllm_jax.data.prepare import Maker, make_rows, maker_of, prepare
from mtllm_jax.data.prepared import Prepared, is_prepared
from mtllm_jax.data.texts import read_texts
from mtllm_jax.data.tokenise import TargetTokenizer, source_tokenizer
from mtllm_jax.data.train_tokenizer import train_llama_tokenizer, train_nllb_tokenizer
from mtllm_jax.metrics import Console
from mtllm_jax.recipes import inputs
from mtllm_jax.recipes import prepare as recipe
from mtllm_jax.recipes.job import stage_seed
from mtllm_jax.schema import resolve

NAMES = [name for key, name in Locale("en").territories.items() if len(key) == 2]
LISTS = [" and ".join(NAMES[i : i + 1 + i % 13]) for i in range(0, 240, 2)]
WINDOW = 25


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tokenizers as they lie beside models, and the texts."""
    root = tmp_path_factory.mktemp("prepare")
    for side in ("encoder", "llm"):
        (root / side).mkdir()
    train_nllb_tokenizer(NAMES, ["eng_Latn", "deu_Latn"], 600, root / "encoder")
    (root / "encoder" / "config.json").write_text(json.dumps({"model_type": "m2m_100"}))
    train_llama_tokenizer(NAMES, 400, root / "llm")
    (root / "llm" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (root / "texts.txt").write_text("\n".join(LISTS) + "\n", encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def maker(folder):
    return Maker(
        source=source_tokenizer(folder / "encoder"),
        target=TargetTokenizer(folder / "llm"),
        english="eng_Latn",
        legacy_source_order=False,
        source_length=48,
        target_length=40,
        packing=True,
        subword_sampling=0.0,
        samplings=1,
        seed=5,
    )


@pytest.fixture
def texts(folder):
    return read_texts(folder / "texts.txt")


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(packing, "_WINDOW", WINDOW)


def assert_same_rows(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])


# ---------------------------------------------------------------- what rows are made


def test_rows_hold_each_text_as_both_sides_read_it(maker, texts):
    rows = make_rows(maker, texts)
    found = {}
    for row in rows:
        for segment, number in enumerate(row["example"].tolist(), 1):
            if number:
                sides = [
                    row[f"{s}_ids"][row[f"{s}_segments"] == segment] for s in ("source", "target")
                ]
                assert number - 1 not in found
                found[number - 1] = [side.tolist() for side in sides]
    assert sorted(found) == list(range(len(LISTS)))
    sources = maker.source.encode(LISTS, "eng_Latn", max_length=48)
    targets = maker.target.encode(LISTS, max_length=40)
    for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
        assert found[i] == [source.tolist(), target.tolist()]
    whole = maker.source.encode(LISTS, "eng_Latn"), maker.target.encode(LISTS)
    assert rows.counts == Counts(
        texts=len(LISTS),
        dropped=0,
        truncated={
            "source": sum(len(ids) > 48 for ids in whole[0]),
            "target": sum(len(ids) > 40 for ids in whole[1]),
        },
        rows=len(rows),
        tokens={"source": sum(map(len, sources)), "target": sum(map(len, targets))},
    )
    assert rows.counts.truncated["source"] > 0
    assert f"{len(LISTS)} texts in {len(rows)} rows" in rows.told()


def test_tokens_of_both_sides_that_end_together(maker):
    """Against the texts that tokens stand for: up to there both sides have read the same."""
    told = dataclasses.replace(maker, aligns=True)
    rows, plain = make_rows(told, LISTS), make_rows(maker, LISTS)
    assert rows.lengths == plain.lengths | {"aligned": 48} and rows.fill.keys() == plain.fill.keys()

    def read(tokenizer, ids, count):
        return tokenizer.decode([ids[:count]])[0].replace(" ", "")

    pairs = cut = 0
    for row in list(rows)[:8]:
        np.testing.assert_array_equal(row["aligned_segments"], row["source_segments"])
        for text in range(1, row["example"].astype(bool).sum() + 1):
            source, aligned = (
                row[f"{name}_ids"][row["source_segments"] == text] for name in ("source", "aligned")
            )
            target = row["target_ids"][row["target_segments"] == text]
            assert aligned[0] == 0  # the language
            source = np.delete(source, 0)
            ends = [read(maker.target, target, n) for n in range(1, len(target) + 1)]
            for i, number in enumerate(aligned[1:].tolist(), 1):
                if number:
                    assert read(maker.source, source, i) == ends[number - 1]
                    pairs += 1
            # A text that is whole on both sides ends on both with a token of it.
            whole = maker.target.decode([target])[0] == LISTS[row["example"][text - 1] - 1]
            if whole and source[-1] == maker.source.eos_id and len(source) < 47:
                assert aligned[-2] == len(target)
            else:
                cut += 1
    assert pairs > 100 and cut


def test_texts_without_a_token_are_dropped_and_counted(maker):
    rows = make_rows(maker, [*LISTS[:30], "", *LISTS[30:40], ""])
    assert rows.counts.texts == 42 and rows.counts.dropped == 2
    kept = {number for row in rows for number in row["example"].tolist() if number}
    assert kept == set(range(1, 43)) - {31, 42}
    with pytest.raises(ValueError, match=r"none of the 2 texts of stage 1 holds a token\."):
        make_rows(maker, ["", ""])
    with pytest.raises(ValueError, match="holds a token"):
        maker.fitted([""])


def test_samplings_segment_each_text_anew_and_the_same_each_time(maker):
    sampled = dataclasses.replace(maker, samplings=3, subword_sampling=0.3)
    rows = make_rows(sampled, LISTS[:20])
    assert_same_rows(rows, make_rows(sampled, LISTS[:20]))
    numbers = [number for row in rows for number in row["example"].tolist() if number]
    assert sorted(numbers) == sorted(3 * list(range(1, 21)))
    drawn = {number: set() for number in numbers}
    for row in rows:
        for segment, number in enumerate(row["example"].tolist(), 1):
            if number:
                drawn[number].add(tuple(row["source_ids"][row["source_segments"] == segment]))
    assert max(map(len, drawn.values())) == 3


def test_lengths_that_follow_the_texts(maker):
    long = dataclasses.replace(maker, source_length=256, target_length=256)
    fitted = long.fitted(LISTS)
    assert 256 in fitted.lengths.values() and fitted.lengths != long.lengths
    fill = make_rows(fitted, LISTS).fill
    assert abs(fill["source"] - fill["target"]) < 0.1


# ---------------------------------------------------------------- prepared = on the fly


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"packing": False},
        {"samplings": 2, "subword_sampling": 0.2},
        {"aligns": True},
    ],
)
def test_prepared_rows_are_those_on_the_fly(tmp_path, maker, texts, changes):
    maker = dataclasses.replace(maker, **changes)
    prepared = prepare(tmp_path / "rows", maker, texts)
    on_the_fly = make_rows(maker, texts)
    assert len(list((tmp_path / "rows").glob("rows-*.arrayrecord"))) > 3
    assert_same_rows(prepared.rows(), on_the_fly)
    assert prepared.counts == on_the_fly.counts
    assert prepared.rows().notes() == on_the_fly.notes()
    assert prepared.rows()[-1].keys() == on_the_fly[0].keys()


def test_shards_are_bounded_in_number_and_of_several_windows(tmp_path, maker, texts, monkeypatch):
    monkeypatch.setattr("mtllm_jax.data.prepare._MOST_SHARDS", 2)
    prepared = prepare(tmp_path / "rows", maker, texts)
    assert len(list((tmp_path / "rows").glob("rows-*.arrayrecord"))) == 2
    assert_same_rows(prepared.rows(), make_rows(maker, texts))


def test_batches_of_prepared_rows_by_workers(tmp_path, maker, texts):
    """What the trainer reads; the rows go to the workers as names of files."""
    prepared = prepare(tmp_path / "rows", maker, texts)
    expected = batches(make_rows(maker, texts), batch_rows=4, seed=1)
    found = batches(prepared.rows(), batch_rows=4, seed=1, mine=[1, 2], workers=1)
    for _ in range(5):
        one, other = next(expected), next(found)
        for name in one:
            np.testing.assert_array_equal(one[name][1:3], other[name])
    found.close()


# ---------------------------------------------------------------- begun again

_SCRIPT = """
import dataclasses, sys, time
from mtllm_jax.data import packing
from mtllm_jax.data.texts import read_texts
from mtllm_jax.data.prepare import Maker, prepare
from mtllm_jax.data.tokenise import TargetTokenizer, source_tokenizer
root, to = sys.argv[1:]
packing._WINDOW = 25
maker = Maker(
    source_tokenizer(root + "/encoder"), TargetTokenizer(root + "/llm"),
    "eng_Latn", False, 48, 40, True, 0.0, 1, 5,
)
slow = lambda done, total: time.sleep(0.3 if done else 0)
prepare(to, maker, read_texts(root + "/texts.txt"), workers=1, progress=slow)
"""


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_killed_and_begun_again_leaves_the_same_bytes(tmp_path, folder, maker, texts):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    prepare(whole, maker, texts)
    process = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, folder, killed], env=reduced.environment()
    )
    deadline = time.monotonic() + 120
    while not list(killed.glob("rows-*.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(ValueError, match=r"is unfinished, with \d of 5 shards"):
        Prepared(killed)
    assert is_prepared(killed)
    names = [note.with_suffix(".arrayrecord").name for note in killed.glob("rows-*.json")]
    written = {name: (killed / name).stat().st_mtime_ns for name in names}
    assert 1 <= len(names) < 5
    told = []
    prepare(killed, maker, texts, progress=lambda done, total: told.append((done, total)))
    assert told[0] == (24 * len(names), 120) and told[-1] == (120, 120)
    assert {name: (killed / name).stat().st_mtime_ns for name in names} == written
    assert files_of(killed) == files_of(whole)
    assert len(workers) >= 2
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "a worker outlived its process"
        time.sleep(0.05)


@pytest.mark.slow
def test_any_number_of_workers_leaves_the_same_bytes(tmp_path, maker, texts):
    for workers in (0, 2):
        prepare(tmp_path / str(workers), maker, texts, workers=workers)
    assert files_of(tmp_path / "0") == files_of(tmp_path / "2")


@pytest.mark.slow
def test_a_worker_that_dies_is_one_sentence_and_what_is_done_is_kept(tmp_path, maker, texts):
    def progress(done, total):
        if done:
            (worker,) = multiprocessing.active_children()
            os.kill(worker.pid, signal.SIGKILL)

    with pytest.raises(ValueError, match=r"one of the 1 --workers was killed, .* if need be\."):
        prepare(tmp_path / "rows", maker, texts, workers=1, progress=progress)
    told = []
    prepare(tmp_path / "rows", maker, texts, progress=lambda done, total: told.append(done))
    assert told[0] > 0
    assert_same_rows(Prepared(tmp_path / "rows").rows(), make_rows(maker, texts))


@pytest.mark.parametrize("other", ["target_length", "seed", "texts"])
def test_a_folder_of_other_rows_is_refused(tmp_path, maker, folder, texts, other):
    prepare(tmp_path / "rows", maker, texts)
    before = files_of(tmp_path / "rows")
    if other == "texts":
        (tmp_path / "t.txt").write_text("another text\n")
        texts = read_texts(tmp_path / "t.txt")
    else:
        maker = dataclasses.replace(maker, **{other: 47})
    with pytest.raises(ValueError, match=rf"rows of other texts or settings .*{other}.*--to\."):
        prepare(tmp_path / "rows", maker, texts)
    assert files_of(tmp_path / "rows") == before


def test_a_folder_of_something_else_is_refused(tmp_path, maker, texts):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"holds 'thesis.tex'; --to must be a new or empty folder"):
        prepare(tmp_path, maker, texts)
    with pytest.raises(ValueError, match="cannot be written to"):
        prepare(tmp_path / "thesis.tex" / "rows", maker, texts)


# ---------------------------------------------------------------- damage


@pytest.fixture
def rows_folder(tmp_path, maker, texts):
    prepare(tmp_path / "rows", maker, texts)
    return tmp_path / "rows"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), "is missing"),
        (lambda file: file.write_bytes(file.read_bytes()[:-100]), r"has \d+ bytes instead of \d+"),
    ],
)
def test_a_shard_that_is_missing_or_cut_is_noticed_when_the_folder_is_opened(
    rows_folder, maker, texts, damage, message
):
    before = files_of(rows_folder)
    damage(rows_folder / "rows-00002-of-00005.arrayrecord")
    with pytest.raises(
        ValueError, match=rf"rows-00002-of-00005\.arrayrecord {message}.*mends it\."
    ):
        Prepared(rows_folder)
    prepare(rows_folder, maker, texts)
    assert files_of(rows_folder) == before


def test_a_flipped_byte_is_noticed_when_the_row_is_read_or_changes_none(rows_folder, maker, texts):
    before = files_of(rows_folder)
    file = rows_folder / "rows-00001-of-00005.arrayrecord"
    sound = list(Prepared(rows_folder).rows())
    noticed = []
    used = np.flatnonzero(np.frombuffer(before[file.name], np.uint8))  # the rest is padding
    for place in used[:: len(used) // 60]:
        data = bytearray(before[file.name])
        data[place] ^= 0x10
        file.write_bytes(data)
        try:
            assert_same_rows(list(Prepared(rows_folder).rows()), sound)
        except ValueError as error:
            noticed.append(str(error))
    assert len(noticed) > 20
    assert all("launch/prepare.py, makes damaged shards again." in said for said in noticed)
    prepare(rows_folder, maker, texts)
    assert files_of(rows_folder) == before


def test_a_manifest_of_another_kind_is_refused(rows_folder):
    (rows_folder / "manifest.json").write_text('{"name": "an app"}')
    with pytest.raises(ValueError, match="is no manifest of prepared rows"):
        Prepared(rows_folder)


def without(*path):
    def damage(manifest):
        for step in path[:-1]:
            manifest = manifest[step]
        del manifest[path[-1]]

    return damage


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without("finished"), "finished is missing"),
        (without("made_from"), "made_from is missing"),
        (lambda manifest: manifest.update(made_from={}), r"made_from\.source_length is missing"),
        (lambda manifest: manifest.update(made_from=[]), "made_from is not a group of fields"),
        (without("made_from", "packing"), r"made_from\.packing is missing"),
        (without("made_from", "pad_ids", "target"), r"made_from\.pad_ids\.target is missing"),
        (lambda manifest: manifest.update(shards=[]), "shards is empty"),
        (lambda manifest: manifest.update(shards={}), "shards is not a list"),
        (lambda manifest: manifest["shards"].insert(1, None), r"shards\[1\] is missing"),
        (without("shards", 3, "bytes"), r"shards\[3\]\.bytes is missing"),
        (without("shards", 0, "counts", "rows"), r"shards\[0\]\.counts\.rows is missing"),
        (without("counts"), "counts is missing"),
        (without("counts", "tokens", "source"), r"counts\.tokens\.source is missing"),
    ],
)
def test_a_damaged_manifest_is_one_sentence(rows_folder, maker, texts, damage, said):
    file = rows_folder / "manifest.json"
    manifest = json.loads(file.read_text())
    damage(manifest)
    file.write_text(json.dumps(manifest))
    match = rf"rows/manifest\.json is damaged, {said}; prepare the text again, with another --to\.$"
    with pytest.raises(ValueError, match=match):
        Prepared(rows_folder)
    with pytest.raises(ValueError, match=match):
        prepare(rows_folder, maker, texts)


@pytest.mark.parametrize("cut", [0, 40, None])
def test_a_shard_whose_note_is_damaged_is_made_again(rows_folder, maker, texts, cut):
    """As of a start that was stopped with two shards made, whose second note is no longer whole."""
    before = files_of(rows_folder)
    manifest = json.loads(before["manifest.json"])
    shards, manifest["shards"] = manifest["shards"], [None] * 5
    del manifest["counts"]
    (rows_folder / "manifest.json").write_text(json.dumps(manifest | {"finished": False}))
    notes = [rows_folder / f"rows-{i:05}-of-00005.json" for i in range(2)]
    for note, shard in zip(notes, shards, strict=False):
        note.write_text(json.dumps(shard))
    notes[1].write_text("{}" if cut is None else notes[1].read_text()[:cut])
    with pytest.raises(ValueError, match="is unfinished, with 1 of 5 shards"):
        Prepared(rows_folder)
    told = []
    prepare(rows_folder, maker, texts, progress=lambda done, total: told.append(done))
    assert told[0] == shards[0]["counts"]["texts"]
    assert files_of(rows_folder) == before


# ---------------------------------------------------------------- at the door of a run


def config_of(folder, **changes):
    values = load_config(f"{reduced.ROOT}/configs/mtllm.py")
    training = values["adaptation"]["training"]
    training |= {"source_length": 48, "target_length": 40}
    values |= {"encoder": str(folder / "encoder"), "llm": str(folder / "llm")}
    values |= {"adaptation_text": (str(folder / "texts.txt"),)}
    for name, value in changes.items():
        *groups, last = name.split("__")
        group = values
        for part in groups:
            group = group[part]
        group[last] = value
    return resolve(MTLLM, values)


def run_recipe(config, to):
    recipe.run(config, str(to), workers=0, fit_lengths=False, console=Console(io.StringIO()))


def read_at_the_door(config):
    source = source_tokenizer(config.encoder)
    return inputs._read_adaptation_text(config, source, None, None)[0]


@pytest.fixture(scope="module")
def prepared_folder(folder, tmp_path_factory):
    to = tmp_path_factory.mktemp("prepared") / "rows"
    said = io.StringIO()
    recipe.run(config_of(folder), str(to), workers=0, fit_lengths=False, console=Console(said))
    return to, said.getvalue()


def test_a_run_takes_the_folder_in_place_of_the_text(folder, prepared_folder):
    to, said = prepared_folder
    assert "120/120 texts" in said and f"Train on it with --config.adaptation_text={to}\n" in said
    prepared = read_at_the_door(config_of(folder, adaptation_text=(str(to),), seed=3))
    assert isinstance(prepared, Prepared) and len(prepared.rows()) == prepared.counts.rows


def test_fitted_lengths_come_with_the_flags_that_take_them(folder, tmp_path):
    said = io.StringIO()
    changes = {"adaptation__training__source_length": 256, "adaptation__objective__per_token": 1.0}
    config = config_of(folder, **changes)
    to = tmp_path / "rows"
    recipe.run(config, str(to), workers=0, fit_lengths=True, console=Console(said))
    lengths = Prepared(to).rows().lengths
    assert max(lengths.values()) == 256
    assert f"--config.adaptation.training.target_length={lengths['target']}" in said.getvalue()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"adaptation__training__target_length": 64},
            "training.target_length 40, here it is 64; set it so, or prepare again",
        ),
        (
            {"adaptation__objective__per_token": 0.5},
            "bridge_start, which align tokens: False, here it is True; set it so, or prepare again",
        ),
        (
            {"adaptation__training__source_length": 64},
            "config.adaptation.training.source_length 48",
        ),
        ({"adaptation__training__packing": False}, "config.adaptation.training.packing True"),
        ({"adaptation__samplings": 2}, "config.adaptation.samplings 1"),
        ({"adaptation__subword_sampling": 0.1}, "config.adaptation.subword_sampling 0.0"),
        ({"legacy_source_order": True}, "config.legacy_source_order False"),
        ({"llm": ""}, "take config.encoder and config.llm"),
    ],
)
def test_rows_that_do_not_fit_the_config_are_refused(folder, prepared_folder, changes, message):
    to, _ = prepared_folder
    with pytest.raises(ValueError, match=r"^config\.adaptation_text: .*\.$") as raised:
        read_at_the_door(config_of(folder, adaptation_text=(str(to),), **changes))
    assert message in str(raised.value)


@pytest.mark.parametrize("side", ["encoder", "llm"])
def test_rows_of_another_tokenizer_are_refused(folder, prepared_folder, tmp_path, side):
    to, _ = prepared_folder
    if side == "encoder":
        train_nllb_tokenizer(NAMES, ["eng_Latn", "deu_Latn"], 500, tmp_path)
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "m2m_100"}))
    else:
        train_llama_tokenizer(NAMES, 380, tmp_path)
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match=rf"with another tokenizer than that of config\.{side};"):
        read_at_the_door(config_of(folder, adaptation_text=(str(to),), **{side: str(tmp_path)}))


@pytest.mark.parametrize("field", ["encoder", "llm", "adaptation_text"])
def test_prepare_needs_models_and_text(folder, tmp_path, field):
    empty = () if field == "adaptation_text" else ""
    with pytest.raises(ValueError, match=re.escape(f"config.{field} is {empty!r}")):
        run_recipe(config_of(folder, **{field: empty}), tmp_path)


def test_prepared_rows_are_not_prepared_again(folder, prepared_folder, tmp_path):
    to, _ = prepared_folder
    said = rf"^config\.adaptation_text: {to} is prepared already; give it to launch/train\.py\.$"
    with pytest.raises(ValueError, match=said):
        run_recipe(config_of(folder, adaptation_text=(str(to),)), tmp_path / "rows")
    assert not (tmp_path / "rows").exists()


def test_a_mixture_is_prepared_as_it_is_on_the_fly(folder, prepared_folder, tmp_path):
    """Three quarters of a source of ten texts, which are drawn over and over."""
    (tmp_path / "few.txt").write_text("\n".join(NAMES[:10]))
    sources = (f"{tmp_path}/few.txt", f"{folder}/texts.txt")
    config = config_of(folder, adaptation_text=sources, adaptation__mixture=(3.0, 1.0))
    said = io.StringIO()
    recipe.run(config, str(tmp_path / "a"), workers=0, fit_lengths=False, console=Console(said))
    told = " ".join(said.getvalue().split())
    assert "few.txt 75.4% (98 drawn of 10), texts.txt 24.6% (32 drawn of 120)" in told
    prepared = Prepared(tmp_path / "a")
    maker = maker_of(
        config,
        source_tokenizer(config.encoder),
        TargetTokenizer(config.llm),
        stage_seed(config.seed, "adaptation"),
    )
    assert_same_rows(prepared.rows(), make_rows(maker, read_at_the_door(config)))
    numbers = [n for row in prepared.rows() for n in row["example"].tolist() if n]
    assert len(numbers) == 130 and sum(n <= 10 for n in numbers) == 98
    run_recipe(config, tmp_path / "a")  # the same again is no error; another mixture is
    other = config_of(folder, adaptation_text=sources, adaptation__mixture=(1.0, 1.0))
    with pytest.raises(ValueError, match=r"rows of other texts or settings .*mixture"):
        run_recipe(other, tmp_path / "a")
    mixed = config_of(folder, adaptation_text=(str(prepared_folder[0]), sources[0]))
    with pytest.raises(ValueError, match="holds prepared rows, which cannot be mixed with other"):
        read_at_the_door(mixed)
    with pytest.raises(ValueError, match=r"adaptation\.mixture is \(1\.0,\); it must be \(\) or 2"):
        config_of(folder, adaptation_text=sources, adaptation__mixture=(1.0,))
    with pytest.raises(ValueError, match=r"config\.adaptation_text is .* without repetitions"):
        config_of(folder, adaptation_text=sources[:1] * 2)


def test_a_manifest_beside_text_is_no_matter(folder, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "manifest.json").write_text("{}")
    (tmp_path / "texts" / "a.txt").write_text("Norway and Sweden\n")
    run_recipe(config_of(folder, adaptation_text=(str(tmp_path / "texts"),)), tmp_path / "rows")
    assert len(Prepared(tmp_path / "rows").rows()) == 1


def test_a_remote_folder_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^--to=gs://bucket/x is remote; .* local folder.*\.$"):
        run_recipe(config_of(folder), "gs://bucket/x")
    assert not list(tmp_path.iterdir())


def test_lengths_are_fitted_to_packed_rows_alone(folder, tmp_path):
    config = config_of(folder, adaptation__training__packing=False)
    with pytest.raises(ValueError, match="--fit_lengths has no effect"):
        recipe.run(
            config, str(tmp_path), workers=0, fit_lengths=True, console=Console(io.StringIO())
        )


# ---------------------------------------------------------------- real text and tokenizers


@pytest.mark.real
def test_both_streams_are_full_on_real_text(mtllm_data: Path, mtllm_models: Path, monkeypatch):
    """English of NTREX-128 and NLLB-Seed, XLM-R's tokens against SmolLM2's, at 512 tokens."""
    monkeypatch.undo()
    files = ("ntrex128/NTREX-128/newstest2019-src.eng.txt", "nllb_seed/seed/eng_Latn")
    texts = [line for name in files for line in (mtllm_data / name).read_text("utf-8").splitlines()]
    maker = Maker(
        source=source_tokenizer(mtllm_models / "multilingual-e5-small"),
        target=TargetTokenizer(mtllm_models / "smollm2-135m-instruct"),
        english="eng_Latn",
        legacy_source_order=False,
        source_length=512,
        target_length=512,
        packing=True,
        subword_sampling=0.0,
        samplings=1,
        seed=0,
    ).fitted(texts)
    assert max(maker.lengths.values()) == 512
    rows = make_rows(maker, texts)
    assert min(rows.fill.values()) >= 0.975
    assert rows.counts.texts == len(texts) and rows.counts.dropped == 0
