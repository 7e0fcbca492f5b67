#!/usr/bin/env bash
# A real SLURM sweep on this machine alone: four small jobs through hydra/launcher=cluster, one of them requeued while it is
# at work, their records checked.
#
#   sudo experiments/slurm/single_node.sh          (or: make slurm-test)
#
# For Debian and Ubuntu as root, because it installs slurm-wlm and munge where they are missing. Key, sockets, state and
# configuration live in a temporary directory; the daemons stop at the end, whatever happened. Not part of the tests. Without
# accounting, which a cluster has, submitit warns that it bypasses sacct.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

refuse() { echo "error: $1" >&2; exit 1; }
[[ $(id -u) == 0 ]] || refuse "this starts SLURM's daemons and may install packages: run it as root"
PYTHON=${PYTHON:-$PWD/.venv/bin/python}
[[ -x $PYTHON ]] || refuse "no Python at $PYTHON: run make install first, or set PYTHON"
"$PYTHON" -c 'import hydra_plugins.hydra_submitit_launcher' 2>/dev/null || refuse "the extra 'sweep' is missing: pip install '.[sweep]'"
if ! { command -v slurmctld && command -v slurmd && command -v munged; } >/dev/null; then
    command -v apt-get >/dev/null || refuse "SLURM is not installed and there is no apt-get: install slurmctld, slurmd and munge first"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq && apt-get install -y -qq --no-install-recommends slurm-wlm munge >/dev/null
fi
! { pgrep -x slurmctld || pgrep -x slurmd; } >/dev/null || refuse "SLURM's daemons run here already: use them, with hydra.launcher.partition=NAME"

DIRECTORY=$(mktemp -d)
chmod 755 "$DIRECTORY"
NODE=$(hostname -s)
export SLURM_CONF=$DIRECTORY/slurm.conf
stop() {
    if [[ -s $DIRECTORY/slurmctld.pid ]]; then
        scancel --user=root --full 2>/dev/null || true
        for _ in $(seq 30); do if [[ -z $(squeue -h 2>/dev/null) ]]; then break; fi; sleep 1; done
        scontrol shutdown 2>/dev/null || true
    fi
    if [[ -s $DIRECTORY/munged.pid ]]; then kill "$(<"$DIRECTORY/munged.pid")" || true; fi
    for _ in $(seq 30); do if ! ls "$DIRECTORY"/*.pid >/dev/null 2>&1; then break; fi; sleep 1; done
    if [[ ${FINISHED:-} ]]; then rm -rf "$DIRECTORY"; else echo "logs: $DIRECTORY" >&2; fi
}
trap stop EXIT

# no systemd, no cgroups: processes are tracked by their parents, and one socket carries the authentication
cat > "$SLURM_CONF" <<CONFIGURATION
ClusterName=single
SlurmctldHost=$NODE(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$DIRECTORY/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
MpiDefault=none
ReturnToService=2
StateSaveLocation=$DIRECTORY/state
SlurmdSpoolDir=$DIRECTORY/spool
SlurmctldPidFile=$DIRECTORY/slurmctld.pid
SlurmdPidFile=$DIRECTORY/slurmd.pid
SlurmctldLogFile=$DIRECTORY/slurmctld.log
SlurmdLogFile=$DIRECTORY/slurmd.log
NodeName=$NODE NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo) State=UNKNOWN
PartitionName=debug Nodes=$NODE Default=YES MaxTime=INFINITE State=UP
CONFIGURATION
mkdir "$DIRECTORY/state" "$DIRECTORY/spool"
(umask 077 && head -c 1024 /dev/urandom > "$DIRECTORY/munge.key")
munged --force --key-file="$DIRECTORY/munge.key" --socket="$DIRECTORY/munge.socket" --pid-file="$DIRECTORY/munged.pid" \
    --log-file="$DIRECTORY/munged.log" --seed-file="$DIRECTORY/munged.seed" >/dev/null 2>&1
slurmctld
slurmd
for _ in $(seq 30); do
    if [[ $(sinfo -h -o %T 2>/dev/null) == idle ]]; then break; fi
    sleep 1
done
[[ $(sinfo -h -o %T) == idle ]] || refuse "the node did not come up: see $DIRECTORY/*.log"
echo "$(slurmctld -V) on one node:"
sinfo

export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 MODEGPT_CACHE=$DIRECTORY/cache
RESULTS=$DIRECTORY/results
(set -x; "$PYTHON" -m modegpt --multirun hydra/launcher=cluster hydra.launcher.partition=debug hydra.launcher.gpus_per_node=null \
    hydra.launcher.cpus_per_task=1 hydra.launcher.mem_gb=2 hydra.launcher.timeout_min=30 hydra.launcher.array_parallelism=2 \
    compression.sparsity=0.2,0.4 allocation=uniform,entropic calibration.num_samples=64 evaluation.zeroshot=null \
    'evaluation.perplexity.windows=[128]' threads=1 tracking=disabled output.root="$RESULTS" output.experiment=slurm) &
SWEEP=$!

# SLURM ends a requeued job by SIGTERM and starts it again
LOG=
while [[ -z $LOG ]]; do
    kill -0 $SWEEP || refuse "the sweep ended before a job began"
    sleep 0.2
    LOG=$(grep -ls '^loading' "$RESULTS"/.sweeps/*/.submitit/*/*_log.out | head -n 1 || true)
done
JOB=$(basename "$(dirname "$LOG")")
(set -x; scontrol requeue "$JOB")
for _ in $(seq 60); do
    if [[ $(squeue -h -o %T -j "$JOB") == PENDING ]]; then break; fi
    sleep 1
done
[[ $(scontrol show job "$JOB") == *"Restarts=1"* ]] || refuse "the job was not requeued"
scontrol update JobId="$JOB" StartTime=now
grep -qs 'terminated (SIGTERM)' "${LOG%.out}.err" || refuse "the requeued job did not heed SIGTERM: see ${LOG%.out}.err"
wait $SWEEP || refuse "the sweep failed"
"$PYTHON" -m modegpt.records.cli --root "$RESULTS" list
"$PYTHON" -m modegpt.records.cli --root "$RESULTS" verify
[[ $(find "$RESULTS" -name record.json | wc -l) == 4 ]] || refuse "four records were expected"
FINISHED=yes
echo "SLURM sweep: 4 of 4 jobs have their record, one after it was requeued"
