#!/usr/bin/env bash
#SBATCH --job-name=openrlhf-ppo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --output=openrlhf-ppo-%j.log
# PPO of an 8B model on two machines of eight GPUs: a Ray cluster on the machines of a SLURM job, then the training as a
# job of the cluster. From the clone, which is /openrlhf on every machine:
#   sbatch examples/scripts/train_ppo_llama_ray_slurm.sh
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
[ "${SMOKE:-0}" = 0 ] || source examples/scripts/smoke.sh

mapfile -t machines < <(scontrol show hostnames "${SLURM_JOB_NODELIST:-}")
first=${machines[0]}
address=$(srun --nodes=1 --ntasks=1 --nodelist "$first" hostname --ip-address | cut -d ' ' -f 1)

# --block keeps a machine in the cluster until the job ends.
srun --overlap --nodes=1 --ntasks=1 --nodelist "$first" \
   ray start --head --node-ip-address "$address" --port 6379 --num-gpus 8 --block &
head=$!
for machine in "${machines[@]:1}"; do
  srun --overlap --nodes=1 --ntasks=1 --nodelist "$machine" \
     ray start --address "$address:6379" --num-gpus 8 --block &
done
# The head has five minutes to answer: without it the machines would idle until the time limit of the SLURM job.
tries=0
until srun --overlap --nodes=1 --ntasks=1 --nodelist "$first" ray job list --address http://127.0.0.1:8265; do
  if ((++tries == 60)) || ! kill -0 "$head"; then
    echo "error: the head of the Ray cluster on $first does not answer, or has ended; see above" >&2
    exit 1
  fi
  sleep 5
done

# The training waits for the GPUs of machines that are still joining.
srun --overlap --nodes=1 --ntasks=1 --nodelist "$first" \
   ray job submit --address="http://127.0.0.1:8265" \
   --runtime-env-json='{"working_dir": "/openrlhf"}' \
   -- python3 -m openrlhf.cli.train_ppo_ray \
   --ref_num_nodes 1 \
   --ref_num_gpus_per_node 4 \
   --reward_num_nodes 1 \
   --reward_num_gpus_per_node 4 \
   --critic_num_nodes 1 \
   --critic_num_gpus_per_node 4 \
   --actor_num_nodes 1 \
   --actor_num_gpus_per_node 4 \
   --vllm_num_engines 4 \
   --vllm_tensor_parallel_size 2 \
   --colocate_critic_reward \
   --colocate_actor_ref \
   --pretrain OpenRLHF/Llama-3-8b-sft-mixture \
   --reward_pretrain OpenRLHF/Llama-3-8b-rm-mixture \
   --save_path /openrlhf/examples/checkpoint/llama3-8b-rlhf-slurm \
   --micro_train_batch_size 8 \
   --train_batch_size 128 \
   --micro_rollout_batch_size 16 \
   --rollout_batch_size 1024 \
   --max_samples 100000 \
   --max_epochs 1 \
   --prompt_max_len 1024 \
   --generate_max_len 1024 \
   --zero_stage 3 \
   --bf16 \
   --actor_learning_rate 5e-7 \
   --critic_learning_rate 9e-6 \
   --init_kl_coef 0.01 \
   --prompt_data OpenRLHF/prompt-collection-v0.1 \
   --input_key context_messages \
   --apply_chat_template \
   --normalize_reward \
   --packing_samples \
   --adam_offload \
   --flash_attn \
   --gradient_checkpointing
