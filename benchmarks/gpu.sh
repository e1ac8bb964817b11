#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command and under 10 minutes, without a network:
#
#     benchmarks/gpu.sh                  tests on real kernels, tile shapes, head rate, benchmark, training steps
#     benchmarks/gpu.sh --dry-run        the same steps rehearsed on the CPU with tiny sizes, into a temporary folder
#
# Without CUDA it is a rehearsal by itself. Writes RESULTS/CARD.json, all steps in one, and the plots beside it. A
# step that fails or runs out of time does not stop the next ones: its last lines are in the result. The exit code is
# that of the first that failed.
#
# PYTHON: the interpreter (default: python). RESULTS: a folder (default: benchmarks/results). PYTEST_SELECTION: which
# tests (default: all).
set -uo pipefail
cd "$(dirname "$0")/.."
root=$PWD
PYTHON=${PYTHON:-python}
LIMIT=590
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

card=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")') || exit
dry=
if [ "${1:-}" = --dry-run ] || [ -z "$card" ]; then
  dry=1 card=rehearsal LIMIT=3600
  export CUDA_VISIBLE_DEVICES=
  results=$(mktemp -d)
  echo "rehearsal on the CPU: the figures mean nothing"
else
  results=${RESULTS:-benchmarks/results}
  mkdir -p "$results" || exit
fi
card=$(echo "$card" | tr -c 'A-Za-z0-9\n' '-' | tr 'A-Z' 'a-z')

if ! (cd / && "$PYTHON" -c 'import orpo_kernels.integration' 2>/dev/null); then
  # Not installed: the folders as setup.py maps them, in links.
  mkdir -p "$work/path/orpo_kernels"
  ln -s "$root"/orpo_kernels/* "$work/path/orpo_kernels/"
  ln -s "$root/integration" "$work/path/orpo_kernels/integration"
  export PYTHONPATH=$work/path${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
fi

failed=0
step() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 begun=$SECONDS code=0
  shift 2
  [ "$limit" -le $((LIMIT - SECONDS)) ] || limit=$((LIMIT - SECONDS))
  if [ "$limit" -lt 10 ]; then
    code=124
    echo "the time was used up before" >"$work/$name.log"
  else
    # An interrupt, so that what there is by then is written; then a kill.
    timeout --signal=INT --kill-after=10 "$limit" "$@" >"$work/$name.log" 2>&1 || code=$?
  fi
  echo "$name: exit code $code after $((SECONDS - begun)) s; $(tail -n 1 "$work/$name.log" | cut -c 1-150)"
  echo "$name $code $((SECONDS - begun))" >>"$work/steps"
  [ "$failed" -ne 0 ] || failed=$code
}

if [ -n "$dry" ]; then
  bench=(--pairs 1 --length 16 --hidden-size 32 --vocab-size 300 --modes frozen --rounds 1 --repeats 1 --sweep 8)
  rate=(--tokens 32 --hidden-size 32 --vocab-size 300 --dtype float32 --repeats 1)
  steps=(--steps 1 --rounds 1 --batch-size 1 --max-length 128)
  rehearse=(TRITON_INTERPRET=1)
  limits=(900 300 60 600 600)
else
  bench=(--model llama-3-8b --dtype bfloat16 --modes frozen trained --rounds 1 --repeats 5 --sweep 256 512 2048)
  rate=(--tokens 8192 --hidden-size 4096 --vocab-size 151936 --dtype bfloat16)
  steps=(--steps 4 --rounds 1)
  rehearse=()
  limits=(200 80 60 170 80)
fi
workers=()
"$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-n "$([ -n "$dry" ] && echo 2 || echo 8)" --dist loadfile)

# shellcheck disable=SC2086  # a selection may be several words
step tests "${limits[0]}" "$PYTHON" -m pytest -p no:cacheprovider "${workers[@]}" ${PYTEST_SELECTION:-tests}
# What it keeps goes into a folder of its own: the figures below are those of the default shapes.
step tune "${limits[1]}" env ORPO_KERNELS_CACHE="$work/tuned" "${rehearse[@]}" \
  "$PYTHON" -m orpo_kernels tune --minutes 1 --output "$work/tune.json"
step head_rate "${limits[2]}" "$PYTHON" benchmarks/head_rate.py "${rate[@]}" --output "$work/head_rate.json"
step bench "${limits[3]}" "$PYTHON" -m orpo_kernels bench "${bench[@]}" --output-dir "$work/bench"
step training_step "${limits[4]}" "$PYTHON" benchmarks/training_step.py "${steps[@]}" --output "$work/training_step.json"

"$PYTHON" - "$work" "$results/$card.json" <<'PYTHON' || exit
import json, sys
from pathlib import Path

work, target = map(Path, sys.argv[1:])
found = {}
for line in (work / "steps").read_text().splitlines():
    name, code, seconds = line.split()
    path = work / ("bench/result.json" if name == "bench" else f"{name}.json")
    found[name] = {
        "exit_code": int(code),
        "seconds": int(seconds),
        "last_lines": (work / f"{name}.log").read_text(errors="replace").splitlines()[-60:],
        "result": json.loads(path.read_text()) if path.exists() else None,
    }
target.write_text(json.dumps(found, indent=1) + "\n")
PYTHON
for plot in "$work"/bench/*.png; do
  [ ! -e "$plot" ] || cp "$plot" "$results/$card-$(basename "$plot")"
done
echo "wrote $(ls -d "$results/$card"* | tr '\n' ' ')after $SECONDS s"
exit "$failed"
