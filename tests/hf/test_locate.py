"""Names of models: folders, URLs, and the hub's, from a cache in its own layout; no network."""

import json
import os
import types

import huggingface_hub
import pytest
from etils import epath
from huggingface_hub import constants, errors

from mtllm_jax.hf.locate import Checkpoint, locate

OLD, NEW = "a" * 40, "b" * 40
SMALL = {
    "config.json": '{"architectures": ["M2M100ForConditionalGeneration"]}',
    "tokenizer.json": "{}",
}
INDEX = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and the hub out of reach."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def cached(cache, commit, files, refs=("main",), repo="org/name"):
    """A snapshot as huggingface_hub leaves it."""
    root = cache / f"models--{repo.replace('/', '--')}"
    for name, text in files.items():
        path = root / "snapshots" / commit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for ref in refs:
        (root / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (root / "refs" / ref).write_text(commit)
    return epath.Path(root / "snapshots" / commit)


def refused(message, *arguments, **keywords):
    with pytest.raises(ValueError, match=message) as caught:
        locate(*arguments, **keywords)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------ folders


def test_folders(cache, tmp_path):
    (tmp_path / "org" / "name").mkdir(parents=True)
    cached(cache, OLD, SMALL | {"model.safetensors": ""})
    for name in ("org/name", "./org/name", str(tmp_path / "org" / "name"), "org", "."):
        assert locate(name) == Checkpoint(name, epath.Path(name), None)
    found = locate(tmp_path / "org")
    assert (found.name, found.folder) == (str(tmp_path / "org"), epath.Path(tmp_path / "org"))
    refused("org/name is a folder, which has no revision 'main'", "org/name", "main")


def test_urls(cache):
    for name in ("gs://bucket/some/model", "s3://bucket/model/", "hf://org/name"):
        found = locate(name)
        assert os.fspath(found.folder) == name.rstrip("/")
        assert found.revision is None
    refused(
        "ftp://host/model is no URL of a folder that can be read; it may be gs://, s3",
        "ftp://host/model",
    )


@pytest.mark.parametrize(
    "name",
    ["./none", "../none/x", "/none", "/none/x", "a/b/c", "org/na me", "org/", "~/x", "org/ü"],
)
def test_paths_to_nothing(name, cache):
    refused(f"{name} is not a folder$", name)


def test_names_of_one_word(cache):
    refused("bert is not a folder; names on the Hugging Face hub are org/name", "bert")
    refused("'' is not a folder", "")


# ------------------------------------------------------------------ the hub, from its cache


def test_a_name_is_found_in_the_cache(cache):
    weights = {"model.safetensors": "x"}
    old = cached(cache, OLD, SMALL | weights, refs=("v1", "refs/pr/3"))
    new = cached(cache, NEW, SMALL | weights)
    assert locate("org/name") == Checkpoint("org/name", new, NEW)
    assert locate("org/name@v1") == Checkpoint("org/name@v1", old, OLD)
    assert locate("org/name@refs/pr/3").revision == OLD
    assert locate(f"org/name@{OLD}").folder == old
    assert locate("org/name", "v1") == Checkpoint("org/name", old, OLD)
    assert locate("org/name@main", OLD) == Checkpoint("org/name@main", old, OLD)  # pinned
    assert (new / "config.json").read_text() == SMALL["config.json"]


def test_small_files_alone(cache):
    folder = cached(cache, OLD, SMALL)
    assert locate("org/name", weights=False).folder == folder
    refused("org/name: its weights are not, or not all, in the hub's cache", "org/name")
    shards = {"model.safetensors.index.json": INDEX, "model-1.safetensors": ""}
    cached(cache, OLD, shards)
    refused("not, or not all, in the hub's cache .* HF_HUB_OFFLINE is set", "org/name")
    cached(cache, OLD, {"model-2.safetensors": ""})
    assert locate("org/name").folder == folder


def test_an_adapter(cache):
    folder = cached(cache, OLD, {"adapter_config.json": "{}", "adapter_model.safetensors": ""})
    assert locate("org/name").folder == folder


def test_not_in_the_cache(cache):
    refused(
        "org/other is no folder here, is not, or not whole, in the hub's cache, and HF_HUB_OFF",
        "org/other",
    )
    cached(cache, OLD, SMALL)
    refused("org/name .* in the hub's cache at revision v2, and HF_HUB_OFFLINE", "org/name@v2")
    refused(f"org/name .* cache at revision {NEW}, and", "org/name", NEW, weights=False)


# ------------------------------------------------------------------ the hub, within reach


@pytest.fixture
def hub(cache, monkeypatch):
    """A hub with some files, and the list of what was asked of it."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    files = SMALL | {
        "pytorch_model.bin": "",
        "consolidated.safetensors": "",
        "onnx/config.json": "",
        "onnx/model.safetensors": "",
        "chat_template.jinja": "",
        "llm_tokenizer/tokenizer.json": "",
        "README.md": "",
        "images/README.md": "",
    }
    asked = []

    def download(repo, revision=None, allow_patterns=None, ignore_patterns=None):
        wanted = huggingface_hub.utils.filter_repo_objects(
            files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        asked.append((repo, revision, sorted(wanted)))
        return str(cached(cache, NEW, {name: files[name] for name in asked[-1][2]}))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return files, asked


SMALL_FILES = [
    "README.md", "chat_template.jinja", "config.json", "llm_tokenizer/tokenizer.json",
    "tokenizer.json",
]  # fmt: skip


def test_small_files_come_first_and_no_others_than_needed(hub):
    files, asked = hub
    files["model.safetensors"] = ""
    files["adapter_model.safetensors"] = ""
    locate("org/name@v1", weights=False)
    assert asked == [("org/name", "v1", SMALL_FILES)]
    asked.clear()
    found = locate("org/name@v1")
    weights = ["adapter_model.safetensors", "model.safetensors"]
    assert asked == [("org/name", "v1", SMALL_FILES), ("org/name", NEW, weights)]
    assert found.revision == NEW


def test_shards_are_those_of_the_index(hub):
    files, asked = hub
    files |= {"model.safetensors.index.json": INDEX, "model-1.safetensors": ""}
    files |= {"model-2.safetensors": "", "model-3.safetensors": ""}
    locate("org/name")
    assert asked[1][2] == ["model-1.safetensors", "model-2.safetensors"]


def test_weights_of_torch_alone(hub):
    refused(
        "org/name has no safetensors files on the hub; convert its weights once and name the folder"
        " instead: python -c .*M2M100ForConditionalGeneration, AutoTokenizer; .*'org/name'",
        "org/name",
    )
    assert locate("org/name", weights=False).revision == NEW


def failing(monkeypatch, error):
    def download(*arguments, **keywords):
        raise error

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


def http_error(kind):
    """As it is raised for an answer of the hub."""

    answer = types.SimpleNamespace(headers={}, request=None)
    return kind("401 Client Error.\n\nLong text", response=answer)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            http_error(errors.GatedRepoError),
            "org/name is gated: ask for access on https://huggingface.co/org/name, then run `hf a",
        ),
        (
            http_error(errors.RepositoryNotFoundError),
            "org/name is neither a folder here nor on the Hugging Face hub; for a private model",
        ),
        (
            http_error(errors.RevisionNotFoundError),
            "org/name has no revision 'v1' on the Hugging Face hub",
        ),
        (errors.HFValidationError("Repo\nid"), "org/name is neither .* nor a name that the Hug"),
    ],
)
def test_what_the_hub_says(error, message, cache, monkeypatch):
    failing(monkeypatch, error)
    refused(message, "org/name@v1")


def test_a_hub_out_of_reach(cache, monkeypatch):
    error = errors.LocalEntryNotFoundError("Got: ConnectError: []\nmore")
    error.__cause__ = ConnectionError("no route")
    failing(monkeypatch, error)
    refused(r"hub's cache, and the hub cannot be reached \(ConnectionError\)", "org/name")


def test_other_errors_pass(cache, monkeypatch):
    failing(monkeypatch, OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        locate("org/name")
