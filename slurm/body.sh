MAX_RESTARTS=@{max_restarts}
NODE_FAILURE_WAIT_S=@{node_failure_wait_s}

# What the run writes, from a machine that sees this folder:
#   tensorboard --logdir "$RUN/tensorboard"       then open http://localhost:6006
# and from your own machine:
#   ssh -L 6006:localhost:6006 LOGIN-NODE         then type the line above there
# How it stands:  megavlm status "$RUN"     Save now:  touch "$RUN/save"     Save and end:  touch "$RUN/stop"

set -uo pipefail
# the shell survives a SIGTERM: the processes of the run save, and the shell decides below
terminated=
trap terminated=yes TERM
restarts=${SLURM_RESTART_COUNT:-0}
echo "$(date '+%F %T') job $JOB, restart $restarts, on $SLURM_JOB_NODELIST"
if ((restarts > MAX_RESTARTS)); then
    echo "restarted $restarts times, giving up"
    exit 1
fi
if [ -n "${SLURM_HET_SIZE:-}" ]; then
    echo "a heterogeneous job has nodes of several kinds; every process of a run needs the same: ask for one kind"
    exit 2
fi
@{setup}
STARTED=$RUN/slurm/environment-$SLURM_JOB_ID-$restarts.txt
# who ran what, where (nothing else of the environment: it may hold secrets)
{
    scontrol show job "$SLURM_JOB_ID"
    env | grep -E '^(SLURM_|NCCL_|CUDA_|OMP_|LD_LIBRARY_PATH|PATH|LOADEDMODULES)' | sort
    command -v nvidia-smi >/dev/null && nvidia-smi -L
} >"$STARTED" 2>&1

# open files: every process has sockets to all others; core files of a killed run fill a disk
ulimit -n "$(ulimit -Hn)"
ulimit -c 0
@{network}
# a job that was submitted from within another world would inherit its place
unset RANK WORLD_SIZE LOCAL_RANK
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# below the ephemeral ports; another one after each restart, because processes of the old start may still hold theirs
MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + restarts) % 12000))
export MASTER_ADDR MASTER_PORT
# the run saves in time by itself, whatever --signal says; empty if there is no limit
MEGAVLM_END_TIME=$(date -d "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %e)" +%s 2>/dev/null)
export MEGAVLM_END_TIME
export MEGAVLM_EXIT_FILE=$RUN/exit_code
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}
export PYTHONUNBUFFERED=1
rm -f "$RUN/exit_code"

# a sleep that a signal to this shell interrupts
pause() {
    sleep "$1" &
    wait $!
}

requeue() {
    if ((restarts >= MAX_RESTARTS)); then
        echo "not requeued: restarted $restarts times already"
        exit 1
    fi
    # three starts in a row without a new checkpoint: a fourth would not get there either
    newest=$(cd "$RUN/checkpoints" 2>/dev/null && ls | grep -E "^step-[0-9]{8,}$" | tail -n 1)
    echo "${newest:-none}" >>"$RUN/slurm/newest-$JOB.txt"
    if [ "$(tail -n 4 "$RUN/slurm/newest-$JOB.txt" | sort | uniq -c | awk '{print $1; exit}')" = 4 ]; then
        echo "not requeued: three restarts without a new checkpoint"
        exit 1
    fi
    # from here on a SIGTERM comes from the requeueing itself
    trap 'exit 0' TERM
    for _ in {1..60}; do
        if scontrol requeue "$JOB"; then pause 600; fi
        # the controller may be unavailable for a moment
        pause 5
    done
    echo "could not be requeued"
    exit 1
}

preempted() { scontrol show job "$SLURM_JOB_ID" | grep -q 'PreemptTime=[0-9]'; }

# each node is looked at before the first step; one that is not well leaves no file
check_nodes() {
    local folder=$RUN/slurm/nodes-$SLURM_JOB_ID-$restarts node
    mkdir -p "$folder"
    timeout 600 srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=0 @{container}\
        @{python} -m megavlm.launch.node_check "$folder" --gpus @{gpus_per_node} --now "$(date +%s)"
    # ended by SLURM, not by what was looked at
    if [ -n "$terminated" ]; then
        preempted && requeue
        exit 1
    fi
    bad=()
    for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
        [ -e "$folder/$node" ] || bad+=("$node")
    done
    ((${#bad[@]})) || return 0
    if ((${#bad[@]} == SLURM_JOB_NUM_NODES)); then
        echo "no node passed the check, so the check or the set-up is wrong; to train without it: --node-check=False"
        exit 1
    fi
    printf '%s\n' "${bad[@]}" >>"$RUN/slurm/bad-nodes.txt"
    echo "not well: ${bad[*]}; all so far are in $RUN/slurm/bad-nodes.txt"
    leave_out "$(sort -u "$RUN/slurm/bad-nodes.txt" | paste -sd,)"
}

# SLURM lets nobody change the nodes of a job that runs: another job, without these nodes, takes over
leave_out() {
    local again=(sbatch --parsable --exclude="$1")
    [ -n "${SLURM_ARRAY_TASK_ID:-}" ] && again+=(--array="$SLURM_ARRAY_TASK_ID")
    if (($(wc -l <"$RUN/slurm/bad-nodes.txt") > MAX_RESTARTS)); then
        echo "nodes were left out $MAX_RESTARTS times, giving up"
    elif next=$("${again[@]}" @{script}); then
        echo "${next%%;*}" | tee "$RUN/slurm/${next%%;*}.job"
        echo "job ${next%%;*} takes over"
        exit 0
    else
        echo "no job can be submitted from this node: submit it again with  sbatch --exclude=$1 "@{script}
    fi
    exit 1
}
@{check}

# what ranks print, each in a file; that of rank 0 is this job's output
LOGS=$RUN/slurm/ranks-$SLURM_JOB_ID-$restarts
mkdir -p "$LOGS"
OWN_LOG='[ "$SLURM_PROCID" = 0 ] || exec >>"$0/rank-$SLURM_PROCID.txt" 2>&1; exec "$@"'

srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" @{srun_options} @{container}\
    bash -c "$OWN_LOG" "$LOGS" @{python} -m megavlm train "$RECIPE"@{arguments} &
srun_pid=$!
# a SIGTERM interrupts `wait`, not the run
while kill -0 $srun_pid 2>/dev/null; do wait $srun_pid; done
wait $srun_pid
code=$?
# the run's own status counts first: srun's is that of whichever process it had to kill
[ -s "$RUN/exit_code" ] && code=$(cat "$RUN/exit_code")
echo "$(date '+%F %T') the run ended with status $code"
if ((code)); then
    # the last words of the other ranks, of at most eight
    find "$LOGS" -name 'rank-*' -size +0c | sort -V | head -n 8 | while read -r log; do
        echo "--- $log" && tail -n 15 "$log"
    done
fi

case $code in
    0) exit 0 ;;
    # hung, or interrupted with a checkpoint: resume later
    74 | 75) requeue ;;
    # told to stop, with a checkpoint: by a person, or by SLURM before a requeue
    76)
        preempted && requeue
        exit 0
        ;;
esac
# a process, a device or the network failed; or one was killed and no other could say so: by the kernel for its memory, by NCCL, or,
# stuck in C, by a thread that can write nothing but its stacks
lost() {
    [ "$code" = 71 ] && return 0
    [ -s "$RUN/exit_code" ] && return 1
    ((code >= 128)) || [ -n "$(find "$RUN/hangs" -name 'stuck-rank-*' -newer "$STARTED" -size +0c 2>/dev/null)" ]
}
if [ -n "$terminated" ]; then
    lost && preempted && requeue
elif lost || [ ! -s "$RUN/exit_code" ]; then
    echo "processes were lost: waiting $NODE_FAILURE_WAIT_S s for SLURM to find a lost node, and to requeue the job itself"
    pause "$NODE_FAILURE_WAIT_S"
    lost && requeue
fi
exit "$code"
