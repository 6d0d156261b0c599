"""launch/generate.py: prompts in, answers out, what is refused or rejected, stopping, processes."""

import contextlib
import functools
import io
import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
import reduced
import tiny_folders
from processes import Processes

from mtllm_jax import generate, sampling
from mtllm_jax.data.templates import Template
from mtllm_jax.data.tokenise import TargetTokenizer
from mtllm_jax.generate import Decoding
from mtllm_jax.metrics import Console
from mtllm_jax.sampling import Sampler, Sampling

TEXTS = [f"{a} of {b} is {c}" for a in ("capital", "river") for b in "abc" for c in "xyz"] * 3
CHAT = (
    "{% for message in messages %}{% if message.role not in ('system', 'user') %}"
    "{{ raise_exception('who is ' + message.role) }}{% endif %}"
    "<s>{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
# Their longest prompt has slots that most tests here share, and so their programs.
ROWS = [{"id": str(i), "prompt": f"what is {i % 7} " * (i % 5 + 1), "n": i} for i in range(20)]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny LLM with a chat template, whose context is 160 tokens."""
    folder = tmp_path_factory.mktemp("llm") / "llm"
    tiny_folders.llama(folder, TEXTS)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 160}))
    (folder / "chat_template.jinja").write_text(CHAT)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    return tmp_path


def decoding(**changes):
    settings = {
        "template": "none",
        "system": "",
        "sampling": Sampling(),
        "max_new_tokens": 8,
        "stop": (),
        "seed": 0,
        "batch_rows": 8,
        "dtype": "float32",
    }
    return Decoding(**settings | changes)


def answered(folder, rows, output="out.jsonl", fsdp=1, **changes):
    """What is printed."""
    file = io.StringIO()
    console = Console(file)
    generate.generate(
        str(folder), str(rows), output, decoding(**changes), fsdp=fsdp, console=console
    )
    return file.getvalue()


def write(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def texts(path="out.jsonl"):
    return {row["id"]: row["answer"] for row in read(path)}


def test_rows_come_in_their_order_with_answers_whatever_their_order_was(folder, here):
    printed = answered(folder, write("r.jsonl", ROWS))
    rows = read("out.jsonl")
    assert [{name: row[name] for name in ("id", "prompt", "n")} for row in rows] == ROWS
    assert len(set(texts().values())) > 10
    assert all(row.keys() - ROWS[0].keys() == {"answer", "ended"} for row in rows)
    assert "answering  20/20 rows" in printed and "tokens/s" in printed
    assert "out.jsonl: 20 rows" in printed and not Path("out.jsonl.parts").exists()
    order = np.random.default_rng(0).permutation(len(ROWS))
    answered(folder, write("s.jsonl", [ROWS[i] for i in order]), "s-out.jsonl")
    assert texts("s-out.jsonl") == texts()


def test_the_tokens_of_answers_can_be_kept_as_they_were_drawn(folder, here):
    """The model knows nothing: its tokens are seldom those that their text would be read as."""
    console = Console(io.StringIO())
    rows = str(write("r.jsonl", ROWS))
    generate.generate(
        str(folder), rows, "out.jsonl", decoding(), fsdp=1, console=console, keep_ids=True
    )
    tokenizer = TargetTokenizer(folder)
    for row in (found := read("out.jsonl")):
        ids = np.array(row["answer_ids"], np.int32)
        assert tokenizer.eos_id not in ids and len(ids) + row["ended"] <= 8
        assert tokenizer.decode([ids]) == [row["answer"]]
    assert any(tokenizer.encode([r["answer"]])[0].tolist() != r["answer_ids"] for r in found)
    named = str(write("s.jsonl", [ROWS[0] | {"answer_ids": []}]))
    with pytest.raises(ValueError, match="there is a column 'answer_ids'"):
        generate.generate(
            str(folder), named, "s-out.jsonl", decoding(), fsdp=1, console=console, keep_ids=True
        )


@pytest.mark.slow
@pytest.mark.parametrize(("batch_rows", "devices", "fsdp"), [(1, 1, 1), (5, 1, 1), (4, 4, 2)])
def test_batches_and_devices_change_no_text(batch_rows, devices, fsdp, folder, here, monkeypatch):
    answered(folder, write("r.jsonl", ROWS))
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:devices])
    answered(folder, "r.jsonl", "b.jsonl", fsdp, batch_rows=batch_rows)
    assert Path("b.jsonl").read_bytes() == Path("out.jsonl").read_bytes()


def test_rows_of_one_prompt_are_answered_apart_and_seeds_too(folder, here):
    rows = [{"id": str(i), "prompt": ROWS[4]["prompt"]} for i in range(6)]
    answered(folder, write("r.jsonl", rows))
    answered(folder, "r.jsonl", "seed.jsonl", seed=1)
    assert len(set(texts().values()) | set(texts("seed.jsonl").values())) > 9


def test_rows_without_an_answer_are_kept_apart_with_the_reason(folder, here):
    bad = [
        ({"id": "a"}, "there is no prompt"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": ["x"]}, "the prompt is ['x'], it must be a string"),
        ({"prompt": "what is " * 80}, "tokens; beside the answer the context has room for 152"),
        ({"prompt": "\ud800"}, "half of a surrogate pair"),
    ]
    write("r.jsonl", [*ROWS[:5], *(row for row, _ in bad)])
    printed = answered(folder, "r.jsonl")
    assert len(read("out.jsonl")) == 5
    rejects = read("out.jsonl.rejects.jsonl")
    assert [reject["line"] for reject in rejects] == [6, 7, 8, 9, 10]
    for (row, reason), reject in zip(bad, rejects, strict=True):
        assert reason in reject["reason"] and reject["row"] == row
    assert "warning: rows without an answer: 5; out.jsonl.rejects.jsonl says why" in printed


def test_where_an_answer_ends(folder, here, monkeypatch):
    """At a token that --stop names, or cut; one whose logits are no numbers is a reject."""
    tokenizer = TargetTokenizer(folder)
    token = tokenizer.pieces([300])[0]
    told = [[5, 6, 300, -1], [5, 6, 7, 8], [5, sampling.NO_NUMBER, -1, -1], [2, -1, -1, -1]]

    def call(self, given, keys, num_slots, told_tokens):
        assert 300 in self._stops_E and 2 in self._stops_E
        return np.array([told[prompt[-1] % 4] for prompt in given], np.int32)

    prompts = {}
    for text in map(str, range(10)):
        prompts.setdefault(tokenizer.encode([text])[0][-1] % 4, text)
    assert len(prompts) == 4
    monkeypatch.setattr(Sampler, "__call__", call)
    write("r.jsonl", [{"prompt": prompts[kind]} for kind in range(4)])
    answered(folder, "r.jsonl", stop=(token,), max_new_tokens=4)
    rows = [(row["answer"], row["ended"]) for row in read("out.jsonl")]
    assert rows == [
        (tokenizer.decode([[5, 6]])[0], True),
        (tokenizer.decode([[5, 6, 7, 8]])[0], False),
        ("", True),
    ]
    (reject,) = read("out.jsonl.rejects.jsonl")
    assert reject["line"] == 3 and reject["reason"] == "the model's logits for it are no numbers"


@pytest.mark.parametrize(
    ("content", "changes", "words"),
    [
        (None, {}, r"r\.jsonl does not exist"),
        ('{"prompts": "a"}', {}, r"line 1: there is no column 'prompt'.*nearest: 'prompts'"),
        ('{"prompt": "a", "answer": ""}', {}, "there is a column 'answer', which is what answers"),
        ('{"prompt": ""}', {}, "none of the 1 rows .* the first, line 1: the prompt is empty"),
        ('{"prompt": "a"}', {"output": "out.csv"}, r"--output=out\.csv must end in \.jsonl"),
        ('{"prompt": "a"}', {"template": "chatml"}, "--template is 'chatml'; it may be one of"),
        ('{"prompt": "a"}', {"system": "Be"}, "--system is 'Be', for which template 'none' has no"),
        ('{"prompt": "a"}', {"stop": ("no such",)}, "--stop names 'no such', which is not one"),
        ('{"prompt": "a"}', {"max_new_tokens": 160}, "--max_new_tokens is 160; the context of"),
        ('{"prompt": "a"}', {"batch_rows": 0}, "--batch_rows is 0; it must be at least 1"),
    ],
)
def test_mistakes_are_one_sentence(content, changes, words, folder, here, monkeypatch):
    monkeypatch.setattr(generate, "load_llama", None)  # the weights are not read
    if content is not None:
        Path("r.jsonl").write_text(content)
    with pytest.raises(ValueError, match=words) as error:
        answered(folder, "r.jsonl", **changes)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_files_are_looked_at_before_the_model(here):
    write("r.jsonl", ROWS[:1])
    for rows, output, words in (
        ("no.jsonl", "out.jsonl", "no.jsonl does not exist"),
        ("r.jsonl", "r.jsonl", "--output=r.jsonl exists"),
        ("r.jsonl", "out.jsonl", r"^--model: /no is not a folder\.$"),
    ):
        with pytest.raises(ValueError, match=words):
            answered("/no", rows, output)


# ---------------------------------------------------------------- templates


def test_templates(folder):
    """Text by text; what the chat template makes is what transformers makes of it."""
    tokenizer = TargetTokenizer(folder)

    def text(name, system=""):
        (ids,) = Template(name, tokenizer, system)(["what {is} x"])
        assert tokenizer.pieces(ids[:1]) == ["<s>"]  # once
        assert "<s>" not in tokenizer.pieces(ids[1:])
        return tokenizer.decode([ids])[0]

    assert text("none") == "what {is} x"
    assert text("alpaca") == (
        "Below is an instruction that describes a task. Write a response that appropriately"
        " completes the request.\n\n### Instruction:\nwhat {is} x\n\n### Response:\n"
    )
    assert text("llama2") == "[INST] what {is} x [/INST]"
    assert text("llama2", "Be") == "[INST] <<SYS>>\nBe\n<</SYS>>\n\nwhat {is} x [/INST]"
    assert text("chat") == "user: what {is} x\nassistant:"
    chat = [{"role": "system", "content": "Be"}, {"role": "user", "content": "what"}]
    theirs = tokenizer._tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    (ids,) = Template("chat", tokenizer, "Be")(["what"])
    assert ids.tolist() == theirs["input_ids"]
    with pytest.raises(ValueError, match=r"^the chat template refuses it: who is admin\.$"):
        tokenizer.encode_chats([[{"role": "admin", "content": "x"}]])


def test_a_tokenizer_without_a_chat_template(tmp_path, folder):
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(ValueError, match="no chat template; others are alpaca, llama2, none"):
        Template("chat", TargetTokenizer(tmp_path))


# ---------------------------------------------------------------- batches


def test_slots_are_few_and_near():
    found = [generate.slots(length) for length in range(1, 4000)]
    assert len(set(found)) < 20 and found == sorted(found)
    for length, slots in enumerate(found, 1):
        assert length <= slots <= max(16, 1.5 * length + 16)


def test_few_prompts_have_no_slots_of_their_own():
    counts = {16: 3, 32: 40, 48: 31, 64: 2, 128: 1}
    assert generate.chosen_widths(counts, 32) == [32, 64, 128]
    assert generate.chosen_widths({16: 1}, 32) == [16]


# ---------------------------------------------------------------- stopping


class Stopped(Exception):
    pass


@contextlib.contextmanager
def counted(monkeypatch, most=10**9):
    """Batches that are answered, in a list; it fails after so many."""
    call, done = Sampler.__call__, []

    def counting(*arguments):
        if len(done) == most:
            raise Stopped
        done.append(1)
        return call(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "__call__", counting)
        yield done


def test_a_stopped_start_is_gone_on_from_at_the_batch(folder, here, monkeypatch):
    write("r.jsonl", ROWS)
    with counted(monkeypatch, 2), pytest.raises(Stopped):
        answered(folder, "r.jsonl")
    assert not Path("out.jsonl").exists()
    with pytest.raises(ValueError, match=r"begun with something else \(seed 0 → 1\); remove it"):
        answered(folder, "r.jsonl", seed=1)
    write("r.jsonl", [ROWS[0] | {"prompt": "other"}, *ROWS[1:]])
    with pytest.raises(ValueError, match="the rows have changed since"):
        answered(folder, "r.jsonl")
    write("r.jsonl", ROWS)
    with counted(monkeypatch) as done:
        answered(folder, "r.jsonl")
    assert len(done) == 1  # of three
    answered(folder, "r.jsonl", "whole.jsonl")
    assert Path("out.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()


launch = functools.partial(reduced.launch, "generate.py")


def test_missing_flags_are_named_before_anything_is_imported(tmp_path):
    code, out, err = launch("--model=M", cwd=tmp_path)
    assert (code, out) == (2, "") and err.startswith("error: --input is missing")


@pytest.mark.slow
def test_killed_or_by_two_processes_the_output_is_the_same_to_the_byte(folder, tmp_path):
    write(tmp_path / "r.jsonl", [{"id": i, "prompt": f"what is {i}"} for i in range(200)])
    settings = ["--max_new_tokens=16", "--batch_rows=8", "--temperature=1", "--top_p=1"]
    flags = [f"--model={folder}", "--input=r.jsonl", *settings]
    code, printed, err = launch(*flags, "--output=whole.jsonl", cwd=tmp_path)
    assert (code, err) == (0, "") and "tokens/s" in printed
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert len({row["answer"] for row in read(tmp_path / "whole.jsonl")}) > 100

    script = reduced.ROOT / "launch" / "generate.py"
    with Processes(2, script, *flags, "--output=two.jsonl", cwd=tmp_path, devices=2) as two:
        codes, _, errors = two.ended()
        assert codes == [0, 0], errors
    assert (tmp_path / "two.jsonl").read_bytes() == whole

    parts = tmp_path / "killed.jsonl.parts"
    killed = [*flags, "--output=killed.jsonl"]
    with Processes(1, script, *killed, cwd=tmp_path, devices=1) as one:
        one.wait_until(lambda: list(parts.glob("*.npy")), "batch")
        os.kill(one.processes[0].pid, signal.SIGKILL)
        one.processes[0].wait()
    there = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.npy")}
    assert there and not (tmp_path / "killed.jsonl").exists()
    code, _, err = launch(*killed, cwd=tmp_path)
    assert (code, err) == (0, "")
    assert (tmp_path / "killed.jsonl").read_bytes() == whole
