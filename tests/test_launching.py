"""The scripts in launch/ that start a run elsewhere: what they would run, and what they do with
stand-ins for gcloud, srun and kubectl that start processes here.

A script is edited as a person would edit it, in a checkout whose launch/train.py is a stub.
"""

import contextlib
import json
import math
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "launch").rglob("*")
    if path.suffix in (".sh", ".sbatch")
)
# Flags with what a shell, JSON or sed could break.
FLAGS = [
    "--config=configs/mtllm.py",
    "--workdir=gs://bucket/a run",
    """--config.note=it's "$x" & \\n""",
]
TRAIN = "TRAIN=(" + " ".join(map(shlex.quote, FLAGS)) + ")"
SHIPPED_TRAIN = "TRAIN=(--config=configs/mtllm.py:llama3-8b --workdir=)"
DATA = {"DATA=''": "DATA='gs://b/some data'"}

TPU = {"PROJECT='' ZONE=''": "PROJECT='p' ZONE='z'", SHIPPED_TRAIN: TRAIN, "POLL=60 ": "POLL=0.1 "}
GKE = {"IMAGE='' CLUSTER=''": "IMAGE='r/mtllm:1' CLUSTER='c'", SHIPPED_TRAIN: TRAIN}
SLURM = {SHIPPED_TRAIN: TRAIN, ".venv/bin/python": sys.executable}

# Adds its flags and what it is told to $SEEN, then does as the next word of $FATE says.
STUB = """
import json, os, signal, sys, time
from pathlib import Path
def lines(worker):
    file = Path(os.environ["SEEN"] + "-" + worker)
    return file.read_text().count("\\n") if file.exists() else 0
starts = lines(Path.home().name)
def stop(*_):
    sys.exit(int(os.environ["MTLLM_SIGTERM_EXIT"]))
signal.signal(signal.SIGTERM, stop)
with open(os.environ["SEEN"] + "-" + Path.home().name, "a") as file:
    file.write(json.dumps([sys.argv[1:], os.environ.get("MTLLM_SIGTERM_EXIT")]) + "\\n")
fate = os.environ["FATE"].split()[starts]
if fate == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("fate", fate, flush=True)
while any(lines(worker) <= starts for worker in os.environ["WORKERS"].split()):
    time.sleep(0.01)  # as collectives do, so that all end at the same time
if fate in ("deaf", "stays"):
    time.sleep(60)
sys.exit(int(fate))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The root of a checkout with the scripts, a stub to start, and little else."""
    root = tmp_path / "a checkout"
    shutil.copytree(ROOT / "launch", root / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        (root / name).touch()
    for name in ("configs", "mtllm_jax"):
        (root / name).mkdir()
    (root / "launch" / "train.py").write_text(STUB)
    return root


def edit(script: Path, changes: dict[str, str]) -> None:
    text = script.read_text()
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    script.write_text(text)


def call(
    checkout: Path, script: str, *words: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", f"launch/{script}", *words],
        cwd=checkout,
        env=os.environ | {"TMPDIR": str(checkout.parent)} | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )


def program(folder: Path, name: str, text: str) -> None:
    """An executable of that name in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def eventually(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def commands(output: str) -> list[list[str]]:
    """The words of each command that --dry-run printed."""
    assert subprocess.run(["bash", "-n"], input=output, text=True).returncode == 0
    return [shlex.split(line) for line in output.splitlines() if not line.startswith("#")]


# ---------------------------------------------------------------- all scripts


def test_shellcheck_finds_nothing():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    found = subprocess.run([shellcheck, "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "")


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "launch/shell.sh"])
def test_scripts_begin_alike_explain_themselves_and_can_be_started(script):
    text = (ROOT / script).read_text()
    assert text.startswith("#!/usr/bin/env bash\n# ") and "\nset -euo pipefail\n" in text
    assert os.access(ROOT / script, os.X_OK)
    if script.endswith("worker.sh"):
        return  # started by tpu.sh alone
    done = subprocess.run(
        ["bash", ROOT / script, "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0 and "--dry-run" in done.stdout and "#" not in done.stdout
    assert "set -" not in done.stdout


@pytest.mark.parametrize(
    ("script", "changes", "words", "names"),
    [
        ("tpu/tpu.sh", {}, ["create"], "PROJECT is empty"),
        ("tpu/tpu.sh", {"ZONE=''": "ZONE=z"}, ["create"], "PROJECT is empty"),
        ("tpu/tpu.sh", {"PROJECT=''": "PROJECT=p"}, ["watch"], "ZONE is empty"),
        ("tpu/tpu.sh", {"PROJECT='' ZONE=''": "PROJECT=p ZONE=z"}, ["run"], "--workdir=gs://"),
        ("tpu/tpu.sh", TPU | {"v5litepod-16": "h100"}, ["create"], "TYPE is 'h100'"),
        ("tpu/tpu.sh", TPU, ["destroy"], "'destroy'"),
        ("tpu/tpu.sh", TPU, [], "''"),
        ("tpu/tpu.sh", TPU, ["create", "--dryrun"], "--dryrun is not an option"),
        ("gke/gke.sh", {}, ["create"], "IMAGE is empty"),
        ("gke/gke.sh", {"IMAGE=''": "IMAGE=i"}, ["create"], "--workdir=gs://"),
        ("gke/gke.sh", {"IMAGE=''": "IMAGE=i", SHIPPED_TRAIN: TRAIN}, ["xpk"], "CLUSTER is empty"),
        ("gke/gke.sh", GKE | {"'4x4'": "16"}, ["create"], "TOPOLOGY is '16'"),
        ("gke/gke.sh", GKE | {"'4x4'": "1x2"}, ["create"], "multiple of CHIPS"),
        ("gke/gke.sh", GKE | DATA, ["xpk"], "DATA is set"),
        ("gke/gke.sh", GKE, ["destroy"], "'destroy'"),
        ("slurm/train.sbatch", {}, [], "--workdir="),
        ("docker/build.sh", {}, ["tpu"], "IMAGE is empty"),
        ("docker/build.sh", {"IMAGE=''": "IMAGE=i"}, ["gpu"], "'gpu'"),
    ],
)  # fmt: skip
def test_what_is_not_edited_or_mistyped_is_one_sentence_and_exit_code_2(
    checkout, script, changes, words, names
):
    edit(checkout / "launch" / script, changes)
    for dry_run in ([], ["--dry-run"]):
        done = call(checkout, script, *words, *dry_run, PATH="/usr/bin:/bin")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert names in done.stderr


def test_the_readme_names_files_that_are_there():
    named = set(re.findall(r"launch/[\w./]*\w", (ROOT / "README.md").read_text()))
    assert {"launch/tpu/tpu.sh", "launch/slurm/train.sbatch", "launch/sky/gpu.yaml"} <= named
    assert not [name for name in named if not (ROOT / name).exists()]


# ---------------------------------------------------------------- Cloud TPU


@pytest.fixture
def cloud(checkout: Path) -> dict[str, str]:
    """Variables under which gcloud, and on its workers python3 and uv, are stand-ins."""
    bin_, cloud = checkout.parent / "bin", checkout.parent / "cloud"
    cloud.mkdir()
    program(
        bin_, "gcloud", f"#!{sys.executable} -SE\n" + (ROOT / "tests/fake_gcloud.py").read_text()
    )
    program(bin_, "uv", """#!/bin/bash
        echo "$@" >> "$HOME/uv.log"
        if [ "$1" != venv ]; then exit; fi
        mkdir -p mtllm_venv/bin && ln -sf "$REAL_PYTHON" mtllm_venv/bin/python
        """)  # fmt: skip
    program(bin_, "python3", """#!/bin/bash
        if [ "$2" = site ]; then echo "$HOME/.local"; exit; fi
        mkdir -p "$HOME/.local/bin" && cp "${BASH_SOURCE%/*}/uv" "$HOME/.local/bin/"
        """)  # fmt: skip
    edit(checkout / "launch/tpu/tpu.sh", TPU | DATA)
    return {
        "PATH": f"{bin_}:{os.environ['PATH']}",
        "FAKE_GCLOUD": str(cloud),
        "REAL_PYTHON": sys.executable,
        "SEEN": str(cloud / "seen"),
        "WORKERS": "0 1",
    }


def calls(cloud: dict[str, str]) -> list[list[str]]:
    lines = (Path(cloud["FAKE_GCLOUD"]) / "calls.jsonl").read_text().splitlines()
    return [["gcloud", *json.loads(line)] for line in lines]


def done_in(cloud: dict[str, str]) -> list[str]:
    """What was done, in order, without the looks at states."""
    done = []
    for words in calls(cloud):
        said = " ".join(words)
        verb = words[4]
        if verb == "ssh":
            verb = next(w for w in ("setup", "start", "status", "stop") if f"worker.sh {w}" in said)
        done.append(verb)
    return [verb for verb in done if verb not in ("list", "status")]


def starts(cloud: dict[str, str], worker: int) -> list[list]:
    return [json.loads(line) for line in Path(f"{cloud['SEEN']}-{worker}").read_text().splitlines()]


def live(cloud: dict[str, str], *lives: list[str]) -> None:
    (Path(cloud["FAKE_GCLOUD"]) / "lives.json").write_text(json.dumps(lives))


@pytest.mark.slow
def test_tpu_watch_goes_on_after_a_preemption_a_stop_and_a_crash_until_the_run_is_done(
    checkout, cloud
):
    live(
        cloud,
        ["WAITING_FOR_RESOURCES", "PROVISIONING", *["ACTIVE"] * 4, "SUSPENDING", "SUSPENDED"],
        ["CREATING", "ACTIVE"],
    )
    done = call(checkout, "tpu/tpu.sh", "watch", FATE="stays 143 1 0", **cloud)
    assert done.returncode == 0, done.stdout + done.stderr
    begin = ["create", "scp", "setup", "start"]
    assert done_in(cloud) == [*begin, "delete", *begin, "start", "start", "delete"]
    # Both workers, and every time: the very command, told that stopped is not finished.
    assert starts(cloud, 0) == starts(cloud, 1) == [[FLAGS, "143"]] * 4
    said = [line.split(" ", 2)[2] for line in done.stdout.splitlines()]
    for state in ("not there", "PROVISIONING", "ACTIVE", "SUSPENDED"):
        assert f"the request is: {state}" in said
    assert "starting again, workers say: exit 1 (1 of at most 5 failures in a row)" in said
    assert said[-1] == "the run is done; deleting the machines"


def test_tpu_watch_creates_again_what_failed_and_gives_up_in_the_end(checkout, cloud):
    edit(checkout / "launch/tpu/tpu.sh", {"MOST_FAILURES=5": "MOST_FAILURES=3"})
    live(cloud, ["refused"], ["FAILED"], ["FAILED"])
    done = call(checkout, "tpu/tpu.sh", "watch", **cloud)
    assert done.returncode == 1 and "3 of at most 3" in done.stdout
    assert done_in(cloud) == ["create", "create", "delete", "create"]


def test_tpu_watch_does_not_repeat_a_mistake_and_keeps_the_machines(checkout, cloud):
    live(cloud, ["ACTIVE"])
    done = call(checkout, "tpu/tpu.sh", "watch", FATE="2", **cloud)
    assert done.returncode == 2 and "mistake" in done.stdout
    begin = ["create", "scp", "setup", "start"]
    assert done_in(cloud) == begin
    homes = Path(cloud["FAKE_GCLOUD"]) / "workers"
    assert sorted(home.name for home in homes.iterdir()) == ["0", "1"]
    for home in homes.iterdir():
        assert "fate 2" in (home / "mtllm.log").read_text()
        assert (home / "uv.log").read_text().splitlines()[1].endswith("./mtllm_jax[tpu,gcs]")
        assert (home / "mtllm_jax/data/from").read_text() == "gs://b/some data"
    # The next watch knows that somebody has looked at it.
    done = call(checkout, "tpu/tpu.sh", "watch", FATE="2 0", **cloud)
    assert done.returncode == 0 and done_in(cloud) == [*begin, *begin[1:], "delete"]


@pytest.mark.slow
def test_tpu_watch_takes_up_its_own_run_and_leaves_another_alone(checkout, cloud):
    live(cloud, ["ACTIVE"])
    for command in ("create", "state", "setup", "run"):
        assert call(checkout, "tpu/tpu.sh", command, FATE="stays 0", **cloud).returncode == 0
    edit(checkout / "launch/tpu/tpu.sh", {"gs://bucket/": "gs://tub/"})
    done = call(checkout, "tpu/tpu.sh", "watch", **cloud)
    assert done.returncode == 2 and "another command" in done.stderr
    edit(checkout / "launch/tpu/tpu.sh", {"gs://tub/": "gs://bucket/"})
    watch = subprocess.Popen(
        ["bash", "launch/tpu/tpu.sh", "watch"],
        cwd=checkout,
        env=os.environ | cloud | {"FATE": "stays 0", "TMPDIR": str(checkout.parent)},
        stdout=subprocess.PIPE,
        text=True,
    )
    eventually(lambda: done_in(cloud).count("start") == 1 and len(calls(cloud)) > 10)
    assert call(checkout, "tpu/tpu.sh", "stop", **cloud).returncode == 0
    said, _ = watch.communicate(timeout=60)
    assert watch.returncode == 0 and "starting again" in said
    assert done_in(cloud) == ["create", "scp", "setup", "start", "stop", "start", "delete"]


@pytest.mark.slow
def test_a_tpu_worker_stops_by_sigterm_and_kills_what_does_not_hear_it(checkout, tmp_path):
    home = tmp_path / "0"
    (home / "mtllm_venv/bin").mkdir(parents=True)
    (home / "mtllm_venv/bin/python").symlink_to(sys.executable)
    (home / "mtllm_jax").symlink_to(checkout)
    given = {
        "HOME": str(home),
        "SEEN": str(tmp_path / "seen"),
        "FATE": "stays deaf stays 0",
        "WORKERS": "0",
        "GRACE": "5",
    }

    def worker(*words):
        done = call(checkout, "tpu/worker.sh", *words, **given)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def started(fate):
        worker("start", *FLAGS)
        eventually(lambda: (home / "mtllm.log").read_text().endswith(f"fate {fate}\n"))

    assert worker("status") == "worker: none"
    started("stays")
    assert worker("status", *FLAGS) == "worker: running"
    assert worker("status", *FLAGS[:-1]) == "worker: busy"
    worker("stop")
    assert worker("status", *FLAGS) == "worker: exit 143"
    started("deaf")
    worker("stop")
    assert worker("status") == "worker: exit 137"
    started("stays")
    worker("start", *FLAGS)  # what runs is stopped first
    eventually(lambda: worker("status") == "worker: exit 0")
    assert len((tmp_path / "seen-0").read_text().splitlines()) == 4


def test_tpu_dry_run_prints_the_commands_that_are_run(checkout, cloud):
    live(cloud, ["ACTIVE"])
    printed = [
        words
        for command in ("create", "state", "setup", "run", "status", "logs", "stop", "delete")
        for words in commands(call(checkout, "tpu/tpu.sh", command, "--dry-run", **cloud).stdout)
    ]
    assert not (Path(cloud["FAKE_GCLOUD"]) / "calls.jsonl").exists()
    for command in ("create", "state", "setup", "run", "status", "stop", "delete"):
        done = call(checkout, "tpu/tpu.sh", command, FATE="0", **cloud)
        assert done.returncode == 0, done.stderr
    gcloud = [words for words in printed if words[0] == "gcloud" and "mtllm.log" not in words[-4]]
    assert gcloud == calls(cloud)
    create = gcloud[0]
    assert create[4:6] == ["create", "mtllm"] and "--spot" in create
    assert "--node-id=mtllm" in create and "--runtime-version=v2-alpha-tpuv5-lite" in create
    assert gcloud[-1][4:] == ["delete", "mtllm", "--force", "--project=p", "--zone=z", "--quiet"]
    (follow,) = [words for words in printed if "mtllm.log" in words[-4]]
    assert "--worker=0" in follow and "--node=0" in follow


def test_tpu_dry_run_of_watch_names_every_command_of_it(checkout, cloud):
    edit(checkout / "launch/tpu/tpu.sh", {
        "'v5litepod-16' SLICES=1 SPOT=yes": "v6e-16 SLICES=2 SPOT=no"
    })  # fmt: skip
    done = call(checkout, "tpu/tpu.sh", "--dry-run", "watch", **cloud)
    words = commands(done.stdout)
    verbs = [each[4] if each[0] == "gcloud" else each[0] for each in words]
    assert verbs == ["tar", "list", "create", "scp", *["ssh"] * 4, "delete", "delete"]
    create = words[2]
    assert {"--node-count=2", "--node-prefix=mtllm", "--runtime-version=v2-alpha-tpuv6e"} < set(
        create
    )
    assert "--spot" not in create and not [w for w in create if w.startswith("--node-id")]


# ---------------------------------------------------------------- GKE

# https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2/, what a manifest of ours may say.
JOBSET_FIELDS = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "spec": {
        "replicatedJobs", "network", "successPolicy", "failurePolicy", "startupPolicy", "suspend",
        "coordinator", "managedBy", "ttlSecondsAfterFinished", "volumeClaimPolicies",
    },
    "spec.failurePolicy": {"maxRestarts", "restartStrategy", "rules"},
    "spec.failurePolicy.rules": {
        "name", "action", "onJobFailureReasons", "onJobFailureMessagePatterns",
        "targetReplicatedJobs",
    },
    "spec.replicatedJobs": {"name", "groupName", "template", "replicas", "dependsOn"},
}  # fmt: skip
JOBSET_ACTIONS = {
    "FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob",
    "RestartJobAndIgnoreMaxRestarts",
}  # fmt: skip
# https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
GKE_ACCELERATORS = {"tpu-v4-podslice", "tpu-v5-lite-podslice", "tpu-v5p-slice", "tpu-v6e-slice"}


def check_jobset(jobset: dict) -> dict:
    """The spec of its Job; raises for a field that JobSet or Kubernetes does not know."""
    places = {
        "": [jobset],
        "spec": [jobset["spec"]],
        "spec.failurePolicy": [jobset["spec"]["failurePolicy"]],
        "spec.failurePolicy.rules": jobset["spec"]["failurePolicy"]["rules"],
        "spec.replicatedJobs": jobset["spec"]["replicatedJobs"],
    }
    for place, values in places.items():
        for value in values:
            assert value.keys() <= JOBSET_FIELDS[place], place
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        assert rule["action"] in JOBSET_ACTIONS
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": jobset["metadata"]}
    job |= replicated["template"]
    for version in ("1.33", kubernetes_validate.latest_version()):
        kubernetes_validate.validate(job, version, strict=True)
    return replicated["template"]["spec"]


def manifest(checkout: Path, **changes: str) -> dict:
    edit(checkout / "launch/gke/gke.sh", GKE | changes)
    done = call(checkout, "gke/gke.sh", "manifest")
    assert (done.returncode, done.stderr) == (0, "")
    return yaml.safe_load(done.stdout)


@pytest.mark.parametrize(
    ("topology", "slices", "hosts"),
    [("4x4", 1, 4), ("2x2", 1, 1), ("16x16", 2, 64), ("4x4x4", 3, 16)],
)
def test_the_jobset_is_one_for_kubernetes_and_has_a_pod_for_each_machine(
    checkout, topology, slices, hosts
):
    jobset = manifest(checkout, **{"'4x4' SLICES=1": f"'{topology}' SLICES={slices}"})
    job = check_jobset(jobset)
    assert "initContainers" not in job["template"]["spec"]
    assert jobset["spec"]["replicatedJobs"][0]["replicas"] == slices
    assert job["parallelism"] == job["completions"] == hosts
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"] == {"google.com/tpu": chips}
    assert chips * hosts == math.prod(map(int, topology.split("x")))
    labels = {name.partition("/")[2]: value for name, value in pod["nodeSelector"].items()}
    assert labels["gke-tpu-accelerator"] in GKE_ACCELERATORS
    assert labels["gke-tpu-topology"] == topology and labels["gke-spot"] == "true"


def test_the_jobset_runs_the_same_command_after_a_preemption_and_not_after_a_mistake(checkout):
    jobset = manifest(checkout)
    job = check_jobset(jobset)
    (container,) = job["template"]["spec"]["containers"]
    assert container["command"] + container["args"] == ["python", "launch/train.py", *FLAGS]
    assert container["image"] == "r/mtllm:1"
    # One failed pod fails its Job, and a failed Job starts all again: stopped must be a failure.
    assert {"name": "MTLLM_SIGTERM_EXIT", "value": "143"} in container["env"]
    assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] >= 100
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [2]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    (mistake,) = jobset["spec"]["failurePolicy"]["rules"]
    assert (mistake["action"], mistake["onJobFailureReasons"]) == (
        "FailJobSet",
        ["PodFailurePolicy"],
    )
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] >= 120


def test_the_jobset_fetches_data_where_there_is_some(checkout):
    edit(checkout / "launch/gke/gke.sh", DATA)
    pod = check_jobset(manifest(checkout))["template"]["spec"]
    (fetch,), (train,) = pod["initContainers"], pod["containers"]
    words = fetch["command"] + fetch["args"]
    assert words[:3] == ["gcloud", "storage", "rsync"] and words[-2] == "gs://b/some data"
    assert fetch["volumeMounts"] == [{"name": "data", "mountPath": words[-1]}]
    (workdir,) = re.findall("WORKDIR (.*)", (ROOT / "launch/docker/Dockerfile").read_text())
    mounted = {mount["name"]: mount["mountPath"] for mount in train["volumeMounts"]}
    assert mounted["data"] == f"{workdir}/data"
    assert {volume["name"] for volume in pod["volumes"]} == mounted.keys()


def test_machines_that_are_not_spot_have_no_such_label(checkout):
    job = check_jobset(manifest(checkout, **{"SPOT=yes": "SPOT=no"}))
    assert "cloud.google.com/gke-spot" not in job["template"]["spec"]["nodeSelector"]


@pytest.mark.parametrize(
    "place",
    [
        lambda jobset: jobset["spec"],
        lambda jobset: jobset["spec"]["replicatedJobs"][0],
        lambda jobset: jobset["spec"]["replicatedJobs"][0]["template"]["spec"],
        lambda jobset: jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"],
    ],
)
def test_a_mistyped_field_would_be_found(checkout, place):
    jobset = manifest(checkout)
    place(jobset)["restartPolcy"] = "Never"
    with pytest.raises((AssertionError, kubernetes_validate.ValidationError)):
        check_jobset(jobset)


def test_gke_applies_the_manifest_and_dry_run_prints_that(checkout):
    edit(checkout / "launch/gke/gke.sh", GKE)
    bin_ = checkout.parent / "bin"
    program(bin_, "kubectl", """#!/bin/bash
        echo "kubectl $*" >> "$LOG"
        if [ "$1" = apply ]; then cat > "$LOG.applied"; fi
        """)  # fmt: skip
    log = checkout.parent / "log"
    given = {"PATH": f"{bin_}:{os.environ['PATH']}", "LOG": str(log)}
    printed = {
        command: call(checkout, "gke/gke.sh", command, "--dry-run", **given).stdout
        for command in ("create", "status", "logs", "delete")
    }
    assert not log.exists()
    for command, expected in printed.items():
        assert call(checkout, "gke/gke.sh", command, **given).returncode == 0
        if command == "create":
            applied = Path(f"{log}.applied").read_text()
            assert applied == call(checkout, "gke/gke.sh", "manifest").stdout
            assert applied in expected
            # What is printed does the same where it is pasted.
            subprocess.run(["bash", "-c", expected], env=os.environ | given, check=True)
            assert Path(f"{log}.applied").read_text() == applied
            log.unlink()
        else:
            assert log.read_text() == expected
            log.unlink()


def test_the_xpk_line_asks_for_the_same_run(checkout):
    edit(checkout / "launch/gke/gke.sh", GKE | {
        "'tpu-v5-lite-podslice' TOPOLOGY='4x4' SLICES=1": "tpu-v5p-slice TOPOLOGY=2x2x4 SLICES=2"
    })  # fmt: skip
    (words,) = commands(call(checkout, "gke/gke.sh", "xpk", "--dry-run").stdout)
    assert words[:3] == ["xpk", "workload", "create"]
    given = dict(word.removeprefix("--").split("=", 1) for word in words[3:])
    assert given["tpu-type"] == "v5p-32" and given["num-slices"] == "2"
    assert (given["cluster"], given["workload"]) == ("c", "mtllm")
    assert given["docker-image"] == "r/mtllm:1" and given["env"] == "MTLLM_SIGTERM_EXIT=143"
    assert shlex.split(given["command"]) == ["exec", "python", "launch/train.py", *FLAGS]


# ---------------------------------------------------------------- Slurm


def sbatch_options(text: str) -> dict[str, str]:
    """What sbatch reads: the #SBATCH lines above the first command."""
    words = [word for line in sbatch_lines(text) for word in shlex.split(line)[1:]]
    return dict(word.removeprefix("--").partition("=")[::2] for word in words)


def sbatch_lines(text: str) -> list[str]:
    lines = []
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            break
        if line.startswith("#SBATCH"):
            lines.append(line)
    return lines


def test_sbatch_reads_all_of_its_lines_and_has_a_task_for_each_gpu():
    text = (ROOT / "launch/slurm/train.sbatch").read_text()
    options = sbatch_options(text)
    assert text.count("\n#SBATCH ") == len(sbatch_lines(text)) == 3
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["open-mode"] == "append" and "requeue" in options
    # To the tasks ("B:" would be the script alone), with time for a checkpoint.
    assert re.fullmatch(r"TERM@\d{3}", options["signal"])
    assert not {"gpus-per-task", "gpu-bind"} & options.keys()


@pytest.mark.parametrize(
    ("code", "before", "again"),
    [(0, 0, False), (143, 90, True), (1, 3, True), (1, 20, False), (134, 0, True), (2, 0, False)],
)
def test_a_job_that_was_stopped_queues_itself_again(checkout, code, before, again):
    edit(checkout / "launch/slurm/train.sbatch", SLURM)
    bin_, log = checkout.parent / "bin", checkout.parent / "log"
    program(
        bin_,
        "srun",
        f'#!/bin/bash\nprintf "%s\\n" "$MTLLM_SIGTERM_EXIT" "$@" > "{log}"\nexit {code}\n',
    )
    program(bin_, "scontrol", f'#!/bin/bash\necho "$@" > "{log}.scontrol"\n')
    spooled = checkout.parent / "slurm_script"  # Slurm runs a copy, elsewhere
    shutil.copy(checkout / "launch/slurm/train.sbatch", spooled)
    given = {"SLURM_SUBMIT_DIR": str(checkout), "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "3"}
    given["SLURM_RESTART_COUNT"] = str(before)
    path = {"PATH": f"{bin_}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", spooled], env=os.environ | given | path, cwd=checkout.parent)
    assert done.returncode == code
    exit_code, *words = log.read_text().split("\n")[: len(FLAGS) + 6]
    assert exit_code == "143" and words[-len(FLAGS) :] == FLAGS
    assert words[-len(FLAGS) - 2 : -len(FLAGS)] == [sys.executable, "launch/train.py"]
    assert "--cpus-per-task=3" in words
    requeued = Path(f"{log}.scontrol")
    assert requeued.exists() == again and (not again or requeued.read_text() == "requeue 7\n")


def test_slurm_dry_run_prints_the_commands(checkout):
    edit(checkout / "launch/slurm/train.sbatch", SLURM)
    done = call(checkout, "slurm/train.sbatch", "--dry-run")
    first, export, step, requeue = commands(done.stdout)
    assert first == ["sbatch", "launch/slurm/train.sbatch"]
    assert export == ["export", "MTLLM_SIGTERM_EXIT=143"]
    assert step[0] == "srun" and step[-len(FLAGS) :] == FLAGS
    assert requeue == ["scontrol", "requeue", "JOB"]


# ---------------------------------------------------------------- SkyPilot

# https://docs.skypilot.co/en/latest/reference/yaml-spec.html
SKY_FIELDS = {
    "": {
        "name", "workdir", "num_nodes", "resources", "envs", "secrets", "volumes", "file_mounts",
        "setup", "run", "config",
    },
    "resources": {
        "infra", "accelerators", "accelerator_args", "cpus", "memory", "instance_type", "use_spot",
        "disk_size", "disk_tier", "network_tier", "max_hourly_cost", "image_id", "ports", "labels",
        "autostop", "any_of", "ordered", "job_recovery",
    },
    "job_recovery": {"strategy", "max_restarts_on_errors", "recover_on_exit_codes"},
}  # fmt: skip


@pytest.mark.parametrize("name", ["gpu", "tpu"])
def test_the_sky_task_has_documented_fields_and_sound_shell(name, tmp_path):
    task = yaml.safe_load((ROOT / f"launch/sky/{name}.yaml").read_text())
    assert task.keys() <= SKY_FIELDS[""] and task["resources"].keys() <= SKY_FIELDS["resources"]
    recovery = task["resources"]["job_recovery"]
    assert recovery.keys() <= SKY_FIELDS["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [143]
    assert "export MTLLM_SIGTERM_EXIT=143" in task["run"]
    assert (task["num_nodes"] == 1) == (name == "tpu")
    shellcheck = Path(sys.executable).with_name("shellcheck")
    for part in ("setup", "run"):
        found = subprocess.run(
            [shellcheck, "--shell=bash", "-"], input=task[part], capture_output=True, text=True
        )
        assert (found.returncode, found.stdout) == (0, "")


# ---------------------------------------------------------------- who starts how many

# What each process of a job finds, by the package's own start and a sum over all of them.
JOINS = """
import json, os, sys
from mtllm_jax import distributed
distributed.start()
import jax
from jax.experimental import multihost_utils
indices = multihost_utils.process_allgather(jax.numpy.int32(jax.process_index())).tolist()
seen = json.dumps([jax.process_index(), jax.process_count(), indices, sys.argv[1:]])
os.write(1, f"\\nseen {seen}\\n".encode())  # at once: the processes share a pipe
distributed.finish()
"""
# srun as far as two tasks on this machine go, with the variables that it documents:
# https://slurm.schedmd.com/srun.html
SRUN = f"""#!{sys.executable}
import os, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
step = {{"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1", "SLURM_NTASKS": "2"}}
tasks = [
    subprocess.Popen(command, env=os.environ | step | {{"SLURM_PROCID": i, "SLURM_LOCALID": i}})
    for i in "01"
]
sys.exit(max(task.wait() for task in tasks))
"""


def free_port(low: int, high: int) -> int:
    for port in range(low, high):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("localhost", port))
            return port
    pytest.fail("no port is free")


def seen_by_each(output: str) -> list[list]:
    return sorted(map(json.loads, re.findall("^seen (.*)", output, re.MULTILINE)))


def here(checkout: Path) -> dict[str, str]:
    """The variables of a process with one CPU device that imports this package."""
    (checkout / "launch/train.py").write_text(JOINS)
    shutil.rmtree(checkout / "mtllm_jax")
    return os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}


@pytest.mark.slow
def test_slurm_tasks_are_the_processes_of_one_run(checkout):
    environment = here(checkout)
    edit(checkout / "launch/slurm/train.sbatch", SLURM)
    program(checkout.parent / "bin", "srun", SRUN)
    # jax makes the coordinator's port of the job's number.
    job = free_port(61440, 65535) - 61440
    environment |= {"PATH": f"{checkout.parent / 'bin'}:{environment['PATH']}"}
    environment |= {"SLURM_JOB_ID": str(job), "SLURM_SUBMIT_DIR": str(checkout)}
    done = subprocess.run(
        ["bash", "launch/slurm/train.sbatch"],
        cwd=checkout, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert seen_by_each(done.stdout) == [[i, 2, [0, 1], FLAGS] for i in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_sky_nodes_are_the_processes_of_one_run(checkout, count):
    environment = here(checkout)
    program(checkout / ".venv/bin", "python", f'#!/bin/bash\nexec "{sys.executable}" "$@"\n')
    run = yaml.safe_load((checkout / "launch/sky/gpu.yaml").read_text())["run"]
    run = re.sub(r"flags=\(.*\)", lambda _: TRAIN.replace("TRAIN", "flags"), run)
    run = run.replace("8476", str(free_port(20000, 30000)))
    nodes = [
        subprocess.Popen(
            ["bash", "-c", run],
            cwd=checkout,
            # https://docs.skypilot.co/en/latest/running-jobs/environment-variables.html
            env=environment | {
                "SKYPILOT_NODE_IPS": "\n".join(["127.0.0.1"] * count),
                "SKYPILOT_NUM_NODES": str(count),
                "SKYPILOT_NODE_RANK": str(rank),
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]  # fmt: skip
    said = "".join(node.communicate(timeout=120)[0] for node in nodes)
    assert [node.returncode for node in nodes] == [0] * count
    everyone = list(range(count))
    assert seen_by_each(said) == [[rank, count, everyone, FLAGS] for rank in everyone]


# ---------------------------------------------------------------- images


def test_the_dockerfile_has_its_targets_and_copies_what_there_is(tmp_path):
    parsed = DockerfileParser(str(tmp_path))
    parsed.content = (ROOT / "launch/docker/Dockerfile").read_text()
    stages: dict[str, list[tuple[str, str]]] = {}
    for step in parsed.structure:
        if step["instruction"] == "FROM":
            stages[step["value"].split(" AS ")[1]] = []
            assert step["value"].startswith(("python:3.11-slim", "base AS "))
        elif step["instruction"] != "COMMENT":
            stages[list(stages)[-1]].append((step["instruction"], step["value"]))
    assert list(stages) == ["base", "cpu", "tpu", "cuda"]
    extras = (ROOT / "setup.cfg").read_text()
    for target in ("cpu", "tpu", "cuda"):
        (install,) = [value for kind, value in stages[target] if kind == "RUN"]
        named = re.fullmatch(r"pip install -e '\.\[(.+)\]'", install)[1].split(",")
        assert "gcs" in named and (target == "cpu") != (target in named)
        assert all(f"\n{name} =\n" in extras for name in named)
        assert ("COPY", ". .") == stages[target][-1]
    assert ("ENTRYPOINT", '["python", "launch/train.py"]') in stages["base"]
    for kind, value in stages["base"]:
        if kind == "COPY":
            assert all((ROOT / source).exists() for source in value.split()[:-1])
    sent = (ROOT / "launch/docker/Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in sent
    kept = {line[1:] for line in sent if line.startswith("!")}
    assert kept == {
        "setup.cfg",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "configs",
        "launch",
        "mtllm_jax",
    }
    assert all((ROOT / name).exists() for name in kept)


def test_an_image_is_built_for_one_target_and_pushed_when_asked(checkout):
    edit(checkout / "launch/docker/build.sh", {"IMAGE=''": "IMAGE=r/mtllm:1"})
    (build,) = commands(call(checkout, "docker/build.sh", "cuda", "--dry-run").stdout)
    assert build[:4] == ["env", "DOCKER_BUILDKIT=1", "docker", "build"]
    assert "--target=cuda" in build and "--tag=r/mtllm:1" in build and build[-1] == str(checkout)
    _, push = commands(call(checkout, "docker/build.sh", "tpu", "push", "--dry-run").stdout)
    assert push == ["docker", "push", "r/mtllm:1"]
