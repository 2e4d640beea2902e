#!/usr/bin/env bash
# Learning from the policy's own answers without a loop around the sampler, on the quickstart's task: two rounds of
# iterative DPO, rejection sampling, and conditional SFT. The quickstart's reward model rates the answers; held-out
# figures are measured with transformers alone.
#   bash examples/scripts/quickstart_iterative.sh            SEED=n sets the seed, FRESH=1 trains anew
# Stages that are finished are kept: started again, it goes on where it was, or shows the figures.
set -euo pipefail
TASK_FLAGS=${TASK_FLAGS:---prompts 4096}

# The environment, the task and the supervised policy: stages task and sft.
source "$(dirname "${BASH_SOURCE[0]}")/quickstart_common.sh" iterative

sampler=generate_vllm
has_vllm || {
  sampler=generate
  echo "note: no vLLM for this Python and system; transformers answers the prompts"
}

train_reward_model
measured sft exact "$out/sft" "$out/task/prompts_eval.jsonl"

# A round answers its half of the prompts with the policy of the round before; the reference stays the supervised policy.
slice=$(($(wc -l <"$out/task/prompts_train.jsonl") / 2))
policy=$out/sft
for round in 0 1; do
  stage "answers_$round" python -m openrlhf.cli.batch_inference \
    --eval_task "$sampler" \
    --pretrain "$policy" \
    --dataset "$out/task/prompts_train.jsonl" \
    --input_key prompt \
    --apply_chat_template \
    --iter "$round" \
    --rollout_batch_size "$slice" \
    --best_of_n 8 \
    --max_new_tokens 12 \
    --tp_size 1 \
    --micro_batch_size 256 \
    --seed "$seed" \
    --output_path "$out/answers_$round.jsonl"

  stage "pairs_$round" deepspeed --num_accelerators "$ranks" --master_port "$port" --module openrlhf.cli.batch_inference \
    --eval_task rm \
    --pretrain "$out/rm" \
    --dataset "$out/answers_$round.jsonl" \
    --max_len 64 \
    --micro_batch_size 256 \
    --window_size 8192 \
    --post_processor iter_dpo \
    --output_path "$out/pairs_$round.jsonl"

  stage "dpo_$round" deepspeed --num_accelerators "$ranks" --master_port "$port" --module openrlhf.cli.train_dpo \
    --pretrain "$policy" \
    --ref_pretrain "$out/sft" \
    --dataset "$out/pairs_$round.jsonl" \
    --prompt_key prompt \
    --max_len 64 \
    --max_epochs 1 \
    --train_batch_size 64 \
    --micro_train_batch_size 32 \
    --learning_rate 3e-4 \
    --beta 0.1 \
    --precompute_ref_log_probs \
    --zero_stage 1 \
    --logging_steps 4 \
    --seed "$seed" \
    --ckpt_path "$out/dpo_${round}_ckpt" \
    --save_path "$out/dpo_$round"
  policy=$out/dpo_$round
  measured "dpo_$round" exact "$policy" "$out/task/prompts_eval.jsonl"
done

# The first round's answers are the supervised policy's, so they serve here too. Their prompts hold the template already.
stage best deepspeed --num_accelerators "$ranks" --master_port "$port" --module openrlhf.cli.batch_inference \
  --eval_task rm \
  --pretrain "$out/rm" \
  --dataset "$out/answers_0.jsonl" \
  --max_len 64 \
  --micro_batch_size 256 \
  --window_size 8192 \
  --post_processor rs \
  --output_path "$out/best.jsonl"

stage rejection deepspeed --num_accelerators "$ranks" --master_port "$port" --module openrlhf.cli.train_sft \
  --pretrain "$out/sft" \
  --dataset "$out/best.jsonl" \
  --input_key input \
  --output_key output \
  --input_template "" \
  --max_len 64 \
  --max_epochs 2 \
  --train_batch_size 64 \
  --micro_train_batch_size 32 \
  --learning_rate 1e-3 \
  --lr_scheduler cosine \
  --lr_warmup_ratio 0.03 \
  --zero_stage 1 \
  --logging_steps 8 \
  --seed "$seed" \
  --ckpt_path "$out/rejection_ckpt" \
  --save_path "$out/rejection"
measured rejection exact "$out/rejection" "$out/task/prompts_eval.jsonl"

# --csft_prompt will stand right behind the prompt, so the template leaves no space there either.
stage rewarded deepspeed --num_accelerators "$ranks" --master_port "$port" --module openrlhf.cli.batch_inference \
  --eval_task rm \
  --pretrain "$out/rm" \
  --dataset "$out/answers_0.jsonl" \
  --max_len 64 \
  --micro_batch_size 256 \
  --window_size 8192 \
  --post_processor csft \
  --normalize_reward \
  --reward_template '{input}<rm_score>: {reward} ' \
  --output_path "$out/rewarded.jsonl"

stage csft deepspeed --num_accelerators "$ranks" --master_port "$port" --module openrlhf.cli.train_sft \
  --pretrain "$out/sft" \
  --dataset "$out/rewarded.jsonl" \
  --input_key input \
  --output_key output \
  --input_template "" \
  --max_len 64 \
  --max_epochs 1 \
  --train_batch_size 64 \
  --micro_train_batch_size 32 \
  --learning_rate 1e-3 \
  --lr_scheduler cosine \
  --lr_warmup_ratio 0.03 \
  --zero_stage 1 \
  --logging_steps 16 \
  --seed "$seed" \
  --ckpt_path "$out/csft_ckpt" \
  --save_path "$out/csft"
# What is asked for: a good answer, a bad one, and one better than any that was seen.
for score in 1.00 -1.00 5.00; do
  measured "csft_$score" exact "$out/csft" "$out/task/prompts_eval.jsonl" --prompt_end "<rm_score>: $score "
done

# What the conditional policy writes when a user asks it for good answers.
stage csft_answers python -m openrlhf.cli.batch_inference \
  --eval_task "$sampler" \
  --pretrain "$out/csft" \
  --dataset "$out/task/prompts_eval.jsonl" \
  --input_key prompt \
  --apply_chat_template \
  --enable_csft \
  --csft_prompt "<rm_score>: 1.00" \
  --greedy_sampling \
  --max_new_tokens 12 \
  --tp_size 1 \
  --micro_batch_size 256 \
  --seed "$seed" \
  --output_path "$out/csft_answers.jsonl"

python "$here/quickstart_iterative_result.py" "$out" --seed "$seed" --result "$(dirname "$out")/result.json"
