"""A gcloud whose queued resource is folders here: FAKE_GCLOUD/workers/N is the home of a worker.

FAKE_GCLOUD/lives.json says how each creation fares, as the states that one look after the other
finds; the last one stays. "refused" as the first state is a creation that fails. A resource that
is not ACTIVE has no workers: what ran there is killed, what lay there is gone. Every call but
those of the workers themselves is added to calls.jsonl.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

WORKERS = 2
HERE = Path(os.environ["FAKE_GCLOUD"])


def value(flag):
    return next(word.removeprefix(flag) for word in sys.argv if word.startswith(flag))


def homes():
    return sorted((HERE / "workers").iterdir())


def lose_workers():
    for home in homes():
        if (home / "mtllm.group").exists() and not (home / "mtllm.exit").exists():
            os.killpg(int((home / "mtllm.group").read_text()), signal.SIGKILL)
    shutil.rmtree(HERE / "workers")


def create():
    lives = json.loads((HERE / "lives.json").read_text())
    states = lives.pop(0)
    (HERE / "lives.json").write_text(json.dumps(lives))
    if states == ["refused"]:
        return 1
    (HERE / "states.json").write_text(json.dumps(states))
    return 0


def look():
    if (HERE / "states.json").exists():
        states = json.loads((HERE / "states.json").read_text())
        print(states[0])
        if states[0] == "ACTIVE" and not (HERE / "workers").exists():
            for worker in range(WORKERS):
                (HERE / "workers" / str(worker)).mkdir(parents=True)
        if states[0] == "SUSPENDED" and (HERE / "workers").exists():
            lose_workers()
        (HERE / "states.json").write_text(json.dumps(states[1:] or states))
    return 0


def delete():
    (HERE / "states.json").unlink()
    if (HERE / "workers").exists():
        lose_workers()
    return 0


def main():
    words = sys.argv[1:]
    if words[:3] == ["storage", "rsync", "--recursive"]:  # a worker's own call
        source, destination = words[3:]
        (Path(destination) / "from").write_text(source)
        return 0
    with (HERE / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(words) + "\n")
    assert words[:3] == ["compute", "tpus", "queued-resources"], words
    verb = words[3]
    if verb in ("create", "list", "delete"):
        return {"create": create, "list": look, "delete": delete}[verb]()
    if not (HERE / "workers").exists():
        print("ERROR: no workers", file=sys.stderr)
        return 1
    some = homes() if "--worker=all" in words else homes()[int(value("--worker=")) :][:1]
    if verb == "scp":
        for home in some:
            shutil.copy(words[4], home / words[5].partition(":")[2])
        return 0
    assert verb == "ssh", words
    return max(
        subprocess.run(
            ["bash", "-c", value("--command=")],
            env=os.environ | {"HOME": str(home)},
            cwd=home,
            check=False,
        ).returncode
        for home in some
    )


if __name__ == "__main__":
    sys.exit(main())
