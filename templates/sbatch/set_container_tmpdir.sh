# shellcheck shell=bash
# Creates the folders that a container mounts, and sets TMPDIR to /tmp where the container cannot have the host's folder.
# Sourced by the scripts that start a container, without arguments: it takes each FOLDER up to "--" from theirs.
while [ "$1" != -- ]; do
    mkdir -p -- "$1" || exit
    shift
done
shift
# torch compiles in $TMPDIR, and MIOpen keeps its databases there.
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
