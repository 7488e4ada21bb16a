#!/usr/bin/env bash
# Parity, then every measurement, on a machine with a CUDA GPU. Needs torch, triton, pytest, cmake,
# ninja and nanobind there, and no network.
#
#   bash benchmarks/gpu_session.sh [--quick] [PART ...]
#
# PARTs, all by default, in this order: environment parity operators ffn decode widths hybrid; on
# request: tune. --quick: most of them at once and in little, to see that they run, then tune.
# A log and a JSON for each part go to $OUT (default: benchmarks/results/gpu-session) as they come.
# Set HOTNEURON_COMMIT where the checkout has no git history, LIMIT to the seconds a part may take.
set -u
cd "$(dirname "$0")/.." || exit 1
export OUT=${OUT:-benchmarks/results/gpu-session}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
PYTHON=${PYTHON:-python3} LIMIT=${LIMIT:-150}
mkdir -p "$OUT" build
exec > >(tee "$OUT/session.log") 2>&1
quick=
if [ "${1:-}" = --quick ]; then quick=--quick; shift; fi
parts=${*:-environment parity operators ffn decode widths hybrid}
failed=
scratch=build/gpu-session-logs
mkdir -p "$scratch"

say() { printf '== %4d s  %s\n' "$SECONDS" "$*"; }

# The C++ kernels, for weights in 8 and 4 bits and for the host's half of hybrid steps. In the
# background, because it takes as long as the first measurements.
build_extension() {
  cmake -S . -B build/gpu-session -G Ninja -DPython_EXECUTABLE="$(command -v "$PYTHON")" \
    -DCMAKE_PREFIX_PATH="$("$PYTHON" -m nanobind --cmake_dir)" &&
    cmake --build build/gpu-session && cmake --install build/gpu-session --prefix .
}

# 0 when it is built; waits, and may be asked again.
extension_built() {
  while kill -0 "$build" 2>/dev/null; do sleep 0.5; done
  [ -e "$scratch/built" ] || { tail -n 20 "$scratch/build.log"; return 1; }
}

environment() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv
  "$PYTHON" -c 'import torch, triton, sys; print(sys.version.split()[0], "torch", torch.__version__, "triton", triton.__version__, torch.cuda.get_device_name())'
}

tests() {
  local workers=
  "$PYTHON" -c 'import xdist' 2>/dev/null && workers="-n 6"
  # shellcheck disable=SC2086
  timeout "$LIMIT" "$PYTHON" -m pytest -q $workers -m gpu -o addopts= -o filterwarnings=default \
    --import-mode=importlib -p no:cacheprovider --tb=short "$@"
}

parity() {
  # shellcheck disable=SC2046
  tests $(grep -l 'mark\.gpu' tests/test_*.py)
}

bench() {
  # shellcheck disable=SC2086
  timeout "$LIMIT" "$PYTHON" benchmarks/bench_gpu.py --out "$OUT" --name "$1" $quick "$1"
}
operators() { bench operators; }
ffn() { bench ffn; }
decode() { bench decode; }
widths() { bench widths; }

# Compiling takes longest, so it is done before, for all kernels at once.
compile_tiles() {
  local kernel jobs=
  for kernel in up down exact predicted "linear bf16" "linear int8" "linear 4 bits"; do
    timeout "$LIMIT" "$PYTHON" benchmarks/bench_gpu.py --out "$scratch" --name "$kernel" \
      tune --layers 1 --repeats 1 --kernels "$kernel" >/dev/null &
    jobs="$jobs $!"
  done
  # shellcheck disable=SC2086
  wait $jobs
}
tune() {
  timeout "$LIMIT" "$PYTHON" benchmarks/bench_gpu.py --out "$OUT" --name tune tune --repeats 20
}

hybrid() {
  extension_built || return 1
  if [ -f benchmarks/bench_hybrid.py ]; then
    # shellcheck disable=SC2086
    timeout "$LIMIT" "$PYTHON" benchmarks/bench_hybrid.py --out "$OUT" --name hybrid $quick
  else
    say "there is no benchmarks/bench_hybrid.py yet"
  fi
}

ended() { # name, status
  if [ "$2" -ne 0 ]; then
    say "$1 FAILED"
    failed="$failed $1"
  fi
}

rm -f "$scratch/built"
(build_extension && touch "$scratch/built") >"$scratch/build.log" 2>&1 &
build=$!
if [ -n "$quick" ]; then
  started=
  for part in ${parts/hybrid/} compile_tiles; do
    "$part" >"$scratch/$part.log" 2>&1 &
    started="$started $part:$!"
  done
  for job in $started; do
    wait "${job#*:}"
    status=$?
    say "${job%:*}"
    tail -n 40 "$scratch/${job%:*}.log"
    [ "$status" -eq 0 ] || cp "$scratch/${job%:*}.log" "$OUT"
    ended "${job%:*}" "$status"
  done
  case $parts in *hybrid*) parts="tune hybrid" ;; *) parts=tune ;; esac
fi
for part in $parts; do
  say "$part"
  "$part"
  ended "$part" $?
done
extension_built || failed="$failed build"
say "done${failed:+, failed:$failed}"
sleep 0.2 # the log is written
[ -z "$failed" ]
