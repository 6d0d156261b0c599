"""What every stage of a run shares: the config, the folder, the mesh, the terminal."""

import contextlib
import dataclasses
import time
import zlib
from collections.abc import Iterator
from typing import Generic, TypeVar

import jax

from mtllm_jax import sharding
from mtllm_jax.config import Mesh
from mtllm_jax.metrics import Console, duration
from mtllm_jax.runfolder import RunFolder, StageFolder

Config = TypeVar("Config")


@dataclasses.dataclass
class Job(Generic[Config]):
    """One run. `seconds` fills up with what each stage took."""

    config: Config
    run: RunFolder
    console: Console
    mesh: jax.sharding.Mesh
    seed: int
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def start(cls, config, run: RunFolder, console: Console) -> "Job[Config]":
        """Build the mesh of `config.mesh` over all devices."""
        mesh_config: Mesh = config.mesh
        return cls(config, run, console, sharding.make_mesh(mesh_config), config.seed)

    def stage_seed(self, name: str) -> int:
        """A seed of its own for each stage and seed of the run, the same on every machine."""
        return zlib.crc32(f"{self.seed}/{name}".encode())

    @contextlib.contextmanager
    def stage(self, name: str, title: str) -> Iterator[StageFolder]:
        """The folder of a stage, timed, and marked as done when its block ends.

        A stage done by an earlier start is announced in one line; its block still runs, and finds
        its results there.
        """
        folder = self.run.stage(name)
        if folder.is_done():
            self.seconds[name] = folder.info()["seconds"]
            self.console.print(f"✓ {title}  done before, in {duration(self.seconds[name])}")
            yield folder
            return
        started = time.monotonic()
        with self.console.stage(title):
            yield folder
        self.seconds[name] = round(time.monotonic() - started, 2)
        folder.finish({"seconds": self.seconds[name]})
