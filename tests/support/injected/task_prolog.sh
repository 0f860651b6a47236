#!/bin/sh
# Slurm exports the variables that a --task-prolog prints to each task. Python then finds sitecustomize.py and the package tests.
here=$(dirname "$0")
echo "export PYTHONPATH=$here:$here/../../..:$here/../../../workflow"
