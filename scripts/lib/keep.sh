#!/usr/bin/env bash
# Keeps a program alive; start-all.sh starts this in a session of its own, with stdout and stderr in the log.
#
#   keep.sh DATA PROGRAM ARGUMENTS...
#
# SIGTERM: passes it on, waits for the program, starts it no more. Settings, for tests: ROUNDHOUSE_RESTART_FIRST_MS (1000),
# ROUNDHOUSE_RESTART_MAX_MS (30000), ROUNDHOUSE_RESTART_RESET_S (60), ROUNDHOUSE_LOG_BYTES_MAX (20 MB),
# ROUNDHOUSE_LOG_CHECK_S (5).
set -u
source "$(dirname "$0")/common.sh"
source "$(dirname "$0")/keeper.sh"

data=$1
shift
log=$data/log/roundhouse.log
first_ms=${ROUNDHOUSE_RESTART_FIRST_MS:-1000}
max_ms=${ROUNDHOUSE_RESTART_MAX_MS:-30000}
reset_s=${ROUNDHOUSE_RESTART_RESET_S:-60}
log_bytes_max=${ROUNDHOUSE_LOG_BYTES_MAX:-20000000}
log_check_s=${ROUNDHOUSE_LOG_CHECK_S:-5}

# The kernel drops the lock with this process, so there is never a second keeper.
exec 9>"$data/keeper.lock"
flock -n 9 || exit 0
write_pid "$data/keeper.pid" $$

child='' sleeper='' stopping=0 told=0
# A second SIGTERM would end the program at once, so it is told only once.
pass_on() {
    [ "$stopping" = 1 ] || return 0
    if [ -n "$child" ] && [ "$told" = 0 ]; then
        told=1
        kill -TERM "$child" 2>/dev/null
    fi
    [ -z "$sleeper" ] || kill "$sleeper" 2>/dev/null
}
stop() {
    stopping=1
    pass_on
}
trap stop TERM INT
trap '' HUP

# The program appends to the file itself, so it does not depend on a pipe to this process; the old half is copied away.
# Goes on for a program that outlives this process.
rotate() {
    trap - TERM INT
    while sleep "$log_check_s"; do
        pid_in "$data/keeper.pid" >/dev/null || pid_in "$data/serve.pid" >/dev/null || return
        [ "$(stat -c %s "$log" 2>/dev/null || echo 0)" -gt "$log_bytes_max" ] || continue
        # Only the end of a log that grew far beyond its cap between two looks.
        tail -c "$log_bytes_max" "$log" >"$log.1.new" && mv "$log.1.new" "$log.1" && : >"$log"
        chmod 600 "$log.1"
    done
}
rotate 9>&- &
rotator=$!

delay_ms=$first_ms
# A data folder that was removed, or that another keeper has taken over, is nothing to start a server on.
is_mine() { [ "$(pid_in "$data/keeper.pid")" = $$ ]; }

while [ "$stopping" = 0 ] && is_mine; do
    began_at=$SECONDS
    "$@" </dev/null >>"$log" 2>&1 9>&- &
    child=$!
    write_pid "$data/serve.pid" "$child"
    # In case the signal came between the start and the line after it.
    pass_on
    # A signal ends `wait` before the program has ended.
    while :; do
        wait "$child"
        status=$?
        kill -0 "$child" 2>/dev/null || break
    done
    child=''
    ! is_mine || rm -f "$data/serve.pid"
    [ "$stopping" = 0 ] && is_mine || break
    [ $((SECONDS - began_at)) -lt "$reset_s" ] || delay_ms=$first_ms
    seconds=$(printf '%d.%03d' $((delay_ms / 1000)) $((delay_ms % 1000)))
    echo "keeper: serve ended with status $status after $((SECONDS - began_at)) s; next start in $seconds s" >>"$log"
    sleep "$seconds" 9>&- &
    sleeper=$!
    pass_on
    wait "$sleeper"
    sleeper=''
    delay_ms=$((delay_ms * 2 < max_ms ? delay_ms * 2 : max_ms))
done
kill "$rotator" 2>/dev/null
# The rotator's own `sleep` would outlive it by some seconds.
for line in $(descendants $$ | cut -d ' ' -f 1); do kill "$line" 2>/dev/null; done
! is_mine || rm -f "$data/keeper.pid"
