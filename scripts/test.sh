#!/usr/bin/env bash
# All checks and tests of the repository, on any Debian-like machine with Rust, Python 3.11 and no GPU. Installs what is
# missing: the first run takes about 20 minutes, mostly downloads and compiling; the next ones a few.
#
#   scripts/test.sh              everything
#   scripts/test.sh rust python  only these steps
#   scripts/test.sh --list       their names
#
# Every step runs, also after one has failed, unless it needs what failed. Logs: target/test-logs/. The last line says how
# many tests and checks passed and failed; the exit code is 0 if none failed or was skipped.
set -euo pipefail
source "$(dirname "$0")/lib/common.sh"
source "$(dirname "$0")/lib/lanes.sh"
cd "$ROOT"
LANE_LOGS=$ROOT/target/test-logs

# name | what | kind of its output | needs
STEPS=(
    "fmt|cargo fmt --check|check|"
    "clippy|cargo clippy, warnings are errors|check|"
    "doc|cargo doc, warnings are errors|check|"
    "shell|the shell scripts: bash -n, shellcheck|check|dev"
    "rust|Rust: unit tests, store, scheduler, the real binary with echo workers|cargo|dev"
    "python|Python: lint, types, tests without engines|pytest|dev"
    "engines|installing the CPU engines, making the checkpoints|check|"
    "workers|the workers alone: real vLLM, Flux, MusicGen; installing; fetching|pytest|engines"
    "sdk|the official OpenAI SDK against the server|pytest|dev"
    "through|real engines through the server|pytest|engines"
)

run_fmt() { cargo fmt --check; }
run_clippy() { cargo clippy --locked --all-targets -- -D warnings; }
run_doc() { RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --document-private-items; }
run_shell() {
    local file files=(.ci/run scripts/*.sh scripts/lib/*.sh)
    for file in "${files[@]}"; do bash -n "$file"; done
    .venv-dev/bin/shellcheck --external-sources --source-path=SCRIPTDIR --severity=warning "${files[@]}"
}
# Tests with real processes mostly wait for them: twice as many at once as there are cores.
run_rust() { RUST_TEST_THREADS=$((2 * $(nproc))) cargo test --locked --no-fail-fast; }
run_python() { scripts/test-python.sh; }
run_engines() {
    scripts/install.sh --cpu
    scripts/make-checkpoints.sh
}
# What `rust` has built is what these test; built anew only if they run alone.
run_workers() {
    cargo test --locked --no-run
    scripts/test-workers.sh
}
run_sdk() {
    cargo test --locked --no-run
    scripts/test-sdk.sh
}
run_through() {
    cargo test --locked --no-run
    scripts/test-engines.sh
}
run_dev() { dev_venv; }

chosen=()
for argument in "$@"; do
    case $argument in
    --list)
        printf '%s\n' "${STEPS[@]}" | awk -F'|' '{ printf "%-8s %s\n", $1, $2 }'
        exit 0
        ;;
    -h | --help)
        sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p;}' "$0"
        exit 0
        ;;
    *)
        printf '%s\n' "${STEPS[@]}" | grep -q "^$argument|" || die "no step $argument (see --list)"
        chosen+=("$argument")
        ;;
    esac
done

is_chosen() { [ ${#chosen[@]} -eq 0 ] || [[ " ${chosen[*]} " == *" $1 "* ]]; }

# Adds up what the log of a step says: "passed failed skipped". A step that is no test run counts as one check.
count() {
    local kind=$1 log=$2 status=$3
    case $kind in
    cargo)
        awk '/^test result: / { for (i = 1; i < NF; i++) {
                 if ($(i+1) ~ /^passed;?$/) p += $i; if ($(i+1) ~ /^failed;?$/) f += $i; if ($(i+1) ~ /^ignored;?$/) s += $i } }
             END { print p+0, f+0, s+0 }' "$log"
        ;;
    pytest)
        # "83 passed, 2 skipped in 41.18s", with or without a frame of =
        awk '/(passed|failed|error|errors|skipped|no tests ran).* in [0-9.]+s/ { for (i = 1; i < NF; i++) {
                 w = $(i+1); gsub(/[^a-z]/, "", w)
                 if ($i !~ /^[0-9]+$/) continue
                 if (w == "passed") p += $i; else if (w == "failed" || w == "error" || w == "errors") f += $i
                 else if (w == "skipped" || w == "xfailed") s += $i } }
             END { print p+0, f+0, s+0 }' "$log"
        ;;
    *) if [ "$status" = 0 ]; then echo 1 0 0; else echo 0 1 0; fi ;;
    esac
}

passed=0 failed=0 skipped=0 report=() broken=' '
note() {
    local name=$1 word=$2 took=$3 p=$4 f=$5 s=$6
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
    report+=("$(printf '%-7s %-8s %5s s   %4s passed %4s failed %4s skipped' "$word" "$name" "$took" "$p" "$f" "$s")")
    [ "$f" = 0 ] || broken+="$name "
}

# What failed in a step, from its log: the tests' names, or the last lines if no test is named.
failures() {
    local log=$1 names
    names=$(grep -aE '^(test .* \.\.\. FAILED|FAILED .*|ERROR .*)$' "$log" | sort -u | head -n 12 || true)
    [ -n "$names" ] || names=$(tail -n 6 "$log")
    cut -c1-200 <<<"$names"
}

# Starts the step if it does not run already, waits for it, and counts.
finish_step() {
    local name what kind needs status=0 p f s
    IFS='|' read -r name what kind needs <<<"$1"
    is_chosen "$name" || return 0
    say
    step "== $name: $what"
    if [ -n "$needs" ] && [[ $broken == *" $needs "* ]]; then
        step "$name: not run, since $needs failed"
        note "$name" "NOT RUN" 0 0 1 0
        return
    fi
    [ -n "${LANE_BEGAN[$name]:-}" ] || lane "$name" strict "run_$name"
    watch_lanes "$name" || status=1
    read -r p f s < <(count "$kind" "$LANE_LOGS/$name.log" $status)
    if [ $status != 0 ] && [ "$f" = 0 ]; then
        f=1 # it failed outside a test: a build, a crash, lint before the tests
    elif [ $status = 0 ] && [ "$f" = 0 ] && [ "$p" = 0 ]; then
        step "$name: ran no test at all, which counts as a failure"
        f=1
    elif [ $status = 0 ] && [ "$f" != 0 ]; then
        step "$name: its output tells of failures, though it ended well; they count"
    fi
    note "$name" "$([ "$f" = 0 ] && echo ok || echo FAILED)" "${LANE_TOOK[$name]}" "$p" "$f" "$s"
}

# A function under `set -e`: in a subshell of its own, since callers test its status.
strict() (
    set -euo pipefail
    "$@"
)

finish() {
    local status=$?
    trap - EXIT HUP INT TERM
    end_lanes
    exit $status
}
trap finish EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

need_rust
need_venv
rm -rf "$LANE_LOGS"
mkdir -p "$LANE_LOGS"

# Downloads beside compiling: one waits for the network, the other for the processor.
is_chosen engines && lane engines strict run_engines
lane dev strict run_dev
if ! watch_lanes dev; then note dev FAILED "${LANE_TOOK[dev]}" 0 1 0; fi
for line in "${STEPS[@]}"; do finish_step "$line"; done

say
step "summary"
printf '    %s\n' "${report[@]}" >&2
for name in $broken; do
    [ -f "$LANE_LOGS/$name.log" ] || continue
    say
    say "    $name:"
    failures "$LANE_LOGS/$name.log" | sed 's/^/      /' >&2
done
[ "$skipped" = 0 ] || say "    $skipped tests were skipped, and none may be; the logs in ${LANE_LOGS#"$ROOT"/}/ say why"
say
echo "$passed passed, $failed failed"
[ "$failed" = 0 ] && [ "$skipped" = 0 ]
