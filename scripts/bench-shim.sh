#!/usr/bin/env bash
# Measures what the synchronous shim adds to a call of the worker: see scripts/bench-shim.py.
# Builds nothing: measures target/release/roundhouse, or the binary that ROUNDHOUSE_BIN names. Arguments: --help.
set -euo pipefail
source "$(dirname "$0")/lib/common.sh"

need_binary release
dev_venv
exec "$ROOT/.venv-dev/bin/python" "$ROOT/scripts/bench-shim.py" "$@"
