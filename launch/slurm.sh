#!/usr/bin/env bash
#SBATCH --job-name=sycoca
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --output=slurm-%j.log
# One launcher a node; run.resume=auto continues a requeued job from its last checkpoint.
# sbatch launch/slurm.sh launch/accelerate/ddp.yaml configs/pretrain/sycoca_cc12m_b16.yaml [key.sub=value ...]
# 300 seconds before the time limit this script gets SIGUSR1 and passes it on; so it does where you ask:
#   scancel --batch --signal=USR1 JOBID      save, end, and go on when there is room again
# The run saves at a step's end and ends with status 85, and the job is put back into the queue. See docs/resume.md.
set -euo pipefail
STOPPED=85
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MAIN_IP=${NODES%%$'\n'*} MAIN_PORT=$((20000 + SLURM_JOB_ID % 20000))
export NUM_NODES=$SLURM_NNODES GPUS_PER_NODE=${SLURM_GPUS_ON_NODE:-8}
srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec launch/multi_node.sh "$@"' multi_node "$@" &
step=$!
trap 'interrupted=true; kill -USR1 "$step" || true' USR1 TERM
interrupted=true
while $interrupted; do # a signal interrupts `wait`, which then has a status of its own
  interrupted=false
  status=0
  wait "$step" || status=$?
done
if [ "$status" -eq "$STOPPED" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
