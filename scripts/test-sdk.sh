#!/usr/bin/env bash
# Drives the server with the official OpenAI SDK, unmodified, on echo workers: tests/sdk.
# Arguments go to pytest: scripts/test-sdk.sh -k stream
#
# Builds nothing: tests target/debug/roundhouse, or the binary that ROUNDHOUSE_BIN names.
set -euo pipefail
source "$(dirname "$0")/lib/common.sh"

need_binary debug
dev_venv
cd "$ROOT"
step "testing $ROUNDHOUSE_BIN with openai $("$ROOT/.venv-dev/bin/python" -c 'import openai; print(openai.__version__)')"
status=0
"$ROOT/.venv-dev/bin/python" -m pytest --durations=5 tests/sdk "$@" || status=$?
step "sdk: $([ $status = 0 ] && echo "all passed" || echo FAILED)"
exit $status
