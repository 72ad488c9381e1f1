"""``ostap-parallel run``: programs run as python runs them, with their tasks on hosts."""

from __future__ import annotations

import json
import os
import pstats
import signal
import socket
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from ostap_parallel.cli import _parser
from ostap_parallel.cli.run import allot, is_here, split_local

PROJECT = Path(__file__).parents[1]
PATIENCE = 60
LAUNCHER = sys.executable, "-m", "ostap_parallel", "run"

PROGRAM = """\
import json, os, sys
from ostap_parallel import futures
from helper import name

def where(item):
    import helper

    place = os.path.dirname(helper.__file__), os.path.basename(os.getcwd())
    return helper.name(item), os.getpid(), os.nice(0), os.environ.get("PYTHONPATH"), *place

def all_workers(wanted):
    found = {}
    while len(found) < wanted:
        calls = [futures.submit(where, item) for item in range(20)]  # not sent together
        for label, pid, *rest in (call.result() for call in calls):
            found[label, pid] = rest
    return [(*key, *rest) for key, rest in found.items()]

if __name__ == "__main__":
    print(json.dumps([sys.argv, sys.path[0], all_workers(int(sys.argv[1]))]))
"""


@pytest.fixture
def program(tmp_path, hosts):
    """A program and a module of its own, in a directory that hosts do not have."""
    directory = tmp_path / "my programs"
    directory.mkdir()
    (directory / "program.py").write_text(PROGRAM)
    ports = {str(host.port): host.name for host in hosts}
    text = f"import os\nPORTS = {ports!r}\ndef name(item):\n"
    text += "    connection = os.environ.get('SSH_CONNECTION', '')\n"
    text += "    return PORTS.get(connection.rpartition(' ')[2], 'local')\n"
    (directory / "helper.py").write_text(text)
    return directory / "program.py"


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(PROJECT), **more}


def launch(*words: object, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LAUNCHER, *map(str, words)],
        cwd=cwd,
        env=environment(**environ),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def found_by(done):
    """Return what PROGRAM has printed: argv, path, and workers by host."""
    assert done.returncode == 0, done.stderr
    argv, path, workers = json.loads(done.stdout)
    by_host: dict[str, list] = {}
    for label, *rest in workers:
        by_host.setdefault(label, []).append(rest)
    return argv, path, by_host


@pytest.mark.slow
class TestHosts:
    def test_a_program_on_hosts_and_here(self, program, ssh_config, tmp_path):
        words = ["--hosts", "localhost", "h1*2", "h2", "h2", "-n", 5, "--ssh-config", ssh_config]
        words += ["-v", "--nice", 3, "--profile", "--pythonpath", "/more", program, 5, "--hosts"]
        done = launch(*words, cwd=tmp_path)
        argv, path, workers = found_by(done)
        assert argv == [str(program), "5", "--hosts"]
        assert path == str(program.parent)
        assert {host: len(found) for host, found in workers.items()} == {
            "local": 1,
            "h1": 2,
            "h2": 2,
        }
        everyone = [worker for found in workers.values() for worker in found]
        assert {tuple(worker[1:3]) for worker in everyone} == {(os.nice(0) + 3, "/more")}
        assert workers["local"][0][3:] == [str(program.parent), tmp_path.name]
        assert workers["h1"][0][3].startswith("/tmp/ostap-parallel.")
        for host, count in {"localhost": 1, "h1": 2, "h2": 2}.items():
            assert f"host {host}, workers: {count}" in done.stderr
        files = {file.name: file for file in (tmp_path / "profile").iterdir()}
        wanted = {f"{host}-{one[0]}.prof" for host, found in workers.items() for one in found}
        assert set(files) == wanted
        stats = pstats.Stats(str(files[f"h1-{workers['h1'][0][0]}.prof"]))
        assert "where" in {function for _, _, function in stats.stats}

    def test_an_allocation(self, program, ssh_config, tmp_path):
        environ = {"SLURM_JOB_NODELIST": "h[1-2]", "SLURM_TASKS_PER_NODE": "1(x2)"}
        words = ["--ssh-config", ssh_config, program, 2]
        _, _, workers = found_by(launch(*words, cwd=tmp_path, **environ))
        assert {host: len(found) for host, found in workers.items()} == {"h1": 1, "h2": 1}

    def test_a_hostfile_and_a_directory(self, program, ssh_config, hosts, tmp_path):
        for host in hosts:
            (host.home / "work").mkdir(exist_ok=True)
        (tmp_path / "hosts").write_text("h[1-2] slots=1\n")
        prolog = tmp_path / "prolog.sh"
        prolog.write_text("export PYTHONPATH=/prolog\n")
        words = ["--hostfile", tmp_path / "hosts", "--ssh-config", ssh_config]
        words += ["--sync", program.with_name("helper.py"), "--prolog", prolog, program, 2]
        _, _, workers = found_by(launch(*words, cwd=tmp_path))
        assert {name: found[0][2] for name, found in workers.items()} == {
            "h1": "/prolog",
            "h2": "/prolog",
        }

    def test_the_configuration(self, program, ssh_config, tmp_path):
        words = ["-n", 2, "--ssh-config", ssh_config, program, 2]
        _, _, workers = found_by(launch(*words, cwd=tmp_path, OSTAP_PPSERVERS="h1*1"))
        assert {host: len(found) for host, found in workers.items()} == {"local": 1, "h1": 1}

    def test_a_program_of_scoop(self, ssh_config, tmp_path):
        (tmp_path / "tree.py").write_text(
            "from ostap_parallel import futures\n"
            "def grow(depth):\n"
            "    return 1 + sum(futures.map(grow, [depth - 1] * 2)) if depth else 1\n"
        )
        (tmp_path / "program.py").write_text(
            "import ostap_parallel as scoop\n"
            "from ostap_parallel import futures, shared\n"
            "import tree\n"
            "def scaled(x):\n"
            "    return x * shared.getConst('scale', timeout=20) * (not scoop.IS_ORIGIN)\n"
            "if __name__ == '__main__':\n"
            "    shared.setConst(scale=10)\n"
            "    print(list(futures.map(scaled, range(4))), scoop.IS_ORIGIN, scoop.IS_RUNNING)\n"
            "    print(futures.mapReduce(abs, max, [3, -7]))\n"
            "    print(futures.submit(tree.grow, 6).result())\n"
        )
        words = ["--host", "h1", "h1", "h2", "--ssh-config", ssh_config, "--profile", "program.py"]
        done = launch(*words, cwd=tmp_path)
        stats = pstats.Stats(*map(str, (tmp_path / "profile").iterdir())).stats
        calls = Counter()
        for (_, _, name), about in stats.items():
            calls[name] += about[1]
        assert (calls["grow"], calls["scaled"]) == (127, 4)
        assert (done.returncode, done.stdout, done.stderr) == (
            0,
            "[0, 10, 20, 30] True True\n7\n127\n",
            "",
        )


ENDINGS = {
    "status": "sys.exit(3)",
    "text": "sys.exit('no more')",
    "nothing": "sys.exit()",
    "the end": "x = 1",
    "an error": "def f():\n    raise ValueError('bad')\nf()",
    "a chain": "try:\n    1 / 0\nexcept ZeroDivisionError:\n    raise KeyError(1)",
    "syntax": "def f(:",
    "a hook": "sys.excepthook = lambda *error: print(error[0].__name__)\n1 / 0",
    "at exit": "import atexit\natexit.register(print, 'last')\nprint(__name__, __doc__, __file__)",
    "arguments": "print(sys.argv, sys.path[0], __spec__ and __spec__.name, __package__)",
    "a class": "import copy\nclass A:\n    pass\nprint(type(copy.copy(A())))",
}


def same_as_python(words, cwd):
    done = launch("-n", 1, *words, cwd=cwd)
    python = subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment(), capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (
        python.returncode,
        python.stdout,
        python.stderr,
    )


@pytest.mark.slow
@pytest.mark.parametrize("text", ENDINGS.values(), ids=ENDINGS)
def test_a_program_runs_as_with_python(tmp_path, text):
    (tmp_path / "program.py").write_text(f"import sys\n{text}\n")
    same_as_python(["program.py", "-n", "--", "a b"], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["package", "module", "directory", "zip", "link", "no module"])
def test_all_kinds_of_programs(tmp_path, how):
    text = ENDINGS["arguments"] + "\nimport beside\nraise OSError('end')"
    package = tmp_path / "package"
    package.mkdir()
    for name in "__main__.py", "inner.py", "program.py":
        (package / name).write_text(f"import sys\n{text}\n")
    for directory in tmp_path, package:
        (directory / "beside.py").touch()
    (package / "__init__.py").touch()
    with zipfile.ZipFile(tmp_path / "program.pyz", "w") as archive:
        for file in package.iterdir():
            archive.write(file, file.name)
    (tmp_path / "link.py").symlink_to(package / "program.py")
    words = {
        "package": ["-m", "package", "-v"],
        "module": ["-m", "package.inner", "-m", "x"],
        "directory": ["package", "a"],
        "zip": ["program.pyz", "a"],
        "link": ["link.py", "a"],
        "no module": ["-m", "gone"],
    }[how]
    same_as_python(words, tmp_path)


@pytest.mark.slow
def test_a_thread_outlives_the_program(tmp_path):
    text = "from ostap_parallel import futures\nimport threading\n"
    text += (
        "def f():\n    threading.main_thread().join()\n    print(list(futures.map(abs, [-1])))\n"
    )
    (tmp_path / "program.py").write_text(f"{text}threading.Thread(target=f).start()\n")
    done = launch("-n", 1, "program.py", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[1]\n", "")


@pytest.mark.slow
def test_ctrl_c(tmp_path):
    text = "from ostap_parallel import futures\nimport time\n"
    text += "f = futures.submit(time.sleep, 60)\nprint('begun', flush=True)\nf.result()\n"
    (tmp_path / "program.py").write_text(text)
    words = [*LAUNCHER, "-n", "1", "program.py"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, cwd=tmp_path, env=environment(), **pipes) as running:
        assert running.stdout.readline() == "begun\n"
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=PATIENCE)
    assert running.returncode == 130
    assert errors.endswith("KeyboardInterrupt\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["gone.py"], "no such program: gone.py"),
        (["--hosts", "h1", "h2"], "write -- behind a list of hosts"),
        (["--no-tunnel", "x.py"], "--no-tunnel: all data goes through ssh"),
        (["--path", "gone", "x.py"], "--path: gone: No such file or directory"),
        (["--nic", "1", "x.py"], "unrecognized arguments: --nic"),
        (["-n", "0", "x.py"], "-n: not a number of at least 1: '0'"),
        (["--hosts", "h1*x", "--", "x.py"], "host 'h1*x'"),
        (["--hostfile", "gone", "x.py"], "--hostfile: gone cannot be read"),
        (["--prolog", "gone", "--hosts", "h1", "--", "x.py"], "script: no such file"),
        (["--hosts", "h1", "--hostfile", "f", "x.py"], "not allowed with argument"),
        (["--sync", "gone", "--hosts", "h1", "--", "x.py"], "sync: no such file or directory"),
    ],
)
def test_what_is_wrong_is_told_first(tmp_path, words, text):
    (tmp_path / "x.py").write_text("print('it ran')")
    done = launch(*words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert text in done.stderr


@pytest.mark.parametrize(
    ("words", "rest", "listed"),
    [
        ("--hosts a b*4 -n 3 p.py --hosts c", "p.py --hosts c", "a b*4"),
        ("--hosts a b*4 ./p -n 3", "./p -n 3", "a b*4"),
        ("--host a b -- p --", "p --", "a b"),
        ("-vv p -v", "p -v", None),
        ("-n 3 -v -m mod -n 4 x", "-n 4 x", None),
        ("--hosts=a p", "p", "a"),
        ("--hosts a -m mod", "", "a"),
    ],
)
def test_options_end_where_the_program_begins(words, rest, listed):
    args = _parser().parse_args(["run", *words.split()])
    assert args.program == rest.split()
    assert args.hosts == (listed and listed.split())


@pytest.mark.parametrize(
    ("shares", "total", "wanted"),
    [
        ("a:2 b:2 c:2", 3, "a:2 b:1"),
        ("a:2 b:1", 6, "a:4 b:2"),
        ("a b", 5, "a:3 b:2"),
        ("a b c", 2, "a:1 b:1"),
    ],
)
def test_workers_in_all(shares, total, wanted):
    def read(text):
        pairs = (one.partition(":") for one in text.split())
        return [(host, int(count) if count else None) for host, _, count in pairs]

    assert allot(read(shares), total) == read(wanted)


def test_this_machine(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "node7.cluster.org")
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    for name in "localhost", "127.0.0.1", "node7", "NODE7.cluster.org", "n7":
        assert is_here(name)
    for name in "node", "node7.other.org", "me@localhost", "localhost:2222", "node70":
        assert not is_here(name)
    shares = [("node7", 2), ("a", None), ("localhost", None), ("b", 3)]
    assert split_local(shares) == (3, ["a", "b*3"])


USERS = {
    "manager": """\
from ostap_parallel import WorkManager
with WorkManager(silent=True) as wm:
    print(sorted(set(wm.process(where, range(60)))))
""",
    "auto": """\
from ostap_parallel import WorkManager
with WorkManager(servers="auto", silent=True) as wm:
    print(sorted(set(wm.process(where, range(60)))))
""",
    "pool": """\
from ostap_parallel import Pool
with Pool(initializer=set_up, initargs=(5,)) as pool:
    print(sorted(set(pool.map(where, range(60)))))
    assert set(pool.map(what_was_set, range(9))) == {5}
""",
    "executor": """\
from ostap_parallel import Executor
with Executor() as executor:
    print(sorted(set(executor.map(where, range(60)))))
""",
    "joblib": """\
import joblib
from ostap_parallel.joblib import register
register()
with joblib.parallel_config(backend="ostap"):
    print(sorted(set(joblib.Parallel()(joblib.delayed(where)(n) for n in range(60)))))
""",
    "pathos": """\
from ostap_parallel.pools import ParallelPool
pool = ParallelPool()
print(sorted(set(pool.map(where, range(60)))))
pool.close()
""",
}

WHERE = """\
import os, sys, time

def where(item):
    time.sleep(0.02)
    return os.path.basename(os.environ.get("PRIVATE_SSHD", "local"))

def set_up(value):
    sys.was_set = value

def what_was_set(item):
    time.sleep(0.02)
    return sys.was_set

"""

NOT_USED = "ostap-parallel run: the hosts were not used (h1*1 h2*1)"


@pytest.mark.slow
class TestOtherWaysIn:
    @pytest.mark.parametrize("user", USERS)
    def test_they_have_the_hosts(self, ssh_config, tmp_path, user):
        (tmp_path / "program.py").write_text(WHERE + USERS[user])
        words = ["--hosts", "h1*1", "h2*1", "--ssh-config", ssh_config, "program.py"]
        done = launch(*words, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (0, "['h1', 'h2']\n"), done.stderr
        assert NOT_USED not in done.stderr

    def test_those_of_an_allocation(self, ssh_config, tmp_path):
        (tmp_path / "program.py").write_text(WHERE + USERS["manager"])
        environ = {"SLURM_JOB_NODELIST": "h[1-2]", "SLURM_TASKS_PER_NODE": "1(x2)"}
        done = launch("--ssh-config", ssh_config, "program.py", cwd=tmp_path, **environ)
        assert (done.returncode, done.stdout) == (0, "['h1', 'h2']\n"), done.stderr

    @pytest.mark.parametrize(
        "text",
        [
            "from ostap_parallel import Pool\nwith Pool(1) as pool: print(pool.map(where, [1]))",
            "print([where(1)])",
        ],
    )
    def test_who_does_without_them_is_told(self, ssh_config, tmp_path, text):
        (tmp_path / "program.py").write_text(WHERE + text)
        words = ["--hosts", "h1*1", "h2*1", "--ssh-config", ssh_config, "program.py"]
        done = launch(*words, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (0, "['local']\n"), done.stderr
        assert NOT_USED in done.stderr
