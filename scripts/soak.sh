#!/usr/bin/env bash
# The long forms of the tests that look for lost jobs: hours of kills, power cuts and simulated runs. The short forms run
# with scripts/test.sh.
#
#   scripts/soak.sh                  everything: 1000 kills, 1000 random power cuts, 10 000 simulated runs, disk errors
#   scripts/soak.sh kills sim        only these: kills, power, disk, sim
#
#   --kills N      kills of the server (1000)
#   --cuts N       random power cuts, beside those at every sync (1000)
#   --seeds N      simulated runs of the scheduler's core (10000)
#
# Stops at the first failure and says how to have it again.
set -euo pipefail
source "$(dirname "$0")/lib/common.sh"
cd "$ROOT"

kills=1000 cuts=1000 seeds=10000 parts=()
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help)
        sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p;}' "$0"
        exit 0
        ;;
    --kills | --cuts | --seeds)
        [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || die "$1 needs a number above 0 (see --help)"
        declare "${1#--}=$2"
        shift
        ;;
    kills | power | disk | sim) parts+=("$1") ;;
    *) die "unknown argument $1 (see --help)" ;;
    esac
    shift
done
[ ${#parts[@]} -gt 0 ] || parts=(sim power disk kills)

need_rust
if [[ " ${parts[*]} " == *" kills "* || " ${parts[*]} " == *" disk "* ]]; then
    [ -x .venv-dev/bin/python ] || [ -n "${ROUNDHOUSE_TEST_PYTHON:-}" ] ||
        die "the workers of these tests need an environment: run scripts/test.sh python once (or set ROUNDHOUSE_TEST_PYTHON)"
fi

# part NAME COMMAND...: runs it with its output, and says how to run it again if it fails.
part() {
    local name=$1 begun=$SECONDS
    shift
    step "$name"
    if ! "$@"; then
        printf '\n%s failed after %s s. A line with a seed stands above; have it again with\n' "$name" $((SECONDS - begun)) >&2
        printf '    ROUNDHOUSE_TEST_SEED=SEED (ROUNDHOUSE_SIM_SEED=SEED for sim)' >&2
        printf ' %q' "$@" >&2
        printf '\n' >&2
        exit 1
    fi
    done_parts+=("$name: $((SECONDS - begun)) s")
}

done_parts=()
faults=(cargo test --release --locked --test faults)
for name in "${parts[@]}"; do
    case $name in
    sim) part "sim: $seeds simulated runs" env ROUNDHOUSE_SIM_SEEDS="$seeds" cargo test --release --locked --lib sim -- --nocapture ;;
    power) part "power: $cuts random power cuts" env ROUNDHOUSE_POWER_CUTS="$cuts" "${faults[@]}" power_cut -- --nocapture ;;
    disk) part "disk: errors, full disks, damage, locks, clients that leave" \
        env ROUNDHOUSE_SOAK=1 ROUNDHOUSE_STOP_CYCLES=100 "${faults[@]}" -- --nocapture --skip power_cut --skip kills ;;
    kills) part "kills: $kills kills of the server" env ROUNDHOUSE_KILL_CYCLES="$kills" "${faults[@]}" kills -- --nocapture ;;
    esac
done
printf '\nAll passed:\n'
printf '  %s\n' "${done_parts[@]}"
