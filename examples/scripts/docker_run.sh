#!/usr/bin/env bash
# Build the image of this repository, if it is not there, and open a shell in it (or run the arguments), as the user who
# asks: what a run writes belongs to you. The clone is /openrlhf, models and data sets are cached in ~/.cache/huggingface.
#   bash examples/scripts/docker_run.sh
#   IMAGE=openrlhf:cpu DOCKERFILE=dockerfile/Dockerfile.cpu GPUS= bash examples/scripts/docker_run.sh
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
[ "${SMOKE:-0}" = 0 ] || source "$root/examples/scripts/smoke.sh"
image=${IMAGE:-openrlhf:cuda}
dockerfile=${DOCKERFILE:-$root/dockerfile/Dockerfile}
gpus=${GPUS-all}

docker image inspect "$image" >/dev/null 2>&1 || docker build --tag "$image" --file "$dockerfile" "$root"

cache=${HF_HOME:-$HOME/.cache/huggingface}
mkdir -p "$cache"
terminal=()
[ -t 0 ] && terminal=(--interactive --tty)
docker run --rm "${terminal[@]}" \
   ${gpus:+--gpus "$gpus"} \
   --shm-size 10g \
   --user "$(id -u):$(id -g)" \
   --cap-drop ALL \
   --security-opt no-new-privileges \
   --volume "$root:/openrlhf" \
   --volume "$cache:/cache" \
   --env HF_HOME=/cache \
   --env HOME=/tmp \
   "$image" "${@:-bash}"
