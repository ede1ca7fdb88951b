#!/usr/bin/env bash
# Starts `roundhouse serve` in the background and keeps it alive, for machines without an init system.
#
#   scripts/start-all.sh                         with models.yaml, data in data/, on 127.0.0.1:9000
#   scripts/start-all.sh --listen 0.0.0.0:9000   all flags go to `roundhouse serve` (see its --help)
#   scripts/stop-all.sh                          ends it, its workers and what keeps it alive
#
# When serve ends for whatever reason it is started again: after 1 s, doubling to 30 s, and 1 s again once it was up for
# 60 s. A first start that fails is not repeated but told. Output goes to DATA/log/roundhouse.log, rotated at 20 MB to
# roundhouse.log.1. Running it again while all is well only says so. If the server makes an API key at this start, it is
# shown here, once, and is in no log; it stays in DATA/api_key.
#
# ROUNDHOUSE_BIN: the program (default: target/release/roundhouse, built if it is missing).
# ROUNDHOUSE_CONFIG, ROUNDHOUSE_DATA_DIR, ROUNDHOUSE_LISTEN: as in `roundhouse serve --help`.
# ROUNDHOUSE_START_WAIT_S: how long to wait for the server to accept requests (60).
set -euo pipefail
source "$(dirname "$0")/lib/common.sh"
source "$ROOT/scripts/lib/keeper.sh"

case ${1:-} in
-h | --help)
    sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p;}' "$0"
    exit 0
    ;;
esac

export ROUNDHOUSE_CONFIG=${ROUNDHOUSE_CONFIG:-$ROOT/models.yaml}
ROUNDHOUSE_DATA_DIR=$(data_dir_of "$@")
export ROUNDHOUSE_DATA_DIR
data=$ROUNDHOUSE_DATA_DIR
log=$data/log/roundhouse.log
wait_s=${ROUNDHOUSE_START_WAIT_S:-60}

binary=${ROUNDHOUSE_BIN:-$ROOT/target/release/roundhouse}
if [ ! -x "$binary" ]; then
    [ -z "${ROUNDHOUSE_BIN:-}" ] || die "ROUNDHOUSE_BIN: there is no program $binary"
    command -v cargo >/dev/null 2>&1 || die "no $binary, and no cargo to build it; install Rust (https://rustup.rs)"
    step "building the server (some minutes the first time)"
    (cd "$ROOT" && cargo build --release --bin roundhouse) || die "building the server failed; the lines above say why"
fi

mkdir -p "$data/log" || die "cannot write to $data; name another folder with --data-dir or ROUNDHOUSE_DATA_DIR"
# Two starts at the same time must not both start it.
exec 8>"$data/start.lock"
flock -w "$wait_s" 8 || die "another start of $data is under way"

address_of() { sed -n 's/^roundhouse listening on \(http:[^ ]*\).*/\1/p' | tail -n1; }

if keeper=$(pid_in "$data/keeper.pid"); then
    address=$({ cat "$log.1" "$log" 2>/dev/null || true; } | address_of)
    echo "Already running (keeper $keeper)${address:+: $address}. Flags and models.yaml are read at a new start: first stop it with scripts/stop-all.sh$(data_flag "$data")"
    exit 0
fi
if serve=$(pid_in "$data/serve.pid"); then
    die "roundhouse serve ($serve) runs on $data, but nothing keeps it alive; run scripts/stop-all.sh$(data_flag "$data") first"
fi

had_key=0
[ ! -e "$data/api_key" ] || had_key=1
touch "$log"
chmod 600 "$log"
offset=$(stat -c %s "$log")
# A session of its own: closing the terminal or ending this shell's group does not reach it.
setsid nohup "$BASH" "$ROOT/scripts/lib/keep.sh" "$data" "$binary" serve "$@" </dev/null >>"$log" 2>&1 8>&- &
disown

fresh_log() { tail -c +"$((offset + 1))" "$log"; }
deadline=$((SECONDS + wait_s))
while :; do
    address=$(fresh_log | address_of)
    [ -z "$address" ] || break
    if fresh_log | grep '^keeper: serve ended' >/dev/null; then
        "$ROOT/scripts/stop-all.sh" --data-dir "$data" >/dev/null 2>&1 || true
        fresh_log | grep -v '^keeper:' | tail -n 40 >&2 || true
        die "the server does not start; the lines above say why (all of it: $log)"
    fi
    if [ "$SECONDS" -ge "$deadline" ]; then
        say "The server does not accept requests after $wait_s s; it goes on trying. Log: $log"
        exit 1
    fi
    sleep 0.1
done

echo "Roundhouse accepts requests on $address"
if [ -f "$data/api_key" ]; then
    # To the person who started it, and never to the log.
    [ "$had_key" = 1 ] || echo "  API key  $(cat "$data/api_key") (new; shown this once)"
    echo "  key in   $data/api_key"
fi
echo "  log      $log"
echo "  look     curl $address/health"
echo "  stop     scripts/stop-all.sh$(data_flag "$data")"
