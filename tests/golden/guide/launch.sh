#!/bin/bash
# longhaul guide: stage main
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
export NCCL_SOCKET_IFNAME='ib0'
export GLOO_SOCKET_IFNAME='ib0'
export PATH=/sw/longhaul/venv/bin:"$PATH"

# The allocation must be the planned one: --set-resources and edited headers change it in silence.
: "${SLURM_JOB_ID:?is not set. Submit job.sbatch, or run snakemake --profile profiles/slurm}"
job=$(scontrol --oneliner show job "$SLURM_JOB_ID")
nodes=$(sed -n 's/.* NumNodes=\([0-9]*\).*/\1/p' <<<"$job")
if [ "$nodes" != 2 ]; then
    echo "error: the allocation has $nodes nodes; the plan says 2" >&2
    echo "  remedy: drop --set-resources, or set nodes in the config" >&2
    exit 2
fi
MASTER_ADDR=$(scontrol show hostnames "$(sed -n 's/.* NodeList=\([^ ]*\).*/\1/p' <<<"$job")" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000)) # below the ephemeral ports
export MASTER_ADDR MASTER_PORT
echo "job $SLURM_JOB_ID: $nodes nodes, rendezvous $MASTER_ADDR:$MASTER_PORT"

# The nodes this stage really got
srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=1 --gpus-per-node=8 --mpi=none --kill-on-bad-exit=1 --wait=60 --unbuffered --label /sw/longhaul/venv/bin/python \
    -m longhaul environment /scratch/my-run/results/guide/stages/main/environment.json

# Training
srun --nodes=2 --ntasks=16 --ntasks-per-node=8 --cpus-per-task=12 --gpus-per-node=8 --mpi=none --kill-on-bad-exit=1 --wait=60 --unbuffered --label /sw/longhaul/venv/bin/python \
    -m longhaul train /scratch/my-run/results/guide/stages/main/stage.json
