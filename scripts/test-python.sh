#!/usr/bin/env bash
# Checks and tests the repository's Python, without torch: ruff, pyright, pytest.
# Tests that need a model's own environment are run by that model's scripts.
# Arguments go to pytest: scripts/test-python.sh -k sigterm
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv-dev
stamp=$venv/requirements-dev.installed

if [[ ! -x $venv/bin/python ]]; then
    python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "test-python: $("$python" --version) is too old; set PYTHON to 3.11 or newer" >&2
        exit 1
    }
    "$python" -m venv "$venv"
fi
if ! cmp -s requirements-dev.txt "$stamp"; then
    uv=$(command -v uv || true)
    if [[ -z $uv ]]; then
        [[ -x $venv/bin/uv ]] || "$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv
        uv=$venv/bin/uv
    fi
    "$uv" pip install --quiet --python "$venv/bin/python" -r requirements-dev.txt
    cp requirements-dev.txt "$stamp"
fi

"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/basedpyright" --level error

shopt -s nullglob
"$venv/bin/python" -m pytest models/base/tests models/echo/tests models/*/tests/test_unit_*.py "$@"
