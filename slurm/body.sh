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
@{setup}
STARTED=$RUN/slurm/environment-$SLURM_JOB_ID-$restarts.txt
# who ran what, where (nothing else of the environment: it may hold secrets)
{
    scontrol show job "$SLURM_JOB_ID"
    env | grep -E '^(SLURM_|NCCL_|CUDA_|OMP_|LD_LIBRARY_PATH|PATH|LOADEDMODULES)' | sort
    command -v nvidia-smi >/dev/null && nvidia-smi -L
} >"$STARTED" 2>&1

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

srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" @{container}\
    @{python} -m megavlm train "$RECIPE"@{arguments} &
srun_pid=$!
# a SIGTERM interrupts `wait`, not the run
while kill -0 $srun_pid 2>/dev/null; do wait $srun_pid; done
wait $srun_pid
code=$?
# the run's own status counts first: srun's is that of whichever process it had to kill
[ -s "$RUN/exit_code" ] && code=$(cat "$RUN/exit_code")
echo "$(date '+%F %T') the run ended with status $code"

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
