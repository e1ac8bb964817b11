#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command and under 10 minutes, without a network:
#
#     benchmarks/gpu.sh                  tests on real kernels, tile shapes, head rate, benchmark, training steps
#     benchmarks/gpu.sh --dry-run        the same steps rehearsed on the CPU with tiny sizes, into a temporary folder
#
# Without CUDA it is a rehearsal by itself. Results go to benchmarks/results/CARD/. A step that fails does not stop
# the next ones; the exit code is that of the first that failed. PYTHON: the interpreter (default: python).
# PYTEST_SELECTION: which tests (default: all).
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}

card=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")')
dry=
if [ "${1:-}" = --dry-run ] || [ -z "$card" ]; then
  dry=1
  export CUDA_VISIBLE_DEVICES=
  results=$(mktemp -d)
  echo "rehearsal on the CPU: the figures mean nothing; they go to $results"
else
  results=benchmarks/results/$(echo "$card" | tr ' /' '--' | tr 'A-Z' 'a-z')
  mkdir -p "$results"
  echo "$card: results go to $results"
fi
failed=0

step() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 begun=$SECONDS code=0
  shift 2
  timeout "$limit" "$@" >"$results/$name.log" 2>&1 || code=$?
  echo "$name: exit code $code after $((SECONDS - begun)) s; $(tail -n 1 "$results/$name.log")"
  [ "$failed" -ne 0 ] || failed=$code
}

if [ -n "$dry" ]; then
  bench=(--pairs 1 --length 16 --hidden-size 32 --vocab-size 300 --rounds 1 --repeats 1 --minutes 1)
  rate=(--tokens 32 --hidden-size 32 --vocab-size 300 --dtype float32 --repeats 1)
  steps=(--steps 1 --rounds 1 --batch-size 1 --max-length 64)
else
  bench=(--model llama-3-8b --dtype bfloat16 --pairs 2 --minutes 2 --sweep 256 512 2048)
  rate=(--tokens 8192 --hidden-size 4096 --vocab-size 151936 --dtype bfloat16)
  steps=(--steps 4 --rounds 2)
fi
# shellcheck disable=SC2086  # a selection may be several words
step tests 240 "$PYTHON" -m pytest ${PYTEST_SELECTION:-tests}
step tune 90 "$PYTHON" benchmarks/tune.py --minutes 1 --output "$results/tune.json"
step head_rate 60 "$PYTHON" benchmarks/head_rate.py "${rate[@]}" --output "$results/head_rate.json"
step bench 180 "$PYTHON" -m orpo_kernels bench "${bench[@]}" --output-dir "$results"
step training_step "$([ -n "$dry" ] && echo 400 || echo 120)" "$PYTHON" benchmarks/training_step.py "${steps[@]}" --output "$results/training_step.json"
exit "$failed"
