"""What every test finds: eight simulated devices, strict shapes, no hub, the real data if any."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator

# JAX reads these once, at its first import: nothing above may import it. Arrays live on the first
# device unless a test spreads them, so a test without a mesh does not pay for the other seven.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    )
os.environ["HF_HUB_OFFLINE"] = "1"
# Where transformers copies a folder's code before it runs it, read at its first import too. One
# folder for all: once code was run from one, Python looks for its neighbours there alone.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="modules-")

from pathlib import Path
from typing import Any

import hypothesis
import jax
import pytest
import reduced
from filelock import FileLock

from mtllm_jax.allocator import keep_freed_memory

keep_freed_memory()
# How long an example takes says what else the machine does.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

# [B, S] + [S] is a mistake here until someone writes it out.
jax.config.update("jax_numpy_rank_promotion", "raise")


def _folder(variable: str, what: str) -> Path:
    """The folder that `variable` names. Unset skips the test; a path that is none fails it."""
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set: it names {what}")
    folder = Path(value).resolve()
    if not folder.is_dir():
        pytest.fail(f"{variable}={value} is not a folder: it names {what}")
    return folder


@pytest.fixture(scope="session")
def mtllm_data() -> Path:
    """The folder of real data sets, one sub-folder each (sib200/, nusax/, …)."""
    return _folder("MTLLM_DATA", "the folder of real data sets")


@pytest.fixture(scope="session")
def mtllm_models() -> Path:
    """The folder of real pretrained checkpoints, one Hugging Face folder each."""
    return _folder("MTLLM_MODELS", "the folder of real pretrained checkpoints")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """gs://bucket, empty; processes that the test starts find it too."""
    from bucket import served  # the one thing here that needs an emulator

    with served() as bucket:
        for name, value in bucket.environment.items():
            monkeypatch.setenv(name, value)
        yield bucket


@pytest.fixture(scope="session")
def mini_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run of the reduced config, finished. Read it, do not change it."""
    return _finished_run(tmp_path_factory, "mini", lambda folder: ())


@pytest.fixture(scope="session")
def own_run(tmp_path_factory: pytest.TempPathFactory, mini_run: Path) -> Path:
    """The same with a user's own models (those of `mini_run`), task and text, and by LoRA."""

    def arguments(folder: Path) -> Iterable[str]:
        fields = reduced.own_fields(folder, mini_run)
        fields |= {"task.name": "continents", "trained": "lora", "lora.rank": "4"}
        return reduced.flags(fields)

    return _finished_run(tmp_path_factory, "own", arguments)


def _finished_run(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    arguments: Callable[[Path], Iterable[str]],
) -> Path:
    """Made once for all workers of this pytest, by the first that asks for it."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / name
    with FileLock(shared / f"{name}.lock"):
        if not folder.exists():
            folder.mkdir()
            workdir = "--workdir=run"  # relative, as most are
            given = (*reduced.ARGUMENTS, *arguments(folder), workdir)
            done = reduced.train(*given, cwd=folder)
            if done.returncode or done.stderr:
                pytest.fail(
                    f"the reduced run ended with {done.returncode}: {done.stdout}{done.stderr}"
                )
    return folder / "run"
