#!/usr/bin/env bash
# Conditional SFT of an 8B model on eight GPUs: every answer is rated, and the policy learns to write answers of the
# rating that its prompt names. Afterwards a high rating is asked for.
# Started again after an interruption it goes on where it stood: what a stage has written whole is not made again.
set -euo pipefail
[ "${SMOKE:-0}" = 0 ] || source "$(dirname "${BASH_SOURCE[0]}")/smoke.sh"
export VLLM_WORKER_MULTIPROC_METHOD=spawn

out=./checkpoint/llama3-8b-csft
mkdir -p $out

[ -e $out/rated.jsonl ] || deepspeed --module openrlhf.cli.batch_inference \
   --eval_task rm \
   --pretrain OpenRLHF/Llama-3-8b-rm-mixture \
   --bf16 \
   --flash_attn \
   --dataset OpenRLHF/preference_dataset_mixture2_and_safe_pku \
   --input_key chosen \
   --output_key "" \
   --apply_chat_template \
   --max_len 4096 \
   --micro_batch_size 4 \
   --post_processor csft \
   --normalize_reward \
   --reward_template '{input}<rm_score>: {reward} ' \
   --output_path $out/rated.jsonl

[ -e $out/policy/config.json ] || deepspeed --module openrlhf.cli.train_sft \
   --pretrain meta-llama/Meta-Llama-3-8B-Instruct \
   --dataset $out/rated.jsonl \
   --input_key input \
   --output_key output \
   --input_template "" \
   --max_len 4096 \
   --train_batch_size 128 \
   --micro_train_batch_size 2 \
   --max_epochs 1 \
   --zero_stage 3 \
   --learning_rate 5e-6 \
   --bf16 \
   --flash_attn \
   --packing_samples \
   --gradient_checkpointing \
   --ckpt_path $out/checkpoints \
   --save_steps 100 \
   --max_ckpt_num 1 \
   --load_checkpoint \
   --save_path $out/policy

[ -e $out/answers.jsonl ] || python3 -m openrlhf.cli.batch_inference \
   --eval_task generate_vllm \
   --pretrain $out/policy \
   --bf16 \
   --flash_attn \
   --tp_size 8 \
   --dataset OpenRLHF/prompt-collection-v0.1 \
   --input_key context_messages \
   --apply_chat_template \
   --max_samples 1024 \
   --max_new_tokens 2048 \
   --prompt_max_len 2048 \
   --enable_csft \
   --csft_prompt '<rm_score>: 5.00' \
   --output_path $out/answers.jsonl
