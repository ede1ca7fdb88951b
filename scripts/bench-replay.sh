#!/usr/bin/env bash
# Plays traces live, on a real server with echo workers and a clock that goes faster, and compares the swaps with those of
# the simulation: prints trace, factor, simulated and live swaps, the difference and whether it is within 10 %. Exits with 1
# if one is beyond. `retimed` is a simulation in which loading takes as long as it did live. Takes as long as the traces divided by the factor: 4 minutes for the three of the default.
#
#   scripts/bench-replay.sh                           c, d and a small one of tests/traces, at factor 50
#   scripts/bench-replay.sh [--factor N] [TRACE...]   these
#
# What the system takes for starting and ending a process is in real time, and looks N times as long. On a busy machine that is
# more than the traces allow for; the two load averages at the end tell.
#
# Builds nothing: plays with target/release/roundhouse, else target/debug/roundhouse, or the binary ROUNDHOUSE_BIN names. The
# echo workers' Python is that of models/echo/.venv, else .venv-dev, or ROUNDHOUSE_REPLAY_PYTHON.
set -euo pipefail
source "$(dirname "$0")/lib/common.sh"

factor=50
traces=()
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help)
        sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p;}' "$0"
        exit 0
        ;;
    --factor)
        factor=${2:?--factor needs a number}
        shift
        ;;
    -*) die "unknown option $1; see --help" ;;
    *) traces+=("$1") ;;
    esac
    shift
done
[ ${#traces[@]} -gt 0 ] || traces=("$ROOT"/tests/traces/{c-alternate-21,d-bursty-21,small-200}.csv)
profile=release
[ -x "$ROOT/target/release/roundhouse" ] || [ ! -x "$ROOT/target/debug/roundhouse" ] || profile=debug
need_binary $profile
python=${ROUNDHOUSE_REPLAY_PYTHON:-$ROOT/models/echo/.venv/bin/python}
if [ ! -x "$python" ] && [ -z "${ROUNDHOUSE_REPLAY_PYTHON:-}" ]; then
    dev_venv
    python=$ROOT/.venv-dev/bin/python
fi

printf '%-20s %7s %10s %8s %6s %11s  %s\n' trace factor simulated retimed live difference ok
missed=0
for trace in "${traces[@]}"; do
    rows=$("$ROUNDHOUSE_BIN" replay --csv --factor "$factor" --echo "$ROOT/models/echo" --python "$python" "$trace")
    awk -F, -v factor="$factor" '
        NR == 1 { for (i = 1; i <= NF; i++) at[$i] = i; next }
        { swaps[$at["policy"]] = $at["swaps"]; trace = $at["trace"] }
        END {
            if (!("simulated" in swaps && "live" in swaps)) exit 2
            by = swaps["live"] - swaps["simulated"]
            is_ok = (by < 0 ? -by : by) <= 0.1 * swaps["simulated"]
            percent = swaps["simulated"] ? 100 * by / swaps["simulated"] : 0
            printf "%-20s %7s %10d %8d %6d %+10.1f%%  %s\n", trace, factor,
                swaps["simulated"], swaps["retimed"], swaps["live"], percent, is_ok ? "yes" : "NO"
            exit !is_ok
        }' <<<"$rows" || missed=$((missed + 1))
done
printf 'load averages of 1 and 5 minutes: %s\n' "$(cut -d' ' -f1,2 </proc/loadavg)"
[ "$missed" -eq 0 ] || die "$missed of ${#traces[@]} traces beyond 10 %"
