#!/usr/bin/env bash
# The other supervised commands on the quickstart's task: DPO and KTO on its preference pairs, distillation from a larger
# teacher, a process reward model on sorting step by step. Held-out figures are measured with transformers alone.
#   bash examples/scripts/quickstart_family.sh            SEED=n sets the seed, FRESH=1 trains anew
# Stages that are finished are kept: started again, it goes on where it was, or shows the figures.
set -euo pipefail

# The environment, the task and the supervised policy: stages task and sft.
source "$(dirname "${BASH_SOURCE[0]}")/quickstart_common.sh" family

stage family_task python "$here/quickstart_family_task.py" "$out/task" --seed "$seed"

stage dpo deepspeed --num_accelerators "$ranks" --master_port "$port" --module openrlhf.cli.train_dpo \
  --pretrain "$out/sft" \
  --dataset "$out/task/pairs_train.jsonl" \
  --eval_dataset "$out/task/pairs_eval.jsonl" \
  --prompt_key prompt \
  --apply_chat_template \
  --max_len 64 \
  --max_epochs 1 \
  --train_batch_size 64 \
  --micro_train_batch_size 32 \
  --learning_rate 5e-4 \
  --beta 0.1 \
  --precompute_ref_log_probs \
  --zero_stage 1 \
  --eval_steps 10 \
  --logging_steps 10 \
  --seed "$seed" \
  --ckpt_path "$out/dpo_ckpt" \
  --save_path "$out/dpo"
measured dpo pairs "$out/dpo" "$out/sft" "$out/task/pairs_eval.jsonl"

stage kto deepspeed --num_accelerators "$ranks" --master_port "$port" --module openrlhf.cli.train_kto \
  --pretrain "$out/sft" \
  --dataset "$out/task/answers_train.jsonl" \
  --eval_dataset "$out/task/answers_eval.jsonl" \
  --input_key prompt \
  --output_key completion \
  --label_key label \
  --apply_chat_template \
  --max_len 64 \
  --max_epochs 1 \
  --train_batch_size 64 \
  --micro_train_batch_size 32 \
  --learning_rate 5e-4 \
  --beta 0.1 \
  --zero_stage 1 \
  --eval_steps 20 \
  --logging_steps 10 \
  --seed "$seed" \
  --ckpt_path "$out/kto_ckpt" \
  --save_path "$out/kto"
measured kto_pairs pairs "$out/kto" "$out/sft" "$out/task/pairs_eval.jsonl"
measured kto answers "$out/kto" "$out/sft" "$out/task/answers_eval.jsonl"

stage prm deepspeed --num_accelerators "$ranks" --master_port "$port" --module openrlhf.cli.train_prm \
  --pretrain "$out/sft" \
  --dataset "$out/task/steps_train.jsonl" \
  --eval_dataset "$out/task/steps_eval.jsonl" \
  --apply_chat_template \
  --placeholder_token '*' \
  --reward_tokens + - \
  --max_len 96 \
  --max_epochs 3 \
  --train_batch_size 64 \
  --micro_train_batch_size 32 \
  --learning_rate 2e-3 \
  --lr_warmup_ratio 0.03 \
  --zero_stage 1 \
  --eval_steps 80 \
  --logging_steps 10 \
  --seed "$seed" \
  --ckpt_path "$out/prm_ckpt" \
  --save_path "$out/prm"
measured prm_before steps "$out/sft" "$out/task/steps_eval.jsonl"
measured prm steps "$out/prm" "$out/task/steps_eval.jsonl"

stage teacher deepspeed --num_accelerators "$ranks" --master_port "$port" --module openrlhf.cli.train_sft \
  --pretrain "$out/task/teacher" \
  --dataset "$out/task/sft_train.jsonl" \
  --eval_dataset "$out/task/sft_eval.jsonl" \
  --input_key prompt \
  --output_key answer \
  --apply_chat_template \
  --max_len 64 \
  --max_epochs 2 \
  --train_batch_size 64 \
  --micro_train_batch_size 32 \
  --learning_rate 2e-3 \
  --lr_scheduler cosine \
  --lr_warmup_ratio 0.03 \
  --zero_stage 1 \
  --eval_steps 160 \
  --logging_steps 10 \
  --seed "$seed" \
  --ckpt_path "$out/teacher_ckpt" \
  --save_path "$out/teacher"

# The supervised policy learned from the same demonstrations as its teacher: what is left to learn is how sure to be.
measured kd_before divergence "$out/sft" "$out/teacher" "$out/task/sft_eval.jsonl"
stage kd deepspeed --num_accelerators "$ranks" --master_port "$port" --module openrlhf.cli.train_kd \
  --pretrain "$out/sft" \
  --teacher_model "$out/teacher" \
  --dataset "$out/task/sft_train.jsonl" \
  --eval_dataset "$out/task/sft_eval.jsonl" \
  --input_key prompt \
  --output_key answer \
  --apply_chat_template \
  --max_len 64 \
  --max_epochs 1 \
  --train_batch_size 64 \
  --micro_train_batch_size 32 \
  --learning_rate 1e-3 \
  --kd_coef 0.9 \
  --zero_stage 1 \
  --eval_steps 40 \
  --logging_steps 10 \
  --seed "$seed" \
  --ckpt_path "$out/kd_ckpt" \
  --save_path "$out/kd"
measured kd_after divergence "$out/kd" "$out/teacher" "$out/task/sft_eval.jsonl"

python "$here/quickstart_family_result.py" "$out" --seed "$seed" --result "$(dirname "$out")/result.json"
