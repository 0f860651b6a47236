#!/bin/bash
# Starts a container on one node: start_container.sh FOLDER... -- apptainer|singularity exec OPTION... IMAGE WORD...
# It creates each FOLDER first: a missing one cannot be bound, and scratch is a different folder on every node.
while [ "$1" != -- ]; do
    mkdir -p -- "$1" || exit
    shift
done
shift
# torch compiles in $TMPDIR, and MIOpen keeps its databases there; some centres set it for each job.
# shellcheck source=templates/sbatch/usable_tmpdir.sh
source "$(dirname -- "$0")/usable_tmpdir.sh"
if [[ ${TMPDIR:-/tmp} != /tmp ]]; then  # Apptainer mounts /tmp itself
    set -- "$1" "$2" --bind "$TMPDIR" "${@:3}"
fi
exec "$@"
