# Shared by the scripts in scripts/: sourced, never run. bash >= 4.
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck disable=SC2034 # used by those who source this
CHECKPOINTS=${ROUNDHOUSE_CHECKPOINTS:-$ROOT/.cache/checkpoints}

# Where bytecode is not written (containers often say so), each start of torch costs 6 s more.
unset PYTHONDONTWRITEBYTECODE

say() { printf '%s\n' "$*" >&2; }

die() {
    say "error: $*"
    exit 1
}

# Seconds since the script began, for progress lines.
elapsed() { printf '%3ds' "$SECONDS"; }

step() { say "[$(elapsed)] $*"; }

# True when an NVIDIA driver answers. Says nothing.
has_nvidia() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; }

# "570.86 (supports CUDA up to 12.8)", or "none".
driver_text() {
    local version cuda
    version=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n1) || true
    cuda=$(nvidia-smi 2>/dev/null | grep -oE 'CUDA( UMD)? Version: *[0-9.]+' | grep -oE '[0-9.]+$' | head -n1) || true
    if [ -z "$version" ]; then
        echo none
    else
        echo "$version (supports CUDA up to ${cuda:-unknown})"
    fi
}

# Free bytes of the file system that holds $1 (or its nearest existing parent).
free_bytes() {
    local dir=$1
    while [ ! -d "$dir" ]; do dir=$(dirname "$dir"); done
    df -P -B1 "$dir" | awk 'NR == 2 { print $4 }'
}

human() { awk -v b="$1" 'BEGIN { if (b >= 1e9) printf "%.1f GB", b / 1e9; else printf "%.0f MB", b / 1e6 }'; }

# The Python that venvs are made with.
base_python() {
    local python=${ROUNDHOUSE_PYTHON:-python3}
    command -v "$python" >/dev/null 2>&1 || die "no $python found; install Python 3.11 or newer, or set ROUNDHOUSE_PYTHON"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "$("$python" --version 2>&1) is too old; 3.11 or newer is needed (set ROUNDHOUSE_PYTHON)"
    # The real binary, not a version manager's shim: venvs must keep working from any folder.
    "$python" -c 'import sys; print(sys.executable)'
}

# Runs apt-get install for what is missing, or says which line a person has to run.
need_apt() {
    if command -v apt-get >/dev/null 2>&1 && [ "$(id -u)" = 0 ]; then
        step "apt-get install $*"
        { apt-get install -y -q "$@" || { apt-get update -q && apt-get install -y -q "$@"; }; } >&2 ||
            die "apt-get install $* failed"
    else
        die "missing: $*. Install them first, for instance: sudo apt-get install $*"
    fi
}

# Makes sure that cargo and a C compiler (for SQLite) are there. The toolchain itself comes by rust-toolchain.toml.
need_rust() {
    command -v cargo >/dev/null 2>&1 || PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin
    command -v cargo >/dev/null 2>&1 || die "no cargo found; install Rust, for instance from https://rustup.rs"
    command -v cc >/dev/null 2>&1 || need_apt gcc libc6-dev
}

# Makes sure that the Python can make virtual environments; Debian packs that apart.
need_venv() { "$(base_python)" -c 'import ensurepip, venv' 2>/dev/null || need_apt python3-venv; }

# Sets UV to a working uv: the one on PATH, else one in a small venv of the project.
find_uv() {
    if command -v uv >/dev/null 2>&1 && uv --version >/dev/null 2>&1; then
        UV=$(command -v uv)
        return
    fi
    UV=$ROOT/.venv-tools/bin/uv
    has_own_uv && return
    # Scripts that run side by side want it at the same moment: one installs, the others wait and find it.
    local lock
    mkdir -p "$ROOT/.cache"
    exec {lock}>"$ROOT/.cache/uv.lock"
    flock "$lock"
    if ! has_own_uv; then install_own_uv; fi
    exec {lock}>&-
}

has_own_uv() { [ -x "$UV" ] && "$UV" --version >/dev/null 2>&1; }

install_own_uv() {
    step "no uv found: installing it into .venv-tools"
    local python
    python=$(base_python)
    "$python" -c 'import ensurepip, venv' 2>/dev/null || need_apt python3-venv
    "$python" -m venv --clear "$ROOT/.venv-tools"
    "$ROOT/.venv-tools/bin/python" -m pip install -q --disable-pip-version-check 'uv>=0.9,<1' ||
        die "could not install uv from PyPI (is the network up?)"
}

# stdin -> short hash
hash_of() { sha256sum | cut -c1-16; }

# Makes .venv-dev, or brings it up to date: what tests and checks the repository's Python. As in test-python.sh.
dev_venv() {
    local venv=$ROOT/.venv-dev
    if [ ! -x "$venv/bin/python" ]; then
        "$(base_python)" -m venv "$venv"
    fi
    if ! cmp -s "$ROOT/requirements-dev.txt" "$venv/requirements-dev.installed"; then
        find_uv
        "$UV" pip install --quiet --python "$venv/bin/python" -r "$ROOT/requirements-dev.txt"
        cp "$ROOT/requirements-dev.txt" "$venv/requirements-dev.installed"
    fi
}

# Sets and exports ROUNDHOUSE_BIN: as it is given, else what cargo built under the profile $1 (debug, release).
need_binary() {
    export ROUNDHOUSE_BIN=${ROUNDHOUSE_BIN:-$ROOT/target/$1/roundhouse}
    ROUNDHOUSE_BIN=$(realpath -m "$ROUNDHOUSE_BIN")
    [ -x "$ROUNDHOUSE_BIN" ] ||
        die "no $ROUNDHOUSE_BIN: run cargo build$([ "$1" = debug ] || echo " --$1") first, or set ROUNDHOUSE_BIN"
}
