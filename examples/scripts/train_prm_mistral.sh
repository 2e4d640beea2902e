#!/usr/bin/env bash
# A process reward model of 7B on eight GPUs: every step of an answer ends with the placeholder and is right or wrong.
set -euo pipefail
[ "${SMOKE:-0}" = 0 ] || source "$(dirname "${BASH_SOURCE[0]}")/smoke.sh"

deepspeed --module openrlhf.cli.train_prm \
   --save_path ./checkpoint/mistral-7b-prm \
   --save_steps 500 \
   --logging_steps 1 \
   --eval_steps 100 \
   --train_batch_size 256 \
   --micro_train_batch_size 8 \
   --pretrain mistralai/Mistral-7B-v0.1 \
   --dataset zhuzilin/Math-Shepherd \
   --input_key input \
   --label_key value \
   --placeholder_token ки \
   --reward_tokens + - \
   --bf16 \
   --max_epochs 1 \
   --max_len 8192 \
   --zero_stage 3 \
   --learning_rate 1e-6 \
   --flash_attn \
   --packing_samples \
   --gradient_checkpointing
