#!/usr/bin/env bash
# Run the tests. On a fresh machine this first makes .venv and installs into it.
# Arguments go to pytest: scripts/test.sh -k merge
set -euo pipefail
source "$(dirname "$0")/setup.sh" test
exec python -m pytest --numprocesses auto --dist loadfile "$@"
