# $1: seconds. Pass on lines. From the first one that begins with "{" on, which starts the server,
# add an empty line whenever that long nothing was said. It tells the server that its client is
# there, which the client itself cannot while C code holds its interpreter, or while it is stopped.
LC_ALL=C
timeout=()
begun= # of a line whose end has not come yet
while :; do
    IFS= read -r "${timeout[@]}" line
    status=$?
    line=$begun$line begun=
    if [ "$status" -eq 0 ]; then
        [[ $line != "{"* ]] || timeout=(-t "$1")
        printf '%s\n' "$line"
    elif [ "$status" -le 128 ]; then # the end
        printf '%s' "$line"
        exit
    elif [ -n "$line" ]; then
        begun=$line
    else
        printf '\n'
    fi
done
