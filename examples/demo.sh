#!/usr/bin/env bash
# Answers examples/questions.jsonl with a small real model, with the text appearing as it is generated.
# `make demo` runs it; it keeps everything in .demo and leaves no process.
set -euo pipefail
cd "$(dirname "$0")/.."

mill=.venv/bin/tokenmill
mkdir -p .demo
# A server of the demo's own, whatever else this user runs.
export TOKENMILL_STATE_DIR="$PWD/.demo/state"
unset TOKENMILL_REDIS_URL

echo "== the model: SmolLM2-135M-Instruct, 95 MB, fetched once"
"$mill" models pull smollm2
echo
echo "== an embedded server, a worker, and the answers as they come"
"$mill" generate examples/questions.jsonl -o .demo/answers.jsonl \
    --model smollm2 --max-tokens 48 --live --overwrite
echo
echo "== one answer a row, in the order of the questions: .demo/answers.jsonl"
head -n 1 .demo/answers.jsonl
