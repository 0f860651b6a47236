#!/bin/bash
# longhaul zero3_offload: train-main
# Rendered before submission and run inside the allocation, by Snakemake and by job.sbatch alike.
# Change the config and render again instead of editing this file.
set -euo pipefail
cd /scratch/my-run
export PYTHONPATH='/opt/longhaul/workflow'
export HF_HUB_OFFLINE='1'
export HF_DATASETS_OFFLINE='1'
export TRANSFORMERS_OFFLINE='1'
export PYTHONUNBUFFERED='1'
export TOKENIZERS_PARALLELISM='false'
export OMP_NUM_THREADS='12'
export NCCL_SOCKET_IFNAME='ib0'
export GLOO_SOCKET_IFNAME='ib0'
export LONGHAUL_INTERCONNECT='infiniband'
[[ -v PYTORCH_ALLOC_CONF ]] || export PYTORCH_ALLOC_CONF='expandable_segments:True'
[[ -v TORCH_FR_BUFFER_SIZE ]] || export TORCH_FR_BUFFER_SIZE='2000'
[[ -v TORCH_NCCL_DUMP_ON_TIMEOUT ]] || export TORCH_NCCL_DUMP_ON_TIMEOUT='1'
[[ -v TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC ]] || export TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC='60000'
export PATH=/sw/longhaul/venv/bin:"$PATH"

# The supervisor checks the allocation, runs the steps of launch.json, restarts them, and requeues the job.
exec /opt/venv/bin/python -m longhaul job supervise /scratch/my-run/results/zero3_offload/stages/main/launch.json
