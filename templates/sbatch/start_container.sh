#!/bin/bash
# Starts a container on one node: start_container.sh FOLDER... -- apptainer|singularity exec OPTION... IMAGE WORD...
# It creates each FOLDER first: a missing one cannot be bound, and scratch is a different folder on every node.
while [ "$1" != -- ]; do
    mkdir -p -- "$1" || exit
    shift
done
shift
# torch compiles in $TMPDIR, and MIOpen keeps its databases there; some centres set it for each job. Of a name with : or ,
# Apptainer would read several folders.
if [[ -d ${TMPDIR:-} && $TMPDIR != *[:,]* ]]; then
    set -- "$1" "$2" --bind "$TMPDIR" "${@:3}"
fi
exec "$@"
