#!/usr/bin/env bash
# Ends what start-all.sh started: the server, its workers, and what keeps it alive.
#
#   scripts/stop-all.sh                   running jobs may finish (server.shutdown_grace, 30 s)
#   scripts/stop-all.sh --now             they are put back into the queue at once
#   scripts/stop-all.sh --data-dir DIR    of a server with another data folder
#
# What has not ended after ROUNDHOUSE_STOP_WAIT_S (60) is killed. Nothing that was accepted is lost. Running it when
# nothing runs does no harm.
set -euo pipefail
source "$(dirname "$0")/lib/common.sh"
source "$ROOT/scripts/lib/keeper.sh"

now=0 flags=()
while [ $# -gt 0 ]; do
    case $1 in
    --now) now=1 ;;
    --data-dir)
        [ $# -ge 2 ] || die "--data-dir needs a folder"
        flags=("$1" "$2")
        shift
        ;;
    --data-dir=*) flags=("$1") ;;
    -h | --help)
        sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p;}' "$0"
        exit 0
        ;;
    *) die "unknown argument $1 (see --help)" ;;
    esac
    shift
done
data=$(data_dir_of "${flags[@]+"${flags[@]}"}")
wait_s=${ROUNDHOUSE_STOP_WAIT_S:-60}
# Guards give workers 10 s between SIGTERM and SIGKILL.
leftover_wait_s=${ROUNDHOUSE_LEFTOVER_WAIT_S:-15}

keeper=$(pid_in "$data/keeper.pid") || keeper=''
serve=$(pid_in "$data/serve.pid") || serve=''
if [ -z "$keeper$serve" ]; then
    echo "Nothing runs on $data."
    exit 0
fi
keeper_began='' serve_began='' family=''
if [ -n "$keeper" ]; then
    keeper_began=$(began "$keeper")
    family=$(descendants "$keeper")
fi
if [ -n "$serve" ]; then
    serve_began=$(began "$serve")
    family+=$'\n'$(descendants "$serve")
fi

all_gone() { ! runs "$keeper" "$keeper_began" && ! runs "$serve" "$serve_began"; }

# True once the command succeeds, false after $1 seconds.
within() {
    local deadline=$((SECONDS + $1))
    shift
    until "$@"; do
        [ "$SECONDS" -lt "$deadline" ] || return 1
        sleep 0.1
    done
}

signal() { kill "-$1" "$2" 2>/dev/null || true; }

fate="running jobs may finish"
[ "$now" = 0 ] || fate="running jobs go back into the queue"
say "Stopping${serve:+ roundhouse serve ($serve)}; $fate."
# The keeper passes it on; without a keeper the server gets it from here.
if [ -n "$keeper" ]; then signal TERM "$keeper"; elif [ -n "$serve" ]; then signal TERM "$serve"; fi
if [ "$now" = 1 ] && [ -n "$serve" ]; then
    sleep 0.3
    # A second signal means: at once.
    ! runs "$serve" "$serve_began" || signal TERM "$serve"
fi
if ! within "$wait_s" all_gone; then
    say "Still running after $wait_s s: killing it."
    # A server that was started meanwhile, or workers that were.
    current=$(pid_in "$data/serve.pid") || current=''
    [ -z "$serve" ] || family+=$'\n'$(descendants "$serve")
    [ -z "$keeper" ] || ! runs "$keeper" "$keeper_began" || signal KILL "$keeper"
    for pid in $serve $current; do signal KILL "$pid"; done
    within 5 all_gone || die "cannot kill $keeper $serve"
fi

family_gone() {
    local pid began_at
    while read -r pid began_at; do
        [ -z "$pid" ] || ! runs "$pid" "$began_at" || return 1
    done <<<"$family"
}

if ! within "$leftover_wait_s" family_gone; then
    say "Some of its processes are left: killing them."
    while read -r pid began_at; do
        [ -z "$pid" ] || ! runs "$pid" "$began_at" || signal KILL "$pid"
    done <<<"$family"
    within 5 family_gone || die "cannot kill all of: $(cut -d ' ' -f 1 <<<"$family" | tr '\n' ' ')"
fi
rm -f "$data/keeper.pid" "$data/serve.pid"
echo "Stopped. Start it again with scripts/start-all.sh$(data_flag "$data")"
