# Sourced by the demo and test scripts. It goes to the checkout's root and activates .venv there.
# The first call makes .venv and installs into it.
# Usage: source scripts/setup.sh EXTRA      EXTRA is test for the test tools too, or "" for none

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# for pytest, which does not come through src/common/startup.py
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"

setup() {
    local extra="${1:-}" python="" candidate wanted
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            python="$candidate"
            break
        fi
    done
    if [ -z "$python" ] && [ ! -x .venv/bin/python ]; then
        echo "error: no Python 3.10 to 3.13 with venv was found; on Debian and Ubuntu: apt install python3 python3-venv" >&2
        return 2
    fi
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    source .venv/bin/activate
    wanted="$(cat requirements.txt pyproject.toml | cksum) $extra"
    if ! grep -qxF "$wanted" .venv/installed 2>/dev/null; then
        echo "installing the requirements into .venv (a minute with a fast network; torch with CUDA is a download of about 3 GB)"
        python -m pip install --quiet --requirement requirements.txt
        python -m pip install --quiet --editable ".${extra:+[$extra]}"
        find_nvcc
        echo "$wanted" >> .venv/installed
    fi
}

# Where there is a GPU: install an nvcc for its kernels, unless one that fits is here. PyPI has none before CUDA
# 13, and then a line says what helps: training works without one, slowly.
find_nvcc() {
    nvidia-smi --list-gpus 2>/dev/null | grep -q "^GPU 0" || return 0
    local said
    said="$(python -c 'from src.ops.toolchain import find_nvcc; find_nvcc()' 2>&1)" && return 0
    said="${said##*BuildError: }"
    if [[ "$said" =~ pip\ install\ \"([^\"]+)\" ]]; then
        echo "installing nvcc, which compiles the GPU's kernels (a download of about 100 MB)"
        python -m pip install --quiet "${BASH_REMATCH[1]}"
    else
        echo "$said" >&2
    fi
}

setup "$@"
