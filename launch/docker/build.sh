#!/usr/bin/env bash
# An image of this checkout, for one kind of machine.
#
#   launch/docker/build.sh cpu|tpu|cuda        build it
#   launch/docker/build.sh cpu|tpu|cuda push   build it and push it to its registry
#
# Then, for example (--gpus=all for the target cuda):
#   docker run --shm-size=8g -v "$PWD/runs:/opt/mtllm_jax/runs" IMAGE --config=configs/mtllm.py
#
# --dry-run prints the commands and runs none.

set -euo pipefail

# Edit this line: a name with its registry, if it is to be pushed.
IMAGE=''

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=launch/shell.sh
source "$root/launch/shell.sh"

options "$@"
edited IMAGE us-docker.pkg.dev/my-project/my-repository/mtllm:1
case ${WORDS[*]} in
  cpu | tpu | cuda | 'cpu push' | 'tpu push' | 'cuda push') ;;
  *) fail "'${WORDS[*]}' is not cpu, tpu or cuda, alone or with push behind it; see $0 --help." ;;
esac

# BuildKit builds the one target, and reads the list of files beside the Dockerfile.
run env DOCKER_BUILDKIT=1 docker build "--file=$root/launch/docker/Dockerfile" \
  "--target=${WORDS[0]}" "--tag=$IMAGE" "$root"
if [[ ${WORDS[1]:-} = push ]]; then run docker push "$IMAGE"; fi
