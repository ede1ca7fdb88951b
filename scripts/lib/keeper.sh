# Shared by start-all.sh, stop-all.sh and keep.sh: sourced, never run. bash >= 4, Linux.
# shellcheck shell=bash

# When a process began, in clock ticks since boot; with its id that names it for good.
began() { sed 's/^.*) //' "/proc/$1/stat" 2>/dev/null | cut -d ' ' -f 20; }

# Whether a process still runs (a zombie does not) that had id $1 and began at $2.
runs() {
    [ -n "$2" ] && [ "$(began "$1")" = "$2" ] &&
        [ "$(sed 's/^.*) //' "/proc/$1/stat" 2>/dev/null | cut -d ' ' -f 1)" != Z ]
}

# Writes "PID BEGAN" of process $2 to the file $1.
write_pid() { echo "$2 $(began "$2")" >"$1"; }

# Prints the id of the process that the file $1 names, if it still runs.
pid_in() {
    local pid began_at
    read -r pid began_at 2>/dev/null <"$1" || return 1
    runs "$pid" "$began_at" && echo "$pid"
}

# The data folder by flag, environment or default; absolute.
data_dir_of() {
    local data=${ROUNDHOUSE_DATA_DIR:-$ROOT/data}
    while [ $# -gt 0 ]; do
        case $1 in
        --data-dir=*) data=${1#*=} ;;
        --data-dir)
            [ $# -ge 2 ] || die "--data-dir needs a folder"
            data=$2
            shift
            ;;
        esac
        shift
    done
    realpath -m -- "$data"
}

# " --data-dir DIR" where it has to be said.
data_flag() { [ "$1" = "$ROOT/data" ] || printf ' --data-dir %q' "$1"; }

# "PID BEGAN" of all descendants of process $1, a line each.
descendants() {
    local list pids=$1 next
    list=$(ps -eo pid=,ppid=)
    while :; do
        next=$(awk -v of=" $pids " 'index(of, " " $2 " ") && !index(of, " " $1 " ") { print $1 }' <<<"$list" | tr '\n' ' ')
        [ -n "$next" ] || break
        pids="$pids ${next% }"
    done
    for pid in $pids; do
        [ "$pid" = "$1" ] || echo "$pid $(began "$pid")"
    done
}
