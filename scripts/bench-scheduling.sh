#!/usr/bin/env bash
# Plays traces through the scheduler on simulated workers and compares what it did with its targets: prints for each measure
# the target, what was got, and whether that is enough. Exits with 1 if one misses. Takes a few seconds.
#
#   scripts/bench-scheduling.sh              the public traces in tests/traces
#   scripts/bench-scheduling.sh TRACE...     these; what they are is told by the beginning of their names (a- to h-, small-)
#   scripts/bench-scheduling.sh --fresh N [--seed S]
#                                            N new traces of each kind a to h and N sets of 12 small ones, seeds from S
#                                            (1000) on: the median of each measure, its range, and how many are beyond
#
# Ratios are to the policies of the reference simulator on the same trace, from the reference.csv beside the trace. A trace
# that is not in it is compared with our own versions of these policies, and the line says so. New traces
# (scripts/lib/fresh_traces.py) are compared with our own versions throughout.
#
# Builds nothing: plays with target/release/roundhouse, else target/debug/roundhouse, or the binary ROUNDHOUSE_BIN names.
set -euo pipefail
source "$(dirname "$0")/lib/common.sh"

case ${1:-} in
-h | --help)
    sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p;}' "$0"
    exit 0
    ;;
esac
profile=release
[ -x "$ROOT/target/release/roundhouse" ] || [ ! -x "$ROOT/target/debug/roundhouse" ] || profile=debug
need_binary $profile
exec "$(base_python)" "$ROOT/scripts/bench-scheduling.py" --binary "$ROUNDHOUSE_BIN" "$@"
