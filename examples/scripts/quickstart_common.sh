#!/usr/bin/env bash
# What the quickstart and its relatives share; all source it, with the name of their folder under runs/: the environment,
# how a stage is run, the first stages, the task and a supervised policy, and one for a reward model.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/../.."
seed=${SEED:-0}
env_dir=${OPENRLHF_ENV:-$PWD/.venv}
out=${RUNS:-runs}/$1/seed-$seed
[ "${FRESH:-0}" = 1 ] && rm -rf "$out"

bash "$here/setup_env.sh" "$env_dir"
export PATH="$env_dir/bin:$PATH" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
mkdir -p "$out"

# On a GPU machine the ranks share what is there; elsewhere two ranks share the cores.
gpus=$( (nvidia-smi -L 2>/dev/null || true) | grep -c GPU || true)
ranks=2
[ "$gpus" = 1 ] && ranks=1
# A port of its own, so that two of these may run at once.
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')

# stage NAME COMMAND...: run once; the marker holds the seconds that it took.
stage() {
  local name=$1 start=$SECONDS
  shift
  if [ -f "$out/$name.done" ]; then
    echo "== $name: done before"
    return
  fi
  echo "== $name"
  "$@"
  echo $((SECONDS - start)) >"$out/$name.done"
}

# measured NAME ARGUMENTS...: keep what measure.py says of held-out rows.
measured() {
  local name=$1
  shift
  [ -f "$out/$name.json" ] && return
  python "$here/measure.py" "$@" >"$out/$name.json.part"
  mv "$out/$name.json.part" "$out/$name.json"
}

has_vllm() { python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("vllm") is None)'; }

# The stage of a reward model, on preference pairs.
train_reward_model() {
  stage reward_model deepspeed --num_accelerators "$ranks" --master_port "$port" --module openrlhf.cli.train_rm \
    --pretrain "$out/sft" \
    --dataset "$out/task/pairs_train.jsonl" \
    --eval_dataset "$out/task/pairs_eval.jsonl" \
    --prompt_key prompt \
    --apply_chat_template \
    --max_len 64 \
    --max_epochs 3 \
    --train_batch_size 64 \
    --micro_train_batch_size 32 \
    --learning_rate 1e-3 \
    --lr_warmup_ratio 0.05 \
    --zero_stage 1 \
    --eval_steps 50 \
    --logging_steps 10 \
    --seed "$seed" \
    --ckpt_path "$out/rm_ckpt" \
    --save_path "$out/rm"
}

# TASK_FLAGS="--demonstrations 256 --pairs 128 --held_out 32" makes it small, to see that all runs.
# shellcheck disable=SC2086
stage task python "$here/quickstart_task.py" "$out/task" --seed "$seed" ${TASK_FLAGS:-}

stage sft deepspeed --num_accelerators "$ranks" --master_port "$port" --module openrlhf.cli.train_sft \
  --pretrain "$out/task/model" \
  --dataset "$out/task/sft_train.jsonl" \
  --eval_dataset "$out/task/sft_eval.jsonl" \
  --input_key prompt \
  --output_key answer \
  --apply_chat_template \
  --max_len 64 \
  --max_epochs 4 \
  --train_batch_size 64 \
  --micro_train_batch_size 32 \
  --learning_rate 3e-3 \
  --lr_scheduler cosine \
  --lr_warmup_ratio 0.03 \
  --zero_stage 1 \
  --eval_steps 80 \
  --logging_steps 10 \
  --seed "$seed" \
  --ckpt_path "$out/sft_ckpt" \
  --save_path "$out/sft"
