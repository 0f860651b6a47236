#!/bin/bash
# longhaul local: stage main
# Rendered before submission and run inside the allocation, by Snakemake and by job.sbatch alike.
# Change the config and render again instead of editing this file.
set -euo pipefail
cd /scratch/my-run
export PYTHONPATH='/opt/longhaul/workflow'
export HF_HUB_OFFLINE='1'
export HF_DATASETS_OFFLINE='1'
export TRANSFORMERS_OFFLINE='1'
export TOKENIZERS_PARALLELISM='false'
export OMP_NUM_THREADS='1'
export DS_ACCELERATOR='cpu'

# The nodes this stage really got
/opt/venv/bin/python \
    -m longhaul environment /scratch/my-run/results/local/stages/main/environment.json

# Training
/opt/venv/bin/python -m torch.distributed.run --standalone --nproc-per-node=2 \
    -m longhaul train /scratch/my-run/results/local/stages/main/stage.json
