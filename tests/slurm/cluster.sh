#!/usr/bin/env bash
# Run a command on the login node of a SLURM cluster of two nodes, which is there only meanwhile. Needs root.
#
#   tests/slurm/cluster.sh COMMAND...        exit code: that of the command, 124 after $CLUSTER_LIMIT_S
#   tests/slurm/cluster.sh power-off NODE    inside: all processes of node 1 or 2 end at once, and its network is dead
#   tests/slurm/cluster.sh power-on NODE
#
# Daemons, jobs and their networks live in namespaces of their own, their files in memory: whatever ends, down to a
# SIGKILL of this script, takes all of it along, and nothing listens on the machine's own network.
# Inside, $CLUSTER is the directory of the cluster; its logs are in log/. $CLUSTER_KEEP_LOGS names a directory to copy
# them to when the command fails.
set -euo pipefail

readonly num_nodes=2 num_gpus=2 subnet=10.213.0

outside() {
    local tool
    for tool in slurmctld slurmd sbatch munged ip unshare; do
        command -v "$tool" >/dev/null || {
            echo "cluster: $tool is missing; apt-get install slurmctld slurmd slurm-client munge iproute2" >&2
            exit 2
        }
    done
    [[ $(id -u) == 0 ]] || { echo "cluster: namespaces and device files need root" >&2; exit 2; }
    export CLUSTER_ID=$$x$RANDOM # in a namespace of its own, process ids are small and come again
    # Only control groups outlive their processes. All of the cluster's processes hold this pipe open, and its reader
    # is in a session of its own: it does its work whatever the others died of.
    exec 9> >(exec setsid "${BASH_SOURCE[0]}" remove-control-groups "$CLUSTER_ID" &>/dev/null)
    # Namespaces end with their first process, that ends with unshare, and that with timeout, which has our pid.
    exec timeout --foreground --kill-after=5 "${CLUSTER_LIMIT_S:-1500}" setpriv --pdeathsig KILL \
        unshare --mount --net --pid --uts --ipc --fork --kill-child --mount-proc "${BASH_SOURCE[0]}" "$@"
}

remove-control-groups() {
    cat >/dev/null # until the last process of the cluster has ended, or nearly
    local deadline=$((SECONDS + 10))
    while ((SECONDS < deadline)); do
        unshare --mount bash -c "mount -t cgroup -o freezer freezer /mnt &&
            find /mnt -depth -type d -path '*/slurm_c$1n*' -exec rmdir {} + &&
            [[ -z \$(find /mnt -path '*/slurm_c$1n*' -print -quit) ]]" && break
        sleep 0.1
    done
}

inside() {
    trap 'exit 143' INT TERM # the first process of a namespace gets only signals that it asks for
    export CLUSTER=/run/cluster SLURM_CONF=/run/cluster/slurm.conf
    mount -t tmpfs tmpfs /run
    mkdir -p /run/netns "$CLUSTER"/{gpu,log,munge,state,spool,freezer}
    chmod 700 "$CLUSTER/munge"
    local node
    join_nodes
    for ((node = 0; node < num_gpus; node++)); do
        mknod "$CLUSTER/gpu/nvidia$node" c 1 3 # /dev/null: SLURM hands out devices, and asks them nothing
    done
    write_settings
    start_daemons
    wait_until_idle
    local code=0
    "$@" || code=$?
    if ((code)) && [[ -n ${CLUSTER_KEEP_LOGS-} ]]; then cp -r "$CLUSTER/log" "$CLUSTER_KEEP_LOGS"; fi
    exit "$code"
}

# One network namespace a node, joined by a bridge; the login node is where the bridge is.
join_nodes() {
    hostname login
    ip link set lo up
    ip link add bridge0 type bridge
    ip address add "$subnet.254/24" dev bridge0
    ip link set bridge0 up
    printf '127.0.0.1 localhost\n%s.254 login\n' "$subnet" >"$CLUSTER/hosts"
    local node
    for ((node = 1; node <= num_nodes; node++)); do
        ip netns add "$node"
        ip link add "node$node" type veth peer name eth0 netns "$node"
        ip link set "node$node" master bridge0 up
        ip -n "$node" address add "$subnet.$node/24" dev eth0
        ip -n "$node" link set eth0 up
        ip -n "$node" link set lo up
        echo "$subnet.$node $(name_of "$node")" >>"$CLUSTER/hosts"
    done
    mount --bind "$CLUSTER/hosts" /etc/hosts
}

# Unlike any of another cluster: SLURM's control groups have the machine's hierarchy in common.
name_of() { echo "c${CLUSTER_ID}n$1"; }

write_settings() {
    # Without control groups SLURM signals every descendant of a job, which no real cluster does.
    tracking=linuxproc
    if mount -t cgroup -o freezer freezer "$CLUSTER/freezer" 2>/dev/null; then tracking=cgroup; fi
    cat >"$CLUSTER/cgroup.conf" <<EOT
CgroupPlugin=cgroup/v1
CgroupMountpoint=$CLUSTER
CgroupAutomount=no
EOT
    cat >"$CLUSTER/gres.conf" <<EOT
AutoDetect=off
Name=gpu File=$CLUSTER/gpu/nvidia[0-$((num_gpus - 1))]
EOT
    # Two kinds of partition: whoever is in `urgent` pushes out whoever is in `batch`, after 20 s of grace.
    cat >"$SLURM_CONF" <<EOT
ClusterName=throwaway
SlurmctldHost=login($subnet.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$CLUSTER/munge.socket
CredType=cred/munge
StateSaveLocation=$CLUSTER/state
SlurmctldPidFile=$CLUSTER/state/slurmctld.pid
SlurmctldLogFile=$CLUSTER/log/slurmctld.log
SlurmdSpoolDir=$CLUSTER/spool/%n
SlurmdPidFile=$CLUSTER/spool/%n/slurmd.pid
SlurmdLogFile=$CLUSTER/log/slurmd-%n.log
ProctrackType=proctrack/$tracking
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$CLUSTER/log/completed.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
SlurmdTimeout=10
KillWait=10
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=$(name_of "[1-$num_nodes]") NodeAddr=$subnet.[1-$num_nodes] CPUs=8 RealMemory=65536 Gres=gpu:$num_gpus State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES MaxTime=60 DefaultTime=10 PriorityTier=1 GraceTime=20 State=UP
PartitionName=urgent Nodes=ALL MaxTime=60 DefaultTime=10 PriorityTier=10 PreemptMode=OFF State=UP
EOT
}

start_daemons() {
    (umask 077 && head -c 1024 /dev/urandom >"$CLUSTER/munge/key")
    munged --foreground --key-file="$CLUSTER/munge/key" --socket="$CLUSTER/munge.socket" \
        --pid-file="$CLUSTER/munge/pid" --log-file="$CLUSTER/munge/log" --seed-file="$CLUSTER/munge/seed" \
        &>"$CLUSTER/log/munged.log" &
    until [[ -S $CLUSTER/munge.socket ]]; do
        kill -0 $! || { cat "$CLUSTER/log/munged.log" >&2; exit 2; }
        sleep 0.05
    done
    slurmctld -D -f "$SLURM_CONF" &>/dev/null & # it has its log
    local node
    for ((node = 1; node <= num_nodes; node++)); do start_node "$node"; done
}

start_node() {
    setsid nsenter --net="/run/netns/$1" unshare --uts \
        bash -c "hostname $(name_of "$1") && exec slurmd -D -f $SLURM_CONF -N $(name_of "$1")" &>/dev/null </dev/null &
    disown # the end of a node is nothing to talk of
}

wait_until_idle() {
    until [[ $(timeout 5 sinfo --noheader --partition=batch --format='%T %D' 2>/dev/null) == "idle $num_nodes" ]]; do
        ((SECONDS < 60)) || { sinfo -R >&2; tail -n 20 "$CLUSTER"/log/* >&2; exit 2; }
        sleep 0.1
    done
    echo "cluster: $num_nodes nodes idle after $((${EPOCHREALTIME/./} / 1000 - CLUSTER_STARTED_MS)) ms, proctrack/$tracking" >&2
}

power-off() {
    ip link set "node$1" down
    local pids
    # A process that is being started may be missed the first time.
    while pids=$(ip netns pids "$1") && [[ -n $pids ]]; do
        xargs kill -KILL <<<"$pids" 2>/dev/null || true
        sleep 0.05
    done
}

power-on() {
    ip link set "node$1" up
    start_node "$1"
}

if [[ ${1-} == power-o* || ${1-} == remove-control-groups ]]; then
    "$@"
elif [[ -n ${CLUSTER_ID-} ]]; then
    inside "$@"
else
    export CLUSTER_STARTED_MS=$((${EPOCHREALTIME/./} / 1000))
    outside "$@"
fi
