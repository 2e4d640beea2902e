#!/usr/bin/env bash
# Set up what is missing and run the tests.
#   bash tests/run.sh             the quick tier
#   bash tests/run.sh --full      everything: matrices and long end-to-end runs too
#   bash tests/run.sh ARG ...     further arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

env_dir=${OPENRLHF_ENV:-$PWD/.venv}
bash examples/scripts/setup_env.sh "$env_dir"

selection=(-m "not full")
if [ "${1:-}" = --full ]; then
  selection=(-m "full or not full")
  shift
fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false WANDB_MODE=offline PATH="$env_dir/bin:$PATH"
# With PYTHONDONTWRITEBYTECODE=1 every program that a test starts would compile the package anew.
python -m compileall -q openrlhf
exec python -m pytest --durations=30 "${selection[@]}" "$@"
