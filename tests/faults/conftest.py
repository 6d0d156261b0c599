"""What tests of faults compare with, and a disk that can be filled."""

import subprocess

import pytest
import stopped


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """The folder of a stage that nothing happened to. Read it, do not change it."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "stage"
    stopped.finish(folder)
    assert [line["step"] for line in stopped.metrics(folder)] == list(range(1, stopped.STEPS + 1))
    return folder


@pytest.fixture(scope="session")
def killed(tmp_path_factory):
    """The folder of a stage killed at step 17, after checkpoints of 7 and 14. Copy it."""
    folder = tmp_path_factory.mktemp("killed") / "stage"
    with stopped.start(folder, "--hold=17") as processes:
        stopped.hold(processes, folder, 14)
        processes.processes[0].kill()
        codes, _, err = processes.ended(200)
    assert codes == [-9] and err == [""]
    assert len(stopped.metrics(folder)) == 16  # a step is written down once the next has begun
    (folder / "held-0").unlink()
    return folder


@pytest.fixture
def small_disk(tmp_path):
    """A folder that is a file system of 6 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small disk is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
