#!/bin/sh
# Slurm gives each task the variables that its --task-prolog prints: Python finds sitecustomize.py and the package tests.
here=$(dirname "$0")
echo "export PYTHONPATH=$here:$here/../../..:$here/../../../workflow"
