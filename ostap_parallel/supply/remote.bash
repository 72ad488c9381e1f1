# Read by bash on a host before anything else, after op_mark and op_tmpdir have been set. Defines
# what the client's further lines use, and makes a private directory that goes when bash goes.
# Whatever the user's scripts, sourced later, do to the shell must not matter here: they may change
# PATH, IFS and options, redirect, exit, and take the exit trap.

exec 19>&1 # our lines have a descriptor of their own
op_rm=$(type -P rm)
op_dir= op_here=

op_say() { printf '\n%s%s %s\n' "$op_mark" "$1" "$2" >&19; }

# Kill all others of this session, whatever became of process groups.
op_end() {
    local pid line IFS=$' \t\n'
    set +f
    for pid in /proc/[0-9]*; do
        pid=${pid#/proc/}
        read -r line <"/proc/$pid/stat" && set -- ${line##*) } && [ "$4" = "$$" ] &&
            [ "$pid" != "$BASHPID" ] && kill -KILL "$pid"
    done
} 2>/dev/null

op_leave='set +eu; op_end; [ -z "$op_dir" ] || "$op_rm" -rf -- "$op_dir" || "$op_rm" -rf -- "$op_dir"' # may be written to

# From op_watch to op_unwatch the client says nothing, so that anything to be read is its end. The
# watcher then ends everything, also what a script has left that ended bash without our trap.
op_watch() {
    exec 18<&0
    (
        trap - EXIT
        until read -t 0 -u 18; do sleep 0.5; done
        "$op_rm" -rf -- "$op_dir"
        op_end
        kill -KILL 0
    ) >/dev/null 2>&1 19>&- &
    op_watcher=$!
    disown
}

op_unwatch() {
    kill -KILL "$op_watcher"
    exec 18<&-
    op_say prepared
}

# Before a script of the user's: find the file that op_file names as people write it.
op_find() {
    op_say step "$1"
    case $op_file in "~/"*) op_file=$HOME/${op_file:2} ;; */*) ;; *) op_file=./$op_file ;; esac
    [ -r "$op_file" ] && return
    echo "$op_file: no such file on this host, or not readable" >&2
    exit 1
}

# After it: go on if it succeeded.
op_found() {
    set +eu
    trap "$op_leave" EXIT
    [ "$1" -eq 0 ] || exit "$1"
}

# op_serve PYTHON MISMATCH NICE MODULES: the server, which reads on where bash has stopped.
op_serve() {
    op_say step python
    if ! type -P -- "$1" >/dev/null; then
        echo "$1: not found; PATH is $PATH" >&2
        exit 127
    fi
    "$1" "$op_dir/ppserver" "$2" "$3" "$4" 19>&-
    set -- $?
    op_say over "$1" # ssh ends later, as it waits for all that uses the tunnel
    exit "$1"
}

# Tell where this session is, in a file of its directory: which kernel has been booted, when the
# first process was started, as containers have their own, and its number.
op_settle() {
    local boot line
    read -r boot </proc/sys/kernel/random/boot_id && read -r line </proc/1/stat || return 0
    set -- ${line##*) }
    op_here="$boot ${20}"
    read -r line <"/proc/$$/stat" && set -- ${line##*) } &&
        (umask 077 && echo "$op_here $4" >"$op_dir/session")
} 2>/dev/null

# Remove what sessions of ours have left here that were killed: those of which no process is there,
# or only such that have ended and that nobody has asked about yet.
op_sweep() {
    local other line session stat
    [ -n "$op_here" ] || return
    for other in "$op_tmpdir"/ostap-parallel.*/; do
        [ -O "$other" ] && read -r line <"$other/session" || continue
        session=${line##* }
        [ "${line% *}" = "$op_here" ] || continue
        for stat in "/proc/$session/stat" /proc/[0-9]*/stat; do
            read -r line <"$stat" || continue
            set -- ${line##*) }
            [ "$4" != "$session" ] || [ "$1" = Z ] || continue 2
        done
        "$op_rm" -rf -- "${other%/}" # of a link, which anybody may have made, just that
    done
} 2>/dev/null

trap "$op_leave" EXIT
op_say step tmpdir
op_dir=$(mktemp -d -- "$op_tmpdir/ostap-parallel.XXXXXXXXXX") || exit
[[ $op_dir == /* ]] || op_dir=$PWD/$op_dir # a script may go elsewhere
op_settle
op_say directory "$op_dir"
op_sweep
