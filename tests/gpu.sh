#!/usr/bin/env bash
# On a machine with a GPU, a CUDA build of torch and nvcc: build, the CUDA tests, compute-sanitizer,
# the GPU benchmarks. Results under $OUT. Needs no network.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu-results}
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 PYOBSERVER_NATIVE=require
python=${PYTHON:-python3}
failed=0
step() { # name, seconds, command …
  local name=$1 limit=$2
  shift 2
  printf '\n== %s\n' "$name"
  timeout "$limit" "$@" 2>&1 | tee "$OUT/$name.log" | tail -40
  local status=${PIPESTATUS[0]}
  if [ "$status" != 0 ]; then
    printf '%s: exit %s\n' "$name" "$status" | tee -a "$OUT/failed.txt"
    failed=1
  fi
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee "$OUT/device.txt"
step build 120 env PYOBSERVER_CUDA=1 "$python" setup.py -q build_ext --inplace
step info 30 "$python" -m pyobserver info
step tests 150 "$python" -m pytest -q tests/ops -k cuda
step memcheck 90 compute-sanitizer --tool memcheck --error-exitcode 9 \
  "$python" -m pytest -q tests/ops/test_fake_quantize.py -k "cuda and (sizes or layouts or backward_of_a_mask)" -p no:cacheprovider
step racecheck 90 compute-sanitizer --tool racecheck --error-exitcode 9 \
  "$python" -m pytest -q tests/ops/test_fake_quantize.py -k "cuda and (sizes or layouts or backward_of_a_mask)" -p no:cacheprovider
step bench 120 "$python" -m bench --quick --device cuda --only fake_quantize --output "$OUT/bench-cuda.md"
exit "$failed"
