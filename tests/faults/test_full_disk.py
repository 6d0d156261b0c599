"""A disk that fills up: the run says so and ends, and what was saved before is whole."""

import errno
import re
import shutil

import jax
import pytest
import stopped
from saved import assert_same, make_iterator

from mtllm_jax.checkpoint import Checkpointer


def fill(folder):
    """Take what is left of its disk; the file that does."""
    filler = folder / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(folder).free))
    assert shutil.disk_usage(folder).free == 0
    return filler


@pytest.mark.slow
def test_a_stage_ends_and_goes_on_where_there_is_room(small_disk, uninterrupted, tmp_path):
    """Exit code 2, not to be repeated before someone has made room."""
    folder = small_disk / "stage"
    with stopped.start(folder, "--hold=9", cwd=tmp_path) as processes:
        stopped.hold(processes, folder, 7)
        filler = fill(small_disk)
        stopped.release(processes, folder)
        codes, _, (err,) = processes.ended(200)
    assert codes == [2], err
    assert err.count("\n") == 1 and re.match(r"error: .*No space left on device.*/stage/", err)
    assert not (folder / "params").exists()
    filler.unlink()
    assert "going on from step 7 of 40" in stopped.finish(folder)
    stopped.assert_same(folder, uninterrupted)


def test_a_full_disk_keeps_the_one_before(small_disk, capfd):
    def state(seed, count):
        return {"w": jax.random.normal(jax.random.key(seed), (count,))}

    big, small = 2_000_000, 500_000
    with Checkpointer(small_disk) as checkpointer:
        checkpointer.save(1, state(1, small), make_iterator())
        checkpointer.save(2, state(2, big), make_iterator())
        with pytest.raises(OSError, match=r"step 2 could not .*No space left") as raised:
            checkpointer.wait()
        assert raised.value.errno == errno.ENOSPC
        assert "that of step 1 is kept" in str(raised.value)
        assert sorted(p.name for p in small_disk.iterdir()) == ["1", "newest"]
        checkpointer.save(2, state(2, small), make_iterator())
    restored, step = Checkpointer(small_disk).restore(state(0, small), make_iterator())
    assert step == 2
    assert_same(restored, state(2, small))
    assert capfd.readouterr() == ("", "")
