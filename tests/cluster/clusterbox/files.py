"""What configuration files hold: pure functions from the cluster's facts to text, and where each is put."""

from __future__ import annotations

from .net import ADDRESSES, COMPUTE, NODES

CPUS = 80
MB_PER_CPU = 500
MEMORY_MB = CPUS * MB_PER_CPU  # what `--exclusive` without a memory asks for
CLUSTER_NAME = "box"
REGISTRY_PORT = 5000


def hosts() -> str:
    """/etc/hosts of every node. Source: hosts(5)."""
    lines = ["127.0.0.1 localhost", "::1 localhost ip6-localhost ip6-loopback"]
    return "\n".join(lines + [f"{address} {node}" for node, address in ADDRESSES.items()]) + "\n"


def known_hosts(public_keys: dict[str, str]) -> str:
    """/etc/ssh/ssh_known_hosts: each node by name and address. Source: sshd(8), SSH_KNOWN_HOSTS FILE FORMAT."""
    return "".join(f"{node},{ADDRESSES[node]} {' '.join(public_keys[node].split()[:2])}\n" for node in NODES)


def sshd_config() -> str:
    """/etc/ssh/sshd_config.d/cluster.conf; all else is Debian's default. Source: sshd_config(5), OpenSSH 10.0."""
    return (
        "HostKey /etc/ssh/ssh_host_ed25519_key\n"
        "PasswordAuthentication no\n"
        "KbdInteractiveAuthentication no\n"
        "UseDNS no\n"
        "PidFile /run/sshd.pid\n"
    )


def slurm_conf(*, cgroups: bool, accounting: bool) -> str:
    """/etc/slurm/slurm.conf. Source: slurm.conf(5), Slurm 24.11.

    config_overrides: nodes may claim more CPUs and memory than there are. batch_sched_delay=0, bf_interval=10: the
    defaults delay a start by up to 3 s. SlurmdTimeout=30: a lost node is noticed within a test's patience. Jobs of
    `high` preempt those of `low`, on the same nodes, and no others: a job with `--requeue` waits anew, one with
    `--no-requeue` ends PREEMPTED. With accounting squeue forgets a job some 10 s after its end, as a busy site's does
    after minutes.
    """
    nodes = ",".join(COMPUTE)
    lines = [
        f"ClusterName={CLUSTER_NAME}",
        "SlurmctldHost=login",
        "SlurmUser=slurm",
        "AuthType=auth/munge",
        "CredType=cred/munge",
        "MpiDefault=none",
        "ProctrackType=proctrack/cgroup" if cgroups else "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/cgroup" if cgroups else "TaskPlugin=task/none",
        "JobAcctGatherType=jobacct_gather/linux",
        "JobAcctGatherFrequency=10",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core_Memory",
        f"DefMemPerCPU={MB_PER_CPU}",
        "SchedulerType=sched/backfill",
        "SchedulerParameters=batch_sched_delay=0,bf_interval=10",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        "LaunchParameters=use_interactive_step",
        "ReturnToService=2",
        "SlurmdParameters=config_overrides",
        "SlurmdTimeout=30",
        "SlurmctldTimeout=30",
        "KillWait=10",
        f"MinJobAge={2 if accounting else 300}",
        "PropagateResourceLimits=NONE",
        "StateSaveLocation=/var/spool/slurmctld",
        "SlurmdSpoolDir=/var/spool/slurmd",
        "SlurmctldPidFile=/run/slurmctld.pid",
        "SlurmdPidFile=/run/slurmd.pid",
        "SlurmctldLogFile=/var/log/slurm/slurmctld.log",
        "SlurmdLogFile=/var/log/slurm/slurmd.log",
    ]
    if accounting:
        lines += ["AccountingStorageType=accounting_storage/slurmdbd", "AccountingStorageHost=login"]
    lines += [
        f"NodeName={nodes} CPUs={CPUS} Sockets=1 CoresPerSocket={CPUS} ThreadsPerCore=1 RealMemory={MEMORY_MB}",
        "PartitionName=DEFAULT DefaultTime=01:00:00 PreemptMode=OFF State=UP",
        f"PartitionName=cpu Nodes={nodes} Default=YES MaxTime=1-00:00:00",
        f"PartitionName=debug Nodes={nodes} DefaultTime=00:10:00 MaxTime=00:30:00",
        f"PartitionName=low Nodes={nodes} PriorityTier=1 PreemptMode=REQUEUE",
        f"PartitionName=high Nodes={nodes} PriorityTier=10",
    ]
    return "\n".join(lines) + "\n"


def cgroup_conf() -> str:
    """/etc/slurm/cgroup.conf. Source: cgroup.conf(5), Slurm 24.11."""
    return (
        "CgroupPlugin=cgroup/v1\n"
        "CgroupMountpoint=/sys/fs/cgroup\n"
        "IgnoreSystemd=yes\n"
        "ConstrainRAMSpace=yes\n"
        "ConstrainCores=no\n"
        "ConstrainDevices=no\n"
    )


def slurmdbd_conf() -> str:
    """/etc/slurm/slurmdbd.conf; the database knows the user `slurm` by its Unix socket. Source: slurmdbd.conf(5)."""
    return (
        "AuthType=auth/munge\n"
        "DbdHost=login\n"
        "SlurmUser=slurm\n"
        "StorageType=accounting_storage/mysql\n"
        "StorageHost=localhost\n"
        "StorageUser=slurm\n"
        "StorageLoc=slurm_acct_db\n"
        "PidFile=/run/slurmdbd/slurmdbd.pid\n"
        "LogFile=/var/log/slurm/slurmdbd.log\n"
    )


def registry_config() -> str:
    """/etc/docker/registry/config.yml: plain HTTP. Source: the registry's configuration reference, version 0.1."""
    return (
        "version: 0.1\n"
        "log:\n  level: warn\n"
        "storage:\n  filesystem:\n    rootdirectory: /var/lib/docker-registry\n  delete:\n    enabled: true\n"
        f"http:\n  addr: :{REGISTRY_PORT}\n"
    )
