#!/usr/bin/env bash
# Train a policy, a reward model and then the policy against that reward model, on this machine, in minutes.
#   bash examples/scripts/quickstart.sh            SEED=n sets the seed, FRESH=1 trains anew
# Stages that are finished are kept: started again, it goes on where it was, or shows the figures.
set -euo pipefail

# The environment, the task and the supervised policy: stages task and sft.
source "$(dirname "${BASH_SOURCE[0]}")/quickstart_common.sh" quickstart

# On a few GPUs the models of PPO share them.
placement=()
[ "$gpus" -ge 1 ] && [ "$gpus" -le 4 ] && placement=(--colocate_all_models --vllm_gpu_memory_utilization 0.3)

engines=1
has_vllm || {
  engines=0
  echo "note: no vLLM for this Python and system; the policy generates itself"
}

train_reward_model

stage ppo python -m openrlhf.cli.train_ppo_ray \
  --pretrain "$out/sft" \
  --reward_pretrain "$out/rm" \
  --normalize_reward \
  --prompt_data "$out/task/prompts_train.jsonl" \
  --eval_dataset "$out/task/prompts_eval.jsonl" \
  --input_key prompt \
  --label_key label \
  --apply_chat_template \
  --eval_reward_func "$here/quickstart_reward.py" \
  --eval_temperature 1 0 0.6 \
  --eval_steps 20 \
  --actor_num_gpus_per_node 1 \
  --critic_num_gpus_per_node 1 \
  --ref_num_gpus_per_node 1 \
  --reward_num_gpus_per_node 1 \
  --vllm_num_engines "$engines" \
  "${placement[@]}" \
  --rollout_batch_size 256 \
  --micro_rollout_batch_size 128 \
  --train_batch_size 128 \
  --micro_train_batch_size 64 \
  --prompt_max_len 32 \
  --generate_max_len 12 \
  --actor_learning_rate 2e-4 \
  --critic_learning_rate 1e-3 \
  --init_kl_coef 0.2 \
  --lambd 0.95 \
  --zero_stage 1 \
  --seed "$seed" \
  --ckpt_path "$out/ppo_ckpt" \
  --save_path "$out/ppo"

python "$here/quickstart_result.py" "$out" --seed "$seed" --result "$(dirname "$out")/result.json"
