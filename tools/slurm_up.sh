#!/bin/bash
# A Slurm of one node for the tests: slurm_up.sh FOLDER starts it and prints the line to export; slurm_up.sh FOLDER down
# ends it. As root, with slurm-wlm and munge installed; nothing outside FOLDER is read or written.
set -euo pipefail
mkdir -p "$1"
F=$(realpath "$1") NODE=$(hostname -s)
if [ "${2:-up}" = down ]; then
    for daemon in slurmd slurmctld munged; do kill "$(cat "$F/$daemon.pid")" || true; done
    exit
fi
mkdir -p "$F/munge" "$F/state" "$F/spool"
chmod 755 "$F" "$F/munge"
head -c 1024 /dev/urandom > "$F/munge/key"
chmod 400 "$F/munge/key"
munged --force --socket="$F/munge/socket" --key-file="$F/munge/key" --pid-file="$F/munged.pid" \
    --log-file="$F/munged.log" --seed-file="$F/munge/seed"
cat > "$F/slurm.conf" <<END
ClusterName=tests
SlurmctldHost=$NODE(127.0.0.1)
SlurmctldPort=26827
SlurmdPort=26828
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$F/munge/socket
StateSaveLocation=$F/state
SlurmdSpoolDir=$F/spool
SlurmctldPidFile=$F/slurmctld.pid
SlurmdPidFile=$F/slurmd.pid
SlurmctldLogFile=$F/slurmctld.log
SlurmdLogFile=$F/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
KillWait=5
NodeName=$NODE NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=4000
PartitionName=tests Nodes=$NODE Default=YES MaxTime=60
END
export SLURM_CONF=$F/slurm.conf
slurmctld
slurmd
for _ in $(seq 40); do
    sinfo --noheader --format=%T 2>/dev/null | grep -q idle && break
    sleep 0.5
done
echo "export SLURM_CONF=$SLURM_CONF"
