#!/bin/bash
# Starts a container on one node.
# start_container.sh FOLDER... -- apptainer|singularity exec OPTION... IMAGE WORD...
# Scratch is a different folder on every node.
# shellcheck source=templates/sbatch/set_container_tmpdir.sh
source "$(dirname -- "$0")/set_container_tmpdir.sh"
if [[ ${TMPDIR:-/tmp} != /tmp ]]; then  # Apptainer mounts /tmp itself
    set -- "$1" "$2" --bind "$TMPDIR" "${@:3}"
fi
exec "$@"
