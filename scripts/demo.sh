#!/usr/bin/env bash
# Shows Roundhouse at work on this machine: builds it, installs the engines, starts the server, and sends it a mixed
# burst of text, image and music jobs for one device.
#
#   scripts/demo.sh            the small models on the CPU; where a GPU is found, asks first
#
# --small     the small models, without asking
# --real      the models of models.yaml, on the GPU; prints sizes, times and licences first
# --keep      leave the server up afterwards, until Ctrl-C
# --port N    first port to try for the server (9000; the next free one is taken)
#
# The small models: SmolLM2-135M with its real weights, Flux and MusicGen with RANDOM weights, so images and sounds are
# noise. Everything else is the real thing: vLLM, diffusers, transformers, and the scheduler.
# Images and sounds go to ./demo-output. The first run downloads about 2 GB of packages and takes minutes; the next ones
# take about as long as loading three models.
set -euo pipefail
source "$(dirname "$0")/lib/common.sh"
source "$(dirname "$0")/lib/lanes.sh"
cd "$ROOT"
# Where models.demo.yaml looks for them.
export ROUNDHOUSE_CHECKPOINTS=$ROOT/.cache/checkpoints

which='' keep=0 port=9000
while [ $# -gt 0 ]; do
    case $1 in
    --small) which=small ;;
    --real) which=real ;;
    --keep) keep=1 ;;
    --port)
        [[ ${2:-} =~ ^[0-9]+$ ]] || die "--port needs a number"
        port=$2
        shift
        ;;
    -h | --help)
        sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p;}' "$0"
        exit 0
        ;;
    *) die "unknown argument $1 (see --help)" ;;
    esac
    shift
done

describe_real() {
    cat >&2 <<TEXT

An NVIDIA GPU answers here. The models of models.yaml would be:

    model                           download   GPU memory    licence of the weights
    Qwen3-4B-Instruct-2507  text        8 GB   up to 20 GB   Apache-2.0
    FLUX.2-klein-4B         images     16 GB   16 GB         Apache-2.0
    MusicGen medium         music       8 GB   5 GB          CC-BY-NC 4.0: NOT for commercial use
    Python packages                    ~5 GB                 11 GB on disk

About 37 GB to download (32 GB of weights, 5 GB of packages): 5 minutes at 1 Gbit/s, 50 at 100 Mbit/s. Each model then
takes 30 s to 3 minutes to load. They take turns on the card; one of 24 GB will do.

TEXT
}

if [ -z "$which" ]; then
    which=small
    if has_nvidia; then
        describe_real
        if [ -t 0 ] && [ -t 2 ]; then
            read -r -p "Use them? [y/N: the small models on the CPU] " answer </dev/tty || answer=
            [[ $answer == [yY]* ]] && which=real
        else
            say "No terminal to ask on, so the small models on the CPU; --real takes these."
        fi
    fi
elif [ "$which" = real ]; then
    has_nvidia || die "--real: nvidia-smi does not answer, so there is no usable NVIDIA driver here"
    describe_real
fi

# --- build and install, side by side -----------------------------------------------------------------------------------

need_rust
LANE_LOGS=$ROOT/.cache/demo/logs
config=models.demo.yaml
[ "$which" = small ] || config=models.yaml

engines() {
    if [ "$which" = small ]; then
        scripts/install.sh --cpu vllm flux musicgen
        scripts/make-checkpoints.sh
    else
        scripts/install.sh --gpu vllm flux musicgen
        scripts/download-models.sh
    fi
}

server='' client='' data=''
finish() {
    local status=$?
    trap - EXIT HUP INT TERM
    set +e
    end_lanes
    [ -z "$client" ] || kill -TERM "$client" 2>/dev/null || true
    if [ -n "$server" ]; then
        kill -TERM "$server" 2>/dev/null || true
        for _ in $(seq 400); do
            kill -0 "$server" 2>/dev/null || break
            sleep 0.1
        done
        kill -KILL "$server" 2>/dev/null && say "the server did not stop within 40 s and was killed"
        wait "$server" 2>/dev/null || true
        if left=$(still_running); then
            say "error: still running after the server has stopped: $left"
            status=1
        else
            say "Stopped; no process is left."
        fi
    fi
    if [ -n "$data" ]; then
        if [ $status != 0 ]; then
            cp "$data"/server.log "$data"/log/*.log "$LANE_LOGS/" 2>/dev/null
            say "The logs of the server and its workers: ${LANE_LOGS#"$ROOT"/}/"
        fi
        rm -rf "$data"
    fi
    exit $status
}

# Processes that carry the mark of this demo in their environment: the server and all that it started. (Its own marks,
# ROUNDHOUSE_*, are not handed on to workers as they are; any other name is.)
still_running() {
    local file pids=''
    for file in /proc/[0-9]*/environ; do
        if { tr '\0' '\n' <"$file"; } 2>/dev/null | grep -qx "DEMO_MARK=$mark"; then
            pids+=" ${file//[!0-9]/}"
        fi
    done
    [ -n "$pids" ] && echo "$pids"
}

trap finish EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

step "building, and installing the engines (the first time takes minutes)"
lane build cargo build --release --locked
lane engines engines
watch_lanes build engines || die "the demo needs both; see above"

# --- serve -------------------------------------------------------------------------------------------------------------

port_is_taken() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
first=$port
while port_is_taken "$port"; do
    port=$((port + 1))
    [ "$port" -lt $((first + 100)) ] || die "no free port from $first to $port"
done
[ "$port" = "$first" ] || say "port $first is taken; using $port"

mkdir -p .cache/demo
data=$(mktemp -d "$ROOT/.cache/demo/data.XXXXXX")
mark=$$-$RANDOM$RANDOM
DEMO_MARK=$mark target/release/roundhouse serve --config "$config" --data-dir "$data" --listen "127.0.0.1:$port" \
    >"$data/server.out" 2>"$data/server.log" </dev/null &
server=$!
for _ in $(seq 300); do
    [ -s "$data/server.out" ] && break
    kill -0 "$server" 2>/dev/null || { tail -n 20 "$data/server.log" >&2; die "the server did not start"; }
    sleep 0.1
done
[ -s "$data/server.out" ] || die "the server says nothing after 30 s"
step "$(head -n1 "$data/server.out")"

# --- the jobs ----------------------------------------------------------------------------------------------------------

talk=("$(base_python)" scripts/demo_client.py "http://127.0.0.1:$port" --out demo-output "--$which")
[ $keep = 0 ] || talk+=(--stays-up)
# In the background, so that a signal reaches this script at once.
"${talk[@]}" &
client=$!
status=0
wait "$client" || status=$?
client=''
[ $status = 0 ] || exit $status
if [ $keep = 1 ]; then
    say "The server stays up on http://127.0.0.1:$port until Ctrl-C."
    wait "$server" || true
fi
