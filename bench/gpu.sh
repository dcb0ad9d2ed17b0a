#!/usr/bin/env bash
# bench/gpu.sh OUTDIR: within ten minutes, the GPU tests and the GPU benches, as files in OUTDIR.
# Needs a CUDA device, torch, triton, tokenizers, jinja2, safetensors, huggingface_hub, pytest and
# pytest-timeout; weights are random.
set -euo pipefail
out=$(realpath -m "${1:?usage: bench/gpu.sh OUTDIR}")
cd "$(dirname "$0")/.."
mkdir -p "$out"
export PYTHONPATH=src PYTHONUNBUFFERED=1
status=0
timeout 240 python3 -P -m pytest -m gpu -o timeout=300 --confcutdir=tests/kernels tests/kernels 2>&1 | tee "$out/pytest.txt" || status=$?
timeout 300 python3 bench/gpu_engine.py --out "$out" || status=$?
exit "$status"
