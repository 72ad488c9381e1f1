"""The command line, run as users run it: as a program, against real hosts."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shlex
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import wait_until
from sshd import describe

from ostap_parallel import WorkManager, __version__, cli

ROOT = Path(__file__).parents[1]
PPLAUNCH = ROOT / "scripts" / "pplaunch"

RUN = """
import sys
from ostap_parallel import WorkManager

def where(number):
    import os, time
    print("task", number)
    time.sleep(0.05)  # else the first worker may do them all
    return number, os.getpid()

if __name__ == "__main__":
    with WorkManager(ncpus=0, servers="auto", silent=True) as manager:
        manager.wait_for_hosts()
        print(sorted(manager.workers))
        results = manager.process(where, range(20), chunk_size=1)
        assert [number for number, _ in results] == list(range(20))
        print(*{pid for _, pid in results})
"""


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home without configuration, and none in the current directory or the environment."""
    for name in [name for name in os.environ if name.startswith("OSTAP_")]:
        monkeypatch.delenv(name)
    path = tmp_path / "home"
    path.mkdir()
    monkeypatch.setenv("HOME", str(path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(path)
    return path


@pytest.fixture(autouse=True)
def _levels():
    """A command is told to be the whole program: what it keeps quiet must not stay so."""
    loggers = [logging.getLogger(name) for name in ("ostap_parallel", "ostap_parallel.supply")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def run(*argv, timeout=60, **kwargs):
    """Run a command to its end."""
    command = [sys.executable, "-m", "ostap_parallel", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, **kwargs)


def rows(stdout):
    """Return the cells of a table's lines by host."""
    lines = [re.split(r"\s{2,}", line) for line in stdout.splitlines()[1:]]
    return {cells[0]: cells for cells in lines}


class Launch:
    """A ``launch`` that runs."""

    def __init__(self, *argv, program=(sys.executable, "-m", "ostap_parallel", "launch")):
        self.process = subprocess.Popen(
            [*program, *map(str, argv)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def exports(self):
        """Wait for the lines that a shell would run; return what bash makes of them."""
        assert self.process.stdout is not None
        lines = [self.process.stdout.readline() for _ in range(2)]
        assert all(line.startswith("export ") for line in lines), self.process.communicate()
        return source("".join(lines))

    def end(self, number=signal.SIGINT):
        """Send a signal; return exit status and what else was printed."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


def source(text):
    """Return the variables of ours that bash text exports."""
    argv = ["bash", "-c", f"{text}\nenv -0"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    variables = dict(item.split("=", 1) for item in done.stdout.split("\0") if "=" in item)
    return {name: value for name, value in variables.items() if name.startswith("OSTAP_PP")}


@pytest.fixture
def launch():
    """``launch(*argv)`` starts one that does not outlive the test."""
    with contextlib.ExitStack() as stack:

        def start(*argv, **kwargs):
            launched = Launch(*argv, **kwargs)
            stack.callback(launched.process.wait)
            stack.callback(launched.process.kill)
            return launched

        yield start


def command_lines():
    """Return the argument lists of all processes, and what environments can be read."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                found.append((entry / "cmdline").read_bytes())
            with contextlib.suppress(OSError):
                found.append((entry / "environ").read_bytes())
    return found


def drop_connections(host):
    """End what sshd runs for each connection, as a broken network does."""
    for pid in host.processes():
        if " sshd: " in describe(pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


# -- hosts -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_hosts_shows_a_good_and_a_bad_host(ssh_config):
    done = run("hosts", "--ssh-config", ssh_config, "h1", "h1:9", "stranger@h2")
    assert done.returncode == 1
    assert done.stderr == ""
    table = rows(done.stdout)
    version = ".".join(map(str, sys.version_info[:2]))
    _, reachable, python, cpus, seconds = table["h1"]
    assert reachable == "yes"
    assert python.startswith(f"{version}.")
    assert 1 <= int(cpus) <= (os.cpu_count() or 1)
    assert 0 < float(seconds) < 60
    assert table["h1:9"][1] == "no"
    assert table["h1:9"][-1].startswith("connect: ssh: connect to host")
    assert "Connection refused" in table["h1:9"][-1]
    assert "Permission denied" in table["stranger@h2"][-1]


@pytest.mark.slow
def test_hosts_is_content_when_all_are_up(ssh_config):
    done = run("hosts", "--ssh-config", ssh_config, "h1", "h2")
    assert done.returncode == 0, done.stderr
    assert [cells[1] for cells in rows(done.stdout).values()] == ["yes", "yes"]


@pytest.mark.slow
def test_what_is_wrong_is_shown_in_full_and_is_no_markup(ssh_config, tmp_path):
    script = tmp_path / "script.sh"
    words = "[bold]not [/red] a style: " + "x" * 300
    script.write_text(f"echo {shlex.quote(words)} >&2; echo second line >&2; exit 3\n")
    done = run("hosts", "--ssh-config", ssh_config, "--script", script, "h1")
    assert done.returncode == 1
    assert f"script: {words}\n" in done.stdout
    assert "second line (ended with exit status 3)" in done.stdout


@pytest.mark.slow
def test_verbose_shows_what_scripts_print(ssh_config, tmp_path):
    script = tmp_path / "script.sh"
    script.write_text("echo hello from $((40 + 2))\n")
    options = ["--ssh-config", ssh_config, "--script", script]
    done = run("hosts", *options, "-v", "h1")
    assert done.returncode == 0
    assert "h1: hello from 42\n" in done.stderr
    assert "hello" not in run("hosts", *options, "h1").stderr


def test_no_server_is_a_usage_error():
    done = run("hosts")
    assert done.returncode == 2
    assert done.stderr.startswith("ostap-parallel: no server is configured")


def test_a_server_that_runs_already_needs_its_secret():
    done = run("hosts", "localhost:1")
    assert done.returncode == 2
    assert "OSTAP_PPSECRET_FILE" in done.stderr


# -- config ----------------------------------------------------------------------------------


CONFIGURATION = """
[Parallel]
ppservers = one.cern.ch, two.cern.ch:2222
profile = /etc/profile
environment = export A=1
    # kept
    export B="$A"

[Parallel:cern.ch]
ssh_options = -o 'Ciphers a b'

[Parallel:two.cern.ch]
profile =
"""


def test_config_names_file_and_section_of_each_value(home):
    file = home / ".ostaprc"
    file.write_text(CONFIGURATION)
    done = run("config", "--python", "python3.12")
    assert done.returncode == 0, done.stderr
    head, one, two = done.stdout.split("\n\n")
    assert head == f"files read:\n  {file}"
    assert one.splitlines() == [
        "one.cern.ch",
        f"  name = one.cern.ch  ({file} [Parallel])",
        f"  profile = /etc/profile  ({file} [Parallel])",
        "  environment = export A=1",
        "      # kept",
        f'      export B="$A"  ({file} [Parallel])',
        "  python = python3.12  (argument)",
        f"  ssh_options = -o 'Ciphers a b'  ({file} [Parallel:cern.ch])",
    ]
    assert two.splitlines()[0] == "two.cern.ch:2222"
    assert f"  profile = (switched off)  ({file} [Parallel:two.cern.ch])" in two.splitlines()


def test_config_reads_the_files_and_servers_that_are_given(home):
    (home / ".ostaprc").write_text(CONFIGURATION)
    file = home / "other"
    file.write_text("[Parallel]\nncpus = 3\n")
    done = run("config", "--config", file, "a", "localhost:4000")
    assert done.stdout.splitlines() == [
        "files read:",
        f"  {file}",
        "",
        "a",
        "  name = a  (argument)",
        f"  ncpus = 3  ({file} [Parallel])",
        "",
        "localhost:4000",
        "  name = localhost  (argument)",
        "  server_port = 4000  (argument)",
    ]


def test_config_without_any():
    done = run("config")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "files read:\n  none\n\nno server is configured\n"


@pytest.mark.parametrize("command", ["hosts", "config", "launch"])
def test_an_unknown_key_is_named_with_file_and_section(home, command):
    file = home / ".ostaprc"
    file.write_text("[Parallel:cern.ch]\nprofil = x\n")
    done = run(command, "h1")
    assert done.returncode == 2
    assert done.stdout == ""
    expected = f"{file} [Parallel:cern.ch] profil: unknown key, did you mean 'profile'?"
    expected += " (more: ostap-parallel help keys)"
    assert done.stderr == f"ostap-parallel: {expected}\n"


# -- options ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "required: COMMAND"),
        (["dance"], "invalid choice: 'dance'"),
        (["hosts", "--tmpdirr", "x"], "unrecognized arguments"),
        (["launch"], "required: SERVER"),
        (["hosts", "--script", "missing", "h1"], "argument script: no such file"),
        (["hosts", "--ssh-config", "missing", "h1"], "argument ssh_config: no such file"),
        (["hosts", "--config", "missing", "h1"], "cannot read"),
        (["hosts", "a b;c"], "server 'a b;c' is none of"),
        (["launch", "localhost:4000"], "is a server already: nothing to launch"),
    ],
)
def test_wrong_options(argv, words, capsys):
    try:
        status = cli.main(argv)
    except SystemExit as exc:  # argparse's own
        status = exc.code
    captured = capsys.readouterr()
    assert (status, captured.out) == (2, "")
    assert words in captured.err


def test_version_and_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"ostap-parallel {__version__}\n"
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert all(command in text for command in ("hosts", "config", "launch"))


# -- launch ----------------------------------------------------------------------------------


OWN_SETTINGS = """
import decimal, sys, time
from ostap_parallel import WorkManager
decimal.getcontext().prec = int(sys.argv[1])
class Own:
    name = sys.argv[1]
def seen(x):
    time.sleep(0.01)
    return sys.argv[1], str(decimal.getcontext().prec), Own.name
if __name__ == "__main__":
    with WorkManager(0, sys.argv[2], silent=True) as wm:
        for _ in range(2):
            assert set(wm.process(seen, range(60), chunk_size=1)) == {(sys.argv[1],) * 3}
"""


@pytest.mark.slow
def test_programs_on_one_server_have_their_own_settings(ssh_config, launch, tmp_path, monkeypatch):
    launched = launch("--ssh-config", ssh_config, "h1*1")
    exports = launched.exports()
    for name, value in exports.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "program.py").write_text(OWN_SETTINGS)
    argv = [sys.executable, tmp_path / "program.py"]
    servers = exports["OSTAP_PPSERVERS"]
    programs = [
        subprocess.Popen([*argv, number, servers], stderr=subprocess.PIPE, text=True)
        for number in ("31", "32")
    ]
    errors = [program.communicate(timeout=60)[1] for program in programs]
    launched.end()
    assert [program.returncode for program in programs] == [0, 0], errors


@pytest.mark.slow
def test_launched_servers_do_the_work_of_another_program(
    hosts, ssh_config, launch, tmp_path, monkeypatch
):
    argv = ["--ssh-config", ssh_config, "h1*2", "h2*1"]
    launched = launch(*argv)
    exports = launched.exports()
    servers = exports["OSTAP_PPSERVERS"].split(",")
    assert len(servers) == 2
    assert all(re.fullmatch(r"localhost:\d+", server) for server in servers)
    secret_file = Path(exports["OSTAP_PPSECRET_FILE"])
    assert stat.S_IMODE(secret_file.stat().st_mode) == 0o600
    assert stat.S_IMODE(secret_file.parent.stat().st_mode) == 0o700
    secret = secret_file.read_bytes()
    assert len(secret) >= 32

    program = tmp_path / "program.py"
    program.write_text(RUN)
    for name, value in exports.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    first, pids = done.stdout.splitlines()
    assert first == str(sorted(servers))
    assert len(pids.split()) == 3  # each worker took part

    table = rows(run("hosts").stdout)  # the launched ones, from the environment
    assert [table[server][1] for server in servers] == ["yes", "yes"]
    assert [int(table[server][2]) for server in servers] == [2, 1]

    assert not any(secret in text for text in command_lines())
    status, out, err = launched.end()
    assert (status, out) == (0, "")
    assert f"h1: {servers[0]} (workers: 2)\n" in err
    assert f"h2: {servers[1]} (workers: 1)\n" in err
    assert "h1: task " in err or "h2: task " in err
    assert secret.decode() not in err
    assert not secret_file.parent.exists()


@pytest.mark.slow
def test_hosts_reports_a_wrong_secret(ssh_config, launch, tmp_path, monkeypatch):
    launched = launch("--ssh-config", ssh_config, "h1*1")
    server = launched.exports()["OSTAP_PPSERVERS"]
    guess = tmp_path / "guess"
    guess.write_text(secrets.token_hex(32))
    monkeypatch.setenv("OSTAP_PPSECRET_FILE", str(guess))
    done = run("hosts", server)
    assert done.returncode == 1
    assert rows(done.stdout)[server][-1] == "server: the server does not accept our secret"
    assert launched.end(signal.SIGTERM)[0] == 0


@pytest.mark.slow
def test_pplaunch_takes_what_the_one_of_ostap_takes(hosts, ssh_config, launch, tmp_path):
    profile, script = hosts["h1"].home / "profile.sh", tmp_path / "script.sh"
    profile.write_text("echo profile read\n")
    script.write_text("echo script read\n")
    options = ["--verbose", "-p", hosts["h1"].inside(profile), "-c", script]
    argv = ["--ssh-config", ssh_config, *options, "h1*1"]
    launched = launch(*argv, program=[sys.executable, str(PPLAUNCH)])
    launched.exports()
    status, out, err = launched.end()
    assert (status, out) == (0, "")
    assert err.index("h1: profile read\n") < err.index("h1: script read\n")
    profile.unlink()


@pytest.mark.slow
def test_pplaunch_takes_a_secret(ssh_config, launch):
    argv = ["--ssh-config", ssh_config, "-q", "-d", "-s", "a secret of mine", "-t", "7200", "h1*1"]
    launched = launch(*argv, program=[sys.executable, str(PPLAUNCH)])
    file = Path(launched.exports()["OSTAP_PPSECRET_FILE"])
    assert file.read_text() == "a secret of mine"
    assert launched.end()[0] == 0


@pytest.mark.slow
def test_a_host_that_fails_is_reported_and_the_others_serve(ssh_config, launch):
    launched = launch("--ssh-config", ssh_config, "h1:9", "h2*1")
    assert "," not in launched.exports()["OSTAP_PPSERVERS"]
    status, _, err = launched.end()
    assert status == 0
    assert "h1:9: connect: ssh: connect to host" in err


def test_no_host_at_all(ssh_config):
    done = run("launch", "--ssh-config", ssh_config, "h1:9", "h2:9")
    assert (done.returncode, done.stdout) == (1, "")
    assert "h1:9: connect: " in done.stderr
    assert "h2:9: connect: " in done.stderr


@pytest.mark.slow
def test_a_host_that_is_lost_comes_back_at_the_same_port(make_hosts, launch):
    hosts = make_hosts(2)
    launched = launch("--ssh-config", hosts.ssh_config, "h1*1", "h2*1")
    exports = launched.exports()
    servers = exports["OSTAP_PPSERVERS"].split(",")
    secret = Path(exports["OSTAP_PPSECRET_FILE"]).read_text()
    lines = iter(launched.process.stderr.readline, "")
    with WorkManager(0, servers, secret=secret, config=(), silent=True) as manager:
        assert manager.wait_for_hosts(60)
        drop_connections(hosts["h1"])
        assert any("lost h1: run: " in line for line in lines)
        assert any(line.startswith(f"h1: {servers[0]} ") for line in lines)
        status = manager.executor.hosts[0]
        assert manager.process(abs, [-n for n in range(9)], chunk_size=1) == list(range(9))
        wait_until(lambda: status.state == "up" and status.lost, 60, "connected again")
        assert manager.process(lambda n: n * n, range(9), chunk_size=1) == [
            n * n for n in range(9)
        ]
    assert launched.end()[0] == 0


@pytest.mark.slow
def test_the_last_host_ends_it(make_hosts, launch):
    (host,) = hosts = make_hosts(1)
    launched = launch("--ssh-config", hosts.ssh_config, "--patience", "0.5", "h1*1")
    secret_file = Path(launched.exports()["OSTAP_PPSECRET_FILE"])
    lines = iter(launched.process.stderr.readline, "")
    host.stop()
    drop_connections(host)
    assert any("lost h1: run: " in line for line in lines)
    assert any("no server is left" in line for line in lines)
    assert launched.process.wait(60) == 1
    assert not secret_file.parent.exists()


@pytest.mark.slow
def test_an_interrupt_while_hosts_start(hosts, ssh_config, launch, tmp_path):
    script = tmp_path / "script.sh"
    script.write_text("exec sleep 60\n")
    launched = launch("--ssh-config", ssh_config, "-c", script, "h1")
    wait_until(lambda: hosts["h1"].processes(), 20, "something on the host")
    status, out, _ = launched.end()
    assert (status, out) == (130, "")


@pytest.mark.slow
def test_an_interrupt_of_hosts(hosts, ssh_config, tmp_path):
    script = tmp_path / "script.sh"
    script.write_text("sleep 60\n")
    argv = ["hosts", "--ssh-config", str(ssh_config), "-c", str(script), "h1"]
    with subprocess.Popen(
        [sys.executable, "-m", "ostap_parallel", *argv], start_new_session=True
    ) as process:
        wait_until(lambda: hosts["h1"].processes(), 20, "something on the host")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
