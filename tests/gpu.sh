#!/usr/bin/env bash
# On a machine with a GPU, a CUDA build of torch and nvcc: build, the CUDA tests, compute-sanitizer,
# the GPU benchmarks. Needs no network; takes under nine minutes, each step its share. The report of bench.gpu (Markdown
# and JSON) and gpu.log come to lie under $OUT, or in bench/results/.
#
# STEPS="build tests" runs these alone; PYTHON=… another interpreter than python3.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
OUT=${OUT:-bench/results}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
log=$OUT/gpu.log
export PYTHONUNBUFFERED=1 PYOBSERVER_NATIVE=require PYOBSERVER_REQUIRE_GPU=1
begin=$SECONDS
failed=
step() { # name, seconds, command …
  local step=$1 limit=$2 status
  shift 2
  case " ${STEPS:-$step} " in *" $step "*) ;; *) return ;; esac
  printf '\n== %s, after %s s\n' "$step" "$((SECONDS - begin))" | tee -a "$log"
  timeout -k 10 "$limit" "$@" >"$OUT/step.log" 2>&1
  status=$?
  tail -25 "$OUT/step.log"
  cat "$OUT/step.log" >>"$log"
  rm "$OUT/step.log"
  test "$status" = 0 || failed="$failed $step ($status)"
}
sanitize() { # tool, seconds: one case of each piece of work, tensors not cut from larger memory
  step "$1" "$2" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    compute-sanitizer --tool "$1" --error-exitcode 9 \
    "$python" -m pytest -q -p no:cacheprovider -m gpu tests/ops/test_determinism.py \
    -k "same_bytes_on_cuda and float32"
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$log"
device=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1 | tr 'A-Z ' 'a-z-')
report=$OUT/$(date -u +%Y-%m-%d)-$device.md
step build 80 env PYOBSERVER_CUDA=1 \
  "$python" -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps .
step info 15 "$python" -m pyobserver info
step tests 180 "$python" -m pytest -q -p no:cacheprovider -m gpu tests
sanitize memcheck 55
sanitize racecheck 55
sanitize initcheck 40
step bench 110 "$python" -m bench.gpu --deadline 80 --output "$report"
if test -f "$report"; then cat "$report"; fi
printf '\n%s s; failed:%s\n' "$((SECONDS - begin))" "${failed:- nothing}" | tee -a "$log"
test -z "$failed"
