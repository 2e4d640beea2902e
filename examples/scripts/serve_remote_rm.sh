#!/usr/bin/env bash
# Serve an 8B reward model on one GPU for train_ppo_llama_with_remote_rm.sh. For other machines add
# --host 0.0.0.0 --api_key FILE, and --remote_rm_key FILE to the training command.
set -euo pipefail
[ "${SMOKE:-0}" = 0 ] || source "$(dirname "${BASH_SOURCE[0]}")/smoke.sh"

python3 -m openrlhf.cli.serve_rm \
   --reward_pretrain OpenRLHF/Llama-3-8b-rm-700k \
   --port 5000 \
   --bf16 \
   --flash_attn \
   --normalize_reward \
   --max_len 8192 \
   --batch_size 16
