#!/usr/bin/env bash
# Check the CUDA kernels on this machine's GPU, and write docs/gpu/CARD-DATE.json.
# It runs the tests that need a GPU, errors against float64, compute-sanitizer, and the benchmarks.
# scripts/doctor.py reads the file and says what ran where.
# It takes less than 10 minutes once .venv is made and the kernels are built.
# Exit code 0: all passed. 1: something did not, and the file says what. 2: there is no GPU.
set -euo pipefail
if ! nvidia-smi --list-gpus 2>/dev/null | grep -q "^GPU 0"; then
    echo "no GPU: nvidia-smi lists none; run this on a machine with an NVIDIA GPU and its driver" >&2
    exit 2
fi
source "$(dirname "$0")/setup.sh" test
find_nvcc

sanitizer="$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -1 || true)"
if [ -z "$sanitizer" ]; then
    python -m pip install --quiet nvidia-cuda-sanitizer-api
    sanitizer="$(python -c 'import glob, sysconfig; print(*glob.glob(sysconfig.get_path("purelib") + "/nvidia/*/bin/compute-sanitizer"))')"
fi

logs="$(mktemp -d)"
trap 'rm -rf "$logs"' EXIT

# step NAME SECONDS COMMAND...: show and keep what it prints, and its exit code. Go on whatever that is
step() {
    local name="$1" limit="$2" code=0
    shift 2
    printf '\n== %s\n' "$name: $*"
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$logs/$name" || code=$?
    echo "$code" > "$logs/$name.code"
}

# built here, so that no later step waits for the compiler
step build 600 python -c 'from src.ops import native; status = native.status("cuda"); print(status); raise SystemExit(not status.passed)'
step tests 120 python -m pytest -m gpu
step numerics 90 python -m benchmarks.gpu_numerics
# no cache of memory: with it a write beyond a tensor could land in another tensor's memory, unseen
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in memcheck racecheck; do
    step "$tool" 80 "$sanitizer" --tool "$tool" --error-exitcode 1 --report-api-errors no python -m benchmarks.gpu_numerics --small
done
unset PYTORCH_NO_CUDA_MEMORY_CACHING
# bf16, because tensor cores take it. These shapes do not fit in memory token by token under autograd
step benchmark 100 python -m benchmarks.wkv --device cuda --dtype bfloat16 --shapes 1,4096,2048 8,4096,2048 --kernels cuda cuda-exact torch
step training 120 python -m benchmarks.sizes

python -m scripts.gpu_record "$logs"
