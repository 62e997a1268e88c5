#!/usr/bin/env bash
# Run the tests. On a fresh machine this first makes .venv and installs into it.
# Without --all it leaves out the tests marked slow or rare. --all --slice=3 runs all but nine tenths of the rare ones.
# Other arguments go to pytest: scripts/test.sh -k merge, scripts/test.sh --all -k merge
set -euo pipefail
tier=(-m "not slow and not rare")
if [ "${1:-}" = --all ]; then
    tier=()
    shift
fi
source "$(dirname "$0")/setup.sh" test
# files go to the workers in the order of tests/budgets.txt
exec python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder "${tier[@]}" "$@"
