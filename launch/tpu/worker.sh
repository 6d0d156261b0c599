#!/usr/bin/env bash
# One worker's side of launch/tpu/tpu.sh, in the home folder of the machine.
#
#   worker.sh setup DATA      a Python of its own in mtllm_venv, with the checkout in mtllm_jax; the
#                             gs:// folder DATA, if it is not '', in mtllm_jax/data
#   worker.sh start FLAG...   launch/train.py in the background; its output is added to mtllm.log
#   worker.sh status FLAG...  one line: worker: none | running | exit CODE | busy (with other flags)
#   worker.sh stop            SIGTERM; what has not ended after GRACE seconds is killed

set -euo pipefail
cd "$HOME"
GRACE=${GRACE:-120}

setup() {
  # The images bring Python 3.10, and uv brings any other. Newer images want to be overruled here.
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
  local uv
  uv=$(python3 -m site --user-base)/bin/uv
  "$uv" venv --quiet --allow-existing --python 3.11 mtllm_venv
  "$uv" pip install --quiet --python mtllm_venv/bin/python --editable './mtllm_jax[tpu,gcs]'
  if [[ -n $1 ]]; then
    mkdir mtllm_jax/data
    gcloud storage rsync --recursive "$1" mtllm_jax/data
  fi
}

# The lock is held by the run and whatever it started: it says more than a process id, which the
# system may give to another process.
running() { ! flock --nonblock mtllm.lock true; }

start() {
  stop
  rm -f mtllm.exit mtllm.pid
  echo "${@@Q}" >mtllm.flags
  # A session of its own outlives the ssh connection. 143 tells stopped from finished.
  # shellcheck disable=SC2016
  MTLLM_SIGTERM_EXIT=143 setsid nohup bash -c '
    exec 9> mtllm.lock && flock 9
    echo $$ > mtllm.group
    cd mtllm_jax
    "$HOME/mtllm_venv/bin/python" launch/train.py "$@" &
    echo $! > "$HOME/mtllm.pid"
    wait $! && code=0 || code=$?
    echo $code > "$HOME/mtllm.exit"' train "$@" >>mtllm.log 2>&1 </dev/null &
  until [[ -s mtllm.pid ]]; do sleep 0.1; done
}

status() {
  if running && [[ $(<mtllm.flags) != "${*@Q}" ]]; then
    echo 'worker: busy'
  elif running; then
    echo 'worker: running'
  elif [[ -s mtllm.exit ]]; then
    echo "worker: exit $(<mtllm.exit)"
  else
    echo 'worker: none'
  fi
}

stop() {
  local end=$((SECONDS + GRACE))
  running || return 0
  # Once: a second signal would end it before it has saved.
  kill -TERM "$(<mtllm.pid)" || true
  while running; do
    if ((SECONDS >= end)); then
      echo 137 >mtllm.exit
      kill -KILL -- "-$(<mtllm.group)" || true # what it started is in its group
    fi
    sleep 0.2
  done
}

case ${1:-} in
  setup | start | status | stop) "$1" "${@:2}" ;;
  *)
    echo "error: '${1:-}' is not one of setup, start, status, stop." >&2
    exit 2
    ;;
esac
