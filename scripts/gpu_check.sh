#!/usr/bin/env bash
# Check the CUDA kernels on this machine's GPU, and write docs/gpu/CARD-DATE.json.
# This script runs the tests that need a GPU, errors against float64, compute-sanitizer, and the benchmarks.
# scripts/doctor.py reads the file and says what ran where. At the end a table for the README is printed.
# It takes 10 minutes once .venv is made, the kernels' PTX was executed on the CPU, and the kernels are built. A
# step that would take longer is stopped, and the file says so, with what was measured until then.
# Usage: bash scripts/gpu_check.sh [RWKV_LM]     RWKV_LM: a checkout of RWKV-LM, to compare its kernels with ours
# Exit code 0: all passed. 1: something did not, and the file says what. 2: there is no GPU, or torch sees none.
set -euo pipefail
if ! nvidia-smi --list-gpus 2>/dev/null | grep -q "^GPU 0"; then
    echo "no GPU: nvidia-smi lists none; run this on a machine with an NVIDIA GPU and its driver" >&2
    exit 2
fi
rwkv_lm=()
[ $# = 0 ] || rwkv_lm=(--rwkv_lm "$(realpath "$1")")
source "$(dirname "$0")/setup.sh" gpu-check
python -c 'from src.common.device import unseen_gpu; raise SystemExit(unseen_gpu() or None)' || exit 2
find_nvcc

# other projects' kernels, to be compared with ours if they can be installed
python -c 'import fla' 2>/dev/null || python -m pip install --quiet --editable ".[bench]" || true
peers=() others=(compiled)
! python -c 'import fla' 2>/dev/null || { peers=(--peers); others=(fla compiled); }

sanitizer="$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -1 || true)"
if [ -z "$sanitizer" ]; then
    python -m pip install --quiet nvidia-cuda-sanitizer-api || true
    sanitizer="$(python -c 'import glob, sysconfig; print(*glob.glob(sysconfig.get_path("purelib") + "/nvidia/*/bin/compute-sanitizer"))')"
fi
ncu="$(command -v ncu || ls /usr/local/cuda*/bin/ncu 2>/dev/null | tail -1 || true)"

logs="$(mktemp -d)" running=""
trap '[ -z "$running" ] || kill "$running" 2>/dev/null; rm -rf "$logs"' EXIT

# step NAME SECONDS COMMAND...: show and keep what it prints, its exit code and its time. Go on whatever that is.
# The output is a file, not a pipe: a process that the command has left behind would hold a pipe open. Lines of
# JSON are for the record.
step() {
    local name="$1" limit="$2" code=0 started=$SECONDS
    shift 2
    printf '\n== %s\n' "$name, at most $limit s: $*"
    timeout --kill-after=5 "$limit" "$@" > "$logs/$name" 2>&1 &
    running=$!
    tail --lines=+1 --follow --sleep-interval=0.2 --pid="$running" "$logs/$name" 2>/dev/null \
        | grep --line-buffered --text --invert-match '^{' || true
    wait "$running" || code=$?
    running=""
    echo "$code $((SECONDS - started)) $limit" > "$logs/$name.code"
}

# What the card will run is executed on the CPU first. A kernel that fails below, and not here, fails on the card.
card="$(python -c 'import torch; print("{}{}".format(*torch.cuda.get_device_capability()))')"
step ptx 300 python -m gpu_emulation.ptx --quick --arch "$card"
# build the kernels now, so that no later step waits for the compiler
step build 600 python -c 'from src.ops import self_test; status = self_test.status("cuda"); print(status); raise SystemExit(not status.passed)'
# The limits below add up to less than 10 minutes. Speeds come first, because they are not known yet.
step training 60 python -m benchmarks.step --device cuda --n_layer 24 --n_embd 2048 --micro_bsz 8 --ctx_len 1024
# a separate step, because torch.compile may take long, or fail
step others 45 python -m benchmarks.step --device cuda --n_layer 24 --n_embd 2048 --micro_bsz 4 --ctx_len 1024 --rounds 3 --variants miss "${others[@]}"
# the model for which RWKV-LM publishes 99,500 tokens a second on an RTX 5090
step published 30 python -m benchmarks.step --device cuda --n_layer 12 --n_embd 768 --micro_bsz 16 --ctx_len 512 --variants none
# without kernel "reference": token by token under autograd these shapes do not fit in memory
step wkv 60 python -m benchmarks.ops wkv --device cuda --shapes 8,4096,2048 1,4096,2048 --kernels cuda cuda-exact torch --rounds 5 "${peers[@]}" "${rwkv_lm[@]}"
step decode 50 python -m benchmarks.gpu_decode --layers 12 --rounds 3 --tokens 32 --rows 1 8 32
step sizes 40 python -m benchmarks.sizes --ctx_len 4096
step numerics 50 python -m benchmarks.gpu_numerics
step tests 100 python -m pytest tests/test_gpu.py -m gpu -rs
# check our kernels only, whose mangled names contain the name of their file
ours="$(cd cuda && echo *.cu | sed 's/\.cu/_cu/g; s/ /|/g')"
# without torch's memory cache, in which a write beyond a tensor could hit another tensor unseen
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in memcheck racecheck initcheck synccheck; do
    if [ -n "$sanitizer" ]; then
        step "$tool" 35 "$sanitizer" --tool "$tool" --kernel-name "regex=$ours" --error-exitcode 1 --report-api-errors no python -m benchmarks.gpu_numerics --small
    else
        step "$tool" 1 echo "not run: compute-sanitizer is not installed; it comes with the CUDA toolkit"
    fi
done
unset PYTORCH_NO_CUDA_MEMORY_CACHING
if [ -n "$ncu" ]; then
    metrics=gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active
    step ncu 20 "$ncu" --csv --metrics "$metrics" --kernel-name-base mangled --kernel-name "regex:$ours" --launch-count 30 python -m benchmarks.ops wkv --device cuda --shapes 8,4096,2048 --kernels cuda --rounds 1
else
    step ncu 1 echo "not measured: ncu is not installed; it comes with the CUDA toolkit"
fi

python -m scripts.gpu_record "$logs"
