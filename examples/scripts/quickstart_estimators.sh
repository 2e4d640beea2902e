#!/usr/bin/env bash
# Every way of estimating advantages on the quickstart's task, from the same supervised policy, with a python reward
# function in place of a reward model: 80 rollouts of 256 answers each.
#   bash examples/scripts/quickstart_estimators.sh            SEED=n sets the seed, FRESH=1 trains anew
#   ESTIMATORS="rloo gspo" bash ...                           only some of them
# Stages that are finished are kept: started again, it goes on where it was, or shows the figures.
set -euo pipefail
estimators=${ESTIMATORS:-gae reinforce reinforce_baseline rloo group_norm dr_grpo gspo}
TASK_FLAGS=${TASK_FLAGS:---prompts 20480 --held_out 2048}

# The environment, the task and the supervised policy: stages task and sft.
source "$(dirname "${BASH_SOURCE[0]}")/quickstart_common.sh" estimators

# What is special to one: gae has a critic; the others compare answers to the same prompt, but for reinforce.
alone=(--rollout_batch_size 256 --n_samples_per_prompt 1)
group=(--rollout_batch_size 32 --n_samples_per_prompt 8 --max_samples 2560)
declare -A flags=(
  [gae]="${alone[*]} --advantage_estimator gae --critic_learning_rate 1e-3 --lambd 0.95"
  [reinforce]="${alone[*]} --advantage_estimator reinforce"
  [reinforce_baseline]="${group[*]} --advantage_estimator reinforce_baseline"
  [rloo]="${group[*]} --advantage_estimator rloo"
  [group_norm]="${group[*]} --advantage_estimator group_norm --use_kl_loss --kl_estimator k3"
  [dr_grpo]="${group[*]} --advantage_estimator dr_grpo --use_kl_loss --kl_estimator k3"
  [gspo]="${group[*]} --advantage_estimator group_norm --policy_loss_type gspo --eps_clip_low_high 3e-3 4e-3"
)

for name in $estimators; do
  # shellcheck disable=SC2086
  stage "$name" deepspeed --num_accelerators 1 --master_port "$port" --module openrlhf.cli.train_ppo \
    --pretrain "$out/sft" \
    --remote_rm_url "$here/quickstart_reward.py" \
    --prompt_data "$out/task/prompts_train.jsonl" \
    --eval_dataset "$out/task/prompts_eval.jsonl" \
    --input_key prompt \
    --label_key label \
    --apply_chat_template \
    --eval_temperature 1 0 \
    --eval_steps 20 \
    ${flags[$name]} \
    --micro_rollout_batch_size 256 \
    --train_batch_size 128 \
    --micro_train_batch_size 128 \
    --prompt_max_len 32 \
    --generate_max_len 12 \
    --actor_learning_rate 3e-4 \
    --init_kl_coef 0.001 \
    --zero_stage 1 \
    --seed "$seed" \
    --ckpt_path "$out/${name}_ckpt" \
    --save_path "$out/$name"
done

python "$here/quickstart_estimators_result.py" "$out" --seed "$seed" --result "$(dirname "$out")/result.json"
