#!/bin/bash
# longhaul container: stage main
# Rendered before submission and run inside the allocation, by Snakemake and by job.sbatch alike.
# Change the config and render again instead of editing this file.
set -euo pipefail
cd /scratch/my-run
module load apptainer/1.3
export PYTHONPATH='/opt/longhaul/workflow'
export HF_HUB_OFFLINE='1'
export HF_DATASETS_OFFLINE='1'
export TRANSFORMERS_OFFLINE='1'
export TOKENIZERS_PARALLELISM='false'
export OMP_NUM_THREADS='38'
export NCCL_IB_HCA='=mlx5_0:1,mlx5_1:1'
export QUOTES='it'"'"'s "quoted" $(touch /tmp/pwned) `id`; #SBATCH --nodes=99'

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
srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=1 --gres=gpu:a100:4 --kill-on-bad-exit=1 --wait=60 --unbuffered --label --mpi=pmix apptainer exec --nv --bind /dev/shm --bind /opt/longhaul --bind /scratch/my-run --bind /scratch/weights --bind '/scratch/token shards' --bind /local --bind /cvmfs '/images/job $(date).sif' python3 \
    -m longhaul environment /scratch/my-run/results/container/stages/main/environment.json

# Training
srun --nodes=2 --ntasks=8 --ntasks-per-node=4 --cpus-per-task=38 --gres=gpu:a100:4 --kill-on-bad-exit=1 --wait=60 --unbuffered --label --mpi=pmix apptainer exec --nv --bind /dev/shm --bind /opt/longhaul --bind /scratch/my-run --bind /scratch/weights --bind '/scratch/token shards' --bind /local --bind /cvmfs '/images/job $(date).sif' python3 \
    -m longhaul train /scratch/my-run/results/container/stages/main/stage.json
