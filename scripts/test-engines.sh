#!/usr/bin/env bash
# Tests the server on real engines: vLLM, diffusers and transformers on the CPU, with small checkpoints: tests/engines.
# Arguments go to pytest: scripts/test-engines.sh tests/engines/test_1_images.py
#
# Installs engines and makes checkpoints that are missing first (minutes the first time, a second later). Builds nothing
# of Rust: tests target/debug/roundhouse, or the binary that ROUNDHOUSE_BIN names.
set -euo pipefail
source "$(dirname "$0")/lib/common.sh"

need_binary debug
"$ROOT/scripts/install.sh" --cpu vllm flux musicgen
"$ROOT/scripts/make-checkpoints.sh" smollm2 flux-schnell flux-klein musicgen
dev_venv
cd "$ROOT"
paths=("$@")
[[ " $* " == *" tests/"* ]] || paths=(tests/engines "$@")
step "testing $ROUNDHOUSE_BIN on real engines (vLLM takes about a minute to start, twice)"
status=0
"$ROOT/.venv-dev/bin/python" -m pytest -v --durations=8 "${paths[@]}" || status=$?
step "engines: $([ $status = 0 ] && echo "all passed" || echo FAILED)"
exit $status
