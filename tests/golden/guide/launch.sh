#!/bin/bash
# longhaul guide: train-main
# Rendered before submission and run inside the allocation, by Snakemake and by job.sbatch alike.
# Change the config and render again instead of editing this file.
set -euo pipefail
cd /scratch/my-run
export PYTHONPATH='/opt/longhaul/workflow'
export HF_HUB_OFFLINE='1'
export HF_DATASETS_OFFLINE='1'
export TRANSFORMERS_OFFLINE='1'
export TOKENIZERS_PARALLELISM='false'
export OMP_NUM_THREADS='12'
export PYTORCH_ALLOC_CONF='expandable_segments:True'
export NCCL_SOCKET_IFNAME='ib0'
export GLOO_SOCKET_IFNAME='ib0'
export PATH=/sw/longhaul/venv/bin:"$PATH"

# The supervisor checks the allocation, runs the steps of launch.json, restarts them, and requeues the job.
exec /opt/venv/bin/python -m longhaul job supervise /scratch/my-run/results/guide/stages/main/launch.json
