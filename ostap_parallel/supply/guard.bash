# Cancel jobs when standard input ends: who has submitted them is gone, or needs them no more. Each
# line is a name of jobs; the arguments are the command, with @NAME@ for it. A name behind "?" is
# that of jobs that are being submitted: until it comes again without, they may still appear, and
# that there are none now says nothing; scancel tells which it has ended. Each line is said again:
# who is far away submits nothing before it is known here.
declare -A op_jobs=()
trap '' PIPE
while IFS= read -r op_name; do
    echo "$op_name"
    case $op_name in "?"*) op_jobs[${op_name:1}]=maybe ;; *) op_jobs[$op_name]= ;; esac
done
trap '' HUP TERM INT
for op_pause in 1 5 10 20 30 0; do # the batch system may be away
    for op_name in "${!op_jobs[@]}"; do
        op_said=$("${@//@NAME@/$op_name}" 2>&1) || continue
        if [ -z "${op_jobs[$op_name]}" ] || [[ $op_said == *"Terminating job "* ]]; then
            unset "op_jobs[$op_name]"
        fi
    done
    [ "${#op_jobs[@]}" -gt 0 ] || exit 0
    sleep "$op_pause"
done
exit 1
