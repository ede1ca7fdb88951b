#!/usr/bin/env bash
# Measures swaps through the real server on this machine's GPU: FLUX.1 at its real shape, MusicGen medium and an 8B model
# of vLLM, all with random weights, by turns on one GPU; and that nothing is left behind. Needs torch, and no network.
#
#   scripts/gpu-verify.sh --out /tmp/verify                       everything: half an hour, 50 GB of disk, 128 GB of memory
#   scripts/gpu-verify.sh --out /tmp/verify --only link,checkpoints    a part at a time; the table has all of them
#   scripts/gpu-verify.sh --scale tiny                            the same procedure on the CPU with the small checkpoints
#   scripts/gpu-verify.sh --help                                  all flags
#
# PYTHON names the interpreter (python3), which must have torch, transformers, diffusers, starlette, uvicorn, soundfile and
# vllm; with --scale tiny any 3.11 does, since workers run in models/*/.venv.
# Exit code: 0 all goals met, 1 one was missed or a part failed, 2 a flag is wrong or the machine lacks something, 130 broken
# off.
set -euo pipefail
source "$(dirname "$0")/lib/common.sh"

exec "${PYTHON:-python3}" "$ROOT/scripts/gpu_verify.py" "$@"
