#!/usr/bin/env bash
# The long forms of the fault tests: hours, not minutes. Stops at the first failure and says how to have it again.
#
#   scripts/soak.sh                    everything, once
#   scripts/soak.sh kills power-cut    only these
#   scripts/soak.sh --rounds 10 kills  ten times over
#   scripts/soak.sh --list             their names
#
# How much: ROUNDHOUSE_KILL_CYCLES (1000), ROUNDHOUSE_STOP_CYCLES (100), ROUNDHOUSE_VANISHING_CLIENTS (5000),
# ROUNDHOUSE_SIM_SEEDS (10000). ROUNDHOUSE_TEST_SEED sets the seed of all but the simulation. Logs: target/soak/.
set -euo pipefail
source "$(dirname "$0")/lib/common.sh"
cd "$ROOT"

export ROUNDHOUSE_SOAK=1
export ROUNDHOUSE_KILL_CYCLES=${ROUNDHOUSE_KILL_CYCLES:-1000}
export ROUNDHOUSE_STOP_CYCLES=${ROUNDHOUSE_STOP_CYCLES:-100}
export ROUNDHOUSE_VANISHING_CLIENTS=${ROUNDHOUSE_VANISHING_CLIENTS:-5000}
export ROUNDHOUSE_SIM_SEEDS=${ROUNDHOUSE_SIM_SEEDS:-10000}

# name | what | arguments of cargo test
PARTS=(
    "kills|the server is killed $ROUNDHOUSE_KILL_CYCLES times under load|--test faults kills::"
    "power-cut|the power is cut: each sync, and 1000 torn states of the disk|--test faults power_cut::"
    "disk-errors|a disk that fails, at 40 random moments of each kind|--test faults disk_errors::"
    "disk-full|a disk that is full|--test faults disk_full::"
    "damage|damaged files|--test faults damage::"
    "strangers|other programs on the database's file|--test faults strangers::"
    "stops|stops under load, clients that vanish|--test faults stops::"
    "simulation|the scheduler's core, seeds 1 to $ROUNDHOUSE_SIM_SEEDS|--lib sim"
)

rounds=1 chosen=()
while [ $# -gt 0 ]; do
    case $1 in
    --list)
        printf '%s\n' "${PARTS[@]}" | awk -F'|' '{ printf "%-12s %s\n", $1, $2 }'
        exit 0
        ;;
    -h | --help)
        sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p;}' "$0"
        exit 0
        ;;
    --rounds)
        [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || die "--rounds: a number from 1 on, not \`${2:-}\`"
        rounds=$2
        shift
        ;;
    *)
        printf '%s\n' "${PARTS[@]}" | grep -q "^$1|" || die "no part $1 (see --list)"
        chosen+=("$1")
        ;;
    esac
    shift
done

need_rust
logs=$ROOT/target/soak
rm -rf "$logs"
mkdir -p "$logs"
step "building"
cargo test --locked --no-run --lib --test faults >"$logs/build.log" 2>&1 || die "the build failed: $logs/build.log"

done_parts=()
summary() {
    say
    step "summary"
    [ ${#done_parts[@]} -eq 0 ] || printf '    %s\n' "${done_parts[@]}" >&2
}

# What a test says about itself: its seed, and how much it did. Both go to the screen and into the summary.
told() { grep -E '^(power cut|kills|stops|vanishing clients|disk errors|damage|damaged log|sim[a-z]*): ' "$1" | sort -u || true; }

for ((round = 1; round <= rounds; round++)); do
    for line in "${PARTS[@]}"; do
        IFS='|' read -r name what arguments <<<"$line"
        [ ${#chosen[@]} -eq 0 ] || [[ " ${chosen[*]} " == *" $name "* ]] || continue
        log=$logs/$name.$round.log
        step "== $name, round $round of $rounds: $what"
        began=$SECONDS status=0
        # shellcheck disable=SC2086 # several words
        cargo test --locked $arguments -- --nocapture >"$log" 2>&1 &
        job=$!
        while kill -0 "$job" 2>/dev/null; do
            sleep 1
            [ $(((SECONDS - began) % 60)) -ne 59 ] || step "   $(tail -n 1 "$log" | cut -c1-150)"
        done
        wait "$job" || status=$?
        told "$log" | sed 's/^/    /' >&2
        if [ $status != 0 ] || ! grep -q '^test result: ok\. [1-9]' "$log"; then
            summary
            say
            say "FAILED: $name. The end of $log:"
            tail -n 30 "$log" >&2
            say
            seeds=$(grep -ohE 'ROUNDHOUSE_(TEST|SIM)_SEED=[0-9]+' "$log" | sort -u | tr '\n' ' ' || true)
            say "again, with the seed that the log names for the test that failed: ${seeds:-none}"
            say "    ROUNDHOUSE_SOAK=1 ROUNDHOUSE_TEST_SEED=SEED cargo test $arguments -- --nocapture"
            exit 1
        fi
        done_parts+=("$(printf '%-12s round %-3s %5s s  %s' "$name" "$round" $((SECONDS - began)) "$(told "$log" | grep -v SEED | tr '\n' ';')")")
    done
done
summary
echo "all passed"
