#!/usr/bin/env bash
# REINFORCE++ of an 8B model on eight GPUs with a python reward: right mathematics, and a little for its form.
# Needs pip install math-verify.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ "${SMOKE:-0}" = 0 ] || source "$here/smoke.sh"

python3 -m openrlhf.cli.train_ppo_ray \
   --ref_num_gpus_per_node 4 \
   --actor_num_gpus_per_node 4 \
   --colocate_actor_ref \
   --vllm_num_engines 4 \
   --pretrain meta-llama/Meta-Llama-3-8B-Instruct \
   --remote_rm_url "$here/reward_math.py,$here/reward_format.py" \
   --reward_weights 1,0.2 \
   --label_key answer \
   --advantage_estimator reinforce \
   --n_samples_per_prompt 8 \
   --save_path ./checkpoint/llama3-8b-math \
   --micro_train_batch_size 8 \
   --train_batch_size 1024 \
   --micro_rollout_batch_size 16 \
   --rollout_batch_size 128 \
   --max_epochs 1 \
   --prompt_max_len 1024 \
   --generate_max_len 2048 \
   --zero_stage 3 \
   --bf16 \
   --actor_learning_rate 5e-7 \
   --init_kl_coef 0.001 \
   --prompt_data openai/gsm8k@main \
   --input_key question \
   --apply_chat_template \
   --packing_samples \
   --adam_offload \
   --flash_attn \
   --gradient_checkpointing
