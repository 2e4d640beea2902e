#!/usr/bin/env bash
# Knowledge distillation from a 70B model to an 8B model on eight GPUs. Both must have one tokenizer.
set -euo pipefail
[ "${SMOKE:-0}" = 0 ] || source "$(dirname "${BASH_SOURCE[0]}")/smoke.sh"

deepspeed --module openrlhf.cli.train_kd \
   --save_path ./checkpoint/llama3-8b-kd \
   --save_steps -1 \
   --logging_steps 1 \
   --eval_steps -1 \
   --train_batch_size 256 \
   --micro_train_batch_size 2 \
   --pretrain meta-llama/Meta-Llama-3-8B-Instruct \
   --teacher_model meta-llama/Meta-Llama-3-70B-Instruct \
   --teacher_offload \
   --kd_coef 0.4 \
   --dataset Open-Orca/OpenOrca \
   --input_key question \
   --output_key response \
   --apply_chat_template \
   --bf16 \
   --max_epochs 1 \
   --max_len 4096 \
   --zero_stage 3 \
   --learning_rate 5e-6 \
   --flash_attn \
   --gradient_checkpointing
