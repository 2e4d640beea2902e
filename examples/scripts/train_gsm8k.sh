#!/usr/bin/env bash
# SFT, a reward model and PPO against it on GSM8K, with a small model, on one machine without a GPU; DPO and KTO too.
#   bash examples/scripts/train_gsm8k.sh MODEL_DIR DATA_DIR OUT_DIR
# DATA_DIR holds gsm8k_train.jsonl and gsm8k_test.jsonl (question, answer), gsm8k_preference_train.jsonl and
# gsm8k_preference_test.jsonl (prompt, chosen, rejected), gsm8k_unpaired_train.jsonl and gsm8k_unpaired_test.jsonl
# (prompt, completion, label). SEED=n sets the seed; STAGES="sft rm ppo dpo kto" picks stages (by default the first
# three). For DPO and KTO ROWS=n takes the first n rows, EPOCHS=n goes over them n times, EVAL_STEPS=n evaluates every n
# steps.
set -euo pipefail

[ $# = 3 ] || {
  sed -n '2,8s/^# //p' "$0" >&2
  exit 2
}
model=$1 data=$2 out=$3
seed=${SEED:-0}
stages=" ${STAGES:-sft rm ppo} "
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
mkdir -p "$out"

[[ $stages == *" sft "* ]] && python -m openrlhf.cli.train_sft \
  --pretrain "$model" \
  --dataset "$data/gsm8k_train.jsonl" \
  --eval_dataset "$data/gsm8k_test.jsonl" \
  --input_key question \
  --output_key answer \
  --apply_chat_template \
  --max_len 512 \
  --max_epochs 1 \
  --train_batch_size 16 \
  --micro_train_batch_size 16 \
  --learning_rate 1e-3 \
  --eval_steps 117 \
  --bf16 \
  --zero_stage 0 \
  --seed "$seed" \
  --ckpt_path "$out/sft_ckpt" \
  --save_path "$out/sft"

[[ $stages == *" rm "* ]] && python -m openrlhf.cli.train_rm \
  --pretrain "$out/sft" \
  --dataset "$data/gsm8k_preference_train.jsonl" \
  --eval_dataset "$data/gsm8k_preference_test.jsonl" \
  --prompt_key prompt \
  --apply_chat_template \
  --max_len 512 \
  --max_epochs 1 \
  --train_batch_size 32 \
  --micro_train_batch_size 8 \
  --learning_rate 2e-4 \
  --eval_steps 34 \
  --bf16 \
  --zero_stage 0 \
  --seed "$seed" \
  --ckpt_path "$out/rm_ckpt" \
  --save_path "$out/rm"

if [[ $stages == *" dpo "* ]]; then
  head -n "${ROWS:-100000}" "$data/gsm8k_preference_train.jsonl" >"$out/pairs_train.jsonl"
  python -m openrlhf.cli.train_dpo \
    --pretrain "$out/sft" \
    --dataset "$out/pairs_train.jsonl" \
    --eval_dataset "$data/gsm8k_preference_test.jsonl" \
    --prompt_key prompt \
    --apply_chat_template \
    --max_len 512 \
    --max_epochs "${EPOCHS:-1}" \
    --eval_steps "${EVAL_STEPS:--1}" \
    --beta 0.1 \
    --precompute_ref_log_probs \
    --train_batch_size 16 \
    --micro_train_batch_size 8 \
    --learning_rate 2e-4 \
    --bf16 \
    --zero_stage 0 \
    --seed "$seed" \
    --ckpt_path "$out/dpo_ckpt" \
    --save_path "$out/dpo"
fi

# Of ten answers four are desirable; the weight makes the two kinds even. Without it, and at the rate of DPO, the policy
# first learns to make every answer less likely, and the loss is flat there.
if [[ $stages == *" kto "* ]]; then
  head -n "${ROWS:-100000}" "$data/gsm8k_unpaired_train.jsonl" >"$out/answers_train.jsonl"
  python -m openrlhf.cli.train_kto \
    --pretrain "$out/sft" \
    --dataset "$out/answers_train.jsonl" \
    --eval_dataset "$data/gsm8k_unpaired_test.jsonl" \
    --input_key prompt \
    --output_key completion \
    --label_key label \
    --apply_chat_template \
    --max_len 512 \
    --max_epochs "${EPOCHS:-1}" \
    --eval_steps "${EVAL_STEPS:--1}" \
    --beta 0.1 \
    --desirable_loss_weight 1.6 \
    --train_batch_size 16 \
    --micro_train_batch_size 16 \
    --learning_rate 7e-5 \
    --lr_warmup_ratio 0.1 \
    --bf16 \
    --zero_stage 0 \
    --seed "$seed" \
    --ckpt_path "$out/kto_ckpt" \
    --save_path "$out/kto"
fi

# The preference data asks questions of GSM8K's test split, so the prompts come from the training split: the last 500
# rows are held out.
if [[ $stages == *" ppo "* ]]; then
  head -n -500 "$data/gsm8k_train.jsonl" >"$out/prompts_train.jsonl"
  tail -n 500 "$data/gsm8k_train.jsonl" | sed -n "1,${EVAL_PROMPTS:-128}p" >"$out/prompts_eval.jsonl"
  python -m openrlhf.cli.train_ppo_ray \
    --pretrain "$out/sft" \
    --reward_pretrain "$out/rm" \
    --normalize_reward \
    --prompt_data "$out/prompts_train.jsonl" \
    --max_samples "${PROMPTS:-1536}" \
    --eval_dataset "$out/prompts_eval.jsonl" \
    --input_key question \
    --label_key answer \
    --apply_chat_template \
    --eval_temperature 1 \
    --eval_steps 12 \
    --actor_num_gpus_per_node 1 \
    --critic_num_gpus_per_node 1 \
    --ref_num_gpus_per_node 1 \
    --reward_num_gpus_per_node 1 \
    --vllm_num_engines 1 \
    --rollout_batch_size 64 \
    --micro_rollout_batch_size 16 \
    --train_batch_size 32 \
    --micro_train_batch_size 16 \
    --prompt_max_len 256 \
    --generate_max_len 160 \
    --actor_learning_rate 2e-5 \
    --critic_learning_rate 1e-4 \
    --init_kl_coef 0.02 \
    --lambd 0.95 \
    --bf16 \
    --zero_stage 0 \
    --seed "$seed" \
    --ckpt_path "$out/ppo_ckpt" \
    --save_path "$out/ppo"
fi
