#!/usr/bin/env bash
# What SMOKE=1 does to an example script, which sources this file before its first command:
#   SMOKE=1 bash examples/scripts/train_sft_llama.sh
# Every command below runs through smoke.py, which puts tiny random models and made-up rows in place of the named ones,
# and small numbers in place of sizes and rounds; the other flags stay as they are, but without a GPU --adam_offload goes
# (DeepSpeed would compile its Adam for a minute). No GPU and no network is needed. What is written goes below
# runs/smoke/SCRIPT (RUNS=dir changes runs), and is replaced when the script runs again.
[ -z "${SMOKE_DIR:-}" ] || return 0

smoke_here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
SMOKE_DIR=$(realpath -m "${RUNS:-$smoke_here/../../runs}/smoke/$(basename "$0" .sh)")
ROUNDS=2
export SMOKE_DIR HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
PYTHONPATH=$(realpath "$smoke_here/../.."):${PYTHONPATH:-}
export PYTHONPATH
rm -rf "$SMOKE_DIR"
mkdir -p "$SMOKE_DIR"
cd "$SMOKE_DIR"

smoke() { command python3 "$smoke_here/smoke.py" "$@"; }
python3() { smoke python3 "$@"; }
deepspeed() { smoke deepspeed "$@"; }
torchrun() { smoke torchrun "$@"; }
ray() { smoke ray "$@"; }
srun() { smoke srun "$@"; }
scontrol() { uname -n; }
docker() { smoke docker "$@"; }
sudo() { smoke sudo "$@"; }
curl() { smoke curl "$@"; }
