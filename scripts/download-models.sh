#!/usr/bin/env bash
# Fetches the published weights of the models in models.yaml into the Hugging Face cache.
#
#   scripts/download-models.sh             every model that has a Hugging Face id
#   scripts/download-models.sh flux        only this entry of models.yaml
#   scripts/download-models.sh --list      what would be fetched, and where to
#
# --config FILE     another models.yaml
# --json-progress   JSON lines on stdout instead of text
#
# Free space is checked first, and a fetch that was cut goes on where it ended. Weights go to HF_HUB_CACHE or
# HF_HOME/hub (else on RunPod: /workspace/.cache/huggingface/hub, which outlives the pod), where workers look for them.
# Gated models need HF_TOKEN; nothing else reads it. HF_ENDPOINT chooses another hub.
set -euo pipefail
source "$(dirname "$0")/lib/common.sh"

config=$ROOT/models.yaml list=0 names=() flags=()
while [ $# -gt 0 ]; do
    case $1 in
    --config)
        [ $# -ge 2 ] || die "--config needs a file"
        config=$2
        shift
        ;;
    --list) list=1 ;;
    --json-progress) flags+=(--json-progress) ;;
    -h | --help)
        sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p;}' "$0"
        exit 0
        ;;
    -*) die "unknown flag $1 (see --help)" ;;
    *) names+=("$1") ;;
    esac
    shift
done
[ -f "$config" ] || die "no $config"

# Any environment with the fetcher's libraries can fetch any model.
python=
for venv in "$ROOT"/models/*/.venv; do
    if "$venv/bin/python" -c 'import huggingface_hub, roundhouse_worker.fetch, yaml' 2>/dev/null; then
        python=$venv/bin/python
        break
    fi
done
[ -n "$python" ] || die "no model is installed yet; run scripts/install.sh first"

entries=$("$python" "$ROOT/scripts/lib/list_models.py" "$config" "${names[@]}") || exit 1
[ -n "$entries" ] || die "no entry of $config names a Hugging Face id"

failed=()
while IFS=$'\t' read -r name repo revision; do
    if [ "$list" = 1 ]; then
        echo "$name: $repo, revision $revision"
        continue
    fi
    say "$name: $repo, revision $revision"
    case $repo in
    facebook/musicgen*) say "note: Meta's MusicGen weights are CC-BY-NC 4.0, not for commercial use" ;;
    esac
    "$python" -m roundhouse_worker.fetch --repo "$repo" --revision "$revision" "${flags[@]}" || failed+=("$name")
done <<<"$entries"
if [ "$list" = 1 ]; then
    "$python" -c 'from roundhouse_worker import weights; print("into:", weights.default_cache())'
fi
[ ${#failed[@]} -eq 0 ] || die "not fetched: ${failed[*]}"
