"""The door: what each mistake on the command line answers, and how a process stops."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import config_dict

from mtllm_jax.cli import resolve, to_dict

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Inner:
    width: int
    rate: float = 0.1
    kind: Literal["lora", "all"] = "lora"


@dataclasses.dataclass(frozen=True)
class Source:
    path: str
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    seed: int = 0
    name: str = "toy"
    packing: bool = True
    languages: tuple[str, ...] = ("deu_Latn",)
    betas: tuple[float, float] = (0.9, 0.95)
    limit: float | None = None
    extra: Inner | None = None
    sources: tuple[Source, ...] = ()


def outer(**values: object) -> dict[str, object]:
    return {"inner": {"width": 8}, **values}


def test_resolve_builds_nested_dataclasses_and_converts_only_int_to_float_and_list_to_tuple():
    config = resolve(
        Outer, config_dict.ConfigDict(outer(betas=[1, 0.5], sources=[{"path": "a"}], limit=3))
    )
    assert config == Outer(Inner(8), betas=(1.0, 0.5), sources=(Source("a"),), limit=3.0)
    assert type(config.betas[0]) is float and type(config.limit) is float


@given(
    st.builds(
        Outer,
        inner=st.builds(Inner, st.integers(), st.floats(allow_nan=False, allow_infinity=False)),
        seed=st.integers(),
        name=st.text(),
        languages=st.lists(st.text()).map(tuple),
        limit=st.none() | st.floats(allow_nan=False, allow_infinity=False),
        extra=st.none() | st.builds(Inner, st.integers(), kind=st.sampled_from(["lora", "all"])),
        sources=st.lists(st.builds(Source, st.text())).map(tuple),
        betas=st.just((0.5, 1.0)),
    )
)
def test_a_config_survives_json(config):
    assert resolve(Outer, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (outer(sede=1), ["config.sede ", "config.seed"]),
        (outer(width=1), ["config.width ", "config.inner.width"]),
        (outer(qqqq=1), ["config.qqqq ", "languages"]),
        (outer(inner={"width": 8, "rat": 1}), ["config.inner.rat ", "config.inner.rate"]),
        (outer(inner={}), ["config.inner.width", "missing", "int"]),
        (outer(inner=3), ["config.inner ", "3", "group"]),
        (outer(seed="1"), ["config.seed", "'1'", "int"]),
        (outer(seed=True), ["config.seed", "True", "int"]),
        (outer(seed=1.0), ["config.seed", "1.0", "int"]),
        (outer(seed=None), ["config.seed", "None", "int"]),
        (outer(packing=1), ["config.packing", "1", "true or false"]),
        (outer(name=3), ["config.name", "3", "str"]),
        (outer(limit="x"), ["config.limit", "'x'", "float or none"]),
        (outer(limit=float("nan")), ["config.limit", "nan", "float"]),
        (outer(limit=False), ["config.limit", "False", "float"]),
        (outer(languages="deu_Latn"), ["config.languages", "'deu_Latn'", "list"]),
        (outer(languages=["a", 1]), ["config.languages[1]", "1", "str"]),
        (outer(betas=[0.9]), ["config.betas", "[0.9]", "list of 2"]),
        (outer(sources=[{"path": 1}]), ["config.sources[0].path", "1", "str"]),
        (outer(inner={"width": 8, "kind": "al"}), ["config.inner.kind", "'al'", "'lora', 'all'"]),
    ],
)
def test_resolve_names_field_value_and_what_is_allowed(values, words):
    with pytest.raises(ValueError, match=r"^config\.\w") as raised:
        resolve(Outer, values)
    message = str(raised.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


TOY_CONFIG = """
from ml_collections import ConfigDict

def small():
    return ConfigDict({
        "recipe": "toy", "seed": 0, "rate": 1.0, "packing": True, "languages": ("deu_Latn",),
        "model": {"width": 8, "kind": "lora"}, "limit": None, "note": None,
    })

RECIPES = {"small": small, "large": small}

def get_config(name="small"):
    return RECIPES[name]()
"""

TOY_SCRIPT = """
'''Toy: python toy.py --config=FILE'''
import dataclasses, json, sys, time
from typing import Literal
from absl import flags
from mtllm_jax import cli

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "only look")
ACTION = flags.DEFINE_string("action", "", "what to do")

@dataclasses.dataclass(frozen=True)
class Model:
    width: int
    kind: Literal["lora", "all"]

@dataclasses.dataclass(frozen=True)
class Toy:
    recipe: str
    seed: int
    rate: float
    packing: bool
    languages: tuple[str, ...]
    model: Model
    limit: float | None
    note: str | None = None

def loop():
    with cli.graceful_stop() as stop:
        step = 0
        print("ready", flush=True)
        while True:
            step += 1
            for _ in range(1000 if ACTION.value == "slow_loop" else 1):
                time.sleep(0.02)
            if stop.requested:
                print("saved", flush=True)
                raise cli.Interrupted(f"stage1, step {step}; saved.")

def main(config):
    assert "jax" not in sys.modules
    print(json.dumps(cli.to_dict(config)), flush=True)
    match ACTION.value:
        case "mistake": raise ValueError("the file\\nrows.jsonl is empty.")
        case "diverged": raise FloatingPointError("10 steps in a row were skipped.")
        case "bug": {}["x"]
        case "library": json.loads("{")
        case "sleep":
            print("ready", flush=True)
            time.sleep(60)
        case "dropped":
            class Slow:
                def __del__(self):
                    print("ready", flush=True)
                    time.sleep(60)
            Slow()
            time.sleep(60)
        case "swallowed":
            print("ready", flush=True)
            try:
                time.sleep(60)
            except KeyboardInterrupt:
                raise RuntimeError("a library's own error") from None
        case "loop" | "slow_loop": loop()

if __name__ == "__main__":
    cli.run_main(main, __doc__, lambda values: Toy, resumes=lambda: not DRY_RUN.value)
"""

BROKEN = {
    "no_function.py": "x = 1\n",
    "syntax.py": "x = 1\ndef (\n",
    "raises.py": "def get_config():\n    return 1 / 0\n",
    "number.py": "def get_config():\n    return 3\n",
    "nameless.py": "def get_config():\n    return {}\n",
    "odd.py": "def get_config():\n    return {'recipe': 'toy', 'sed': 1}\n",
    "broken.json": '{"seed": 1,\n "rate" 2}\n',
    "list.json": "[1]\n",
    "notes.txt": "seed=1\n",
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy.py").write_text(TOY_SCRIPT)
    (folder / "config.py").write_text(textwrap.dedent(TOY_CONFIG))
    for name, text in BROKEN.items():
        (folder / name).write_text(text)
    (folder / "latin.json").write_bytes(b'{"note": "\xe9"}')
    return folder


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "toy.py", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder: Path, *arguments: str) -> tuple[int, str, str]:
    process = start(folder, *arguments)
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


def test_every_kind_of_override_and_any_order(toy):
    code, out, err = run(
        toy, "--config.seed=3", "--config", "config.py:large", "--config.rate=2",
        "--noconfig.packing", "--config.languages=fra_Latn, zho_Hans", "--config.model.kind",
        "all", "--config.limit=.5", "--config.note=x y", "--dry_run",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert json.loads(out) == {
        "recipe": "toy",
        "seed": 3,
        "rate": 2.0,
        "packing": False,
        "languages": ["fra_Latn", "zho_Hans"],
        "model": {"width": 8, "kind": "all"},
        "limit": 0.5,
        "note": "x y",
    }


def test_a_runs_json_repeats_it_and_can_be_overridden(toy, tmp_path):
    _, first, _ = run(toy, "--config=config.py", "--config.languages=('a', 'b')")
    (tmp_path / "config.json").write_text(first)
    repeat = f"--config={tmp_path}/config.json"
    code, out, err = run(toy, repeat, "--config.limit=2")
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads(first) | {"limit": 2.0}
    (tmp_path / "config.json").write_text(out)
    assert json.loads(run(toy, repeat, "--config.limit=none")[1]) == json.loads(first)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--config is missing"]),
        (["--config="], ["--config is missing"]),
        (["--config=config.py", "--config=config.py"], ["2 times"]),
        (["--config=confg.py"], ["confg.py", "not a file", "config.py"]),
        (["--config=nowhere/config.json"], ["nowhere/config.json", "not a file"]),
        (["--config=notes.txt"], ["notes.txt", "FILE.py"]),
        (["--config=config.py:smal"], ["config.py", "'smal'", "small, large", "nearest: small"]),
        (["--config=config.py:"], ["config.py", "''", "small, large"]),
        (["--config=config.py:zzz"], ["config.py", "'zzz'", "small, large"]),
        (["--config=nameless.py:x"], ["nameless.py:x", "takes no name"]),
        (["--config=no_function.py"], ["no_function.py", "get_config"]),
        (["--config=syntax.py"], ["syntax.py", "line 2"]),
        (["--config=raises.py"], ["raises.py", "line 2", "ZeroDivisionError"]),
        (["--config=number.py"], ["number.py", "int", "ConfigDict"]),
        (["--config=odd.py"], ["config.sed ", "config.seed"]),
        (["--config=nameless.py"], ["config.recipe", "missing"]),
        (["--config=broken.json"], ["broken.json", "line 2"]),
        (["--config=list.json"], ["list.json", "list"]),
        (["--config=latin.json"], ["latin.json", "UTF-8"]),
        (["--config.sede=1"], ["config.sede ", "config.seed"]),
        (["--config.width=1"], ["config.width ", "config.model.width"]),
        (["--config.model=1"], ["config.model ", "config.model.width"]),
        (["--config.model.width.x=1"], ["config.model.width.x ", "config.model.width"]),
        (["--config.seed=abc"], ["config.seed", "'abc'", "an int"]),
        (["--config.seed=1.5"], ["config.seed", "'1.5'", "an int"]),
        (["--config.seed=a: b"], ["config.seed", "an int"]),
        (["--config.seed"], ["config.seed"]),
        (["--config.=1"], ["config. "]),
        (["--flagfile=gone"], ["gone"]),
        (["--config.rate=fast"], ["config.rate", "'fast'", "a float"]),
        (["--config.limit=low"], ["config.limit", "'low'", "a float or none"]),
        (["--config.rate=nan"], ["config.rate", "nan", "a float"]),
        (["--config.packing=maybe"], ["config.packing", "'maybe'", "true or false"]),
        (["--noconfig.seed"], ["config.seed"]),
        (["--config.languages=(1, 2)"], ["config.languages[0]", "1", "a str"]),
        (["--config.model.kind=al"], ["config.model.kind", "'al'", "'lora', 'all'"]),
        (["--dry_run=maybe"], ["--dry_run", "'maybe'", "true or false"]),
        (["--wrkdir=x"], ["--wrkdir", "--workdir"]),
        (["--seed=1"], ["--seed", "--config.seed"]),
        (["stray"], ["'stray'"]),
        (["--", "--dry_run"], ["'--dry_run'"]),
        (["--action=mistake"], ["the file rows.jsonl is empty."]),
        (["--action=diverged"], ["10 steps in a row were skipped."]),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_and_exit_code_2(toy, arguments, words):
    if not any(a.startswith("--config=") for a in arguments) and arguments:
        arguments = ["--config=config.py", *arguments]
    code, out, err = run(toy, *arguments)
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert all(word in err for word in words), err
    assert "Traceback" not in err + out


@pytest.mark.parametrize("action", ["bug", "library"])
def test_a_bug_keeps_its_traceback(toy, action):
    code, _, err = run(toy, "--config=config.py", f"--action={action}")
    assert code == 1
    assert "Traceback" in err


@pytest.mark.parametrize("flag", ["--help", "-h", "--helpfull"])
def test_help_is_short_and_names_the_flags(toy, flag):
    code, out, err = run(toy, flag)
    assert (code, err) == (0, "")
    assert out.startswith("Toy:") and "--workdir" in out and "--config.FIELD" in out
    assert len(out.splitlines()) < 20


def stop_when_ready(process: subprocess.Popen[str], *signals: int) -> tuple[int, str, str]:
    assert process.stdout is not None
    while process.stdout.readline() != "ready\n":
        assert process.poll() is None
    time.sleep(0.1)
    for signum in signals:
        process.send_signal(signum)
        time.sleep(0.2)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, out, err


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_loop_saves_and_says_how_to_go_on(toy, signum, code):
    process = start(toy, "--config=config.py", "--action=loop", "--config.note=a b")
    returned, out, err = stop_when_ready(process, signum)
    assert (returned, out) == (code, "saved\n")
    first, second = err.splitlines()
    assert first.startswith("stopped: stage1, step ")
    assert (
        second == "Go on with: python toy.py --config=config.py --action=loop '--config.note=a b'"
    )


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_outside_a_loop_it_stops_at_once(toy, signum, code):
    returned, _, err = stop_when_ready(start(toy, "--config=config.py", "--action=sleep"), signum)
    assert returned == code
    assert err.splitlines() == [
        "stopped.",
        "Go on with: python toy.py --config=config.py --action=sleep",
    ]


@pytest.mark.parametrize("action", ["loop", "sleep"])
def test_a_scheduler_may_choose_the_code_after_sigterm_and_not_after_ctrl_c(
    toy, monkeypatch, action
):
    monkeypatch.setenv("MTLLM_SIGTERM_EXIT", "143")
    for signum, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process = start(toy, "--config=config.py", f"--action={action}")
        assert stop_when_ready(process, signum)[0] == code


def test_it_stops_where_python_drops_exceptions(toy):
    process = start(toy, "--config=config.py", "--action=dropped")
    code, _, err = stop_when_ready(process, signal.SIGINT)
    assert code == 130 and err.splitlines()[0] == "stopped." and "ignored" not in err


def test_it_stops_where_a_library_makes_another_error_of_it(toy):
    process = start(toy, "--config=config.py", "--action=swallowed")
    code, _, err = stop_when_ready(process, signal.SIGTERM)
    assert code == 0 and err.splitlines()[0] == "stopped." and "Traceback" not in err


def test_a_dry_run_has_nothing_to_go_on_with(toy):
    process = start(toy, "--config=config.py", "--action=sleep", "--dry_run")
    assert stop_when_ready(process, signal.SIGINT)[2] == "stopped.\n"


def test_a_second_interrupt_does_not_wait_for_a_step_of_20_seconds(toy):
    process = start(toy, "--config=config.py", "--action=slow_loop")
    code, out, err = stop_when_ready(process, signal.SIGINT, signal.SIGINT)
    assert code == 130 and "saved" not in out
    assert err.strip().startswith("stopped at once") and "Traceback" not in err
