#!/usr/bin/env bash
# PPO of a 70B model on four machines of eight GPUs: actor and reference share sixteen GPUs, critic and reward model
# eight, four engines of two GPUs generate. Start Ray on the first machine, and join it from the three others:
#   ray start --head --num-gpus 8
#   ray start --address FIRST:6379 --num-gpus 8
# Every machine needs this repository at /openrlhf and the same Python environment.
set -euo pipefail
[ "${SMOKE:-0}" = 0 ] || source "$(dirname "${BASH_SOURCE[0]}")/smoke.sh"

ray job submit --address="http://127.0.0.1:8265" \
   --runtime-env-json='{"working_dir": "/openrlhf"}' \
   -- python3 -m openrlhf.cli.train_ppo_ray \
   --ref_num_nodes 2 \
   --ref_num_gpus_per_node 8 \
   --reward_num_nodes 1 \
   --reward_num_gpus_per_node 8 \
   --critic_num_nodes 1 \
   --critic_num_gpus_per_node 8 \
   --actor_num_nodes 2 \
   --actor_num_gpus_per_node 8 \
   --vllm_num_engines 4 \
   --vllm_tensor_parallel_size 2 \
   --colocate_critic_reward \
   --colocate_actor_ref \
   --vllm_sync_backend nccl \
   --pretrain meta-llama/Meta-Llama-3-70B-Instruct \
   --reward_pretrain OpenRLHF/Llama-3-8b-rm-700k \
   --save_path /openrlhf/examples/checkpoint/llama3-70b-rlhf \
   --micro_train_batch_size 1 \
   --train_batch_size 128 \
   --micro_rollout_batch_size 2 \
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
   --normalize_reward \
   --packing_samples \
   --adam_offload \
   --flash_attn \
   --gradient_checkpointing
