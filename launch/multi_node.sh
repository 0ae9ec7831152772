#!/usr/bin/env bash
# Run this on every node, with the first node's address as MAIN_IP and the node's own NODE_RANK (0 on the first).
# NUM_NODES=2 NODE_RANK=0 GPUS_PER_NODE=8 MAIN_IP=10.0.0.1 \
#   launch/multi_node.sh launch/accelerate/ddp.yaml configs/pretrain/sycoca_cc12m_b16.yaml [key.sub=value ...]
# SIGTERM and SIGUSR1 make the run save and end with status 85 (docs/resume.md); the signal may reach one node or all.
# TOOL=tools/finetune_vqa.py runs another tool; PYTHON is the interpreter.
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: launch/multi_node.sh launch/accelerate/NAME.yaml configs/pretrain/NAME.yaml [key.sub=value ...]" >&2
  exit 2
fi
: "${NUM_NODES:?of all}" "${NODE_RANK:?of this node, from 0}" "${GPUS_PER_NODE:?}" "${MAIN_IP:?address of node 0}"
cd "$(dirname "$0")/.."
launch_file=$1
shift
exec "${PYTHON:-python}" launch/forward_signals.py --config_file "$launch_file" --num_machines "$NUM_NODES" \
  --machine_rank "$NODE_RANK" --num_processes $((NUM_NODES * GPUS_PER_NODE)) --main_process_ip "$MAIN_IP" \
  --main_process_port "${MAIN_PORT:-29500}" --same_network "${TOOL:-tools/pretrain.py}" "$@"
