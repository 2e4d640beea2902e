#!/usr/bin/env bash
# PPO of an 8B model on eight GPUs with rewards of a server: start serve_remote_rm.sh first, on a GPU of its own.
# Several servers with one model: --remote_rm_url http://a:5000/get_reward,http://b:5000/get_reward --remote_rm_mode replicas
set -euo pipefail
[ "${SMOKE:-0}" = 0 ] || source "$(dirname "${BASH_SOURCE[0]}")/smoke.sh"

python3 -m openrlhf.cli.train_ppo_ray \
   --ref_num_gpus_per_node 2 \
   --critic_num_gpus_per_node 2 \
   --actor_num_gpus_per_node 2 \
   --colocate_actor_ref \
   --vllm_num_engines 2 \
   --pretrain OpenRLHF/Llama-3-8b-sft-mixture \
   --remote_rm_url http://localhost:5000/get_reward \
   --save_path ./checkpoint/llama3-8b-rlhf \
   --micro_train_batch_size 8 \
   --train_batch_size 128 \
   --micro_rollout_batch_size 16 \
   --rollout_batch_size 1024 \
   --max_samples 100000 \
   --max_epochs 1 \
   --prompt_max_len 1024 \
   --generate_max_len 1024 \
   --zero_stage 3 \
   --bf16 \
   --actor_learning_rate 5e-7 \
   --critic_learning_rate 9e-6 \
   --init_kl_coef 0.01 \
   --prompt_data OpenRLHF/prompt-collection-v0.1 \
   --input_key context_messages \
   --apply_chat_template \
   --packing_samples \
   --adam_offload \
   --flash_attn \
   --gradient_checkpointing
