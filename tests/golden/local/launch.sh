#!/bin/bash
# longhaul local: train-main
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
export OMP_NUM_THREADS='1'
export DS_ACCELERATOR='cpu'

# The supervisor checks the allocation, runs the steps of launch.json, restarts them, and requeues the job.
exec /opt/venv/bin/python -m longhaul job supervise /scratch/my-run/results/local/stages/main/launch.json
