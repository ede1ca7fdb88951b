#!/usr/bin/env bash
# Measures the store, the server over it, and other queues beside them, on this machine's disk, in one run: prints a table of
# targets and what was got. docs/BENCHMARKS.md says what each line means.
#
#   scripts/bench-store.sh               everything: about 6 minutes, once all is built
#   scripts/bench-store.sh --quick       under 2 minutes: shorter measurements, at most 10 000 waiting jobs
#   scripts/bench-store.sh --profile life    runs one case under perf and shows where its time goes
#
#   --out FILE           writes the text to FILE as well
#   --dir DIR            where the databases lie while measuring (target/bench-store); it must be on a disk
#   --pending A,B,...    how many jobs wait before a measurement (0,10000,100000,1000000)
#   --models N           how many models the jobs are for, by turns (20)
#   --only A,B,...       only these parts: disk, bare, store, http, restart, peers
#   --patience S         waits up to S seconds before each part until other processes are quiet (0)
#   --no-peers           does not build and measure the other queues
#   --no-profile         does not profile the cases of missed targets
#
# Builds what is missing, which takes minutes the first time. Other queues: effectum and apalis-sqlite (benches/peers, built
# here and nowhere else), huey (installed into .venv-bench). A machine that does other things meanwhile spoils the figures;
# each part says how much others took of the processors.
set -euo pipefail
source "$(dirname "$0")/lib/common.sh"
cd "$ROOT"

HUEY=3.5.4

out='' dir=$ROOT/target/bench-store only='' peers=1 pass=()
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help)
        sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p;}' "$0"
        exit 0
        ;;
    --quick | --no-profile) pass+=("$1") ;;
    --no-peers) peers=0 ;;
    --out | --dir | --pending | --models | --patience | --only | --profile)
        [ $# -ge 2 ] || die "$1 needs a value (see --help)"
        case $1 in
        --out) out=$(realpath -m "$2") ;;
        --dir) dir=$(realpath -m "$2") ;;
        --only)
            only=$2
            pass+=("$1" "$2")
            ;;
        --profile)
            peers=0
            pass+=("$1" "$2")
            ;;
        *) pass+=("$1" "$2") ;;
        esac
        shift
        ;;
    *) die "unknown argument $1 (see --help)" ;;
    esac
    shift
done
[ -z "$only" ] || [[ ",$only," == *,peers,* ]] || peers=0

[ "$(uname -s)" = Linux ] || die "this benchmark reads /proc and needs Linux"
need_rust
mkdir -p "$dir" || die "cannot make $dir"
[ "$(free_bytes "$dir")" -ge 8000000000 ] || die "$dir has $(human "$(free_bytes "$dir")") free; the benchmark needs 8 GB there"
if [ -n "$out" ]; then
    mkdir -p "$(dirname "$out")"
    : >"$out" || die "cannot write $out"
fi

# Builds the benchmark and the server with it, and prints where the benchmark's program is.
build_bench() {
    step "building the benchmark and the server (release)"
    cargo bench --locked --bench store --no-run || die "the benchmark does not build"
    cargo bench --locked --bench store --no-run --message-format=json 2>/dev/null |
        grep -o '"executable":"[^"]*/store-[^"]*"' | cut -d'"' -f4 | tail -n1
}

build_peer() {
    step "building the peer $1"
    cargo build --locked --release --manifest-path "benches/peers/$1/Cargo.toml" ||
        die "the peer $1 does not build (is the network up?); --no-peers measures without"
    pass+=("--$1" "$ROOT/benches/peers/$1/target/release/peer-$1")
}

install_huey() {
    local venv=$ROOT/.venv-bench
    if ! "$venv/bin/python" -c "from importlib.metadata import version; assert version('huey') == '$HUEY'" 2>/dev/null; then
        step "installing huey $HUEY into .venv-bench"
        need_venv
        find_uv
        "$(base_python)" -m venv --clear "$venv"
        "$UV" pip install --quiet --python "$venv/bin/python" "huey==$HUEY" ||
            die "could not install huey from PyPI (is the network up?); --no-peers measures without"
    fi
    pass+=(--huey-python "$venv/bin/python")
}

program=$(build_bench)
[ -x "$program" ] || die "cargo did not say where the benchmark's program is"
if [ $peers = 1 ]; then
    # Cargo takes another target folder from the environment; then the paths below would be wrong.
    unset CARGO_TARGET_DIR
    build_peer effectum
    build_peer apalis
    install_huey
fi

step "measuring in $dir"
status=0
"$program" --dir "$dir" "${pass[@]}" | tee ${out:+"$out"} || status=$?
[ $status = 0 ] || die "the benchmark ended early"
[ -z "$out" ] || step "written to $out"
