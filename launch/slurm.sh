#!/usr/bin/env bash
#SBATCH --job-name=sycoca
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --requeue
#SBATCH --output=slurm-%j.log
# One launcher a node; run.resume=auto continues a requeued job from its last checkpoint.
# sbatch launch/slurm.sh launch/accelerate/ddp.yaml configs/pretrain/sycoca_cc12m_b16.yaml [key.sub=value ...]
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MAIN_IP=${NODES%%$'\n'*} MAIN_PORT=$((20000 + SLURM_JOB_ID % 20000))
export NUM_NODES=$SLURM_NNODES GPUS_PER_NODE=${SLURM_GPUS_ON_NODE:-8}
srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec launch/multi_node.sh "$@"' multi_node "$@"
