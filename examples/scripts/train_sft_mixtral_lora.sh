#!/usr/bin/env bash
# LoRA adapters for a mixture of experts of 8x7B on eight GPUs; lora_combiner merges them into the model afterwards.
# --aux_loss_coef keeps the experts evenly used; it is the usual weight.
set -euo pipefail
[ "${SMOKE:-0}" = 0 ] || source "$(dirname "${BASH_SOURCE[0]}")/smoke.sh"

deepspeed --module openrlhf.cli.train_sft \
   --max_len 4096 \
   --dataset Open-Orca/OpenOrca \
   --input_key question \
   --output_key response \
   --input_template $'User: {}\nAssistant: ' \
   --train_batch_size 128 \
   --micro_train_batch_size 4 \
   --max_samples 500000 \
   --pretrain mistralai/Mixtral-8x7B-v0.1 \
   --save_path ./checkpoint/mixtral-sft-lora \
   --save_steps -1 \
   --logging_steps 1 \
   --eval_steps -1 \
   --zero_stage 3 \
   --max_epochs 1 \
   --bf16 \
   --flash_attn \
   --packing_samples \
   --learning_rate 5e-6 \
   --lora_rank 64 \
   --lora_alpha 64 \
   --aux_loss_coef 0.001 \
   --gradient_checkpointing
