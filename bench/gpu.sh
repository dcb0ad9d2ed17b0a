#!/usr/bin/env bash
set -euo pipefail
usage="usage: bench/gpu.sh OUTDIR [--tiny]

Within ten minutes on one GPU: the GPU tests, every kernel against its roofline, step times of
Llama-3.1-8B's shapes, the nano workload on Qwen3-0.6B's with a profile of mixed and decode steps,
and transformers' continuous batching on the same requests. Steps and the workload run in turns,
one step ahead, and one step ahead with CUDA graphs. JSON and logs go to OUTDIR; the table comes
last. A part that fails or runs out of its time leaves the others alone, and the exit status says
so.

Needs a CUDA device, torch, triton, tokenizers, jinja2, safetensors, huggingface_hub, gguf,
llguidance, numpy, pytest and pytest-timeout; with pytest-xdist the tests are quicker, with
transformers there is a comparison. Weights are random.

--tiny   the same programs with tiny shapes under Triton's interpreter, without a GPU: a rehearsal,
         whose figures mean nothing"
case "${1:-}" in
  "" | -*) echo "$usage"; [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; exit ;;
esac
out=$(realpath -m "$1")
cd "$(dirname "$0")/.."
mkdir -p "$out"
export PYTHONPATH=src PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
tiny=()
tests=(-o timeout=300)
# Most of their time goes into compiling kernels, on one core a process.
if "$python" -c 'import xdist' 2>/dev/null; then tests+=(-n 8); fi
case "${2:-}" in
  "") ;;
  --tiny)
    export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=
    tiny=(--tiny)
    tests=(--collect-only -q) ;;
  *) echo "$usage" >&2; exit 2 ;;
esac
status=0

part() { # part NAME SECONDS COMMAND...
  local name=$1 seconds=$2
  shift 2
  echo "== $name"
  if ! timeout "$seconds" "$@" >"$out/$name.log" 2>&1; then
    status=1
    echo "$name failed, or took more than $seconds s; the end of $out/$name.log:"
    tail -n 15 "$out/$name.log"
  fi
}

rm -f "$out"/gpu_{kernels,steps,engine,transformers}.json
part pytest 180 "$python" -P -m pytest -m gpu "${tests[@]}" --confcutdir=tests/kernels \
  tests/kernels tests/engine/test_on_gpu.py
tail -n 1 "$out/pytest.log"
part gpu_kernels 120 "$python" bench/gpu_kernels.py --out "$out" --seconds 90 "${tiny[@]}"
part gpu_steps 90 "$python" bench/gpu_steps.py --out "$out" "${tiny[@]}"
part gpu_engine 120 "$python" bench/gpu_engine.py --out "$out" "${tiny[@]}"
if "$python" -c 'import transformers' 2>/dev/null; then
  part gpu_transformers 80 "$python" bench/gpu_transformers.py --out "$out" "${tiny[@]}"
else
  echo "== gpu_transformers: transformers is not installed; left out"
fi
"$python" bench/gpu_table.py "$out" | tee "$out/table.txt"
exit "$status"
