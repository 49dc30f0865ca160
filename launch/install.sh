# Sourced by quickstart.sh and test.sh: a virtual environment with qbrec in it, at the versions of constraints.txt.
#
#   install_qbrec [dev]     makes .venv if there is none and installs; returns at once when nothing has changed
#
# Sets ROOT and VENV and puts the environment first on PATH. Settings, all optional:
#   PYTHON       interpreter to build the environment from   (default: the first Python >= 3.11 on PATH)
#   QBREC_VENV   where the environment lies                  (default: .venv in the repository)
# pip keeps its ordinary configuration (pip.conf, PIP_* variables), so mirrors and the choice of a CPU build of
# torch are made there.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$(realpath -ms "${QBREC_VENV:-$ROOT/.venv}")"

fail() {
    echo "error: $1" >&2
    [[ -z "${2:-}" ]] || echo "  fix: $2" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer found (looked for: ${PYTHON:-python3, python3.11 … python3.14})" \
        "install one, or name it: PYTHON=/path/to/python3.11 bash launch/…"
}

install_qbrec() {
    local extra="${1:-}" python wanted stamp log
    # Where the code and the environment lie is part of the stamp: the installation is editable.
    wanted="$(cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" <(echo "$ROOT $VENV") | sha256sum | cut -d' ' -f1)"
    stamp="$VENV/qbrec-installed${extra:+-$extra}"
    log="$VENV/install.log"
    if [[ "$(cat "$stamp" 2>/dev/null)" == "$wanted" ]] && "$VENV/bin/python" -c '' 2>/dev/null; then
        export PATH="$VENV/bin:$PATH"
        return
    fi
    # An environment that works is used, whoever made it; one that does not is rebuilt only if it was made here.
    # (After a move its python still runs, but the other programs in bin/ name the old place.)
    if [[ "$(cat "$VENV/made-by-qbrec" 2>/dev/null || echo "$VENV")" != "$VENV" ]] ||
        ! "$VENV/bin/python" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix or sys.version_info < (3, 11))' 2>/dev/null; then
        [[ -f "$VENV/made-by-qbrec" || -z "$(ls -A "$VENV" 2>/dev/null)" ]] ||
            fail "$VENV is no working virtual environment with Python 3.11 or newer" "remove it, or set QBREC_VENV"
        python="$(find_python)"
        echo "making the virtual environment $VENV with $("$python" --version)"
        rm -rf "$VENV"
        mkdir -p "$VENV"
        echo "unfinished" >"$VENV/made-by-qbrec"
        "$python" -m venv "$VENV" || fail "python -m venv failed" "on Debian and Ubuntu: apt install python3-venv"
        echo "$VENV" >"$VENV/made-by-qbrec"
    fi
    export PATH="$VENV/bin:$PATH"
    echo "installing qbrec${extra:+[$extra]} (some minutes the first time; log: $log)"
    # DeepSpeed comes as source; without its native operations (DS_BUILD_OPS=0) building it takes no compiler.
    if ! (cd "$ROOT" && DS_BUILD_OPS=0 "$VENV/bin/python" -m pip install --no-input --progress-bar off \
        --constraint constraints.txt --editable ".${extra:+[$extra]}") >"$log" 2>&1; then
        tail -n 30 "$log" >&2
        fail "pip could not install qbrec" "read $log; behind a proxy or mirror, set PIP_INDEX_URL / PIP_PROXY"
    fi
    # dev contains the plain installation; the other way round only adds to what is there.
    echo "$wanted" >"$VENV/qbrec-installed"
    echo "$wanted" >"$stamp"
}
