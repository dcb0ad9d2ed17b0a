#!/usr/bin/env bash
set -euo pipefail
usage="usage: bench/gpu.sh OUTDIR [PART[:SECONDS]...] [--limit SECONDS] [--tiny]

Everything there is to learn of one GPU, on random weights of real shapes, within ten minutes.
JSON and logs go to OUTDIR, written after every figure; the table of all that lies there comes last.

  tests         the GPU tests
  engine        the nano workload on Qwen3-0.6B's shapes: rates, the device's busy share, profiles
  sync          random traffic one step ahead in graphs: everything in a launch that waits
  kernels       every kernel against its roofline
  steps         decode and mixed steps of Llama-3.1-8B's shapes, and the cost model for planning
  transformers  its continuous batching on the nano workload
  start         from process start to the first token, with an empty and a warm Triton cache
  plan          Llama-2-70B on 4 GPUs, on paper, from what steps measured; needs no GPU
  tiles         attention's tiles, checked and timed; the best are OUTDIR/tile_tables/NAME.json, for
                kernels/tile_tables
  fixed_linears what deterministic linears cost beside cuBLAS, by tile

Without PART all of them but the last two, in this order. A part may take SECONDS, or without them its share of the
limit and what those before it left over; shortly before it begins nothing more by itself, then it
is stopped. One that fails or is stopped leaves the others alone, keeps what it has written, and
makes the exit status 1.

--limit  seconds for all parts together (550): one that would begin with less than 15 left does not
--tiny   the same programs with tiny shapes under Triton's interpreter, without a GPU: a rehearsal,
         whose figures mean nothing

PYTHON is the interpreter (python3). Where there is no .git, TOKENMILL_COMMIT says the commit."
case "${1:-}" in
  "" | -*) echo "$usage"; [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; exit ;;
esac
out=$(realpath -m "$1")
shift
cd "$(dirname "$0")/.."
limit=550 is_tiny= parts=()
declare -A is_fixed seconds=([tests]=100 [engine]=140 [sync]=25 [kernels]=60 [steps]=90 [transformers]=50
  [start]=65 [plan]=15 [tiles]=120 [fixed_linears]=60)
while [ $# -gt 0 ]; do
  name=${1%%:*}
  case $1 in
    --tiny) is_tiny=1 ;;
    --limit) limit=${2:?$usage}; shift ;;
    *) [ -n "${seconds[$name]:-}" ] || { echo "$usage" >&2; exit 2; }
      parts+=("$name")
      [ "$name" = "$1" ] || seconds[$name]=${1#*:} is_fixed[$name]=1 ;;
  esac
  shift
done
[ ${#parts[@]} -gt 0 ] || parts=(tests engine sync kernels steps transformers start plan)
mkdir -p "$out"
export PYTHONPATH=src PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
tiny=()
# Whatever warns there is listed, and fails nothing; what only a CPU compiles is not looked at.
pytest=(-P -m pytest -m gpu -o timeout=120 -W default --import-mode=importlib -p no:cacheprovider
  --confcutdir=tests/kernels '--ignore-glob=*/test_compiled_*')
mapfile -t tests < <(grep -rl --include='*.py' 'mark\.gpu' tests/engine)
tests+=(tests/kernels)
if [ -n "$is_tiny" ]; then
  export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=
  tiny=(--tiny)
  pytest+=(--collect-only -q)
elif "$python" -c 'import xdist' 2>/dev/null; then
  # Most of the time goes into compiling kernels, on one core a process.
  pytest+=(-n "$(($(nproc) > 16 ? 16 : $(nproc)))" --dist worksteal -v --tb=short)
fi
"$python" bench/gpu_needs.py "${tiny[@]}"
status=0 begun=$SECONDS

part() { # part NAME COMMAND...: within what is left of the limit, but for the time of those behind
  local name=$1 mine=${seconds[$1]} left=$((limit - SECONDS + begun))
  later=$((later - mine))
  shift
  if [ "$left" -lt 15 ]; then
    status=1
    echo "== $name: left out, $left s are left"
    return
  fi
  [ -n "${is_fixed[$name]:-}" ] || [ $((left - later)) -le "$mine" ] || mine=$((left - later))
  [ "$mine" -lt "$left" ] || mine=$left
  echo "== $name, up to $mine s"
  rm -f "$out/gpu_$name.json" "$out/$name.log"
  local started=$SECONDS result=139 goes_on=
  # One that was ended by a fault goes on with what it has not tried.
  while [ "$result" -gt 130 ] && [ "$result" -ne 137 ] && [ "$mine" -gt 10 ]; do
    # SOON is when a part begins nothing more. An interrupt leaves a trace, and of tests a summary.
    GPU_BENCH_GOES_ON=$goes_on timeout -s INT -k 8 "$mine" \
      "${@/#SOON/$((mine > 45 ? mine - 15 : mine * 2 / 3))}" >>"$out/$name.log" 2>&1 &&
      result=0 || result=$?
    goes_on=1 mine=$((mine - SECONDS + started))
  done
  if [ "$result" -ne 0 ]; then
    status=1
    echo "$name failed, or was stopped after $((SECONDS - started)) s; the end of $out/$name.log:"
    tail -n 25 "$out/$name.log"
  else
    echo "$((SECONDS - started)) s"
  fi
}

later=0
for name in "${parts[@]}"; do later=$((later + seconds[$name])); done
for name in "${parts[@]}"; do
  case $name in
    tests)
      part tests env OMP_NUM_THREADS=1 "$python" "${pytest[@]}" "${tests[@]}"
      tail -n 1 "$out/tests.log" ;;
    *)
      part "$name" "$python" "bench/gpu_$name.py" --out "$out" --seconds SOON "${tiny[@]}" ;;
  esac
done
"$python" bench/gpu_table.py "$out" | tee "$out/table.txt"
exit "$status"
