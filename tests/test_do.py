"""``ostap-parallel do``: what it prints, what it tells, and how it ends."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import wait_until
from sshd import describe

from ostap_parallel.commands.pace import MOST_TOGETHER
from ostap_parallel.views import live

DO = [sys.executable, "-m", "ostap_parallel", "do"]
PATIENCE = 60


def do(*words, stdin=b"", **options):
    """Run it; return exit status, output and errors."""
    done = subprocess.run(
        [*DO, *map(str, words)], input=stdin, capture_output=True, timeout=PATIENCE, **options
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def on_hosts(hosts):
    """The options that reach two hosts."""
    return "--ssh-config", hosts.ssh_config, "-S"


class TestWhereItPrints:
    @pytest.mark.parametrize(
        ("joblog", "told"),
        [
            ("/dev/full", b"[Errno 28] No space left on device: '/dev/full'"),
            ("no/such", b"job log no/such: No such file or directory"),
            (".", b"job log .: Is a directory"),
        ],
    )
    def test_a_job_log_that_cannot_be_written(self, tmp_path, joblog, told):
        ended = do("--joblog", joblog, "echo", ":::", "a", cwd=tmp_path)
        assert ended == (255, b"", b"ostap-parallel do: " + told + b"\n")

    def test_a_job_log_that_is_shown(self):
        status, printed, errors = do("--joblog", "/dev/stderr", "echo", ":::", "a", "b")
        assert (status, sorted(printed.split())) == (0, [b"a", b"b"])
        head, *lines = errors.splitlines()
        assert head.startswith(b"Seq\tHost\t")
        assert sorted(line.split(b"\t")[-1] for line in lines) == [b"echo a", b"echo b"]

    @pytest.mark.parametrize(
        ("where", "ended"),
        [
            (">/dev/full", (255, b"", b"ostap-parallel do: [Errno 28] No space left on device\n")),
            (">&-", (0, b"", b"")),
            ("2>&-", (0, b"a\n", b"")),
            ("<&- >&- 2>&-", (0, b"", b"")),
        ],
    )
    def test_nowhere(self, where, ended):
        command = f"{shlex.join(DO)} echo ::: a {where}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=PATIENCE)
        assert (done.returncode, done.stdout, done.stderr) == ended

    def test_no_standard_input_is_an_empty_one(self):
        command = f"{shlex.join(DO)} echo <&-"
        done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=PATIENCE)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


class TestValues:
    @pytest.mark.slow
    def test_words_files_and_standard_input(self, tmp_path):
        (tmp_path / "file").write_text("x\ny z\n")
        assert do("-k", "echo", "{}", ":::", "a", "b c") == (0, b"a\nb c\n", b"")
        assert do("-k", "echo", "::::", tmp_path / "file") == (0, b"x\ny z\n", b"")
        assert do("-k", "-a", tmp_path / "file", "echo {#} {}") == (0, b"1 x\n2 y z\n", b"")
        assert do("-k", "echo", stdin=b"1\n2\n") == (0, b"1\n2\n", b"")
        assert do("-k", "echo", "::::", "-", stdin=b"1\n2") == (0, b"1\n2\n", b"")

    @pytest.mark.slow
    def test_slow_input_holds_up_nothing(self):
        with subprocess.Popen(
            [*DO, "echo"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            for word in (b"one\n", b"two\n"):
                process.stdin.write(word)
                process.stdin.flush()
                assert process.stdout.readline() == word
            process.stdin.close()
            assert process.wait(PATIENCE) == 0

    def test_what_runs_is_told_to_who_looks(self, tmp_path):
        argv = [*DO, "until [ -e {} ]; do sleep 0.05; done", ":::", str(tmp_path / "go")]
        with subprocess.Popen(argv) as process:

            def told():
                runs = [run for run in live.runs() if run["process"] == process.pid]
                return [run for run in runs if run["running"]]

            try:
                (run,) = wait_until(told, PATIENCE, "it is told of")
            finally:
                (tmp_path / "go").touch()
            assert process.wait(PATIENCE) == 0
        assert run["title"] == "do until [ -e {} ]; do sleep 0.05; done"
        assert (run["done"], run["total"], len(run["running"])) == (0, 1, 1)

    @pytest.mark.slow
    def test_names_with_quotes_and_line_ends(self):
        names = [b"it's", b"a\nb", b"$(id)", b"\xff\xfe", b"-n \\"]
        status, out, _ = do("-0", "-k", "printf '%s\\0' {}", stdin=b"\0".join(names) + b"\0")
        assert (status, out) == (0, b"\0".join(names) + b"\0")

    @pytest.mark.parametrize(
        ("words", "out"),
        [
            (["{1}{2}", ":::", "a", "b", ":::", "1", "2"], "a1 a2 b1 b2"),
            (["{1}{2}", ":::", "a", "b", ":::+", "1", "2"], "a1 b2"),
            (["--link", "{1}{2}", ":::", "a", "b", ":::", "1", "2"], "a1 b2"),
            (["{/.}", ":::", "d/e.f"], "e"),
        ],
    )
    def test_several_inputs(self, words, out):
        assert do("--dry-run", *words)[1].decode().split() == out.split()

    @pytest.mark.slow
    def test_commands_as_values(self):
        assert do("-k", ":::", "echo a; echo b", "exit 3") == (1, b"a\nb\n", b"")

    @pytest.mark.slow
    def test_nothing_to_do(self):
        assert do("-k", ":::", "", "echo b") == (0, b"b\n", b"")
        assert do("-k", "echo [{}]", ":::", "", "a") == (0, b"[]\n[a]\n", b"")

    def test_a_dry_run_runs_nothing(self, tmp_path):
        status, out, _ = do("--dry-run", "touch {} {host}", ":::", f"{tmp_path}/it's")
        assert (status, out) == (0, f"touch '{tmp_path}/it'\"'\"'s' {{host}}\n".encode())
        assert not list(tmp_path.iterdir())


class TestOutput:
    @pytest.mark.slow
    def test_what_a_command_prints_stays_together(self):
        status, out, err = do(
            "-j4", "for n in 1 2 3; do echo {}; echo {} >&2; done", ":::", *"abc"
        )
        assert status == 0
        for text in (out, err):
            assert sorted(text.split(b"\n")[:-1:3]) == [b"a", b"b", b"c"]
            assert all(len(set(text.split()[n : n + 3])) == 1 for n in (0, 3, 6))

    @pytest.mark.slow
    def test_nobody_reads_to_the_end(self):
        words = [*DO, "-k", "seq {} 100000", ":::", *map(str, range(100))]
        pipe = subprocess.PIPE
        with subprocess.Popen(words, stdout=pipe, stderr=pipe) as process:
            assert process.stdout.readline() == b"0\n"
            process.stdout.close()
            assert process.wait(PATIENCE) == 128 + signal.SIGPIPE
            assert process.stderr.read() == b""

    @pytest.mark.slow
    def test_tags(self):
        assert do("-k", "--tag", "echo", ":::", "a", "b")[1] == b"a\ta\nb\tb\n"

    @pytest.mark.slow
    def test_lines_as_they_come(self):
        text = "echo {}1; sleep 0.3; echo {}2"
        status, out, _ = do("-j2", "--line-buffer", "--tag", text, ":::", "a", "b")
        assert status == 0
        lines = out.decode().splitlines()
        assert sorted(lines[:2]) == ["a\ta1", "b\tb1"]
        assert sorted(lines[2:]) == ["a\ta2", "b\tb2"]

    @pytest.mark.slow
    def test_long_output_is_whole(self):
        status, out, _ = do("-k", "head -c {} /dev/zero; echo end", ":::", "3000000", "10")
        assert status == 0
        assert (len(out), out[3_000_000:3_000_004]) == (3_000_018, b"end\n")

    @pytest.mark.slow
    def test_results(self, tmp_path):
        assert do("--results", tmp_path / "r", "echo {}; echo err >&2", ":::", "a", "b")[0] == 0
        assert (tmp_path / "r/1/stdout").read_text() == "a\n"
        assert (tmp_path / "r/2/stderr").read_text() == "err\n"


class TestEnds:
    @pytest.mark.slow
    def test_the_exit_status_is_the_number_of_failures(self):
        assert do("exit {}", ":::", "0", "1", "0", "2")[0] == 2
        assert do("-j4", "false", ":::", *range(120))[0] == 101

    @pytest.mark.parametrize(
        "words",
        [
            ["--no-such"],
            ["--timeout", "5x", "true"],
            ["--resume", "true", ":::", "1"],
            ["--halt", "later", "true", ":::", "1"],
            ["{3}", ":::", "a"],
            ["true", "::::", "/no/such/file"],
        ],
    )
    def test_what_is_wrong_is_told(self, words):
        status, out, err = do(*words)
        assert (status, out) == (255, b"")
        assert err

    @pytest.mark.slow
    def test_a_time_limit(self):
        status, _, err = do("--timeout", "0.3", "sleep", ":::", "0", "53191")
        assert status == 1
        assert b"sleep 53191: not done after 0.3 s" in err

    @pytest.mark.slow
    def test_halt_now(self):
        status, _, _ = do("-j2", "--halt", "now,fail=1", ":::", "sleep 53192", "exit 7", "true")
        assert status == 7
        assert not [pid for pid in processes() if "sleep 53192" in describe(pid)]

    @pytest.mark.slow
    def test_halt_soon(self):
        status, out, _ = do("-j1", "--halt", "soon,fail=1", ":::", "echo 1", "exit 7", "echo 3")
        assert (status, out) == (7, b"1\n")

    @pytest.mark.slow
    def test_retries(self, tmp_path):
        text = f"echo x >> {tmp_path}/tries; test $(wc -l < {tmp_path}/tries) = {{}}"
        assert do("--retries", "3", text, ":::", "3")[0] == 0

    @pytest.mark.slow
    def test_resume(self, tmp_path):
        log, marks = tmp_path / "log", tmp_path / "marks"
        words = ["--joblog", log, f"echo {{}} >> {marks}; test {{}} != 2", ":::"]
        assert do(*words, "1", "2")[0] == 1
        assert do("--resume", *words, "1", "2", "3")[0] == 0
        assert do("--resume-failed", *words, "1", "2", "3")[0] == 1
        assert sorted(marks.read_text().split()) == ["1", "2", "2", "3"]
        status, _, err = do("--resume", *words, "4")
        assert (status, b"number 1 was" in err) == (255, True)

    @pytest.mark.slow
    def test_resume_after_the_end_of_the_client(self, tmp_path):
        log, marks, values = tmp_path / "log", tmp_path / "marks", [*map(str, range(1, 601))]
        words = ["-j2", "--joblog", log, f"echo {{}} >> {marks}", ":::", *values]
        with subprocess.Popen([*DO, *words]) as process:
            many = lambda: log.exists() and log.read_bytes().count(b"\n") > 50  # noqa: E731
            wait_until(many, PATIENCE, "some have ended")
            process.kill()
        ended = log.read_bytes().count(b"\n")
        assert do("--resume", *words)[0] == 0
        lines = log.read_text().splitlines()[1:]
        assert sorted((line.split("\t")[0] for line in lines), key=int) == values
        ran = marks.read_text().split()
        assert set(ran) == set(values)
        assert len(ran) - len(values) <= 2 * MOST_TOGETHER
        assert ended < 600

    @pytest.mark.slow
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_signals(self, number):
        with subprocess.Popen([*DO, "sleep", ":::", "53193", "53194"]) as process:
            wait_until(lambda: sleeping("5319[34]"), PATIENCE, "commands run")
            process.send_signal(number)
            assert process.wait(PATIENCE) == 130
        wait_until(lambda: not sleeping("5319[34]"), 5, "no command is left")


class TestOnHosts:
    @pytest.mark.slow
    def test_values_go_to_hosts(self, on_hosts):
        text = "basename $PRIVATE_SSHD; echo {host} >&2; : {}"
        status, out, err = do(*on_hosts, "h1*1,h2*1", f"sleep 0.1; {text}", ":::", *range(6))
        assert status == 0
        assert sorted(set(out.split())) == [b"h1", b"h2"]
        assert sorted(out.split()) == sorted(err.split()), err

    @pytest.mark.slow
    def test_files_of_a_map_go_to_their_hosts(self, on_hosts, tmp_path):
        (tmp_path / "map").write_text("h1 = [a, 'b c']\nh2 = [d]\nlocalhost = [e]")
        options = [*on_hosts[:-1], "--map", tmp_path / "map", "-k", "--tag"]
        status, out, _ = do(*options, "basename $PRIVATE_SSHD . 2>&1; : {}")
        assert status == 0
        lines = [line.split("\t") for line in out.decode().splitlines()]
        assert lines[:3] == [["a", "h1"], ["b c", "h1"], ["d", "h2"]]
        assert lines[3][0] == "e"
        assert do("--map", tmp_path / "map", "echo", ":::", "a")[0] == 255
        assert do("--map", tmp_path / "none", "echo")[0] == 255

    @pytest.mark.slow
    def test_a_host_that_cannot_be_had(self, on_hosts):
        status, out, err = do(*on_hosts, "h1,h9", "echo", ":::", "a")
        assert (status, out) == (0, b"a\n")
        assert b"h9" in err


def processes():
    return [int(path.name) for path in Path("/proc").glob("[0-9]*")]


def sleeping(pattern):
    return subprocess.run(["pgrep", "-f", f"^sleep {pattern}"], capture_output=True).stdout
