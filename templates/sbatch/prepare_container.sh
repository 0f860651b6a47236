# shellcheck shell=bash
# Sourced by the scripts that start a container, without arguments: it works on their own.
# It creates each FOLDER up to "--" and drops these words: neither a missing folder can be mounted, nor can it be used inside.
while [ "$1" != -- ]; do
    mkdir -p -- "$1" || exit
    shift
done
shift
# It sets $TMPDIR to /tmp where the container cannot have that folder: torch compiles there, and MIOpen keeps its databases there.
# Of a name with : or , Apptainer would read several folders.
if [[ ! -d ${TMPDIR:-/tmp} || ! -w ${TMPDIR:-/tmp} || ${TMPDIR:-} == *[:,]* ]]; then
    # launch.sh has put MIOpen's folders below the old one.
    for name in MIOPEN_USER_DB_PATH MIOPEN_CUSTOM_CACHE_DIR; do
        if [[ ${!name:-} == "$TMPDIR"/* ]]; then
            export "$name=/tmp/${!name#"$TMPDIR"/}"
        fi
    done
    export TMPDIR=/tmp
fi
