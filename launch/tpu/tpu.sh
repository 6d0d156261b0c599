#!/usr/bin/env bash
# A run on Cloud TPUs, by queued resources: one slice or several.
#
#   launch/tpu/tpu.sh watch       all of it, until the run has ended: create, setup, run; the same
#                                 again after a preemption; delete when it is done
#   launch/tpu/tpu.sh create      ask for the machines
#   launch/tpu/tpu.sh state       where the request stands
#   launch/tpu/tpu.sh setup       copy this checkout to every worker, install it, fetch DATA
#   launch/tpu/tpu.sh run         start launch/train.py on every worker; what runs is stopped first
#   launch/tpu/tpu.sh status      what every worker does
#   launch/tpu/tpu.sh logs [all]  follow the log of worker 0; all: the last lines of each
#   launch/tpu/tpu.sh stop        let the run save and end; a watch would start it again
#   launch/tpu/tpu.sh delete      give the machines back
#
# --dry-run prints the commands and runs none. gcloud must be installed and logged in.

set -euo pipefail

# Edit these three lines. TYPE and ZONE go together: gcloud compute tpus accelerator-types list.
# DATA, if there is one, is a gs:// folder that becomes data/ on every worker; TRAIN are the flags of
# launch/train.py, as --config.adaptation_text=data/english.jsonl.
PROJECT='' ZONE=''
TYPE='v5litepod-16' SLICES=1 SPOT=yes
DATA='' TRAIN=(--config=configs/mtllm.py:llama3-8b --workdir=)

# These may stay.
NAME=mtllm      # of the queued resource
POLL=60         # seconds between two looks at the machines
MOST_FAILURES=5 # in a row, before watch gives up; a preemption is none

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
# shellcheck source=launch/shell.sh
source "$here/../shell.sh"

options "$@"
edited PROJECT my-project
edited ZONE us-west4-a
edited_workdir gs://
# https://cloud.google.com/tpu/docs/runtimes
case $TYPE in
  v6e-*) RUNTIME=v2-alpha-tpuv6e ;;
  v5p-*) RUNTIME=v2-alpha-tpuv5 ;;
  v5litepod-*) RUNTIME=v2-alpha-tpuv5-lite ;;
  v4-* | v3-* | v2-*) RUNTIME=tpu-ubuntu2204-base ;;
  *) fail "TYPE is '$TYPE'; it must begin with v6e-, v5p-, v5litepod-, v4-, v3- or v2-." ;;
esac

WHERE=("--project=$PROJECT" "--zone=$ZONE" --quiet)
TARBALL=${TMPDIR:-/tmp}/$NAME-checkout.tgz
ERRORS=${TMPDIR:-/tmp}/$NAME-errors
WORKER=mtllm_jax/launch/tpu/worker.sh

queued() { run gcloud compute tpus queued-resources "$@" "${WHERE[@]}"; }

on_workers() { queued ssh "$NAME" --node=all --worker=all "--command=$1"; }

create() {
  local nodes=("--node-id=$NAME") tier=()
  if [[ $SLICES != 1 ]]; then nodes=("--node-count=$SLICES" "--node-prefix=$NAME"); fi
  if [[ $SPOT = yes ]]; then tier=(--spot); fi
  queued create "$NAME" "${nodes[@]}" "--accelerator-type=$TYPE" "--runtime-version=$RUNTIME" \
    "${tier[@]}"
}

# state: one of the API's names, as ACTIVE; nothing where there is no such request.
state() { queued list "--filter=name~(^|/)$NAME\$" '--format=value(state.state)'; }

delete() { queued delete "$NAME" --force; }

pack() {
  run tar -czf "$TARBALL" -C "$root" --exclude=__pycache__ \
    setup.cfg pyproject.toml README.md LICENSE configs launch mtllm_jax
}

install() {
  queued scp "$TARBALL" "$NAME:checkout.tgz" --node=all --worker=all &&
    on_workers "if [ -e $WORKER ]; then bash $WORKER stop; fi; rm -rf mtllm_jax && \
mkdir mtllm_jax && tar -xzf checkout.tgz -C mtllm_jax && bash $WORKER setup $(quoted "$DATA")"
}

start() { on_workers "bash $WORKER start $(quoted "${TRAIN[@]}")"; }

# status: a line from each worker; a machine without a checkout has no script to ask.
status() {
  on_workers "bash $WORKER status $(quoted "${TRAIN[@]}") 2>&- || echo 'worker: none'"
}

logs() {
  if [[ ${1:-} = all ]]; then
    on_workers 'tail -n 20 mtllm.log'
  else
    queued ssh "$NAME" --node=0 --worker=0 '--command=tail -n 100 -F mtllm.log'
  fi
}

say() { echo "$(date '+%F %T') $*"; }

# failed WHAT: counts it; ends the script after too many in a row.
failures=0
failed() {
  failures=$((failures + 1))
  say "$1 ($failures of at most $MOST_FAILURES failures in a row)"
  if ((failures >= MOST_FAILURES)); then
    say "giving up; the machines are kept: look at $0 logs all, then $0 watch or $0 delete"
    exit 1
  fi
}

# again SAID: starts the run on all workers, as SAID is what they say; new ones are set up before.
started=0
again() {
  # What ran for long has got somewhere, and its end is no failure in a row.
  if ((SECONDS - started > 1800)); then failures=0; fi
  started=$SECONDS
  case $1 in
    none) say 'setting up' ;;
    *none* | *'exit 143'*) say 'starting again' ;;
    *) failed "starting again, workers say: $1" ;;
  esac
  if { [[ $1 != *none* ]] || install; } && start; then
    ours=yes
    say 'started'
  else
    failed 'a worker could not be started'
  fi
}

# look: asks the workers, and acts on what they say together.
waited=no # for the others, where some have ended
ours=no   # what an earlier command left on the machines is no news
look() {
  local said
  # gcloud tells of every connection that it makes; only where one fails is that of use.
  said=$(status 2>"$ERRORS") || {
    say "a worker is out of reach: $(tail -n 1 "$ERRORS")"
    return
  }
  said=$(sed -n 's/^worker: //p' <<<"$said" | sort -u | paste -sd, -)
  case ,$said, in
    *,busy,*) fail "the workers run another command; $0 stop ends that." ;;
    *,running,*) ours=yes ;;
  esac
  if [[ $ours = no ]]; then said=none; fi
  case ,$said, in
    ,running,) waited=no ;;
    ',exit 0,')
      say 'the run is done; deleting the machines'
      delete
      exit 0
      ;;
    *',exit 2,'*)
      say "the command has a mistake (exit code 2), see $0 logs; the machines are kept"
      exit 2
      ;;
    # Some have ended: the others save, or notice within a while that they are alone.
    *,running,*)
      if [[ $waited = yes ]]; then again "$said"; fi
      waited=yes
      ;;
    *)
      waited=no
      again "$said"
      ;;
  esac
}

watch() {
  local now before=
  pack
  while true; do
    now=$(state) || now='out of reach'
    if [[ $now != "$before" ]]; then say "the request is: ${now:-not there}"; fi
    before=$now
    case $now in
      '') create || failed 'the request was refused' ;;
      ACTIVE) look ;;
      SUSPENDED)
        failures=0
        delete && continue
        ;;
      FAILED)
        failed 'the request failed'
        delete && continue
        ;;
    esac
    sleep "$POLL"
  done
}

# watch_plan: the commands of watch, each with what it waits for.
watch_plan() {
  pack
  echo "# every $POLL s:" && state
  echo '# no such request:' && create
  echo '# ACTIVE, and the machines are new:' && install && start
  echo '# ACTIVE, then:' && status
  echo '# workers have ended, not all of them with 0 (and none with 2, a mistake):' && start
  echo '# SUSPENDED or FAILED (after that there is no such request):' && delete
  echo '# all workers have ended with 0:' && delete
}

case ${WORDS[0]:-} in
  watch) if [[ $DRY_RUN = yes ]]; then watch_plan; else watch; fi ;;
  create | state | status | delete) "${WORDS[0]}" ;;
  setup) pack && install ;;
  run) start ;;
  logs) logs "${WORDS[@]:1}" ;;
  stop) on_workers "bash $WORKER stop" ;;
  *) fail "'${WORDS[*]}' is none of its commands; see $0 --help." ;;
esac
