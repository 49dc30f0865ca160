#!/usr/bin/env bash
# All checks of the repository, in the order of what fails fastest.
#
#   bash launch/test.sh           ruff, mypy, import-linter, fast tests       (what to run before every commit)
#   bash launch/test.sh --slow    fault, cluster and end-to-end tests
#
# Further arguments go to pytest:  bash launch/test.sh -k loader -x
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

step() {
    echo
    echo "== $*"
    local start=$SECONDS
    "$@"
    echo "== done in $((SECONDS - start)) s"
}

install_qbrec dev,encode
cd "$ROOT"
if [[ "${1:-}" == "--slow" ]]; then
    shift
    step pytest -m slow --durations=10 "$@"
else
    step ruff check .
    step ruff format --check .
    step mypy
    step lint-imports
    step pytest -m "not slow" --durations=10 "$@"
fi
