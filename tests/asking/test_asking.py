"""An LLM asked benchmarks: choices against torch, files, before and after, what is refused."""

import functools
import io
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest
import reduced
import tiny_folders

from mtllm_jax.asking import answering
from mtllm_jax.asking import evaluate as asking
from mtllm_jax.data.templates import Template
from mtllm_jax.data.tokenise import TargetTokenizer
from mtllm_jax.evaluate import Source
from mtllm_jax.metrics import Console

TEXTS = [f"{a} of {b} is {c}" for a in ("capital", "river") for b in "abc" for c in "xyz"] * 3
CHAT = (
    "{% for message in messages %}<s>{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
CODES = {"en": "eng_Latn", "de": "deu_Latn", "sw": "swh_Latn"}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny LLM with a chat template, whose context is 200 tokens."""
    folder = tmp_path_factory.mktemp("asked") / "tiny"
    tiny_folders.llama(folder, TEXTS)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 200}))
    (folder / "chat_template.jinja").write_text(CHAT)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The official layouts, small: MGSM, Belebele, XCOPA with COPA."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    for two, code in CODES.items():
        lines = [f"{two} what is {i}?\t{i},000\r\n" for i in range(6)]
        write(f"mgsm/mgsm/mgsm_{two}.tsv", "".join(lines))
        rows = [
            {
                **{"link": f"l{i}", "question_number": 1 + i % 2, "dialect": code},
                **{"flores_passage": f"river of {two} is {i}", "question": f"what is {i}"},
                **{f"mc_answer{n}": f"{two} {'xyz'[n % 3] * n}" for n in (1, 2, 3, 4)},
                **{"correct_answer_num": str(1 + i % 4), "ds": "2023-05-03"},
            }
            for i in range(8)
        ]
        write_jsonl(f"belebele/{code}.jsonl", rows)
    header = "premise,question,choice1,choice2,label\n"
    rows = [f"river {i},{'cause' if i % 2 else 'effect'},is x,is z z,{i % 2}\n" for i in range(6)]
    for split in ("train", "dev", "test"):
        write(f"copa/data/copa/en_{split}.csv", header + "".join(rows))
    rows = [
        {"premise": f"mto {i}", "choice1": "x x", "choice2": "y", "question": "cause"}
        | {"label": i % 2, "idx": i, "changed": False}
        for i in range(6)
    ]
    write_jsonl("xcopa/data/sw/test.sw.jsonl", rows)
    return tmp_path


def write(path, text):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8", newline="")


def write_jsonl(path, rows):
    write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def asked(
    folder, task, against="", to="", prompt="", template="", max_new_tokens=None, spm="", **source
):
    """results.json, and what is printed."""
    fields = {"task": task, "data": task.split("_")[0], "english_data": "", "test": ""}
    fields |= {"languages": (), "limit": None}
    file = io.StringIO()
    results = asking.evaluate(
        str(folder),
        Source(**fields | source),
        asking.How(prompt, template, max_new_tokens, spm),
        against=against,
        to=to,
        means=answering.Means(batch_rows=4, fsdp=1, dtype="float32"),
        console=Console(file),
    )
    path = Path(to or f"evaluations/{task}-{Path(folder).name}")
    assert results == json.loads((path / "results.json").read_text())
    return results, file.getvalue()


def predictions(task, folder=None):
    path = folder or f"evaluations/{task}-tiny"
    lines = Path(path, "predictions/llm.jsonl").read_text().splitlines()
    return pd.DataFrame(map(json.loads, lines))


def say(monkeypatch, answer):
    """In the place of what the LLM writes: answer(prompt)."""
    monkeypatch.setattr(
        answering,
        "written",
        lambda llm, prompts, *_: [{"answer": answer(row["prompt"])} for row in prompts],
    )


@pytest.fixture(scope="session")
def torch_scores(folder):
    """(prompt ids, answer ids) → summed log-likelihood of the answer, by transformers."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def score(prompt, answer):
        ids = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            logp = model(ids).logits[0].log_softmax(-1)
        places = range(len(prompt) - 1, ids.shape[1] - 1)
        return float(sum(logp[p, ids[0, p + 1]] for p in places))

    return score


@pytest.mark.parametrize("template", ["chat", "none"])
def test_the_likeliest_choice_is_that_of_torch(template, folder, here, torch_scores):
    """Of XCOPA the likeliest of two texts, however many tokens they have."""
    asked(folder, "xcopa", english_data="copa", template=template)
    found = predictions("xcopa")
    assert set(found["language"]) == {"eng_Latn", "swh_Latn"} and len(found) == 12
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for _, row in found.iterrows():
        choices = ["is x", "is z z"] if row["language"] == "eng_Latn" else ["x x", "y"]
        if template == "chat":
            text = f"<s>user: {row['prompt']}\nassistant:"
            prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
            answers = [tokenizer(c, add_special_tokens=False)["input_ids"] for c in choices]
        else:
            prompt = tokenizer(row["prompt"])["input_ids"]
            answers = [
                tokenizer(f"{row['prompt']} {c}")["input_ids"][len(prompt) :] for c in choices
            ]
        scores = [torch_scores(prompt, answer) for answer in answers]
        assert abs(scores[0] - scores[1]) > 1e-3  # so that rounding decides nothing
        assert row["answer"] == str(1 + int(np.argmax(scores)))
    english = found[found["language"] == "eng_Latn"]["prompt"]
    assert english[0] == "river 0\nWhat happened as a result?"


def test_letters_and_what_is_written_are_named_apart(folder, here, monkeypatch):
    results, printed = asked(folder, "belebele_letters", limit=4)
    found = predictions("belebele_letters")
    prompt = found["prompt"][0]
    assert "river of de is" in prompt and "\nA. de y\nB. de zz\nC. de xxx\nD. de yyyy\n" in prompt
    right = (found["answer"] == found["label"]).groupby(found["language"]).mean()
    entry = results["systems"]["tiny"]
    assert entry["english"] == right["eng_Latn"]
    assert entry["languages"] == right.drop("eng_Latn").to_dict()
    assert "12/12 rows" in printed and "German" in printed
    say(monkeypatch, lambda prompt: "(B)" if "of sw" in prompt else "?")
    results, _ = asked(folder, "belebele_generated")
    entry, unread = (one["systems"]["tiny"] for one in results["measures"])
    assert entry["languages"] == {"deu_Latn": 0, "swh_Latn": 0.25} and entry["english"] == 0
    assert unread["languages"] == {"deu_Latn": 1, "swh_Latn": 0} and unread["english"] == 1


def test_before_and_after_stand_on_every_line(folder, here, monkeypatch, tmp_path):
    say(monkeypatch, lambda prompt: f"so 3.\nAnswer: {int(prompt.split()[3][0]) // 3 * 3},000")
    asked(folder, "mgsm", to="before")
    tuned = tmp_path / "sdrrl" / "model"
    shutil.copytree(folder, tuned)
    say(monkeypatch, lambda prompt: f"{prompt.split()[3][0]}000" if prompt[:2] == "sw" else "None.")
    results, printed = asked(tuned, "mgsm", against="before", to="after")
    accuracy = results["measures"][0]
    assert list(accuracy["systems"]) == ["sdrrl", "tiny"]
    assert accuracy["systems"]["tiny"]["languages"] == {"deu_Latn": 1 / 3, "swh_Latn": 1 / 3}
    assert accuracy["systems"]["sdrrl"]["languages"] == {"deu_Latn": 0, "swh_Latn": 1}
    change = accuracy["change"]
    assert change["english"]["difference"] == pytest.approx(-1 / 3)
    assert change["mean"]["difference"] == pytest.approx((-1 / 3 + 2 / 3) / 2)
    low, high = change["languages"]["swh_Latn"]["interval"]
    assert 0 < low < 2 / 3 < high <= 1
    for text in (
        printed,
        Path("after/results.md").read_text(),
        Path("after/report.html").read_text(),
    ):
        assert "+66.7" in text and "−33.3" in text and "change" in text
    page = Path("after/report.html").read_text()
    assert "Solve this problem step by step" in page and "SDRRL" in page
    assert "Solve this" in Path("after/prompt.txt").read_text()
    # Its predictions alone will do, and part of the rows.
    lines = Path("before/predictions/llm.jsonl").read_text().splitlines()
    Path("some.jsonl").write_text("\n".join(line for line in lines if "deu" not in line))
    results, printed = asked(tuned, "mgsm", against="some.jsonl", to="after")
    assert "the answers are those in after" in printed
    assert results["measures"][0]["change"]["languages"]["deu_Latn"] is None
    assert results["measures"][0]["change"]["mean"]["difference"] == pytest.approx(2 / 3)
    assert "some has answered 12 of the 18 rows" in results["notes"][-1]


def test_translation_both_ways(folder, here, monkeypatch):
    for code, text in (
        ("eng_Latn", "the river is old and cold"),
        ("deu_Latn", "der Fluss ist alt"),
    ):
        write(f"flores/devtest/{code}.devtest", f"{text}\n{text}\n{text}\n")
    say(monkeypatch, lambda prompt: "x")
    results, _ = asked(folder, "flores", to="before")
    assert [one["name"] for one in results["measures"]] == [
        *("chrF++ from English", "BLEU from English", "off-target from English"),
        *("chrF++ into English", "BLEU into English", "off-target into English"),
    ]
    found = predictions("flores", "before")
    assert found["prompt"][0].startswith("Translate this sentence from English into German.")
    assert found["prompt"][3].startswith("Translate this sentence from German into English.")
    assert found["id"].tolist() == [f"{way} {i}" for way in ("from", "into") for i in range(3)]
    with pytest.raises(ValueError, match="--languages names eng_Latn; it must name those that are"):
        asked(folder, "flores", languages=("eng_Latn",), to="G")


def test_short_answers(folder, here, monkeypatch):
    answers = {"en": "Bern", "de": "die Stadt Bern"}
    entries = {lang: [{"type": "entity", "text": text}] for lang, text in answers.items()}
    row = {"queries": {"en": "what", "de": "was"}, "answers": entries}
    write_jsonl("mkqa/mkqa.jsonl", [row | {"example_id": i} for i in range(3)])
    say(monkeypatch, lambda prompt: "Bern\nor Basel")
    results, _ = asked(folder, "mkqa", languages=("eng_Latn", "deu_Latn"))
    names = ["F1", "exact match", "F1, official", "exact match, official", "off-target"]
    assert [one["name"] for one in results["measures"]] == names
    entry = results["systems"]["tiny"]
    assert entry["english"] == 1 and entry["languages"] == {"deu_Latn": pytest.approx(2 / 3)}
    assert predictions("mkqa")["label"][0] == ["die Stadt Bern"]
    assert "Answer in German with a few words" in predictions("mkqa")["prompt"][0]
    asked(folder, "mkqa", languages=("eng_Latn", "deu_Latn"), against="evaluations/mkqa-tiny")


def test_an_article_loses_its_end_where_it_does_not_fit(folder, here, monkeypatch):
    rows = [
        {"id": "a", "text": "river of x " * 200, "summary": "s"},
        {"id": "b", "text": "c", "summary": "s"},
    ]
    write_jsonl("xlsum/english_test.jsonl", rows)
    say(monkeypatch, lambda prompt: "s")
    results, _ = asked(folder, "xlsum", max_new_tokens=20)
    first, second = predictions("xlsum")["prompt"]
    tokens = len(Template("chat", TargetTokenizer(folder))([first])[0])
    assert 150 < tokens <= 180 and first.endswith(
        "Summarise this article in one sentence, in English."
    )
    assert second.startswith("c\n")
    assert results["notes"] == ["In 1 prompts the text has lost its end, to fit the context."]
    assert results["systems"]["tiny"]["languages"] == {"eng_Latn": 1}


def test_another_prompt_is_told(folder, here, monkeypatch):
    say(monkeypatch, lambda prompt: "1")
    asked(folder, "mgsm", to="before")
    Path("p.txt").write_text("{question} {{in {language}}}\n")
    results, _ = asked(folder, "mgsm", prompt="p.txt", against="before", to="after")
    assert predictions("mgsm", "after")["prompt"][0] == "de what is 0? {in German}"
    assert results["notes"] == [
        "Before is tiny before, after tiny.",
        "tiny before was asked otherwise: the prompt was another one.",
    ]
    with pytest.raises(ValueError, match=r"--to=after holds another evaluation \(prompt"):
        asked(folder, "mgsm", to="after")


@pytest.mark.slow
def test_what_is_written_is_what_the_llm_goes_on_with(folder, here, torch_scores):
    """Its likeliest tokens; what does not fit the context is told."""
    Path("p.txt").write_text("{question}" + " of" * 150)
    with pytest.raises(ValueError, match="none of the 6 rows can be answered"):
        asked(folder, "mgsm", prompt="p.txt", max_new_tokens=60, languages=("deu_Latn",))
    shutil.rmtree("evaluations")
    write("mgsm/mgsm/mgsm_de.tsv", "what is x?\t1\n" + "what is " * 150 + "\t2\n")
    results, _ = asked(folder, "mgsm", max_new_tokens=3, languages=("deu_Latn",), template="none")
    found = predictions("mgsm")
    tokenizer = TargetTokenizer(folder)
    ids = Template("none", tokenizer)([found["prompt"][0]])[0].tolist()
    for _ in range(3):
        scores = [torch_scores(ids, [token]) for token in range(len(tokenizer.vocabulary))]
        ids.append(int(np.argmax(scores)))
    assert found["answer"][0] == tokenizer.decode([ids[-3:]])[0]
    assert found["answer"][1] == "" and "tokens; beside the answer" in found["problem"][1]
    first, second = results["notes"]
    assert first.startswith("1 of the 2 rows have no answer and count as such, the first as the p")
    assert second == "1 of the 2 answers were cut at 3 tokens."


@pytest.mark.slow
def test_a_stopped_start_is_gone_on_from(folder, here, monkeypatch):
    monkeypatch.setattr(answering, "_WINDOW", 5)
    score, calls = answering.Scores.__call__, []

    def failing(self, tokens):
        calls.append(len(tokens))
        if len(calls) == 3:
            raise ZeroDivisionError
        return score(self, tokens)

    monkeypatch.setattr(answering.Scores, "__call__", failing)
    with pytest.raises(ZeroDivisionError):
        asked(folder, "belebele_letters")
    asked(folder, "belebele_letters")
    assert calls == [5, 5, 5, 5, 5, 4]
    names = {"evaluation.json", "predictions", "prompt.txt"}
    names |= {"report.html", "results.json", "results.md"}
    assert {path.name for path in Path("evaluations/belebele_letters-tiny").iterdir()} == names


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"task": "sib200"},
            "--task=sib200 is not one that an LLM's folder is asked: these are mg",
        ),
        ({"task": "", "test": "r.jsonl", "data": ""}, "--test is for a trained stack"),
        ({"data": "xcopa"}, r"xcopa holds no mgsm/mgsm_<language>\.tsv or mgsm_<language>\.tsv"),
        ({"data": ""}, "--data is missing"),
        ({"languages": ("fra_Latn",)}, "mgsm: language 'fra_Latn' is not one of the 3"),
        ({"prompt": "no.txt"}, r"--prompt=no\.txt cannot be read: No such file"),
        ({"prompt": "a.txt"}, r"--prompt=a\.txt names \{text\}; of --task=mgsm it may name \{que"),
        ({"prompt": "b.txt"}, r"--prompt=b\.txt must name \{question\}"),
        ({"prompt": "c.txt"}, r"--prompt=c\.txt is no template"),
        ({"prompt": "d.txt"}, r"--prompt=d\.txt has more than a name in braces"),
        ({"english_data": "x"}, "--english_data has no effect on --task=mgsm"),
        ({"template": "x"}, "--template is 'x'; it may be one of chat, alpaca"),
        ({"max_new_tokens": 0}, "--max_new_tokens is 0"),
        ({"spm": "x.model"}, "--spm has no effect on --task=mgsm: nothing there"),
        ({"task": "xcopa", "max_new_tokens": 4}, "--max_new_tokens has no effect on --task=xcopa"),
        ({"against": "M"}, r"--against=M: M is not a file; it must be what this tool wrote"),
        ({"against": "bad.jsonl"}, "bad.jsonl, line 1: there is no column 'answer'"),
        ({"against": "other.jsonl"}, "other.jsonl, line 1: the row '0' in deu_Latn has another l"),
        ({"against": "twice.jsonl"}, "twice.jsonl, line 2: the row '0' in deu_Latn is there twice"),
        ({"against": "none.jsonl"}, "none.jsonl has no row in common with these"),
        ({"to": "gs://b/E"}, "--to=gs://b/E is remote"),
        ({"to": "mgsm"}, "--to=mgsm is not an empty folder, nor an evaluation"),
    ],
)
def test_mistakes_are_one_sentence(change, words, folder, here):
    prompts = {"a": "{text} {question}", "b": "{language}", "c": "{question", "d": "{question:9}"}
    for name, text in prompts.items():
        Path(f"{name}.txt").write_text(text)
    row = {"id": "0", "language": "deu_Latn", "label": "0,000", "answer": "1"}
    write_jsonl("bad.jsonl", [{k: v for k, v in row.items() if k != "answer"}])
    write_jsonl("other.jsonl", [row | {"label": "7"}])
    write_jsonl("twice.jsonl", [row, row])
    write_jsonl("none.jsonl", [row | {"id": "x"}])
    with pytest.raises(ValueError, match=words) as error:
        asked(folder, **{"task": "mgsm"} | change)
    assert "\n" not in str(error.value) and not Path("evaluations").exists()


def test_a_line_without_a_result_is_named(folder, here):
    write("mgsm/mgsm/mgsm_sw.tsv", "what?\t1\nwhat\n")
    with pytest.raises(ValueError, match=r"mgsm_sw\.tsv, line 2: there must be a question and its"):
        asked(folder, "mgsm")


def test_which_models_are_asked(folder, here):
    write("run/config.json", '{"recipe": "mtllm"}')
    write("stack/config.json", '{"model_type": "mtllm"}')
    assert asking.is_llm(str(folder), "sib200")
    write("tuned/config.json", '{"recipe": "sdrrl"}')
    with pytest.raises(ValueError, match="it must be one of its LLMs, as tuned/sdrrl/model"):
        asking.is_llm("tuned", "mgsm")
    assert not any(asking.is_llm(name, "mgsm") for name in ("run", "stack", "mgsm"))
    assert asking.is_llm("org/name", "mgsm") and not asking.is_llm("org/name", "sib200")
    assert asking.name_of("a/sdrrl/model") == "sdrrl" and asking.name_of("a/b") == "b"


@pytest.mark.slow
def test_the_tool(folder, here):
    """A whole process, and its exit codes."""
    launch = functools.partial(reduced.launch, "evaluate.py", cwd=here)
    flags = [f"--model={folder}", "--task=mgsm", "--data=mgsm", "--max_new_tokens=4"]
    code, printed, err = launch(*flags, "--languages=deu_Latn")
    assert (code, err) == (0, ""), err
    assert "accuracy, %" in printed and "off-target" in printed
    code, _, err = launch(*flags, "--languages=deu_Latn", "--prompt=no.txt")
    assert code == 2 and err.startswith("error: --prompt=no.txt cannot be read")
    write("run/config.json", '{"recipe": "mtllm"}')
    code, _, err = launch("--model=run", "--task=sib200", "--data=x", "--prompt=p")
    assert code == 2 and "--prompt has no effect: --model=run is no LLM" in err
