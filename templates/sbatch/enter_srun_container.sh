#!/bin/bash
# Sets the working folder and PYTHONPATH inside the container that srun started for a step, and continues the step.
# enter_srun_container.sh WORKDIR PYTHONPATH FOLDER... -- WORD...
# srun leaves the working folder to the image, and PYTHONPATH of an image replaces that of the host.
cd -- "$1" || exit
export PYTHONPATH="$2"
shift 2
# enroot gives a container a /tmp of its own, and does not mount $TMPDIR of the host.
# shellcheck source=templates/sbatch/set_container_tmpdir.sh
source "$(dirname -- "$0")/set_container_tmpdir.sh"
exec "$@"
