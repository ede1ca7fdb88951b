# Work in the background with its output in a log and one line of progress: sourced, never run. Needs common.sh.
# shellcheck shell=bash
#
#   LANE_LOGS=some/folder
#   lane build cargo build --release      starts it
#   watch_lanes build other               waits, shows what each does, fails if one failed (after the end of its log)
#   end_lanes                             ends what still runs

declare -A LANE_PID=() LANE_BEGAN=() LANE_TOOK=()
HEARTBEAT_S=${HEARTBEAT_S:-20}

# A process group of its own, so that all of it can be ended.
lane() {
    local name=$1
    shift
    mkdir -p "$LANE_LOGS"
    rm -f "$LANE_LOGS/$name.end"
    set -m
    (
        trap 'echo $SECONDS >"$LANE_LOGS/$name.end"' EXIT
        export TERM=dumb
        "$@"
    ) >"$LANE_LOGS/$name.log" 2>&1 </dev/null &
    LANE_PID[$name]=$!
    set +m
    LANE_BEGAN[$name]=$SECONDS
}

lane_runs() { [ -n "${LANE_PID[$1]:-}" ] && kill -0 "${LANE_PID[$1]}" 2>/dev/null; }

# Seconds it has run, or ran.
lane_seconds() { echo "${LANE_TOOK[$1]:-$((SECONDS - LANE_BEGAN[$1]))}"; }

# The last line that says something, without colours and carriage returns.
lane_line() {
    tail -c 2000 "$LANE_LOGS/$1.log" 2>/dev/null | tr '\r' '\n' | sed 's/\x1b\[[0-9;]*[A-Za-z]//g; s/^ *//' |
        grep -v '^[[:space:]]*$' | tail -n1 | cut -c1-"$2"
}

# Its exit status; its process is gone afterwards.
lane_status() {
    local status=0
    if [ -n "${LANE_PID[$1]:-}" ]; then
        wait "${LANE_PID[$1]}" 2>/dev/null || status=$?
        unset "LANE_PID[$1]"
    fi
    return $status
}

watch_lanes() {
    local name width=100 live=0 drawn=0 failed=0 beat=$SECONDS running
    [ -t 2 ] && [ "${TERM:-dumb}" != dumb ] && live=1 && width=$(($(tput cols 2>/dev/null || echo 100) - 20))
    while :; do
        running=()
        for name in "$@"; do
            if lane_runs "$name"; then
                running+=("$name")
            elif [ -z "${LANE_TOOK[$name]:-}" ]; then
                # When it ended, which may be long before it was asked about.
                LANE_TOOK[$name]=$(($(cat "$LANE_LOGS/$name.end" 2>/dev/null || echo $SECONDS) - LANE_BEGAN[$name]))
                [ $drawn = 0 ] || printf '\033[%dA\033[J' "$drawn" >&2
                drawn=0
                if lane_status "$name"; then
                    step "$name: done in ${LANE_TOOK[$name]} s"
                else
                    failed=1
                    step "$name: FAILED after ${LANE_TOOK[$name]} s; the end of ${LANE_LOGS#"$ROOT"/}/$name.log:"
                    tail -n 40 "$LANE_LOGS/$name.log" | sed 's/^/    /' >&2
                fi
            fi
        done
        [ ${#running[@]} -gt 0 ] || break
        if [ $live = 1 ]; then
            [ $drawn = 0 ] || printf '\033[%dA\033[J' "$drawn" >&2
            for name in "${running[@]}"; do
                printf '%4ss %-8s %s\n' "$(lane_seconds "$name")" "$name" "$(lane_line "$name" "$width")" >&2
            done
            drawn=${#running[@]}
        elif [ $((SECONDS - beat)) -ge "$HEARTBEAT_S" ]; then
            beat=$SECONDS
            for name in "${running[@]}"; do step "$name: $(lane_line "$name" "$width")"; done
        fi
        sleep 0.5
    done
    return $failed
}

end_lanes() {
    local name
    for name in "${!LANE_PID[@]}"; do
        kill -TERM -- "-${LANE_PID[$name]}" 2>/dev/null || true
    done
    for name in "${!LANE_PID[@]}"; do lane_status "$name" || true; done
}
