#!/bin/bash
# longhaul container: train-main
# Rendered before submission and run inside the allocation, by Snakemake and by job.sbatch alike.
# Change the config and render again instead of editing this file.
set -euo pipefail
cd /scratch/my-run
set +u  # modules and the `module` function itself use unset variables
if ! type -t module >/dev/null; then
    # The shell of a job is no login shell, and not every centre exports the function `module`.
    init=${MODULESHOME:-}/init/bash
    [[ -r $init ]] || init=/etc/profile
    set +e  # a command that fails in there is no failure of the job
    # shellcheck source=/dev/null
    source "$init"
    set -e
fi
module load apptainer/1.3
set -u
export PYTHONPATH='/opt/longhaul/workflow'
export HF_HUB_OFFLINE='1'
export HF_DATASETS_OFFLINE='1'
export TRANSFORMERS_OFFLINE='1'
export PYTHONUNBUFFERED='1'
export TOKENIZERS_PARALLELISM='false'
export OMP_NUM_THREADS='38'
export LONGHAUL_INTERCONNECT='ethernet'
export NCCL_IB_HCA='=mlx5_0:1,mlx5_1:1'
export QUOTES='it'"'"'s "quoted" $(touch /tmp/pwned) `id`; #SBATCH --nodes=99'
[[ -v PYTORCH_ALLOC_CONF ]] || export PYTORCH_ALLOC_CONF='expandable_segments:True'
[[ -v TORCH_FR_BUFFER_SIZE ]] || export TORCH_FR_BUFFER_SIZE='2000'
[[ -v TORCH_NCCL_DUMP_ON_TIMEOUT ]] || export TORCH_NCCL_DUMP_ON_TIMEOUT='1'
[[ -v TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC ]] || export TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC='60000'

# The supervisor checks the allocation, runs the steps of launch.json, restarts them, and requeues the job.
exec /opt/venv/bin/python -m longhaul job supervise /scratch/my-run/results/container/stages/main/launch.json
