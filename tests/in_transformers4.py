"""Run by test_transformers4.py in an environment of its own: exported folders in transformers 4.57.

    python in_transformers4.py JOB.json OUT.json

JOB: {"texts", "languages", "questions", "ids", "stacks": {folder: kind}, "llms", "translators",
"tokenizers": [folder]}. OUT: for each folder what its model makes of them, with lists for arrays,
and "tokens", what the tokenizers make of the texts.
"""

import json
import sys

import torch
import transformers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultipleChoice,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

job, out = json.load(open(sys.argv[1], encoding="utf-8")), {}
texts, languages = job["texts"], job["languages"]
ids = torch.tensor(job["ids"])


def load(auto, folder):
    model, loading = auto.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, dtype=torch.float32
    )
    assert not any(loading.values()), (folder, loading)
    return model.eval()


for folder, kind in job["stacks"].items():
    model = load(AutoModel, folder)
    found = out[folder] = {"vectors": model.encode(texts, languages).tolist()}
    if kind == "classification":
        model = load(AutoModelForSequenceClassification, folder)
        found["answers"] = model.classify(texts, languages)
    if kind == "multiple_choice":
        model = load(AutoModelForMultipleChoice, folder)
        found["choices"] = model.choose(*zip(*job["questions"], strict=True), languages[0])
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    found["tokens"] = tokenizer(texts).input_ids
    found["llm_tokens"] = AutoTokenizer.from_pretrained(f"{folder}/llm_tokenizer")(texts).input_ids
    model.save_pretrained(f"{folder}-again")
with torch.no_grad():
    for folder in job["llms"]:
        out[folder] = load(AutoModelForCausalLM, folder)(ids).logits.tolist()
    for folder in job["translators"]:
        model = load(AutoModelForSeq2SeqLM, folder)
        out[folder] = model(input_ids=ids, decoder_input_ids=ids).logits.tolist()
out["tokens"] = {
    folder: AutoTokenizer.from_pretrained(folder)(texts).input_ids for folder in job["tokenizers"]
}
out["version"] = transformers.__version__
with open(sys.argv[2], "w", encoding="utf-8") as file:
    json.dump(out, file)
