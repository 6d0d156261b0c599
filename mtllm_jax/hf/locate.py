"""Where a model lies that the user named: a folder, local or remote, or a name on the hub.

    /models/nllb   ./nllb   gs://bucket/nllb    a folder
    org/name   org/name@revision                the Hugging Face hub's, unless it is a folder here

What the hub has is fetched into the cache of huggingface_hub; what is there needs no network.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from etils import epath

from mtllm_jax.hf.files import Files
from mtllm_jax.hf.tensors import conversion
from mtllm_jax.runfolder import is_remote

_SCHEMES = ("gs", "s3", "az", "hf")  # that epath knows
_HUB_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>\S+))?", re.ASCII)
# Configs, indices, tokenizers, and the card with the licence; other runtimes' files lie in folders.
_SMALL = ("*.json", "*.txt", "*.model", "*.jinja", "README.md")
_IGNORED = ("onnx/*", "openvino/*", "original/*", "runs/*")


@dataclass(frozen=True)
class Checkpoint:
    """A model found by its name.

    name: as it was given. folder: where its files lie. revision: the commit on the hub, by which
    the very same files are found again; None for a folder.
    """

    name: str
    folder: epath.Path
    revision: str | None = None


def locate(
    name: str | os.PathLike, revision: str | None = None, *, weights: bool = True
) -> Checkpoint:
    """The folder of a model, its files fetched from the hub where it is named so.

    revision: a commit, branch or tag; it goes before the one in the name, so that a run that was
    told "org/name@main" keeps to the commit it found. weights: False fetches configs and tokenizer
    alone, to check them before gigabytes are fetched. ValueError says in one sentence what is wrong
    with the name, the revision, the access or the cache.
    """
    name = os.fspath(name)
    if is_remote(name) or (name and Path(name).is_dir()):
        if revision is not None:
            raise ValueError(f"{name} is a folder, which has no revision {revision!r}")
        if is_remote(name) and name.split("://")[0] not in _SCHEMES:
            allowed = ", ".join(f"{scheme}://" for scheme in _SCHEMES)
            raise ValueError(f"{name} is no URL of a folder that can be read; it may be {allowed}")
        return Checkpoint(name, epath.Path(name))
    found = _HUB_NAME.fullmatch(name)
    if name.startswith(("/", ".", "~")) or found is None:
        hint = "" if "/" in name else "; names on the Hugging Face hub are org/name"
        raise ValueError(f"{name or repr(name)} is not a folder{hint}")
    repo, revision = found["repo"], revision or found["revision"]
    snapshot = _fetch(repo, revision, _SMALL)
    if weights:
        files = _weight_files(snapshot)
        _fetch(repo, snapshot.name, [name for names in files for name in names])
        _check_weights(repo, snapshot, files)
    return Checkpoint(name, epath.Path(snapshot), snapshot.name)


def _weight_files(snapshot: Path) -> list[list[str]]:
    """The files of a model's weights and of an adapter's, as their indices name them.

    A repository may hold others beside them: the same weights once more, for another program.
    """
    files, found = Files(snapshot), []
    for stem in ("model", "adapter_model"):
        index = f"{stem}.safetensors.index.json"
        content = files.read_json(index) if files.has(index) else None
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        listed = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
        found.append(sorted(listed) or [f"{stem}.safetensors"])
    return found


def _check_weights(repo: str, snapshot: Path, files: Sequence[Sequence[str]]) -> None:
    """ValueError unless the weights of a model or of an adapter have come."""
    from huggingface_hub import constants

    if any(all((snapshot / name).exists() for name in names) for names in files):
        return
    if constants.HF_HUB_OFFLINE:
        raise ValueError(
            f"{repo}: its weights are not, or not all, in the hub's cache ({snapshot}), and"
            " HF_HUB_OFFLINE is set"
        )
    config = Files(snapshot).read_json("config.json") if (snapshot / "config.json").exists() else {}
    architecture = str((config.get("architectures") or [""])[0])
    to = repo.split("/")[1]
    raise ValueError(
        f"{repo} has no safetensors files on the hub; convert its weights once and name the folder"
        f" instead: {conversion(repo, architecture, to=to)}"
    )


def _fetch(repo: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The snapshot of a repository in the cache, with the files that match `patterns`."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    try:
        folder = huggingface_hub.snapshot_download(
            repo, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(_IGNORED)
        )
    except errors.GatedRepoError:
        why = f"is gated: ask for access on {constants.ENDPOINT}/{repo}, then run `hf auth login`"
    except errors.RepositoryNotFoundError:
        why = (
            "is neither a folder here nor on the Hugging Face hub; for a private model run"
            " `hf auth login`"
        )
    except errors.RevisionNotFoundError:
        why = f"has no revision {revision!r} on the Hugging Face hub"
    except errors.LocalEntryNotFoundError as error:
        reason = f"the hub cannot be reached ({_first_cause(error)})"
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else reason
        at = f" at revision {revision}" if revision else ""
        why = f"is no folder here, is not, or not whole, in the hub's cache{at}, and {reason}"
    except errors.HFValidationError:
        why = "is neither a folder here nor a name that the Hugging Face hub allows"
    else:
        return Path(folder)
    raise ValueError(f"{repo} {why}") from None


def _first_cause(error: BaseException) -> str:
    """The name of the error that a chain began with."""
    while error.__cause__ is not None:
        error = error.__cause__
    return type(error).__name__
