#!/usr/bin/env bash
# Tests the three models' workers as they are: real vLLM, diffusers and transformers, on small checkpoints, on the CPU;
# installing, in a copy; and fetching weights, against a local stand-in of the hub.
#
#   scripts/test-workers.sh                  everything
#   scripts/test-workers.sh flux musicgen    only these (vllm, flux, musicgen, scripts)
#
# Installs and makes what is missing first (minutes the first time, a second later), but nothing of Rust: `scripts` tests
# target/debug/roundhouse, or the binary that ROUNDHOUSE_BIN names.
set -euo pipefail
source "$(dirname "$0")/lib/common.sh"

suites=("$@")
[ ${#suites[@]} -gt 0 ] || suites=(scripts flux musicgen vllm)
models=() paths=() with_vllm=0
for suite in "${suites[@]}"; do
    case $suite in
    vllm) models+=(vllm) with_vllm=1 ;;
    flux | musicgen) models+=("$suite") paths+=("$ROOT/models/$suite/tests") ;;
    scripts)
        need_binary debug
        models+=(flux) paths+=("$ROOT/scripts/tests")
        ;;
    *) die "unknown suite $suite: vllm, flux, musicgen or scripts" ;;
    esac
done

"$ROOT/scripts/install.sh" --cpu "${models[@]}"
for suite in "${suites[@]}"; do
    case $suite in
    vllm) "$ROOT/scripts/make-checkpoints.sh" smollm2 ;;
    flux) "$ROOT/scripts/make-checkpoints.sh" flux-schnell flux-klein ;;
    musicgen) "$ROOT/scripts/make-checkpoints.sh" musicgen ;;
    esac
done
dev_venv

export PYTHONPATH=$ROOT/models/base:$ROOT/models/base/tests
pytest=("$ROOT/.venv-dev/bin/python" -m pytest --durations=5)
cd "$ROOT"
status=0 vllm_pid='' vllm_log=''
if [ $with_vllm = 1 ]; then
    # vLLM takes a minute to start, most of it on one core: meanwhile the others run.
    vllm_log=$(mktemp)
    "${pytest[@]}" models/vllm/tests >"$vllm_log" 2>&1 &
    vllm_pid=$!
    trap 'kill "$vllm_pid" 2>/dev/null || true; rm -f "$vllm_log"' EXIT
fi
if [ ${#paths[@]} -gt 0 ]; then
    "${pytest[@]}" "${paths[@]}" || status=1
fi
if [ -n "$vllm_pid" ]; then
    wait "$vllm_pid" || status=1
    cat "$vllm_log"
fi
step "$([ $status = 0 ] && echo "workers: all passed" || echo "workers: FAILED")"
exit $status
