# Cancel jobs when standard input ends: who has submitted them is gone, or needs them no more. Each
# line is a name of jobs; the arguments are the command, with @NAME@ for it.
op_names=()
while IFS= read -r op_name; do op_names+=("$op_name"); done
trap '' HUP TERM INT
for op_pause in 1 5 10 20 30 0; do # the batch system may be away
    op_left=()
    for op_name in "${op_names[@]}"; do
        "${@//@NAME@/$op_name}" || op_left+=("$op_name")
    done
    op_names=("${op_left[@]}")
    [ "${#op_names[@]}" -gt 0 ] || exit 0
    sleep "$op_pause"
done
exit 1
