#!/usr/bin/env bash
#SBATCH --job-name=openrlhf
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --output=openrlhf-%j.log
# A script that starts with `deepspeed --module`, on all machines of a SLURM job. From the clone, which all of them see:
#   sbatch examples/scripts/train_llama_slurm.sh examples/scripts/train_dpo_llama.sh
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
script=$(realpath "${1:-examples/scripts/train_sft_llama.sh}")
[ "${SMOKE:-0}" = 0 ] || source examples/scripts/smoke.sh

head=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-}" | head -n 1)

# What the script means by deepspeed: one torchrun a machine, eight ranks by each.
deepspeed() {
  srun --kill-on-bad-exit=1 torchrun \
     --nnodes "${SLURM_JOB_NUM_NODES:-1}" \
     --nproc_per_node 8 \
     --rdzv_id "${SLURM_JOB_ID:-0}" \
     --rdzv_backend c10d \
     --rdzv_endpoint "$head:29500" \
     "$@"
}
source "$script"
