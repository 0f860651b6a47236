# shellcheck shell=bash
# Sourced by the scripts that start a container: it sets $TMPDIR to /tmp where the container cannot have that folder.
# Compilers fail in a folder that is absent. Of a name with : or , Apptainer would read several folders.
if [[ ! -d ${TMPDIR:-/tmp} || ! -w ${TMPDIR:-/tmp} || ${TMPDIR:-} == *[:,]* ]]; then
    # launch.sh has put MIOpen's folders below the old one.
    for name in MIOPEN_USER_DB_PATH MIOPEN_CUSTOM_CACHE_DIR; do
        if [[ ${!name:-} == "$TMPDIR"/* ]]; then
            export "$name=/tmp/${!name#"$TMPDIR"/}"
        fi
    done
    export TMPDIR=/tmp
fi
