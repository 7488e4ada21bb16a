#!/usr/bin/env bash
# Parity and every measurement, on a machine with a CUDA GPU. Needs torch, triton, pytest, cmake,
# ninja and nanobind there, and no network.
#
#   bash benchmarks/gpu_session.sh [--quick] [PART ...]
#
# PARTs, all by default, in this order: environment compile parity operators decode hybrid ffn widths
# batches; on request: tune. What is timed runs alone, and nothing else should run on the machine.
# --quick: in little, to see that they run. A log and one JSON of all parts, session.json, go to $OUT
# (default: benchmarks/results/gpu-session), the JSON anew after each part. Set HOTNEURON_COMMIT where the checkout
# has no git history, LIMIT to the seconds a part may take, TOTAL to those of all together: what
# does not fit is cut or left out.
set -u
cd "$(dirname "$0")/.." || exit 1
export OUT=${OUT:-benchmarks/results/gpu-session}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/build/triton}
PYTHON=${PYTHON:-python3} LIMIT=${LIMIT:-95} TOTAL=${TOTAL:-480}
mkdir -p "$OUT" build
exec > >(tee "$OUT/session.log") 2>&1
quick=
if [ "${1:-}" = --quick ]; then quick=--quick; shift; fi
parts=${*:-environment compile parity operators decode hybrid ffn widths batches}
failed=
scratch=build/gpu-session-logs
mkdir -p "$scratch"

say() { printf '== %4d s  %s\n' "$SECONDS" "$*"; }

# The C++ kernels, for weights in 8 and 4 bits and for the host's half of hybrid steps. In the
# background, while the Triton kernels are compiled.
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

# A command within the part's limit and what is left of the whole.
limited() {
  local left=$((TOTAL - SECONDS))
  [ "$left" -lt "$LIMIT" ] || left=$LIMIT
  [ "$left" -ge 5 ] || { say "no time left"; return 1; }
  timeout -k 2 "$left" "$@"
}

environment() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv
  limited "$PYTHON" -c 'import torch, triton, sys; print(sys.version.split()[0], "torch", torch.__version__, "triton", triton.__version__, torch.cuda.get_device_name())'
}

# The kernels for the shapes that are measured, all at once, into Triton's cache.
compile() {
  local jobs= decode="decode --batch 1 --layers 1"
  for work in "operators --batch 1" "ffn --batch 1" "ffn --batch 2" "ffn --batch 4" \
    "widths --batch 1" "widths --batch 4" "$decode"; do
    # shellcheck disable=SC2086
    {
      [ "$work" != "$decode" ] || extension_built # a model imports it
      limited "$PYTHON" benchmarks/bench_gpu.py --out "$scratch" --name "compile-${work// /}" \
        --quick --repeats 1 $work
    } >"$scratch/compile-${work// /}.log" 2>&1 &
    jobs="$jobs $!"
  done
  for job in $jobs; do wait "$job"; done
  tail -q -n 1 "$scratch"/compile-*.log
}

parity() {
  local workers=
  extension_built
  "$PYTHON" -c 'import xdist' 2>/dev/null && workers="-n 12"
  # shellcheck disable=SC2046,SC2086
  limited "$PYTHON" -W ignore -m pytest -q $workers -m gpu -o addopts= -o filterwarnings=default \
    --import-mode=importlib -p no:cacheprovider --tb=short $(grep -l 'mark\.gpu' tests/test_*.py)
}

bench() { # name of the result, measurement, options
  # shellcheck disable=SC2086
  limited "$PYTHON" benchmarks/bench_gpu.py --out "$scratch" --name "$1" $quick "${@:2}"
}
operators() { bench operators operators --batch 1; }
decode() { extension_built && bench decode decode --batch 1; }
ffn() { bench ffn ffn --batch 1 2 4; }
widths() { bench widths widths --batch 1 4; }
batches() {
  extension_built && bench decode-batches decode --batch 2 4 8
  bench operators-batches operators --batch 2 4 8 16
  bench ffn-batches ffn --batch 8 16
}
tune() { bench tune tune; }

hybrid() {
  extension_built || return 1
  # shellcheck disable=SC2086
  limited "$PYTHON" benchmarks/bench_hybrid.py --out "$scratch" --name hybrid --new-tokens 16 $quick
}

# Some machines hand back few files: one for all results so far.
join_results() {
  "$PYTHON" benchmarks/join_results.py "$OUT/session.json" \
    "$scratch"/{operators,ffn,widths,decode,hybrid,operators-batches,ffn-batches,decode-batches,tune}.json
}

rm -f "$scratch/built" "$scratch"/*.json
(build_extension && touch "$scratch/built") >"$scratch/build.log" 2>&1 &
build=$!
for part in $parts; do
  say "$part"
  if ! "$part"; then
    say "$part FAILED"
    failed="$failed $part"
  fi
  join_results
done
extension_built || failed="$failed build"
say "done${failed:+, failed:$failed}"
sleep 0.2 # the log is written
[ -z "$failed" ]
