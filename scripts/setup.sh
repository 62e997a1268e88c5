# Sourced by the demo and test scripts: go to the checkout's root and activate .venv there.
# The first call makes .venv and installs into it.
# Usage: source scripts/setup.sh EXTRA      EXTRA is test or gpu-check for their tools too, or "" for none

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# for pytest, because src/common/startup.py, which sets it elsewhere, runs too late there
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"

setup() {
    local extra="${1:-}" python="" candidate wanted cuda
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; then
            python="$candidate"
            break
        fi
    done
    if [ -z "$python" ] && [ ! -x .venv/bin/python ]; then
        echo "error: no Python 3.10 to 3.14 with venv was found; on Debian and Ubuntu: apt install python3 python3-venv" >&2
        return 2
    fi
    [ -x .venv/bin/python ] || "$python" -m venv .venv | narrate "making .venv"
    source .venv/bin/activate
    wanted="$(cat requirements.txt pyproject.toml | cksum) $extra"
    if ! grep -qxF "$wanted" .venv/installed 2>/dev/null; then
        cuda="" # pip takes torch with CUDA on Linux on x86_64, unless it is told an index of torch for CPUs
        if [ "$(uname -sm)" = "Linux x86_64" ] && [[ "$(python -m pip config list)" != */whl/cpu* ]]; then
            cuda="; torch with CUDA is a download of about 3 GB"
        fi
        echo "installing the requirements into .venv (a minute or two with a fast network$cuda)"
        pip_install --requirement requirements.txt && pip_install --editable ".${extra:+[$extra]}" &&
            find_nvcc "$extra" && echo "$wanted" >> .venv/installed
    fi
}

pip_install() {
    python -m pip install "$@" | narrate "starting pip"
    return "${PIPESTATUS[0]}"
}

# Say what pip does, whose lines come in, and for how long. $1 is said until its first line. On a terminal it
# is one line that changes, elsewhere a line every five seconds at most, and every minute if it is the same.
narrate() {
    local doing="$1" line text there last="" begun=$SECONDS said=$SECONDS
    while true; do
        line=""
        # exit code of read: above 128 if no line came in this second, 1 at the end
        IFS= read -r -t 1 line || [ $? -gt 128 ] || break
        case "$line" in
            Collecting* | *Downloading* | Building* | *Preparing* | Installing*) doing="${line%% (from *}" ;;
        esac
        text="$doing"
        if [[ "$doing" == Installing* ]]; then
            there=(.venv/lib/python*/site-packages/*.dist-info)
            text="installing, ${#there[@]} packages are there"
        fi
        text="${text#"${text%%[! ]*}"}, $((SECONDS - begun)) s"
        if [ -t 1 ]; then
            printf '\r\033[K%s' "${text:0:78}"
        elif [ $((SECONDS - said)) -ge $([ "$doing" = "$last" ] && echo 60 || echo 5) ]; then
            echo "$text"
            last="$doing"
            said=$SECONDS
        fi
    done
    if [ -t 1 ]; then printf '\r\033[K'; fi
}

# For a GPU's kernels, and for the tests, which execute these kernels on a CPU: install an nvcc, unless one that
# fits is here. PyPI has none before CUDA 13, nor for a Mac, and then a line says what helps: training works
# without one, slowly, and those tests are skipped.
find_nvcc() {
    [ "${1:-}" = test ] || nvidia-smi --list-gpus 2>/dev/null | grep -q "^GPU 0" || return 0
    local said
    said="$(python -c 'from src.ops.toolchain import find_nvcc; find_nvcc()' 2>&1)" && return 0
    said="${said##*BuildError: }"
    if [[ "$said" =~ pip\ install\ \"([^\"]+)\" ]]; then
        echo "installing nvcc, which compiles the GPU's kernels (a download of about 100 MB)"
        pip_install "${BASH_REMATCH[1]}" || echo "NVCC ABSENT: pip did not install it" >&2
    else
        echo "$said" >&2
    fi
}

setup "$@"
