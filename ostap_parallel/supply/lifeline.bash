# $1: seconds; $2: a directory, if not empty. Pass on lines. From the first one that begins with "{" on, which starts the server,
# add an empty line whenever that long nothing was said. It tells the server that its client is
# there, which the client itself cannot while C code holds its interpreter, or while it is stopped.
# The very first line is not passed on: it is the number of the process that reads from here. That
# must end with the client, even if it does not mind the end of its input; and the directory must
# go, which is what leads there needs, as the client may have been killed.
LC_ALL=C
directory=$2
timeout=()
begun= # of a line whose end has not come yet
pid=
born=

# Find out when the process with that number was started, as a number may be given again.
look() {
    local stat
    state=Z since=
    read -r stat <"/proc/$pid/stat" || return
    set -- ${stat##*) }
    state=$1 since=${20}
}

is_there() {
    if [ -e /proc/self/stat ]; then
        look
        [ "$state" != Z ] && [ "$since" = "$born" ]
    else
        kill -0 "$pid"
    fi
}

# The client is gone, or has nothing more to say: what reads from here sees that now.
finish() {
    exec >&- 3<> <(:) # nothing ever comes from 3, which makes it a clock
    local signal turn
    for signal in TERM KILL; do
        for ((turn = 0; turn < 12; turn++)); do
            is_there || break 2
            read -r -t 0.25 -u 3
        done
        is_there && kill "-$signal" "$pid"
    done
    [ -z "$directory" ] || rm -rf -- "$directory"
    exit
}

IFS= read -r pid || exit
look
born=$since
while :; do
    IFS= read -r "${timeout[@]}" line
    status=$?
    line=$begun$line begun=
    if [ "$status" -eq 0 ]; then
        [[ $line != "{"* ]] || timeout=(-t "$1")
        printf '%s\n' "$line"
    elif [ "$status" -le 128 ]; then # the end
        printf '%s' "$line"
        finish
    elif [ -n "$line" ]; then
        begun=$line
    else
        printf '\n'
    fi
done
