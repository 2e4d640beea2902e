#!/usr/bin/env bash
# DPO of a 34B model on eight GPUs: the optimizer works in main memory, and the shards of the reference lie there.
set -euo pipefail
[ "${SMOKE:-0}" = 0 ] || source "$(dirname "${BASH_SOURCE[0]}")/smoke.sh"

deepspeed --module openrlhf.cli.train_dpo \
   --save_path ./checkpoint/llama-34b-dpo \
   --save_steps -1 \
   --logging_steps 1 \
   --eval_steps -1 \
   --train_batch_size 256 \
   --micro_train_batch_size 1 \
   --pretrain codellama/CodeLlama-34b-Instruct-hf \
   --bf16 \
   --max_epochs 1 \
   --max_len 2048 \
   --zero_stage 3 \
   --learning_rate 5e-7 \
   --beta 0.1 \
   --dataset OpenRLHF/preference_dataset_mixture2_and_safe_pku \
   --apply_chat_template \
   --chosen_key chosen \
   --rejected_key rejected \
   --packing_samples \
   --adam_offload \
   --ref_offload \
   --flash_attn \
   --gradient_checkpointing
