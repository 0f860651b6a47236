#!/bin/sh
# Prints what one node has, one `key: value` per line, for `longhaul site detect --probe` and `longhaul site check --probe`.
# It needs neither Python nor the job environment, and changes nothing.
echo "host: $(hostname)"
echo "cpus: ${SLURM_CPUS_ON_NODE:-$(nproc)}"
echo "memory_kib: $(sed -n 's/^MemTotal: *\([0-9]*\) kB$/\1/p' /proc/meminfo)"
for path in /sys/class/net/*; do
  echo "interface: ${path##*/}"
done
for port in /sys/class/infiniband/*/ports/*; do
  if grep -qs ACTIVE "$port/state"; then
    echo "rdma_port: $(cat "$port/link_layer")"
  fi
done
if command -v nvidia-smi >/dev/null; then
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader | sed 's/^/nvidia: /'
  nvidia-smi | sed -n 's/.*CUDA Version: *\([0-9.]*\).*/cuda: \1/p'
fi
if command -v amd-smi >/dev/null; then
  amd-smi static --asic --vram --json | sed 's/^/amd_smi: /'
fi
if command -v rocm-smi >/dev/null; then
  rocm-smi --showproductname --showmeminfo vram --csv | sed 's/^/rocm_smi: /'
fi
sed 's/^/rocm: /' /opt/rocm/.info/version 2>/dev/null
if command -v amd-smi >/dev/null; then
  amd-smi version | sed -n 's/.*ROCm version: *\([0-9.]*\).*/rocm: \1/p'
fi
echo "end: probe"
