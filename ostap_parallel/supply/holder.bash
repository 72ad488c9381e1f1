# A batch job that waits: sessions are attached to it as steps. It ends when there has been none for
# some 30 seconds, as then nobody is there who would cancel it. A session is known by a word in its
# command line. When the batch system warns of its end, sessions may finish what they do.
op_said=$(readlink "/proc/$$/fd/1")
case $op_said in
*/.ostap-parallel-words.*) # what is wanted is what those say that do not get so far
    rm -f "$op_said"
    rmdir "${op_said%/*}" 2>/dev/null
    ;;
esac
op_mark="[o]stap-parallel-job-$SLURM_JOB_ID\\."
op_nap=8 op_most=4
trap 'op_nap=0.3 op_most=1' TERM
trap : USR1 USR2
op_left=$op_most
while [ "$op_left" -gt 0 ]; do
    sleep "$op_nap" &
    wait "$!"
    kill "$!" 2>/dev/null
    if grep -qsa "$op_mark" /proc/[0-9]*/cmdline || [ "$op_left" -gt "$op_most" ]; then
        op_left=$op_most
    else
        op_left=$((op_left - 1))
    fi
done
exit 0
