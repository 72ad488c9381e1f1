"""Real batch systems on this machine, each in a directory of its own: SLURM and SGE.

Nothing is read or written in /etc or /var, no port is fixed, and only what was started is ended.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

from cable import Cable
from roomy import temporary_root

READY = 90.0  # seconds that daemons may take to begin, or to end
SGE_PROGRAMS = Path("/usr/lib/gridengine")
MEMORY_GROUPS = Path("/sys/fs/cgroup/memory")


class Unavailable(Exception):
    """The batch system cannot be had here."""


@dataclass
class Cluster:
    """A batch system.

    Attributes
    ----------
    environ
        What its commands, and who uses them, need in the environment.
    directory
        Where all of it is.
    has_accounts, has_groups
        Whether sacct answers, and whether memory is limited by control groups; SLURM only.
    """

    name: str
    directory: Path
    environ: dict[str, str]
    slots: int
    has_accounts: bool = False
    has_groups: bool = False
    nodes: list[str] = field(default_factory=list)
    _daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _argv: dict[str, Sequence[str]] = field(default_factory=dict)
    _before: dict[str, str] = field(default_factory=lambda: dict(os.environ))

    def run(self, *argv: str, data: str = "") -> str:
        """Run a command; return what it printed."""
        done = subprocess.run(
            argv, env={**os.environ, **self.environ}, input=data, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        return done.stdout

    def try_(self, *argv: str) -> str:
        """Run a command that may fail; return what it printed."""
        environ = {**os.environ, **self.environ}
        return subprocess.run(argv, env=environ, capture_output=True, text=True).stdout

    def start(self, daemon: str, *argv: str) -> None:
        """Start a daemon, or start one again by its name."""
        self._argv[daemon] = argv or self._argv[daemon]
        # killed with this process, however that ends; and jobs that crash leave no core
        bound = ["setpriv", "--pdeathsig", "KILL", "prlimit", "--core=0"]
        with (self.directory / f"{daemon}.out").open("ab") as out:
            self._daemons[daemon] = subprocess.Popen(
                [*bound, *self._argv[daemon]],
                env={**self._before, **self.environ},  # nothing of a test's that starts it again
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def stop(self, daemon: str, number: int = signal.SIGKILL) -> None:
        """End a daemon."""
        process = self._daemons.pop(daemon)
        process.send_signal(number)
        try:
            process.wait(READY)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def signal(self, daemon: str, number: int) -> None:
        """Send a signal to a daemon that runs."""
        if process := self._daemons.get(daemon):
            process.send_signal(number)

    def jobs(self) -> list[str]:
        """Return the lines of the jobs that wait or run."""
        argv = ["squeue", "-h"] if self.name == "slurm" else ["qstat", "-u", "*"]
        lines = self.try_(*argv).splitlines()
        return lines if self.name == "slurm" else lines[2:]

    def unfit(self) -> list[str]:
        """Return the nodes or queues that take no jobs now, with their states and the reasons."""
        if self.name == "slurm":
            lines = self.try_("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T %E").splitlines()
            is_fit = [words[1:2] == ["idle"] for words in map(str.split, lines)]
        else:
            lines = [line for line in self.try_("qstat", "-f").splitlines() if "@" in line]
            is_fit = [len(line.split()) == 5 for line in lines]  # the sixth word is its state
        if not lines:
            return ["nobody answers"]
        return [line for line, fit in zip(lines, is_fit, strict=True) if not fit]

    def resume(self) -> None:
        """Have nodes or queues take jobs again that were taken out, as who looks after them."""
        if self.name == "sge":
            self.try_("qmod", "-c", "*")
            return
        for line in self.unfit():
            self.try_("scontrol", "update", f"nodename={line.split()[0]}", "state=resume")

    def cancel_all(self) -> None:
        """Cancel all jobs, and wait until they are gone."""
        deadline = time.monotonic() + READY
        if self.name == "slurm":
            self.try_("scancel", "--quiet", f"--user={os.getuid()}")
        else:
            self.try_("qdel", "-f", "-u", "*")
        while self.jobs() and time.monotonic() < deadline:
            time.sleep(0.05)

    def close(self) -> None:
        """Cancel all jobs and end all daemons."""
        self.cancel_all()
        for daemon in reversed(list(self._daemons)):
            # slurmd ends its steps' keepers when it is asked to; the others leave nothing
            asked = daemon.startswith(("slurmd", "mariadb"))
            self.stop(daemon, signal.SIGTERM if asked else signal.SIGKILL)
        for pid in processes_in(self.directory):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.has_groups:
            remove_groups(self.nodes)
        shutil.rmtree(self.directory, ignore_errors=True)


def processes_in(directory: Path) -> list[int]:
    """Return the processes with a directory in their arguments or environment."""
    needle = os.fsencode(f"{directory}/")
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                text = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                if needle in text:
                    found.append(int(entry.name))
    return found


def remove_groups(nodes: Sequence[str]) -> None:
    """Remove the control groups of nodes."""
    for node in nodes:
        for root in Path("/sys/fs/cgroup").glob(f"*/slurm_{node}"):
            for group in sorted(root.rglob("*/"), key=lambda path: -len(path.parts)):
                with contextlib.suppress(OSError):
                    group.rmdir()
            with contextlib.suppress(OSError):
                root.rmdir()


def free_ports(count: int) -> list[int]:
    """Return ports that nobody has at the moment."""
    with contextlib.ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
        ]
        return [one.getsockname()[1] for one in sockets]


def until(predicate, what: str, cluster: Cluster) -> None:
    """Wait until something is true; else tell what the daemons said."""
    deadline = time.monotonic() + READY
    while not predicate():
        if time.monotonic() > deadline:
            logs = [*cluster.directory.glob("*.out"), *cluster.directory.glob("*.log")]
            texts = "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in logs)
            raise Unavailable(f"not within {READY} s: {what}\n{texts}")
        time.sleep(0.05)


def need(*programs: str) -> None:
    """Raise `Unavailable` where it cannot run."""
    if os.geteuid():
        raise Unavailable("batch systems are started as root only")
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    wanted = ("setpriv", "prlimit", *programs)
    if missing := [name for name in wanted if shutil.which(name, path=path) is None]:
        raise Unavailable(f"not installed: {', '.join(missing)}")


@contextmanager
def private_directory() -> Iterator[Path]:
    """A directory that jobs of any user may look into, with a short name."""
    directory = Path(tempfile.mkdtemp(prefix="ob-", dir=temporary_root()))
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


SLURM_CONF = """\
ClusterName=tb
SlurmctldHost=localhost({address})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=200
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,batch_sched_delay=0,sched_min_interval=0
JobCompType=jobcomp/none
ReturnToService=2
SlurmdTimeout=5
SlurmctldTimeout=5
MessageTimeout=2
TCPTimeout=1
MinJobAge=300
KillWait=10
OverTimeLimit=0
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
"""


@contextmanager
def open_slurm(
    nodes: int = 2,
    cpus: int = 2,
    accounts: bool = True,
    extra: str = "",
    cables: Sequence[Cable] = (),
) -> Iterator[Cluster]:
    """Run a SLURM of virtual nodes on this machine; raises `Unavailable`.

    The first nodes are at the far ends of cables, if there are some.

    Partitions: ``main``, the default one; ``urgent``, for which jobs of ``main`` are begun anew;
    ``soft``, whose jobs are cancelled for those, with a grace of two minutes; and ``short``, with
    a limit of one minute.
    """
    need("slurmctld", "slurmd", "sbatch", *(["slurmdbd", "mariadbd"] if accounts else []))
    with private_directory() as directory, contextlib.ExitStack() as stack:
        port, accounts_port, *ports = free_ports(nodes + 2)
        names = [f"{directory.name[3:].replace('_', 'x')}-{i}" for i in range(1, nodes + 1)]
        conf = directory / "slurm.conf"
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        environ = {"SLURM_CONF": str(conf), "PATH": path}
        cluster = Cluster("slurm", directory, environ, nodes * cpus, nodes=names)
        stack.callback(cluster.close)
        cluster.has_groups = MEMORY_GROUPS.is_dir() and os.access(MEMORY_GROUPS, os.W_OK)
        (directory / "state").mkdir()
        near = cables[0].near if cables else "127.0.0.1"
        text = SLURM_CONF.format(port=port, directory=directory, address=near) + extra
        if accounts:
            start_accounts(cluster, accounts_port)
            text += "AccountingStorageType=accounting_storage/slurmdbd\n"
            text += f"AccountingStorageHost=localhost\nAccountingStoragePort={accounts_port}\n"
        kind = "cgroup" if cluster.has_groups else "linuxproc"
        text += f"ProctrackType=proctrack/{kind}\nJobAcctGatherType=jobacct_gather/none\n"
        text += f"TaskPlugin=task/{'cgroup' if cluster.has_groups else 'none'}\n"
        here = socket.gethostname().partition(".")[0]
        addresses = [*(cable.far for cable in cables), *["127.0.0.1"] * nodes]
        for name, node_port, address in zip(names, ports, addresses, strict=False):
            text += f"NodeName={name} NodeHostname={here} NodeAddr={address} Port={node_port} "
            text += f"CPUs={cpus} RealMemory=1000 State=UNKNOWN\n"
        every = f"Nodes={','.join(names)} State=UP"
        text += f"PartitionName=main {every} Default=YES MaxTime=INFINITE PriorityTier=1\n"
        text += f"PartitionName=urgent {every} PriorityTier=10\n"
        text += f"PartitionName=short {every} MaxTime=1\n"
        text += f"PartitionName=soft {every} PriorityTier=1 PreemptMode=CANCEL GraceTime=120\n"
        conf.write_text(text)
        groups = "CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\n"
        (directory / "cgroup.conf").write_text(f"{groups}ConstrainRAMSpace=yes\n")
        cluster.start("slurmctld", "slurmctld", "-D", "-f", str(conf))
        for name, cable in zip_longest(names, cables):
            (directory / f"spool-{name}").mkdir()
            argv = [] if cable is None else ["nsenter", f"--net={cable.space}"]
            cluster.start(f"slurmd-{name}", *argv, "slurmd", "-D", "-N", name, "-f", str(conf))
        count = str(nodes)
        until(
            lambda: f"idle {count}" in cluster.try_("sinfo", "-h", "-p", "main", "-o", "%t %D"),
            "its nodes are idle",
            cluster,
        )
        if accounts:
            cluster.has_accounts = True  # once the controller has told its address there
            command = "sacctmgr", "-nP", "show", "cluster"
            until(lambda: "127.0.0.1" in cluster.try_(*command), "it has accounts", cluster)
        yield cluster


def start_accounts(cluster: Cluster, port: int) -> None:
    """Start a data base and slurmdbd, so that sacct answers."""
    directory = cluster.directory
    sock, data = directory / "sql", directory / "data"
    options = ["--no-defaults", "--user=root", f"--datadir={data}"]
    method = "--auth-root-authentication-method=normal"
    options += ["--innodb-buffer-pool-size=16M", "--innodb-log-file-size=8M"]
    cluster.run("mariadb-install-db", *options, method, "--skip-test-db")
    small = "--innodb-lock-wait-timeout=900", "--skip-log-bin"
    socket_ = f"--socket={sock}"
    cluster.start("mariadb", "mariadbd", *options, socket_, "--skip-networking", *small)
    client = ["mariadb", "--no-defaults", "-S", str(sock), "-e"]
    until(lambda: "1" in cluster.try_(*client, "SELECT 1"), "the data base answers", cluster)
    user = "CREATE USER 'slurm'@'localhost' IDENTIFIED BY 'x'"
    grant = "GRANT ALL ON slurm_acct_db.* TO 'slurm'@'localhost'"
    cluster.run(*client, f"CREATE DATABASE slurm_acct_db; {user}; {grant}")
    conf = directory / "slurmdbd.conf"
    conf.write_text(
        f"AuthType=auth/none\nDbdHost=localhost\nDbdAddr=127.0.0.1\nDbdPort={port}\n"
        "SlurmUser=root\nStorageType=accounting_storage/mysql\nStorageHost=localhost\n"
        "StorageUser=slurm\nStoragePass=x\nStorageLoc=slurm_acct_db\n"
        f"LogFile={directory}/slurmdbd.log\nPidFile={directory}/slurmdbd.pid\n"
    )
    conf.chmod(0o600)
    # the client library knows of another socket only by this variable
    cluster.start("slurmdbd", "env", f"MYSQL_UNIX_PORT={sock}", "slurmdbd", "-D")
    until(lambda: is_listening(port), "slurmdbd listens", cluster)


def is_listening(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


SGE_BOOTSTRAP = """\
admin_user              root
default_domain          none
ignore_fqdn             true
spooling_method         classic
spooling_lib            libspoolc
spooling_params         {common};{directory}/qmaster
binary_path             {programs}
qmaster_spool_dir       {directory}/qmaster
security_mode           none
listener_threads        2
worker_threads          2
scheduler_threads       1
"""

SGE_SCHEDULER = """\
algorithm                         default
schedule_interval                 0:0:1
maxujobs                          0
queue_sort_method                 load
job_load_adjustments              NONE
load_adjustment_decay_time        0:0:0
load_formula                      np_load_avg
schedd_job_info                   true
flush_submit_sec                  1
flush_finish_sec                  1
params                            none
reprioritize_interval             0:0:0
halftime                          168
usage_weight_list                 cpu=1.000000,mem=0.000000,io=0.000000
compensation_factor               5.000000
weight_user                       0.250000
weight_project                    0.250000
weight_department                 0.250000
weight_job                        0.250000
weight_tickets_functional         0
weight_tickets_share              0
share_override_tickets            TRUE
share_functional_shares           TRUE
max_functional_jobs_to_schedule   200
report_pjob_tickets               TRUE
max_pending_tasks_per_job         50
halflife_decay_list               none
policy_hierarchy                  OFS
weight_ticket                     0.010000
weight_waiting_time               0.000000
weight_deadline                   3600000.000000
weight_urgency                    0.100000
weight_priority                   1.000000
max_reservation                   0
default_duration                  INFINITY
"""

SGE_HOST = """\
hostname {host}
load_scaling NONE
complex_values NONE
user_lists NONE
xuser_lists NONE
projects NONE
xprojects NONE
usage_scaling NONE
report_variables NONE
"""

SGE_ENVIRONMENT = """\
pe_name smp
slots 999
user_lists NONE
xuser_lists NONE
start_proc_args NONE
stop_proc_args NONE
allocation_rule $pe_slots
control_slaves TRUE
job_is_first_task TRUE
urgency_slots min
accounting_summary FALSE
qsort_args NONE
"""

_SGE_SETTINGS = {
    "min_uid": "0",
    "min_gid": "0",
    "load_report_time": "00:00:01",
    "max_unheard": "00:00:10",
    "mailer": "/bin/true",
    "administrator_mail": "none",
    "execd_params": "none",
    # A job that is killed in start-up files of the developer's may leave locks of theirs behind.
    "login_shells": "none",
}


@contextmanager
def open_sge(slots: int = 4) -> Iterator[Cluster]:
    """Run a cell of SGE with this machine as its host, and a queue ``all.q``.

    Raises `Unavailable`.
    """
    need("qsub", "qstat", "qconf")
    if not (SGE_PROGRAMS / "spoolinit").exists():
        raise Unavailable("not installed: gridengine-master")
    with private_directory() as directory, contextlib.ExitStack() as stack:
        master, execution = free_ports(2)
        environ = {
            "SGE_ROOT": str(directory),
            "SGE_CELL": "default",
            "SGE_ARCH": "lx-amd64",
            "SGE_QMASTER_PORT": str(master),
            "SGE_EXECD_PORT": str(execution),
            "SGE_ND": "1",
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        }
        cluster = Cluster("sge", directory, environ, slots)
        stack.callback(cluster.close)
        make_cell(cluster)
        cluster.start("qmaster", str(SGE_PROGRAMS / "sge_qmaster"))
        until(lambda: cluster.try_("qconf", "-sh"), "qmaster answers", cluster)
        set_up_queue(cluster, slots)
        cluster.start("execd", str(SGE_PROGRAMS / "sge_execd"))

        def is_ready() -> bool:
            lines = [line.split() for line in cluster.try_("qstat", "-f").splitlines()]
            return any(words[:1] and "all.q@" in words[0] and len(words) == 5 for words in lines)

        until(is_ready, "its queue is up", cluster)
        stack.enter_context(reminding(cluster, "execd"))
        yield cluster


@contextmanager
def reminding(cluster: Cluster, daemon: str) -> Iterator[None]:
    """Tell a daemon again and again of children that have ended.

    On a machine with much to do SGE's may miss the first signal, and looks for them once a minute.
    """
    over = threading.Event()

    def remind() -> None:
        while not over.wait(0.5):
            cluster.signal(daemon, signal.SIGCHLD)

    thread = threading.Thread(target=remind, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def make_cell(cluster: Cluster) -> None:
    """Write the files of a cell, as its installation would."""
    directory, host = cluster.directory, socket.gethostname()
    common = directory / "default" / "common"
    for path in common, directory / "qmaster" / "job_scripts", directory / "execd":
        path.mkdir(parents=True)
    for name in "bin", "utilbin", "lib":
        (directory / name).mkdir()
        (directory / name / "lx-amd64").symlink_to(SGE_PROGRAMS)
    (directory / "util").symlink_to("/usr/share/gridengine/util")
    (common / "act_qmaster").write_text(f"{host}\n")
    (common / "host_aliases").write_text(f"{host} localhost\n")
    texts = {"common": common, "directory": directory, "programs": SGE_PROGRAMS}
    (common / "bootstrap").write_text(SGE_BOOTSTRAP.format(**texts))
    places = f"{common};{directory}/qmaster"
    cluster.run(str(SGE_PROGRAMS / "spoolinit"), "classic", "libspoolc", places, "init")
    lines = []
    for line in Path("/usr/share/gridengine/default-configuration").read_text().splitlines():
        name = line.split(" ")[0]
        if name == "execd_spool_dir":
            line = f"execd_spool_dir {directory}/execd"
        elif name in _SGE_SETTINGS:
            line = f"{name} {_SGE_SETTINGS[name]}"
        lines.append(line.replace("flush_time=00:00:15", "flush_time=00:00:01"))
    (directory / "conf").write_text("\n".join([*lines, ""]))
    defaults = str(SGE_PROGRAMS / "spooldefaults")
    resources = "/usr/share/gridengine/util/resources"
    cluster.run(defaults, "configuration", f"{directory}/conf")
    cluster.run(defaults, "complexes", f"{resources}/centry")
    cluster.run(defaults, "usersets", f"{resources}/usersets")
    cluster.run(defaults, "managers", "root")
    cluster.try_(defaults, "adminhosts", host)


def set_up_queue(cluster: Cluster, slots: int) -> None:
    """Give a cell its host, scheduler, parallel environment and queue."""
    directory, host = cluster.directory, socket.gethostname()
    cluster.try_("qconf", "-ah", host)
    cluster.run("qconf", "-as", host)
    group = f"group_name @allhosts\nhostlist {host}\n"
    settings = {
        "-Msconf": SGE_SCHEDULER,
        "-Ae": SGE_HOST.format(host=host),
        "-Ahgrp": group,
        "-Ap": SGE_ENVIRONMENT,
    }
    for option, text in settings.items():
        (directory / "setting").write_text(text)
        cluster.try_("qconf", option, f"{directory}/setting")
    wanted = {
        "qname": "all.q",
        "hostlist": "@allhosts",
        "slots": str(slots),
        "shell": "/bin/sh",
        "load_thresholds": "NONE",
        "pe_list": "smp",
        "notify": "00:00:03",
        "tmpdir": str(cluster.directory),  # jobs of other cells have the same numbers
    }
    lines = []
    for line in cluster.run("qconf", "-sq").splitlines():
        name = line.split(" ")[0]
        lines.append(f"{name} {wanted[name]}" if name in wanted else line)
    (directory / "setting").write_text("\n".join([*lines, ""]))
    cluster.run("qconf", "-Aq", f"{directory}/setting")
