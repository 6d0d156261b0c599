"""Real processes, over loopback: the run that one process makes, and how they gather and end.

Four CPU devices in all, in one process or two. faults/ has what happens to them in a stage.
"""

import contextlib
import fcntl
import json
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import reduced
from processes import Processes, free_port

import mtllm_jax
from mtllm_jax import distributed
from mtllm_jax.checkpoint import load_params

TRAIN = reduced.ROOT / "launch" / "train.py"
SCRIPT = reduced.ROOT / "tests" / "one_of_processes.py"
GIVEN = {
    distributed.ADDRESS: "localhost:1234",
    distributed.COUNT: "2",
    distributed.INDEX: "1",
}
FIELDS = {
    "adaptation.training.steps": 120,  # what was learnt tells answers apart
    # Embeddings are large enough to be cut, over processes too.
    "mesh.data": 1,
    "mesh.fsdp": -1,
    "mini_nllb.width": 64,
    "mini_llama.width": 64,
    "mini_llama.vocab_size": 1100,
}
ARGUMENTS = (*reduced.ARGUMENTS, *reduced.flags(FIELDS))
STAGES = ("mini_nllb", "mini_llama", "adaptation", "teacher", "distillation", "mt_encoder")
# The same sums, some in another order: the last places of float32 (1.2e-7 of a number) differ, and
# Adam's division by small second moments widens that from step to step.
TOLERANCE = 1e-5  # of a loss, and of each array's largest number


def finished(count, folder):
    """A whole run by so many processes."""
    with Processes(count, TRAIN, *ARGUMENTS, "--workdir=run", cwd=folder) as processes:
        codes, out, err = processes.ended()
    assert codes == [0] * count and err == [""] * count, err
    assert out[1:] == [""] * (count - 1)  # the first alone prints
    return folder / "run", out[0]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return finished(1, tmp_path_factory.mktemp("single"))


@pytest.fixture(scope="module")
def double(tmp_path_factory):
    return finished(2, tmp_path_factory.mktemp("double"))


def metrics_of(run, stage="adaptation"):
    lines = (run / stage / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same_losses(run, wanted, stage="adaptation"):
    got, wanted = metrics_of(run, stage), metrics_of(wanted, stage)
    assert [line["step"] for line in got] == [line["step"] for line in wanted]
    for name in ("loss", "grad_norm"):
        numbers = [[line[name] for line in lines] for lines in (got, wanted)]
        np.testing.assert_allclose(*numbers, rtol=TOLERANCE, err_msg=f"{stage}, {name}")


def weights(run, stage="adaptation"):
    about = json.loads((run / stage / "params" / "checksums.json").read_text())["checkpoint"]
    abstract: dict = {}
    for name, kind in about["leaves"].items():
        dtype, shape = kind.rstrip("]").split("[")
        sizes = tuple(int(size) for size in shape.split(",") if size)
        *outer, last = name.split("/")
        inner = abstract
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = jax.ShapeDtypeStruct(sizes, dtype)
    return load_params(run / stage / "params", abstract)


def assert_same_weights(run, wanted):
    got, wanted = weights(run), weights(wanted)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(wanted), strict=True):
        scale = float(np.max(np.abs(b)))
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE * scale, err_msg=name)


# ---------------------------------------------------------------- what they do together


@pytest.mark.slow
def test_decisions_batches_weights_and_hashes(tmp_path):
    with Processes(2, SCRIPT, cwd=tmp_path) as processes:
        codes, out, err = processes.ended(120)
    assert codes == [0, 0], err
    told = [json.loads(text.splitlines()[-1]) for text in out]
    everything = list(range(8))
    cut = [everything[:4], everything[4:]]
    # Meshes data, fsdp, data × tensor, tensor: the last gives each process all rows.
    assert [one["rows"] for one in told] == [[half, half, half, everything] for half in cut]
    hashes = [*told[0]["hashes"], *told[1]["hashes"]]
    assert len(hashes) == 10 and len(set(hashes)) == 1


@pytest.mark.slow
def test_a_whole_run_is_the_single_process_one(single, double):
    """Every stage's losses and stage 1's weights but for rounding, the very same answers."""
    (run, said), (wanted, said_alone) = double, single
    for stage in STAGES:
        assert_same_losses(run, wanted, stage)
    assert_same_weights(run, wanted)
    answers = sorted(path.name for path in (wanted / "predictions").iterdir())
    assert len(answers) == 6
    for name in answers:
        assert (run / "predictions" / name).read_bytes() == (
            wanted / "predictions" / name
        ).read_bytes()
    results, alone = (json.loads((r / "results.json").read_text()) for r in (run, wanted))
    assert results["systems"] == alone["systems"]
    assert results["systems_unseen"] == alone["systems_unseen"]
    assert (run / "report.html").stat().st_size > 10_000
    marks = [
        [line[0] for line in text.splitlines() if line[:1] in ("▶", "✓")]
        for text in (said, said_alone)
    ]
    assert marks[0] == marks[1] and len(marks[0]) == 16  # eight stages begin and end
    assert len(mtllm_jax.load(run).encode(["Kenia"], ["deu_Latn"])[0]) == 64


# ---------------------------------------------------------------- what happens to them


@pytest.mark.slow
def test_a_signal_between_the_stages(tmp_path):
    """To one of them: all end at once, as one process does."""
    with Processes(2, TRAIN, *ARGUMENTS, "--workdir=run", cwd=tmp_path) as processes:
        made = tmp_path / "run" / "text" / "done.json"
        processes.wait_until(made.exists, "text")
        processes.processes[1].send_signal(signal.SIGTERM)
        codes, _, err = processes.ended(120)
    assert codes == [0, 0], err
    assert any("stopped" in said for said in err), err


@contextlib.contextmanager
def one_of_two(index, port, *command, cwd, **variables):
    """A process whose partner never comes."""
    job = dict(zip(GIVEN, (f"localhost:{port}", "2", str(index)), strict=True))
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=reduced.environment() | job | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(
    ("signum", "variables", "code"),
    [
        (signal.SIGINT, {}, 130),
        (signal.SIGTERM, {}, 0),
        (signal.SIGTERM, {"MTLLM_SIGTERM_EXIT": "143"}, 143),
    ],
)
def test_a_signal_while_they_gather(index, signum, variables, code, tmp_path):
    port = free_port()
    command = (TRAIN, *ARGUMENTS, "--workdir=run")
    with contextlib.ExitStack() as stack:
        if index == 1:
            listener = stack.enter_context(socket.create_server(("localhost", port)))
            listener.settimeout(60)
        process = stack.enter_context(one_of_two(index, port, *command, cwd=tmp_path, **variables))
        if index == 1:
            stack.enter_context(listener.accept()[0])
        else:
            deadline = time.monotonic() + 60
            with socket.socket() as client:
                while client.connect_ex(("localhost", port)):
                    assert process.poll() is None and time.monotonic() < deadline
                    time.sleep(0.05)
        process.send_signal(signum)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, "")
    assert err.startswith("\nstopped at once. Go on with: python ") and err.count("\n") == 2


@pytest.mark.slow
def test_one_does_not_come(tmp_path):
    soon = "from mtllm_jax import distributed as d; d._GATHER_SECONDS = 3; d.start()"
    with one_of_two(0, free_port(), "-c", soon, cwd=tmp_path) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert err.count("\n") == 1 and "not all processes came within 3 seconds; start them" in err


# ---------------------------------------------------------------- what a user gets wrong


@pytest.mark.slow
def test_a_mistake_that_one_finds_ends_all(tmp_path):
    """The first alone looks whether the folder is in use."""
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with Processes(2, TRAIN, *ARGUMENTS, "--workdir=run", cwd=tmp_path) as processes:
            codes, out, err = processes.ended(120)
    assert codes == [2, 2] and out == ["", ""], (codes, out, err)
    assert err[0].count("\n") == 1 and err[0].startswith("error: workdir run is in use by another")
    assert err[1] == "process 1 ends, as process 0 has ended with 2\n"


@pytest.mark.slow
def test_a_mistake_at_the_door_is_each_ones(tmp_path):
    wrong = ("--config.seed=one", "--workdir=run")
    with Processes(2, TRAIN, *ARGUMENTS, *wrong, cwd=tmp_path) as processes:
        codes, out, err = processes.ended(120)
    assert codes == [2, 2] and out == ["", ""]
    assert err == ["error: config.seed is 'one'; it must be an int.\n"] * 2


@pytest.mark.slow
def test_a_port_that_another_holds(tmp_path):
    """Not exit code 2: the port may be free when a scheduler tries again."""
    with socket.create_server(("localhost", 0)) as listener:
        port = listener.getsockname()[1]
        with one_of_two(0, port, TRAIN, *ARGUMENTS, "--workdir=run", cwd=tmp_path) as process:
            out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert err == (
        f"error: JAX_COORDINATOR_ADDRESS is 'localhost:{port}', but process 0 cannot listen on"
        f" port {port} (Address already in use); end what holds it, or name a free port.\n"
    )


def test_only_what_listens_holds_a_port(monkeypatch):
    """Neither connections of an earlier process, nor a port that jax is told not to listen on."""
    monkeypatch.delenv("JAX_COORDINATOR_BIND_ADDRESS", raising=False)
    with socket.create_server(("", 0)) as listener:
        port = listener.getsockname()[1]
        given = {"coordinator_address": f"elsewhere:{port}"}
        with pytest.raises(SystemExit, match=f"cannot listen on port {port} "):
            distributed._check_port(given)
        with socket.create_connection(("localhost", port)) as client:
            listener.accept()[0].close()  # who closes first keeps the connection for a minute
            assert client.recv(1) == b""
    distributed._check_port(given)
    with socket.socket() as plain, pytest.raises(OSError, match="in use"):
        plain.bind(("", port))
    with socket.create_server(("", port)):
        monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", "[::]:1")
        distributed._check_port(given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {distributed.COUNT: None},
            "JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID are set, but not JAX_NUM_PROCESSES: ",
        ),
        (
            {distributed.COUNT: None, distributed.INDEX: ""},
            "JAX_COORDINATOR_ADDRESS is set, but not JAX_NUM_PROCESSES and JAX_PROCESS_ID: ",
        ),
        ({distributed.COUNT: "two"}, "JAX_NUM_PROCESSES is 'two'; it must be a whole number."),
        ({distributed.COUNT: "0"}, r"JAX_NUM_PROCESSES is 0; it must be at least 1\."),
        ({distributed.INDEX: "-1"}, "JAX_PROCESS_ID is '-1'; it must be a whole number."),
        ({distributed.INDEX: "2"}, "JAX_PROCESS_ID is 2; .* it must be below 2."),
        ({distributed.ADDRESS: "here"}, "JAX_COORDINATOR_ADDRESS is 'here'; it must be host:port"),
        ({distributed.ADDRESS: "here:0"}, "JAX_COORDINATOR_ADDRESS is 'here:0'; it must be"),
    ],
)
def test_variables_half_set_or_wrong(changes, message):
    environment = {name: value for name, value in (GIVEN | changes).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        distributed.named_in(environment)


def test_what_the_environment_names():
    named = {"coordinator_address": "localhost:1234", "num_processes": 2, "process_id": 1}
    assert distributed.named_in(GIVEN) == named
    assert distributed.named_in({}) is None
    assert distributed.named_in({distributed.COUNT: "1"})["num_processes"] == 1


def test_tasks_of_a_scheduler():
    step = {"SLURM_STEP_NODELIST": "node[1-2]"}
    assert distributed.several_tasks(step | {"SLURM_NTASKS": "4"}) == "SLURM_NTASKS"
    assert distributed.several_tasks(step | {"SLURM_NTASKS": "1"}) is None
    assert distributed.several_tasks({"SLURM_NTASKS": "4"}) is None  # in the batch script itself
    assert distributed.several_tasks({"OMPI_COMM_WORLD_SIZE": "2"}) == "OMPI_COMM_WORLD_SIZE"
    assert distributed.several_tasks({}) is None


def test_a_job_that_jax_does_not_find(monkeypatch):
    """Open MPI 5 no longer tells what jax looks for."""
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setattr(jax.distributed, "initialize", no_cluster)
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ValueError, match=r"OMPI_COMM_WORLD_SIZE says .* set JAX_COORD"):
        distributed.start()
    assert not distributed.in_job()
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == before


def no_cluster(**options):
    """What jax.distributed.initialize does where it finds none."""
    raise ValueError("coordinator_address should be defined.")


def test_what_says_that_another_is_gone(monkeypatch):
    cut = jax.errors.JaxRuntimeError(
        "UNKNOWN: Gloo all-reduce failed: Connection closed by peer\nx"
    )
    assert distributed.lost(cut) is None  # alone there is nobody to lose
    monkeypatch.setattr(distributed, "_JOB", distributed._Job(client=None, index=1, count=2))
    said = distributed.lost(cut)
    assert said.startswith("process 1 has lost the others") and "closed by peer); start" in said
    assert distributed.lost(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")) is None
    assert distributed.lost(ValueError("a connection is not this one")) is None


def test_a_process_on_its_own():
    """Everything is its own business, and jax.distributed is not touched."""
    distributed.start()
    assert not distributed.in_job() and distributed.is_first()
    assert not jax.distributed.is_initialized()
    value = object()
    assert distributed.by_first(lambda: value) is value
    assert distributed.after_first(lambda: value) is value
    assert [distributed.Ballot()(number) for number in (0, 2)] == [0, 2]
    distributed.leave(2)
    distributed.finish()
