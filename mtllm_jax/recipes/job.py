"""What every stage of a run shares: the config, the folder, the mesh, the terminal."""

import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import resource
import time
import zlib
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import jax

import mtllm_jax
from mtllm_jax import distributed, goodput
from mtllm_jax.metrics import Console, duration
from mtllm_jax.runfolder import RunFolder, StageFolder, read_json, write_json
from mtllm_jax.watch import UNWATCHED, Watch

Config = TypeVar("Config")

_STARTS = "starts.json"  # what the starts of a stage so far have cost, its last one included


@dataclasses.dataclass
class Job(Generic[Config]):
    """One run. `stages` fills up with what each stage's done.json says: "seconds" and more.

    place: of its stages' folders in the run folder; "" or a folder's name and "/".
    """

    config: Config
    run: RunFolder
    console: Console
    mesh: jax.sharding.Mesh
    seed: int
    watch: Watch = UNWATCHED
    place: str = ""
    stages: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def seconds(self) -> dict[str, float]:
        """What each stage took."""
        return {name: done["seconds"] for name, done in self.stages.items()}

    @property
    def time(self) -> dict[str, float]:
        """Seconds of all stages by what they went into, and the goodput of the run."""
        files = {name: self.run.path / name / goodput.FILE for name in self.stages}
        return goodput.of_run(
            self.seconds, {name: read_json(file) for name, file in files.items() if file.exists()}
        )

    @property
    def peak_memory_gb(self) -> float:
        """The most memory that a process of this run held, in 10⁹ bytes, by the end of a stage."""
        return max(done["peak_memory_gb"] for done in self.stages.values())

    def stage_seed(self, name: str) -> int:
        """A seed of its own for each stage and seed of the run, the same on every machine."""
        return stage_seed(self.seed, name)

    def facts(self) -> dict[str, Any]:
        """Versions, the machine and what time went into, for the report."""
        packages = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "transformers")
        device = jax.devices()[0]
        return {
            "versions": {
                "mtllm_jax": mtllm_jax.__version__,
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in packages},
            },
            "device": f"{jax.device_count()} × {device.device_kind}, {os.cpu_count()} CPU cores",
            "peak memory": f"{self.peak_memory_gb:.2f} GB",
            "where time went": goodput.told(self.time),
        }

    def of_seed(self, seed: int) -> "Job[Config]":
        """The same run, going on with another seed in folders of its own."""
        return dataclasses.replace(self, seed=seed, place=f"seed-{seed}/")

    @contextlib.contextmanager
    def stage(self, name: str, title: str) -> Iterator[StageFolder]:
        """The folder of a stage, timed, and marked as done when its block ends.

        A stage done by an earlier start is announced in one line; its block still runs, and finds
        its results there. Its seconds are those of all starts that it was not killed in.
        """
        name = f"{self.place}{name}"
        title = f"{title}, seed {self.seed}" if self.place else title
        folder = self.run.stage(name)
        if folder.is_done():
            self.stages[name] = folder.info()
            self.console.print(f"✓ {title}  done before, in {duration(self.seconds[name])}")
            yield folder
            return
        before = read_json(folder.path / _STARTS) if (folder.path / _STARTS).exists() else {}
        started = time.monotonic()

        def spend() -> dict[str, Any]:
            seconds = before.get("seconds", 0.0) + time.monotonic() - started
            memory = max(before.get("peak_memory_gb", 0.0), _peak_memory() / 1e9)
            spent = {"seconds": round(seconds, 2), "peak_memory_gb": round(memory, 3)}
            write_json(folder.path / _STARTS, spent)
            return spent

        try:
            with self.console.stage(title):
                yield folder
        except BaseException:
            with contextlib.suppress(OSError):  # a full disk: what has ended the stage says more
                spend()
            raise
        spent = spend()

        def finish() -> dict[str, Any]:
            folder.finish(spent)
            return folder.info()

        self.stages[name] = distributed.by_first(finish)


def _peak_memory() -> int:
    """Bytes of main memory that this process held at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def stage_seed(seed: int, name: str) -> int:
    """A seed for what `name` draws in runs of `seed`: spread out, and the same on every machine."""
    return zlib.crc32(f"{seed}/{name}".encode())
