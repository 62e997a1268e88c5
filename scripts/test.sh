#!/usr/bin/env bash
# Run the tests. On a fresh machine this first makes .venv and installs into it.
# Arguments go to pytest: scripts/test.sh -k merge
set -euo pipefail
source "$(dirname "$0")/setup.sh" test
# files go to the workers in the order of tests/conftest.py
exec python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder "$@"
