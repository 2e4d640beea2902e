#!/usr/bin/env bash
# Rejection sampling with an 8B model on eight GPUs. A round answers prompts of its own several times with the policy of
# the round before, rates the answers, and trains on the best answer to each prompt. ROUNDS=n sets the rounds.
# Started again after an interruption it goes on where it stood: what a stage has written whole is not made again.
set -euo pipefail
[ "${SMOKE:-0}" = 0 ] || source "$(dirname "${BASH_SOURCE[0]}")/smoke.sh"
export VLLM_WORKER_MULTIPROC_METHOD=spawn

out=./checkpoint/llama3-8b-rejection
policy=OpenRLHF/Llama-3-8b-sft-mixture
mkdir -p $out

for ((round = 0; round < ${ROUNDS:-5}; round++)); do
  [ -e "$out/answers-$round.jsonl" ] || python3 -m openrlhf.cli.batch_inference \
     --eval_task generate_vllm \
     --pretrain "$policy" \
     --bf16 \
     --flash_attn \
     --tp_size 8 \
     --dataset OpenRLHF/prompt-collection-v0.1 \
     --input_key context_messages \
     --apply_chat_template \
     --max_new_tokens 2048 \
     --prompt_max_len 2048 \
     --temperature 0.7 \
     --top_p 0.9 \
     --enable_prefix_caching \
     --best_of_n 4 \
     --iter "$round" \
     --rollout_batch_size 10240 \
     --output_path "$out/answers-$round.jsonl"

  [ -e "$out/best-$round.jsonl" ] || deepspeed --module openrlhf.cli.batch_inference \
     --eval_task rm \
     --pretrain OpenRLHF/Llama-3-8b-rm-mixture \
     --bf16 \
     --flash_attn \
     --dataset "$out/answers-$round.jsonl" \
     --max_len 4096 \
     --micro_batch_size 4 \
     --post_processor rs \
     --output_path "$out/best-$round.jsonl"

  [ -e "$out/policy-$round/config.json" ] || deepspeed --module openrlhf.cli.train_sft \
     --pretrain "$policy" \
     --dataset "$out/best-$round.jsonl" \
     --input_key input \
     --output_key output \
     --input_template "" \
     --max_len 4096 \
     --train_batch_size 128 \
     --micro_train_batch_size 2 \
     --max_epochs 1 \
     --zero_stage 3 \
     --learning_rate 2e-6 \
     --bf16 \
     --flash_attn \
     --packing_samples \
     --gradient_checkpointing \
     --ckpt_path "$out/checkpoints-$round" \
     --save_steps 20 \
     --max_ckpt_num 1 \
     --load_checkpoint \
     --save_path "$out/policy-$round"
  policy=$out/policy-$round
done
