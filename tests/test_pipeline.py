"""LOFAR's recipes and node scripts on real hosts, and data maps."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from helpers import wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from sshd import describe

from ostap_parallel.errors import ConfigError
from ostap_parallel.pipeline import (
    BaseRecipe,
    ComputeJob,
    DataMap,
    DataMapError,
    DataProduct,
    MultiDataMap,
    RemoteCommandRecipeMixIn,
    align_data_maps,
    load_data_map,
    store_data_map,
    validate_data_maps,
)
from ostap_parallel.pipeline.state import MAGIC, State

PATIENCE = 60
EXAMPLE = Path(__file__).parents[1] / "examples" / "pipeline"

NODE = """
import os, sys
from ostap_parallel.pipeline import LOFARnode, LOFARnodeTCP

class script({base}):
    def run(self, *args):
        {body}

if __name__ == "__main__":
    {main}
"""
TWO_WORDS = "sys.exit(script(sys.argv[1], sys.argv[2]).run_with_logging(*sys.argv[3:]))"
THREE_WORDS = (
    "jobid, host, port = sys.argv[1:4]; "
    "sys.exit(script(jobid, host, port).run_with_stored_arguments())"
)


class Recipe(BaseRecipe, RemoteCommandRecipeMixIn):
    pass


@pytest.fixture
def node(tmp_path):
    """A function that writes a node script and returns the command for it."""

    def write(body, base="LOFARnodeTCP", main=THREE_WORDS):
        path = tmp_path / "script.py"
        path.write_text(NODE.format(body=body, base=base, main=main))
        return f"python {path}"

    return write


@pytest.fixture
def recipe(hosts, caplog):
    """A recipe for the hosts of the tests."""
    caplog.set_level(logging.DEBUG)
    recipe = Recipe()
    recipe.settings = {"ssh_config": hosts.ssh_config, "config": ()}
    return recipe


class TestTheExample:
    """The two programs of LOFAR's own documents, with other imports."""

    def start(self, *words, **options):
        program = EXAMPLE / "master" / "example_parallel.py"
        done = subprocess.run(
            [sys.executable, program, *words], capture_output=True, text=True, **options
        )
        return done.returncode, done.stdout, done.stderr.splitlines()

    def test_a_report_without_a_place_is_refused_at_once(self, tmp_path):
        status, out, lines = self.start("-j", "foo", "--report", str(tmp_path / "none" / "x"))
        assert (status, out) == (2, "")
        assert f"{tmp_path}/none/x is a directory, or in none that is there" in lines[-1]

    @pytest.mark.slow
    def test_here(self):
        status, out, lines = self.start("-j", "foo", "-d")
        assert (status, out) == (0, "Results:\n"), lines
        stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
        wanted = [
            "DEBUG   example_parallel: Dispatching command to localhost as a process",
            "INFO    example_parallel: Waiting for compute threads...",
            f"INFO    node.{platform.node()}.example_parallel: "
            "Received example_argument as argument",
            "INFO    example_parallel: recipe example_parallel completed",
        ]
        positions = []
        for text in wanted:
            found = [
                n for n, line in enumerate(lines) if re.fullmatch(stamp + re.escape(text), line)
            ]
            assert len(found) == 1, (text, lines)
            positions += found
        assert positions == sorted(positions)

    @pytest.mark.slow
    def test_only_what_is_asked_for_is_told(self):
        assert self.start("-j", "foo") == (0, "Results:\n", [])

    def test_a_name_is_needed(self):
        assert self.start()[0] == 2

    @pytest.mark.slow
    def test_a_failure(self, tmp_path):
        shutil.copytree(EXAMPLE, tmp_path / "p")
        (tmp_path / "p/nodes/example_parallel.py").write_text("raise SystemExit(3)")
        program = tmp_path / "p/master/example_parallel.py"
        done = subprocess.run([sys.executable, program, "-j", "x"], capture_output=True, text=True)
        assert done.returncode == 1
        assert "failed on localhost: exit status 3" in done.stderr


class TestJobs:
    @pytest.mark.slow
    def test_objects_go_there_and_outputs_come_back(self, recipe, node):
        command = node(
            "self.outputs['sum'] = sum(args[0]); self.outputs['kinds'] = args; return 0"
        )
        arguments = [[1, 2, 3], {"a": (None, 1.5)}, b"\\0"]
        jobs = [ComputeJob("localhost", command, arguments) for _ in range(3)]
        pool = recipe._schedule_jobs(jobs)
        assert pool == dict(enumerate(jobs))
        for job in jobs:
            assert job.results["returncode"] == 0
            assert job.results["sum"] == 6
            assert job.results["kinds"] == tuple(arguments)
            assert float(job.results["job_duration"]) > 0
            assert job.results["monitor_stats"]["cpu"] >= 0
        assert not recipe.error.is_set()
        assert [row["job_id"] for row in json.loads(recipe.outputs["return_json"])] == [0, 1, 2]

    @pytest.mark.parametrize(
        ("base", "main"), [("LOFARnode", TWO_WORDS), ("LOFARnodeTCP", THREE_WORDS)]
    )
    @pytest.mark.parametrize("arguments", [[], ["0"], ["it's", "$HOME"]])
    def test_both_forms(self, recipe, node, base, main, arguments):
        command = node("self.outputs['args'] = args", base, main)
        job = ComputeJob("localhost", command, arguments)
        recipe._schedule_jobs([job])
        assert job.results["returncode"] == 0
        assert job.results["args"] == tuple(arguments)

    def test_large_arguments(self, recipe, node):
        job = ComputeJob("localhost", node("self.outputs['n'] = len(args[0])"), ["x" * 3_000_000])
        recipe._schedule_jobs([job])
        assert job.results["n"] == 3_000_000

    @pytest.mark.slow
    def test_failures(self, recipe, node):
        body = "{'exit': lambda: sys.exit(7), 'kill': lambda: os.kill(os.getpid(), 11), "
        body += "'raise': lambda: 1 / 0, 'well': lambda: None}[args[0]]()"
        command = node(body)
        jobs = [
            ComputeJob("localhost", command, [how]) for how in ("exit", "kill", "raise", "well")
        ]
        recipe._schedule_jobs(jobs)
        assert [job.results["returncode"] for job in jobs] == [7, -signal.SIGSEGV, 1, 0]
        assert recipe.error.is_set()

    def test_records(self, recipe, node, caplog):
        body = "self.logger.debug('all %s', 1); print('out'); print('err', file=sys.stderr)"
        recipe._schedule_jobs([ComputeJob("localhost", node(body))])
        found = {(r.name, r.levelname, r.getMessage()) for r in caplog.records}
        assert (f"node.{platform.node()}.script", "DEBUG", "all 1") in found
        assert ("node.local.script", "DEBUG", "out") in found
        assert ("node.local.script", "WARNING", "err") in found

    def test_resources(self, recipe, node):
        command = node("self.outputs['threads'] = os.environ['OMP_NUM_THREADS']")
        job = ComputeJob("localhost", command, resources={"cores": 2})
        recipe._schedule_jobs([job])
        assert job.results["threads"] == "2"

    def test_nothing_listens(self, recipe, node, tmp_path):
        body = "self.outputs['listening'] = "
        body += "open('/proc/net/tcp').read() + open('/proc/net/tcp6').read()"
        before = here()
        job = ComputeJob("localhost", node(body))
        recipe._schedule_jobs([job])
        # what goes on listening is of others on this machine
        found = listening(job.results["listening"]) - before - here()
        assert {one for one in found if one[0] != "0100007F"} == set()

    def test_no_jobs(self, recipe):
        assert recipe._schedule_jobs([]) == {}


def here():
    return listening(Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text())


def listening(text):
    rows = (line.split() for line in text.splitlines())
    return {tuple(row[1].split(":")) for row in rows if len(row) > 3 and row[3] == "0A"}


# Accounts of hosts, each with the user of this machine who has it, and what a job of one does
# while the other's runs: it looks what there is of whom, and what of that it may read; that of bob
# goes on after all of ann's has gone.
USERS = {"ann": 54321, "bob": 54322}
CLIENTS = {"ann": "daemon", "bob": "nobody"}
LOOK = """
import glob, json, os, sys, threading, time

def until(happened):
    deadline = time.monotonic() + 100
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)

def owners(paths):
    return sorted({os.stat(path).st_uid for path in paths})

def look(folder):
    paths = glob.glob(folder + "/ostap-parallel*")
    readable = [path for path in paths if os.access(path, os.R_OK) or os.access(path, os.X_OK)]
    return {"uid": os.getuid(), "all": owners(paths), "open": owners(readable)}
"""
USER = (
    LOOK
    + """
from ostap_parallel.pipeline import LOFARnodeTCP

class script(LOFARnodeTCP):
    def run(self, name, other):
        open("/tmp/there-" + name, "w").close()
        until(lambda: os.path.exists("/tmp/there-" + other))
        until(lambda: os.path.exists("/tmp/go"))
        self.outputs.update(look("/tmp"))
        with open("/tmp/there-" + name, "w") as file:
            file.write("seen")
        until(lambda: open("/tmp/there-" + other).read())
        if name == "bob":
            until(lambda: owners(glob.glob("/tmp/ostap-parallel*")) == [os.getuid()])
        return 0

jobid, host, port = sys.argv[1:4]
sys.exit(script(jobid, host, port).run_with_stored_arguments())
"""
)

# What a user runs here; it looks around, too, while the jobs of both are held up.
CLIENT = (
    LOOK
    + """
import tempfile
from ostap_parallel.pipeline import BaseRecipe, ComputeJob, RemoteCommandRecipeMixIn

class Recipe(BaseRecipe, RemoteCommandRecipeMixIn):
    pass

name, other, command, hosts = sys.argv[1:]
here = tempfile.gettempdir()

def report():
    until(lambda: len(owners(glob.glob(here + "/ostap-parallel*"))) == 2)
    with open(f"{here}/found-{name}", "w") as file:
        json.dump(look(here), file)
    os.rename(f"{here}/found-{name}", f"{here}/told-{name}")

threading.Thread(target=report, daemon=True).start()
recipe = Recipe()
recipe.settings = {"ssh_config": f"{os.path.dirname(__file__)}/config", "config": ()}
recipe.servers = [f"{name}@{host}" for host in hosts.split()]
jobs = [ComputeJob(host, command, [name, other]) for host in hosts.split()]
recipe._schedule_jobs(jobs)
keys = "returncode", "uid", "all", "open"
print(json.dumps([{key: job.results.get(key) for key in keys} for job in jobs]))
"""
)

# Has a directory that others may not enter hold nothing but one of those in it, which they may:
# the interpreter may be in the home of who runs the tests. $1 is the one, $2 the other.
OPEN = """
set -e
if [ "$1" ]; then
    mount -t tmpfs -o mode=755 open /mnt
    mkdir -p "/mnt/${2#"$1"}"
    mount --bind "$2" "/mnt/${2#"$1"}"
    mount --rbind /mnt "$1"
fi
shift 2
exec "$@"
"""


def as_user(name):
    """Return the words before a command that have a user of this machine run it."""
    prefix = Path(os.path.realpath(sys.executable)).parents[1]
    closed = [path for path in reversed(prefix.parents) if not path.stat().st_mode & 1]
    opened = [str(closed[0]), str(prefix)] if closed else ["", ""]
    account = pwd.getpwnam(name)
    user = [f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]
    inner = ["setpriv", *user, "--inh-caps=-all", "--bounding-set=-all"]
    return ["unshare", "--mount", "sh", "-c", OPEN, "sh", *opened, *inner]


@pytest.fixture
def shared(hosts_of_two):
    """A directory like /tmp, in which the two users of this machine have what they need."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="two-users-") as folder:
        path = Path(folder)
        path.chmod(0o1777)
        source = hosts_of_two.ssh_config.parent
        for name in CLIENTS.values():
            account, home = pwd.getpwnam(name), path / f"of-{name}"
            home.mkdir(mode=0o700)
            (home / "client.py").write_text(CLIENT)
            for file in ("user_key", "known_hosts"):
                shutil.copy(source / file, home)
            config = hosts_of_two.ssh_config.read_text()
            (home / "config").write_text(config.replace(str(source), str(home)))
            for one in (home, *home.iterdir()):
                os.chown(one, account.pw_uid, account.pw_gid)
        yield path


@pytest.fixture
def hosts_of_two(make_hosts):
    """Two hosts on which two users have accounts."""
    if os.getuid():
        pytest.skip("only root can be other users")
    words = [*as_user("nobody"), sys.executable, "-c", "import ostap_parallel.pipeline"]
    path = os.pathsep.join(filter(None, sys.path))
    tried = subprocess.run(words, env={"PYTHONPATH": path}, cwd="/", stderr=subprocess.DEVNULL)
    if tried.returncode:
        pytest.skip("other users cannot run this interpreter, or have no way to this package")
    made = make_hosts(2, path="/usr/bin:/bin")
    if not made[0].private:
        pytest.skip("accounts of others need hosts of their own")
    for host in made:
        for name, uid in USERS.items():
            home = host.home.parent / name
            home.mkdir(mode=0o700)
            os.chown(home, uid, uid)
            with (host.home.parent / "etc/passwd").open("a") as file:
                file.write(f"{name}:x:{uid}:{uid}::{host.inside(home)}:/bin/sh\n")
            with (host.home.parent / "etc/shadow").open("a") as file:
                file.write(f"{name}:*:19000::::::\n")
    return made


class TestOnHosts:
    @pytest.mark.slow
    def test_many_jobs_on_two_hosts(self, recipe, tmp_path):
        text = NODE.format(
            body="self.outputs['host'] = os.path.basename(os.environ['PRIVATE_SSHD'])",
            base="LOFARnodeTCP",
            main=THREE_WORDS,
        )
        command = f"python -c '{text}'".replace("'PRIVATE_SSHD'", '"PRIVATE_SSHD"')
        command = command.replace("'host'", '"host"')
        jobs = [ComputeJob(f"h{1 + n % 2}", command) for n in range(20)]
        recipe._schedule_jobs(jobs, max_per_node=3)
        assert [job.results["returncode"] for job in jobs] == [0] * 20
        assert [job.results["host"] for job in jobs] == ["h1", "h2"] * 10

    @pytest.mark.slow
    def test_two_recipes_at_once(self, hosts):
        recipes = [Recipe(), Recipe()]
        jobs = [[ComputeJob(f"h{n}", f"test {n} -lt") for n in (1, 2)] for _ in recipes]
        threads = []
        for recipe, theirs in zip(recipes, jobs, strict=True):
            recipe.settings = {"ssh_config": hosts.ssh_config, "config": ()}
            threads.append(threading.Thread(target=recipe._schedule_jobs, args=[theirs]))
            threads[-1].start()
        for thread in threads:
            thread.join(PATIENCE)
        assert {job.results["returncode"] for theirs in jobs for job in theirs} == {2}

    def test_two_users_at_once(self, hosts_of_two, shared):
        made, clients = hosts_of_two, {}
        names = " ".join(host.name for host in made)
        environ = {"TMPDIR": str(shared), "PATH": os.environ["PATH"]}
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        with contextlib.ExitStack() as ending:
            for name, other in (("ann", "bob"), ("bob", "ann")):
                user = CLIENTS[name]
                script = shared / f"of-{user}" / "client.py"
                words = [sys.executable, script, name, other, f"python -c '{USER}'", names]
                clients[name] = ending.enter_context(
                    subprocess.Popen(
                        [*as_user(user), *words], env=environ, cwd="/", stdout=subprocess.PIPE
                    )
                )
                ending.callback(clients[name].kill)
            for name in USERS:
                told = lambda name=name: (shared / f"told-{name}").exists()  # noqa: E731
                wait_until(told, 2 * PATIENCE, f"{name} has looked around")
            for host in made:
                (host.tmp / "go").touch()
            outputs = {name: clients[name].communicate(timeout=2 * PATIENCE)[0] for name in USERS}
        uids = {name: pwd.getpwnam(user).pw_uid for name, user in CLIENTS.items()}
        for name, uid in USERS.items():
            told = json.loads((shared / f"told-{name}").read_text())
            assert told == {"uid": uids[name], "all": sorted(uids.values()), "open": [uids[name]]}
            found = {"returncode": 0, "uid": uid, "all": sorted(USERS.values()), "open": [uid]}
            assert json.loads(outputs[name]) == [found, found]
        assert [path.name for path in shared.iterdir() if path.name.startswith("ostap")] == []
        for host in made:
            assert {path.name for path in host.tmp.iterdir()} == {"go", "there-ann", "there-bob"}
            for path in host.tmp.iterdir():
                path.unlink()

    @pytest.mark.slow
    def test_five_hundred(self, recipe):
        jobs = [ComputeJob(f"h{1 + n % 2}", "true") for n in range(500)]
        recipe._schedule_jobs(jobs, max_per_node=3)
        assert {job.results["returncode"] for job in jobs} == {0}

    @pytest.mark.slow
    def test_a_host_that_cannot_be_had(self, recipe, caplog):
        jobs = [ComputeJob("h9", "true"), ComputeJob("h1", "true")]
        recipe._schedule_jobs(jobs)
        assert [job.results["returncode"] for job in jobs] == [1, 0]
        assert recipe.error.is_set()
        assert "failed on h9" in caplog.text

    def test_the_limit_of_the_configuration(self, recipe, caplog):
        recipe.config.read_string("[remote]\nmax_per_node = 2\nmethod = local")
        recipe._schedule_jobs([ComputeJob("h1", "true")])
        assert "Limiting to 2 simultaneous jobs/node" in caplog.text
        assert "Dispatching command to h1 as a process" in caplog.text


class TestEnds:
    PROGRAM = """
import sys
from ostap_parallel.pipeline import BaseRecipe, ComputeJob, RemoteCommandRecipeMixIn

class recipe(BaseRecipe, RemoteCommandRecipeMixIn):
    def go(self):
        self._schedule_jobs([ComputeJob("localhost", "exec sleep 64123;") for _ in range(2)])

if __name__ == "__main__":
    sys.exit(recipe().main(["-j", "x"]))
"""

    @pytest.mark.slow
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
    def test_jobs_end_with_their_recipe(self, tmp_path, number):
        (tmp_path / "recipe.py").write_text(self.PROGRAM)
        with subprocess.Popen(
            [sys.executable, tmp_path / "recipe.py"], stderr=subprocess.PIPE
        ) as program:
            wait_until(lambda: sleeping("64123"), PATIENCE, "the jobs run")
            program.send_signal(number)
            status = program.wait(PATIENCE)
        assert status == (-number if number == signal.SIGKILL else 130)
        wait_until(lambda: not sleeping("64123"), 5, "no job is left")

    def test_in_a_thread(self, recipe):
        """Signals are for the main thread."""
        job = ComputeJob("localhost", "true")
        thread = threading.Thread(target=recipe._schedule_jobs, args=[[job]])
        thread.start()
        thread.join(PATIENCE)
        assert job.results["returncode"] == 0


def sleeping(seconds):
    pids = (int(path.name) for path in Path("/proc").glob("[0-9]*"))
    return [pid for pid in pids if describe(pid).endswith(f"sleep {seconds}")]


class TestConfiguration:
    def run(self, tmp_path, text, *words):
        (tmp_path / "pipeline.cfg").write_text(text)
        code = "from ostap_parallel.pipeline import BaseRecipe\nclass r(BaseRecipe): pass\n"
        code += "raise SystemExit(r().main(['-j', 'x', *__import__('sys').argv[1:]]))"
        done = subprocess.run(
            [sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True
        )
        return done.returncode, done.stderr

    def test_what_means_nothing_is_told(self, tmp_path):
        status, err = self.run(tmp_path, "[remote]\nmethod = mpirun\nkey_filename = x\n")
        assert status == 0
        assert "[remote] key_filename means nothing here" in err
        assert "method mpirun: ssh is taken in its place" in err
        _, err = self.run(tmp_path, "[remote]\nmethod = slurm_srun\n")
        assert err == ""

    def test_a_log_file(self, tmp_path):
        status, _ = self.run(tmp_path, "[logging]\nlog_file = log\n", "-v")
        assert status == 0
        assert "recipe r completed" in (tmp_path / "log").read_text()

    def test_what_cannot_be_read(self, tmp_path):
        status, err = self.run(tmp_path, "nothing\n")
        assert status == 1
        assert "pipeline.cfg" in err
        assert self.run(tmp_path, "", "-c", "none")[0] == 1


class TestStates:
    """Recipes go on after what they have finished."""

    PROGRAM = """
import os, sys
from ostap_parallel.pipeline import ComputeJob, RemoteCommandRecipeMixIn, StatefulRecipe

class recipe(StatefulRecipe, RemoteCommandRecipeMixIn):
    def go(self):
        super().go()
        self._schedule_jobs([ComputeJob("localhost", "echo a >> marks; true")])
        command = "run() { echo N >> marks; KILL test N != 1 || test -e good; }; run"
        jobs = [ComputeJob("localhost", command.replace("N", str(n))) for n in range(3)]
        self._schedule_jobs(jobs, max_per_node=1)
        self.outputs["found"] = self.run_task("other", ["x"], answer=7)
        return int(self.error.is_set())

if __name__ == "__main__":
    with open("pid", "w") as file:
        file.write(str(os.getpid()))
    sys.exit(recipe().main())
"""
    OTHER = """
from ostap_parallel.pipeline import BaseRecipe

class other(BaseRecipe):
    def go(self):
        super().go()
        with open("marks", "a") as file:
            file.write("task\\n")
        self.outputs["inputs"] = [self.inputs["answer"], self.inputs["args"], self.inputs["size"]]
        return 0
"""

    @pytest.fixture
    def start(self, tmp_path):
        (tmp_path / "other.py").write_text(self.OTHER)
        (tmp_path / "tasks.cfg").write_text("[other]\nrecipe = other\nsize = 3\n")
        (tmp_path / "pipeline.cfg").write_text("[DEFAULT]\ntask_files = [tasks.cfg]\n")

        def start(*words, kill=""):
            program = tmp_path / "recipe.py"
            program.write_text(self.PROGRAM.replace("KILL", kill))
            argv = [sys.executable, program, "-j", "x", *words]
            done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
            marks = (tmp_path / "marks").read_text().split()
            (tmp_path / "marks").unlink()
            return done.returncode, marks, done.stdout, done.stderr

        return start

    @pytest.mark.slow
    def test_what_has_failed_runs_again(self, start, tmp_path):
        status, marks, _, err = start()
        assert (status, marks) == (1, ["a", "0", "1", "2", "task"]), err
        (tmp_path / "good").touch()
        status, marks, out, err = start()
        assert (status, marks) == (0, ["1"]), err
        assert out == "Results:\nfound = {'inputs': [7, ['x'], '3']}\n"
        (tmp_path / "x.state").unlink()
        assert start()[1] == ["a", "0", "1", "2", "task"]

    @pytest.mark.slow
    def test_one_that_was_killed_goes_on(self, start, tmp_path):
        (tmp_path / "good").touch()
        kill = "if [ N = 1 ] && mkdir dead; then kill -9 $(cat pid); sleep 64124; fi;"
        assert start(kill=kill)[:2] == (-signal.SIGKILL, ["a", "0", "1"])
        with (tmp_path / "x.state").open("ab") as file:
            file.write(b"\0\0\0\x20half")
        status, marks, _, err = start(kill=kill)
        assert (status, marks) == (0, ["1", "2", "task"]), err

    @pytest.mark.slow
    def test_a_task_whose_inputs_have_changed_runs_again(self, start, tmp_path):
        (tmp_path / "good").touch()
        assert start()[1][-1] == "task"
        (tmp_path / "marks").touch()
        assert start()[1] == []
        (tmp_path / "tasks.cfg").write_text("[other]\nrecipe = other\nsize = 4\n")
        status, marks, out, err = start()
        assert (status, marks) == (0, ["task"]), err
        assert out == "Results:\nfound = {'inputs': [7, ['x'], '4']}\n"

    @pytest.mark.slow
    def test_a_recipe_that_runs_twice_does_its_jobs_twice(self, tmp_path):
        (tmp_path / "again.py").write_text("""
from ostap_parallel.pipeline import ComputeJob, RemoteCommandRecipeMixIn, StatefulRecipe

class again(StatefulRecipe, RemoteCommandRecipeMixIn):
    def go(self):
        super().go()
        self._schedule_jobs([ComputeJob("localhost", "echo job >> marks; true")])
        self._schedule_jobs([ComputeJob("localhost", "test -e good #")])
        return int(self.error.is_set())
""")
        (tmp_path / "top.py").write_text("""
import sys
from ostap_parallel.pipeline import StatefulRecipe

class top(StatefulRecipe):
    def go(self):
        super().go()
        for n in range(2):
            self.run_task("again", ["x"])
        return 0

sys.exit(top().main())
""")

        def start():
            argv = [sys.executable, "top.py", "-j", "x"]
            done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
            return done.returncode, (tmp_path / "marks").read_text().split()

        assert start() == (1, ["job"])
        (tmp_path / "good").touch()
        assert start() == (0, ["job"] * 2)
        assert start() == (0, ["job"] * 2)

    def test_equal_arguments_have_equal_keys_in_any_process(self):
        program = (
            "from ostap_parallel.pipeline.state import key_of\n"
            "text = ''.join(['a', 'b'])\n"
            "for one in [{*'abcdef'}, 1], ['ab', 'ab'], ['ab', text], [text, text], ['ab', 'b']:\n"
            "    print(key_of('job', *one).hex())\n"
        )
        told = set()
        for seed in "1", "2":
            environment = {**os.environ, "PYTHONHASHSEED": seed}
            argv = [sys.executable, "-c", program]
            out = subprocess.run(argv, env=environment, capture_output=True, check=True).stdout
            told.add(tuple(out.split()))
        ((_, one, *same, other),) = told
        assert {*same} == {one}
        assert other != one

    def test_one_that_was_killed_as_it_began_its_state(self, tmp_path):
        path = tmp_path / "x.state"
        for size in 0, 5, len(MAGIC):
            path.write_bytes(MAGIC[:size])
            assert len(State(path)) == 0
            State(path).put(b"key", {"a": 1})
            assert State(path).get(b"key") == {"a": 1}
            assert path.read_bytes().count(MAGIC) == 1

    def test_a_state_that_others_can_write(self, tmp_path):
        path = tmp_path / "x.state"
        before = os.umask(0)
        try:
            State(path).put(b"key", {"a": 1})
        finally:
            os.umask(before)
        assert State(path).get(b"key") == {"a": 1}
        path.chmod(0o666)
        with pytest.raises(ConfigError, match="could run code: everybody can write it"):
            State(path)

    def test_what_is_no_state(self, start, tmp_path):
        (tmp_path / "x.state").write_text("something")
        (tmp_path / "marks").touch()
        status, marks, _, err = start()
        assert (status, marks) == (1, [])
        assert "x.state is no state of a recipe" in err

    @pytest.mark.slow
    def test_a_directory_for_jobs(self, start, tmp_path):
        with (tmp_path / "pipeline.cfg").open("a") as file:
            file.write("[layout]\njob_directory = jobs/x\n")
        start()
        assert (tmp_path / "jobs" / "x" / "statefile").is_file()

    @pytest.mark.slow
    def test_the_report(self, start, tmp_path):
        _, _, _, err = start("--report", "report.json", "-v")
        rows = json.loads((tmp_path / "report.json").read_text())
        assert [row["returncode"] for row in rows] == [0, 0, 1, 0]
        assert all(row["memory"] > 0 and row["job_host"] == "localhost" for row in rows)
        lines = [line.split()[4:] for line in err.splitlines() if " localhost " in line]
        assert ["2", "localhost", "0"] in [line[:3] for line in lines]


SEED = """\
  lce001=[ /data/scratch/L2010/L20852_SB000-uv.MS.dppp, /data/scratch/L2010/swinban k/SB9.dppp ] \
lce002=[ /data/L20852_SB001-uv.MS.dppp ]
  lce003=[ /data/L20852_SB002-uv.MS.dppp,
           /data/L20852_SB011-uv.MS.dppp ]   # a comment
lce004 = []
"""


class TestDataMaps:
    def load(self, tmp_path, text, kind=DataMap):
        (tmp_path / "map").write_text(text)
        return kind.load(tmp_path / "map")

    def test_parameters(self, tmp_path):
        (tmp_path / "map").write_text(SEED)
        assert list(load_data_map(tmp_path / "map")) == [
            ("lce001", "/data/scratch/L2010/L20852_SB000-uv.MS.dppp"),
            ("lce001", "/data/scratch/L2010/swinban k/SB9.dppp"),
            ("lce002", "/data/L20852_SB001-uv.MS.dppp"),
            ("lce003", "/data/L20852_SB002-uv.MS.dppp"),
            ("lce003", "/data/L20852_SB011-uv.MS.dppp"),
        ]
        multi = self.load(tmp_path, "h = ['a, b', \"c\"]", MultiDataMap)
        assert (multi[0].host, multi[0].file, multi[0].skip) == ("h", ["a, b", "c"], False)

    def test_literals(self, tmp_path):
        text = "\n[{'host': 'a', 'file': 'f', 'skip': False}, {'host': 'b', 'file': 'g'}]\n"
        found = self.load(tmp_path, text)
        assert list(found) == [DataProduct("a", "f", False), DataProduct("b", "g", True)]
        found.iterator = DataMap.SkipIterator
        assert [item.file for item in found] == ["f"]
        assert self.load(tmp_path, "[('a', 'f')]")[0].skip is False
        text = "[{'host': 'h', 'skip': False, 'file': \"['a', 'b']\", 'file_skip': [True, False]}]"
        assert self.load(tmp_path, text, MultiDataMap)[0].file == ["a", "b"]

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("\n\nh1=[a]\nh2 a", "map: line 4: host = .* is wanted"),
            ("h1=[a]\nh2=[a, b\nh3=[c]", "map: line 2: the list of h2 has no end"),
            ("h1=[a,,b]", "map: line 1: a file is missing"),
            ("[('a', 'b'),\n('c' 'd'", "map: line"),
            ("[('a', 'b'),\n__import__('os')]", "map: line 2: only text"),
            ("[1]", "no data product"),
            ("[{'host': 1}]", "no data product"),
        ],
    )
    def test_errors_tell_where(self, tmp_path, text, told):
        with pytest.raises(DataMapError, match=told):
            self.load(tmp_path, text)
        with pytest.raises(DataMapError, match="none"):
            DataMap.load(tmp_path / "none")

    @pytest.mark.slow
    @settings(deadline=None)
    @given(st.lists(st.tuples(st.text(), st.text(), st.booleans())))
    def test_what_is_stored_is_loaded(self, tmp_path_factory, items):
        path = tmp_path_factory.mktemp("map") / "map"
        store_data_map(path, items)
        assert DataMap.load(path) == DataMap(items)

    def test_maps_that_go_together(self):
        one = DataMap([("a", "f", False), ("b", "g", True)])
        other = DataMap([("a", "x", True), ("b", "y", False)])
        assert validate_data_maps(one, other)
        align_data_maps(one, other)
        assert [item.skip for item in [*one, *other]] == [True] * 4
        assert not validate_data_maps(one, DataMap([("a", "f")]))
        assert not validate_data_maps(one, DataMap([("b", "f"), ("a", "f")]))
        with pytest.raises(DataMapError, match="two"):
            align_data_maps(one)
        with pytest.raises(DataMapError, match="same hosts"):
            align_data_maps(one, DataMap([]))
