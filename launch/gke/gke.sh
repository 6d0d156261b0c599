#!/usr/bin/env bash
# A run on Cloud TPUs in a GKE cluster, as a JobSet: one slice or several.
#
#   launch/gke/gke.sh manifest   print what is applied: jobset.yaml with the lines below filled in
#   launch/gke/gke.sh create     start the run; it comes back after preemptions by itself
#   launch/gke/gke.sh status     the JobSet and its pods
#   launch/gke/gke.sh logs       follow the first pod of the first slice
#   launch/gke/gke.sh delete     let the run save, and remove the JobSet
#   launch/gke/gke.sh xpk        start it by xpk instead, in a cluster that xpk made
#
# --dry-run prints the commands and runs none. The image is made by launch/docker/build.sh; kubectl
# points at a cluster with JobSet (https://jobset.sigs.k8s.io/docs/installation/) and with a node
# pool for each slice. create after delete goes on from the last checkpoint.

set -euo pipefail

# Edit these three lines. ACCELERATOR and TOPOLOGY are labels of the node pools. DATA, if there is one,
# is a gs:// folder that becomes data/ in every pod; TRAIN are the flags of launch/train.py, as
# --config.adaptation_text=data/english.jsonl. CLUSTER is for xpk alone.
IMAGE='' CLUSTER=''
ACCELERATOR='tpu-v5-lite-podslice' TOPOLOGY='4x4' SLICES=1 SPOT=yes
DATA='' TRAIN=(--config=configs/mtllm.py:llama3-8b --workdir=)

# These may stay.
NAME=mtllm
CHIPS=4                 # of one machine: 4 in slices of several machines
MAX_RESTARTS=500        # of the whole run, preemptions counted
SERVICE_ACCOUNT=default # it must reach the buckets of DATA and --workdir

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/shell.sh
source "$here/../shell.sh"

options "$@"
edited IMAGE us-docker.pkg.dev/my-project/my-repository/mtllm:1
edited_workdir gs://
[[ $TOPOLOGY =~ ^[0-9]+x[0-9]+(x[0-9]+)?$ ]] ||
  fail "TOPOLOGY is '$TOPOLOGY'; it must be as 4x4 or 4x4x4."
all_chips=$((${TOPOLOGY//x/*}))
((all_chips % CHIPS == 0)) ||
  fail "TOPOLOGY is $TOPOLOGY, $all_chips chips; it must be a multiple of CHIPS, which is $CHIPS."

# json WORD...: a list of strings.
json() {
  local word list=()
  for word in "$@"; do
    word=${word//\\/\\\\}
    list+=("\"${word//\"/\\\"}\"")
  done
  local IFS=,
  echo "[${list[*]}]"
}

manifest() {
  local text pair
  text=$(<"$here/jobset.yaml")
  if [[ $SPOT != yes ]]; then text=$(grep -v '# with SPOT$' <<<"$text"); fi
  if [[ -z $DATA ]]; then text=$(grep -v '# with DATA$' <<<"$text"); fi
  for pair in "NAME=$NAME" "IMAGE=$IMAGE" "ACCELERATOR=$ACCELERATOR" "TOPOLOGY=$TOPOLOGY" \
    "SLICES=$SLICES" "HOSTS=$((all_chips / CHIPS))" "CHIPS=$CHIPS" "MAX_RESTARTS=$MAX_RESTARTS" \
    "SERVICE_ACCOUNT=$SERVICE_ACCOUNT" "DATA=$DATA" "ARGS=$(json "${TRAIN[@]}")"; do
    text=${text//"\${${pair%%=*}}"/"${pair#*=}"}
  done
  echo "$text"
}

create() {
  if [[ $DRY_RUN = yes ]]; then
    printf "kubectl apply -f - <<'EOF'\n%s\nEOF\n" "$(manifest)"
  else
    manifest | kubectl apply -f -
  fi
}

status() {
  run kubectl get jobset "$NAME"
  run kubectl get pods -l "jobset.sigs.k8s.io/jobset-name=$NAME"
}

logs() {
  local first="jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
  run kubectl logs --follow --tail=100 -l "jobset.sigs.k8s.io/jobset-name=$NAME,$first"
}

delete() { run kubectl delete jobset "$NAME"; }

# The names count chips, those of v5p and v4 cores, of which a chip has two.
tpu_type() {
  case $ACCELERATOR in
    tpu-v5-lite-podslice) echo "v5litepod-$all_chips" ;;
    tpu-v6e-slice) echo "v6e-$all_chips" ;;
    tpu-v5p-slice) echo "v5p-$((2 * all_chips))" ;;
    tpu-v4-podslice) echo "v4-$((2 * all_chips))" ;;
    *) fail "ACCELERATOR is '$ACCELERATOR'; the name that xpk has for it is not known here." ;;
  esac
}

# xpk starts again what ended with 143, and not what ended with 2, without being asked. exec: the
# shell around the command hands SIGTERM to its own child and no further.
xpk_create() {
  edited CLUSTER my-cluster
  [[ -z $DATA ]] || fail 'DATA is set, and xpk would not fetch it; attach it by xpk storage.'
  local type
  type=$(tpu_type)
  run xpk workload create "--cluster=$CLUSTER" "--workload=$NAME" "--tpu-type=$type" \
    "--num-slices=$SLICES" "--docker-image=$IMAGE" "--max-restarts=$MAX_RESTARTS" \
    --termination-grace-period-seconds=300 --env=MTLLM_SIGTERM_EXIT=143 \
    "--command=exec python launch/train.py $(quoted "${TRAIN[@]}")"
}

case ${WORDS[0]:-} in
  manifest | create | status | logs | delete) "${WORDS[0]}" ;;
  xpk) xpk_create ;;
  *) fail "'${WORDS[*]}' is none of manifest, create, status, logs, delete, xpk; see $0 --help." ;;
esac
