#!/usr/bin/env bash
# What a CPU cannot show, on a machine with 1 or more GPUs, in about 20 minutes: one line an item, PASS, FAIL or SKIP.
#   bash benchmarks/gpu_checklist.sh [OUT_DIR]
# Run it in the environment of `bash examples/scripts/setup_env.sh`. The commands' output is kept in OUT_DIR. The exit
# status is the number of items that failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=$(realpath -m "${1:-runs/gpu_checklist}")
mkdir -p "$out"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
failed=0

report() { printf '%-4s  %s\n' "$1" "$2"; }

# item NAME COMMAND...: PASS when the command ends with 0 within 10 minutes.
item() {
  local name=$1 log
  log=$out/${name//[^a-zA-Z0-9]/_}.log
  shift
  if timeout 600 bash -uo pipefail -c '"$@"' _ "$@" >"$log" 2>&1; then
    report PASS "$name"
  else
    report FAIL "$name (see $log)"
    failed=$((failed + 1))
  fi
}

skip() { report SKIP "$1: $2"; }

sft() { # sft OUT FLAGS...: two epochs of the sorting task on as many GPUs as the launcher is told
  local folder=$1 launcher=$2
  shift 2
  rm -rf "$folder" "${folder}_run"
  $launcher openrlhf.cli.train_sft --pretrain "$out/task/model" --dataset "$out/task/sft_train.jsonl" \
    --eval_dataset "$out/task/sft_eval.jsonl" --input_key prompt --output_key answer --apply_chat_template \
    --max_len 64 --max_samples 512 --max_epochs 2 --train_batch_size 32 --micro_train_batch_size 16 \
    --learning_rate 1e-3 --save_path "$folder" --ckpt_path "${folder}_ckpt" "$@"
}

same_loss() { # same_loss RUN_A RUN_B TOLERANCE: the training losses agree
  python - "$@" <<'P'
import json, sys
a, b = ([json.loads(line)["gpt_loss"] for line in open(f"{run}_run/metrics.jsonl") if '"train"' in line] for run in sys.argv[1:3])
gap = max(abs(x - y) / x for x, y in zip(a, b, strict=True))
print(f"largest relative gap of the loss {gap:.2e}")
sys.exit(gap > float(sys.argv[3]))
P
}

ppo() { # ppo OUT FLAGS...
  local folder=$1
  shift
  rm -rf "$folder" "${folder}_run"
  python -m openrlhf.cli.train_ppo_ray --pretrain "$out/sft_one" --remote_rm_url examples/scripts/quickstart_reward.py \
    --prompt_data "$out/task/prompts_train.jsonl" --input_key prompt --label_key label --apply_chat_template \
    --max_samples 256 --rollout_batch_size 64 --micro_rollout_batch_size 32 --train_batch_size 64 \
    --micro_train_batch_size 32 --prompt_max_len 32 --generate_max_len 24 --actor_learning_rate 1e-4 \
    --save_path "$folder" --ckpt_path "${folder}_ckpt" "$@"
}

sync_gap() { # sync_gap RUN LIMIT: the engine's log-probs are those of the trainer in every step
  python - "$@" <<'P'
import json, sys
gaps = [json.loads(line)["sync_gap"] for line in open(f"{sys.argv[1]}_run/metrics.jsonl") if '"train"' in line]
print(f"sync gap {max(gaps):.2e} in {len(gaps)} steps")
sys.exit(max(gaps) > float(sys.argv[2]))
P
}

one_gpu_ppo() { ppo "$out/ppo_shared" --colocate_all_models --vllm_num_engines 1 --vllm_gpu_memory_utilization 0.3 \
  --actor_num_gpus_per_node 1 --critic_num_gpus_per_node 1 --ref_num_gpus_per_node 1 "$@" && sync_gap "$out/ppo_shared" 0.02; }
apart_ppo() { ppo "$out/ppo_apart" --vllm_num_engines 1 --actor_num_gpus_per_node 1 --critic_num_gpus_per_node 1 \
  --ref_num_gpus_per_node 1 --colocate_actor_ref "$@" && sync_gap "$out/ppo_apart" 0.02; }
nccl_sft() { sft "$out/sft_two" "deepspeed --num_gpus 2 --module" && same_loss "$out/sft_one" "$out/sft_two" 1e-3; }
zero3_sft() { sft "$out/sft_zero3" "deepspeed --num_gpus 2 --module" --zero_stage 3 && same_loss "$out/sft_one" "$out/sft_zero3" 1e-3; }
bf16_sft() { sft "$out/sft_bf16" "python -m" --bf16 && same_loss "$out/sft_one" "$out/sft_bf16" 5e-2; }

export out
export -f sft same_loss ppo sync_gap one_gpu_ppo apart_ppo nccl_sft zero3_sft bf16_sft

if [ "$gpus" = 0 ]; then
  echo "no GPU on this machine: nothing to check" >&2
  exit 2
fi
nvidia-smi --query-gpu=name --format=csv,noheader
python examples/scripts/quickstart_task.py "$out/task" --seed 0 >"$out/task.log" 2>&1 || { cat "$out/task.log"; exit 1; }

item "SFT in fp32 on one GPU" sft "$out/sft_one" "python -m"
item "SFT in bf16 on one GPU, the same curve" bf16_sft
item "kernels against the plain ways" python benchmarks/gpu.py --out "$out"
item "PPO with everything on one GPU, engine asleep while training" one_gpu_ppo --vllm_enable_sleep
if [ "$gpus" -ge 2 ]; then
  item "NCCL: SFT on two GPUs, the same curve" nccl_sft
  item "NCCL: SFT under ZeRO-3 on two GPUs, the same curve" zero3_sft
else
  skip "NCCL" "needs 2 GPUs"
fi
if [ "$gpus" -ge 3 ]; then
  item "PPO with actor, critic and engine on GPUs of their own" apart_ppo
else
  skip "PPO with actor, critic and engine on GPUs of their own" "needs 3 GPUs"
fi
skip "weight sync through CUDA IPC or NCCL" "weights travel through Ray's object store today"
skip "engines over several GPUs (tensor parallel)" "not built yet"
echo "$failed failed"
exit "$failed"
