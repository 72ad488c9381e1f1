"""Commands on this machine and on real ssh hosts: what becomes of them, and what is left."""

from __future__ import annotations

import logging
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import crash, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from sshd import describe

from ostap_parallel import Executor
from ostap_parallel.cli import main
from ostap_parallel.commands import (
    Command,
    CommandFailed,
    Done,
    Template,
    Transfer,
    commands_of,
    run,
    run_as_completed,
)
from ostap_parallel.errors import ConfigError
from ostap_parallel.views import live

PATIENCE = 60
GONE = 50.0


@pytest.fixture(scope="module")
def here():
    with Executor(2) as executor:
        yield executor


@pytest.fixture(scope="module")
def pair(own_hosts):
    """An executor with two slots on each of two hosts, and none here."""
    with Executor(0, "h1*2 h2*2", ssh_config=own_hosts.ssh_config, config=()) as executor:
        assert executor.wait_for_hosts(PATIENCE)
        yield executor


def named(text: str) -> list[int]:
    """Return the processes whose command line holds a text."""
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if text in describe(pid)]


class TestHere:
    def test_what_becomes_of_commands(self, here):
        begin = time.time()
        done = run(
            ["echo out; echo err >&2; exit 3", ["printf", "%s", "$HOME '\""]], executor=here
        )
        first, second = done
        assert (first.status, first.stdout, first.stderr) == (3, b"out\n", b"err\n")
        assert (first.host, first.number, first.succeeded) == ("local", 1, False)
        assert begin <= first.start <= time.time()
        assert 0 < first.seconds < PATIENCE
        assert second.check().text == "$HOME '\""

    def test_a_failure_is_raised_when_asked(self, here):
        (done,) = run([["sh", "-c", "seq 20 >&2; exit 2"]], executor=here)
        with pytest.raises(CommandFailed, match="exit status 2") as caught:
            done.check()
        assert str(caught.value).splitlines()[-10:] == [str(n) for n in range(11, 21)]
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)

    def test_a_signal_is_told_from_a_status(self, here):
        killed, exited = run(["kill -SEGV $$", "exit 139"], executor=here)
        assert (killed.status, killed.signal, killed.reason()) == (None, 11, "killed by SIGSEGV")
        assert (exited.status, exited.signal) == (139, None)

    def test_what_cannot_be_started(self, here, tmp_path):
        file = tmp_path / "file"
        file.touch()
        missing, forbidden, nowhere = run(
            [["no-such"], [str(file)], Command("true", directory=tmp_path / "x")], executor=here
        )
        assert (missing.status, forbidden.status) == (127, 126)
        assert "no-such: No such file" in missing.reason()
        assert not nowhere.succeeded
        assert str(tmp_path / "x") in nowhere.reason()

    def test_surroundings(self, here, tmp_path):
        command = Command(
            "pwd; printf %s. $A; cat",
            directory=tmp_path,
            environment={"A": "$HOME-1"},
            stdin=b"\0\xff",
        )
        (done,) = run([command], executor=here)
        assert done.stdout == f"{tmp_path}\n{os.environ['HOME']}-1.".encode() + b"\0\xff"

    def test_input_from_a_file(self, here, tmp_path):
        (tmp_path / "in").write_text("text")
        good, bad = run(
            [Command("cat", stdin=tmp_path / "in"), Command("cat", stdin=tmp_path / "none")],
            executor=here,
        )
        assert good.text == "text"
        assert "none" in bad.reason()

    @pytest.mark.parametrize(
        ("text", "printed"),
        [
            ("echo a  'b  c' 'it'\\''s'", "a b  c it's\n"),
            ("echo $((1 + 1)) ~+ | tr -d /", None),
            ("type type", "type is a shell builtin\n"),
            ("a=1 env -u a printf %s", None),
            ("A=1", ""),
        ],
    )
    def test_shell_text_is_what_bash_says(self, here, text, printed):
        (done,) = run([text], executor=here)
        wanted = subprocess.run(["bash", "-c", text], capture_output=True)
        assert (done.stdout, done.status) == (wanted.stdout, wanted.returncode)
        assert printed in (None, done.text)

    def test_the_first_begins_before_the_second_is_there(self, here, tmp_path):
        mark, seen = tmp_path / "mark", threading.Event()

        def slowly():
            yield f"touch {mark}"
            wait_until(mark.exists, PATIENCE, "the first has run")
            assert seen.wait(PATIENCE)  # and its end is told
            yield "exit 3"

        statuses = []
        for done in run_as_completed(slowly(), executor=here):
            seen.set()
            statuses.append(done.status)
        assert statuses == [0, 3]

    def test_what_reading_raises_is_raised(self, here):
        def wrong():
            yield "true"
            raise LookupError("no more")

        with pytest.raises(LookupError, match="no more"):
            run(wrong(), executor=here)

    def test_many_that_cannot_begin(self, here, tmp_path):
        commands = [Command("cat", stdin=tmp_path / "none")] * 30
        assert len(run(commands, executor=here)) == 30
        assert len(run(iter(commands), executor=here)) == 30

    def test_what_it_used(self, here):
        text = "x = b'y' * 100_000_000\nfor n in range(3_000_000): pass\nprint('y' * 1000)"
        (done,) = run([[sys.executable, "-c", text]], executor=here)
        assert done.memory > 100_000_000
        assert done.user + done.system > 0.02
        assert done.written >= 1000
        assert done.read > 10_000

    @pytest.mark.parametrize(
        "text", ["sleep 61730", "trap '' TERM; sleep 61731 & sleep 61732; sleep 61733"]
    )
    def test_a_time_limit(self, here, text):
        begin = time.monotonic()
        (done,) = run([Command(text, timeout=0.3)], executor=here)
        assert done.timed_out
        assert "not done after 0.3 s" in done.reason()
        assert time.monotonic() - begin < GONE
        assert not named("sleep 6173")

    def test_a_time_limit_of_months(self, here):
        (done,) = run([Command("echo there", timeout=1e7)], executor=here)
        assert done.check().text == "there\n"

    def test_a_daemon_ends_with_its_command(self, here):
        begin = time.monotonic()
        text = "setsid sh -c 'trap \"\" HUP; sleep 71731; sleep 71732' >/dev/null & echo started"
        (done,) = run([text], executor=here)
        assert done.check().text == "started\n"
        assert time.monotonic() - begin < GONE
        assert not named("sleep 7173")

    def test_the_end_of_a_pipe_is_waited_for(self, here):
        (done,) = run(["echo word > >(sleep 0.05; cat)"], executor=here)
        assert done.text == "word\n"

    def test_what_is_kept_is_bounded(self, here):
        text = "echo begin; head -c 3000000 /dev/zero; echo end"
        (done,) = run([text], executor=here, keep=1000)
        assert done.sizes[0] == 3_000_010
        assert len(done.stdout) == 1000
        assert done.stdout.startswith(b"begin\n\0")
        assert done.stdout.endswith(b"\0end\n")

    def test_retries(self, here, tmp_path):
        text = f"echo x >> {tmp_path}/tries; test $(wc -l < {tmp_path}/tries) = 3"
        good, bad = run(
            [Command(text, retries=5), Command("false", retries=1)], executor=here, max_per_node=1
        )
        assert (good.succeeded, good.attempts) == (True, 3)
        assert (bad.succeeded, bad.attempts) == (False, 2)

    def test_they_come_as_they_end(self, here):
        commands = ["sleep 0.5; echo 1", "echo 2"]
        texts = [done.text for done in run_as_completed(commands, executor=here)]
        assert texts == ["2\n", "1\n"]

    def test_who_leaves_ends_what_runs(self, here):
        commands = [["sleep", "81731"], "true", ["sleep", "81732"]]
        results = run_as_completed(commands, executor=here)
        assert next(results).succeeded
        begin = time.monotonic()
        results.close()
        assert time.monotonic() - begin < GONE
        assert not named("sleep 8173")
        assert run(["true"], executor=here)[0].succeeded

    def test_endless_input(self, here):
        results = run_as_completed((["echo", str(n)] for n in iter(int, 1)), executor=here)
        assert [next(results).text for _ in range(20)] == ["0\n"] * 20
        results.close()

    def test_output_is_logged_by_line(self, here, caplog):
        caplog.set_level(logging.DEBUG)
        with Executor(1) as executor:
            command = Command("echo one; echo -n two; echo three >&2", name="it's\nme")
            run([command], executor=executor)
            executor.backend.flush()
            found = {(r.name, r.levelname, r.getMessage()) for r in caplog.records}
        name = "local.it's\nme"
        wanted = {(name, "DEBUG", "one"), (name, "DEBUG", "two"), (name, "WARNING", "three")}
        assert wanted <= found

    def test_cores(self, here):
        wide = Command(self.counting(), cores=2)
        done = run([wide] * 3, executor=here)
        assert {d.text for d in done} == {"1\n"}

    @staticmethod
    def counting() -> str:
        """Return a command that prints how many like it run."""
        return "sleep 0.1; pgrep -c -f '[s]leep 0.1; pgrep' || true"

    @pytest.mark.parametrize("wrong", ["", [], 3, [3], ["a\0b"]])
    def test_what_is_no_command(self, wrong):
        with pytest.raises((ValueError, TypeError)):
            Command(wrong)

    @pytest.mark.parametrize(
        ("wrong", "told"),
        [
            ({"environment": {"a=b": "1"}}, "a variable 'a=b' with '1'"),
            ({"environment": {"": "1"}}, "a variable '' with"),
            ({"environment": {1: "1"}}, "the name of a variable is text, not 1"),
            ({"variables": {"a": "b\0c"}}, r"a variable 'a' with 'b\\x00c'"),
            ({"directory": "a\0b"}, "no directory can have a null byte"),
            ({"stdin": 3}, "stdin is bytes, text, or the path of a file, not 3"),
        ],
    )
    def test_what_no_command_can_have(self, wrong, told):
        with pytest.raises((ValueError, TypeError), match=told):
            Command(["true"], **wrong)

    def test_numbers_in_variables_are_text(self, here):
        command = Command("echo $N $M", environment={"N": 4}, variables={"M": 5})
        (done,) = run([command], executor=here)
        assert done.text == "4 5\n"

    def test_bytes_in_variables_and_as_input_are_as_they_are(self, here):
        given = {b"N": b"a\xff", "M": "b"}
        for name in "environment", "variables":
            command = Command("cat; echo $N$M", stdin=memoryview(b"c"), **{name: given})
            (done,) = run([command], executor=here)
            assert done.stdout == b"ca\xffb\n"

    def test_text_that_is_none_in_this_locale(self, here):
        lone = "\ud800"
        strange, good = run([["printf", lone], ["printf", "x"]], executor=here)
        assert strange.error.startswith("printf: ")
        assert "codec can't encode" in strange.error
        assert "Traceback" not in strange.error
        assert (strange.attempts, good.text) == (1, "x")

    def test_what_cannot_be_kept_here_is_kept_nowhere(self, tmp_path):
        (tmp_path / "file").touch()
        with Executor(1) as executor:
            where = {"executor": executor, "keep": 1000, "overflow": tmp_path / "file"}
            look = "ls -l /proc/$PPID/fd | grep -c deleted"
            (before,) = run([look], **where)
            (done,) = run(["head -c 100000 /dev/zero"], **where)
            assert "its output cannot be written" in done.error
            assert str(tmp_path / "file") in done.error
            (after,) = run([look], **where)
            assert after.text == before.text

    def test_one_command_is_no_list(self):
        with pytest.raises(TypeError, match="list"):
            run("true")


class TestEnds:
    """No command outlives who started it."""

    PROGRAM = """
from ostap_parallel.commands import run
if __name__ == "__main__":
    run([["sh", "-c", "setsid sleep 97531; true"]] * 2, **SETTINGS)
"""

    @pytest.fixture
    def start(self, tmp_path):
        """A function that starts a program whose commands run."""
        path, started = tmp_path / "program.py", []

        def start(**settings):
            path.write_text(self.PROGRAM.replace("SETTINGS", repr(settings)))
            started.append(subprocess.Popen([sys.executable, path], stderr=subprocess.PIPE))
            wait_until(self.running, PATIENCE, "a command runs")
            return started[0]

        yield start
        for process in started:
            process.kill()
            process.wait(PATIENCE)
            process.stderr.close()

    @staticmethod
    def running() -> list[int]:
        return [pid for pid in named("sleep 97531") if "sh -c" not in describe(pid)]

    @pytest.mark.slow
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
    def test_here(self, start, number):
        start(ncpus=2).send_signal(number)
        wait_until(lambda: not named("sleep 97531"), GONE, "no command is left")

    @pytest.mark.slow
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
    def test_on_hosts(self, start, hosts, number):
        start(servers="h1*2", ssh_config=str(hosts.ssh_config), config=()).send_signal(number)
        wait_until(lambda: not named("sleep 97531"), GONE, "no command is left")


class TestOnHosts:
    def test_pinned_commands_run_where_they_are_to(self, pair):
        commands = [Command("echo $PRIVATE_SSHD", host=f"h{1 + n % 2}") for n in range(20)]
        for n, done in enumerate(run(commands, executor=pair)):
            assert done.check().host == f"h{1 + n % 2}"
            assert Path(done.text.strip()).name == done.host

    @pytest.mark.slow
    def test_many_with_few_at_a_time(self, pair):
        text = "d=~/many; mkdir -p $d; touch $d/$$; ls $d | wc -l; "
        text += "sleep 0.005; rm $d/$$"
        done = run([text] * 100, executor=pair, max_per_node=1)
        assert {d.text.strip() for d in done} == {"1"}
        assert {d.host for d in done} == {"h1", "h2"}

    def test_one_that_waits_blocks_no_other(self, pair):
        commands = [Command("sleep 0.5", host="h1")] * 4 + [Command("true", host="h2")] * 10
        numbers = [done.number for done in run_as_completed(commands, executor=pair)]
        assert set(numbers[:10]) == set(range(5, 15))

    @pytest.mark.slow
    def test_a_host_that_cannot_be_had(self, hosts):
        commands = [Command("true", host="h9"), Command("echo $PRIVATE_SSHD")]
        bad, good = run(commands, servers="h1*1", ssh_config=hosts.ssh_config, config=())
        assert "h9" in bad.reason()
        assert (bad.status, bad.attempts) == (None, 0)
        assert good.host == "h1"

    def test_a_host_that_is_unknown(self, pair):
        (bad,) = run([Command("true", host="h9")], executor=pair)
        assert bad.reason() == "h9 is not among the hosts"

    def test_a_retry_goes_elsewhere(self, pair):
        (done,) = run([Command("test $(basename $PRIVATE_SSHD) = h2", retries=1)], executor=pair)
        assert (done.succeeded, done.host) == (True, "h2")

    @pytest.mark.slow
    def test_files_of_results(self, pair, tmp_path):
        text = "head -c 9000000 /dev/urandom | tee >(cksum >&2)"
        done = run([text] * 4 + ["echo small"], executor=pair, results=tmp_path, keep=1 << 20)
        for one in done[:4]:
            one.check()
            told = one.stderr.split()[:2]
            found = subprocess.run(["cksum", one.files[0]], capture_output=True).stdout.split()
            assert found[:2] == told
            assert one.sizes[0] == 9_000_000
        assert (tmp_path / "5" / "stdout").read_text() == "small\n"

    @pytest.mark.slow
    def test_much_output_of_many(self, pair, tmp_path):
        """Neither here nor there is it all in memory."""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        done = run(["head -c 100000000 /dev/zero"] * 8, executor=pair, results=tmp_path)
        assert {one.check().files[0].stat().st_size for one in done} == {100_000_000}
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 250_000  # KiB

    def test_two_runs_share_the_slots(self, pair):
        text = "d=~/two; mkdir -p $d; touch $d/$$; ls $d | wc -l; sleep 0.02; rm $d/$$"
        found: list[int] = []

        def one():
            done = run([Command(text, host="h1")] * 10, executor=pair)
            found.extend(int(d.check().text) for d in done)

        threads = [threading.Thread(target=one) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert len(found) == 20
        assert max(found) <= 2

    @pytest.mark.parametrize(
        ("host", "text", "most"),
        [("h1", "true", 1400), (None, "true", 400), (None, "sleep 0.1", 40)],
    )
    def test_an_endless_source_is_read_as_far_as_there_is_use(self, pair, host, text, most):
        read = 0

        def endless():
            nonlocal read
            while read < 5000:
                read += 1
                yield Command(text, host=host)

        results = run_as_completed(endless(), executor=pair)
        assert [next(results).host for _ in range(5)].count("h1") in (
            range(6) if host is None else [5]
        )
        results.close()
        assert read <= most

    @pytest.mark.slow
    def test_a_lost_connection_ends_what_runs(self, make_hosts):
        (host,) = made = make_hosts(1)
        settings = {"ssh_config": made.ssh_config, "config": (), "patience": 0}
        with Executor(0, "h1*1", **settings) as executor:
            assert executor.wait_for_hosts(PATIENCE)
            found: list[Done] = []
            waiting = threading.Thread(
                target=lambda: found.extend(run([["sleep", "84173"]], executor=executor))
            )
            waiting.start()
            wait_until(lambda: named("sleep 84173"), PATIENCE, "it runs")
            host.stop()  # it is not to come back
            for pid in host.processes():
                if "sshd" in describe(pid):
                    os.kill(pid, signal.SIGKILL)
            wait_until(lambda: not named("sleep 84173"), GONE, "it has ended")
            waiting.join(PATIENCE)
            assert not found[0].succeeded
            assert found[0].reason()

    @pytest.mark.slow
    def test_a_lost_host(self, make_hosts):
        lost, stays = made = make_hosts(2)
        commands = [["sleep", "0.3"]] * 12
        settings = {"ssh_config": made.ssh_config, "config": ()}
        results = run_as_completed(commands, servers="h1*1 h2*1", **settings)
        done = [next(results)]
        crash(lost)
        done += results
        assert all(one.succeeded for one in done)
        assert len(done) == 12
        assert stays.name in {one.host for one in done}

    def test_what_runs_is_told_to_who_looks(self, pair, own_hosts, monkeypatch, capsys):
        monkeypatch.setattr(live, "DELAY", 0.05)
        text = "until [ -e ~/go ]; do sleep 0.05; done; exit 3"
        commands = ["true"] * 3 + [Command(text, host=host.name) for host in own_hosts]
        going = threading.Thread(
            target=run, args=[commands], kwargs={"title": "waits", "executor": pair}
        )
        going.start()

        def told():
            runs = [one for one in live.runs() if one["process"] == os.getpid()]
            return [one for one in runs if one["done"] == 3 and len(one["running"]) == 2]

        try:
            (one,) = wait_until(told, PATIENCE, "two run")
            assert main(["status"]) == 0
        finally:
            for host in own_hosts:
                (host.home / "go").touch()
            going.join(PATIENCE)
            for host in own_hosts:
                (host.home / "go").unlink()
        assert (one["title"], one["total"], one["failed"]) == ("waits", 5, 0)
        assert {row["host"]: (row["busy"], row["workers"]) for row in one["hosts"]} == {
            "h1": (1, 2),
            "h2": (1, 2),
        }
        out = capsys.readouterr().out
        assert "waits: 3/5 items in " in out
        assert "running: item 4 ('until [ -e ~/go ]; do sleep 0.05; done; exit 3') on h1" in out
        assert told() == []

    @pytest.mark.slow
    @pytest.mark.parametrize("retries", [0, 1])
    def test_a_loss_is_no_failure_of_the_command(self, make_hosts, retries):
        lost, stays = made = make_hosts(2)
        text = "true {}; [ {host} = h2 ] || sleep 83001; echo x >>~/ran; exit 3"
        commands = list(commands_of(text, [""], hosts=["h1", "h2"], retries=retries))
        found: list[Done] = []
        with Executor(0, "h1*2 h2*1", ssh_config=made.ssh_config, config=()) as executor:
            assert executor.wait_for_hosts(PATIENCE)
            running = threading.Thread(
                target=lambda: found.extend(run(commands, executor=executor))
            )
            running.start()
            wait_until(lambda: named("sleep 83001"), PATIENCE, "it runs")
            crash(lost)
            running.join(60)
        (done,) = found
        assert (done.host, done.status) == ("h2", 3)
        assert (stays.home / "ran").read_text() == "x\n" * (1 + retries)

    @pytest.mark.slow
    def test_a_lost_host_is_waited_for_with_patience(self, make_hosts):
        _, lost = made = make_hosts(2)
        settings = {"ssh_config": made.ssh_config, "config": (), "patience": 1}
        with Executor(0, "h1*1 h2*1", **settings) as executor:
            assert executor.wait_for_hosts(PATIENCE)
            crash(lost)
            good, bad = run([Command("true", host=f"h{n}") for n in (1, 2)], executor=executor)
        assert good.succeeded
        assert "h2" in bad.reason()


class TestJobLog:
    def test_its_form(self, here, tmp_path):
        log = tmp_path / "log"
        run(["echo a\necho b", "exit 4", "kill -9 $$"], executor=here, joblog=log)
        head, *lines = log.read_text().splitlines()
        assert head.split("\t")[0:3] == ["Seq", "Host", "Starttime"]
        rows = {int(row[0]): row for row in (line.split("\t") for line in lines)}
        assert [rows[n][6:] for n in (1, 2, 3)] == [
            ["0", "0", "echo a\0echo b"],
            ["4", "0", "exit 4"],
            ["0", "9", "kill -9 $$"],
        ]
        assert rows[1][5] == "4"

    def test_resume(self, here, tmp_path):
        log, marks = tmp_path / "log", tmp_path / "marks"
        commands = [f"echo {n} >> {marks}; test {n} != 2" for n in range(4)]
        run(commands[:3], executor=here, joblog=log)
        with log.open("a") as file:
            file.write("4\thalf a li")  # whoever wrote it was killed
        done = run(commands, executor=here, joblog=log, resume=True)
        assert [one.is_skipped for one in done] == [True, True, True, False]
        assert [one.succeeded for one in done] == [True, True, False, True]
        done = run(commands, executor=here, joblog=log, resume="failed")
        assert [one.is_skipped for one in done] == [True, True, False, True]
        assert sorted(marks.read_text().split()) == ["0", "1", "2", "2", "3"]

    def test_changed_commands_are_told(self, here, tmp_path):
        run(["true"], executor=here, joblog=tmp_path / "log")
        with pytest.raises(ConfigError, match=r"number 1 was 'true' and is 'false' now"):
            run(["false"], executor=here, joblog=tmp_path / "log", resume=True)

    def test_there_must_be_one(self):
        with pytest.raises(ConfigError, match="needs a joblog"):
            run(["true"], resume=True)

    @pytest.mark.parametrize("text", ["something\n", "something"])
    @pytest.mark.parametrize("resume", [True, "append"])
    def test_what_is_no_log(self, here, tmp_path, text, resume):
        (tmp_path / "log").write_text(text)
        with pytest.raises(ConfigError, match="is no job log: it begins with 'something'"):
            run(["true"], executor=here, joblog=tmp_path / "log", resume=resume)
        assert (tmp_path / "log").read_text() == text

    @pytest.mark.parametrize("text", ["", "Seq\tHo"])  # whoever began it was killed
    def test_one_that_has_just_begun(self, here, tmp_path, text):
        (tmp_path / "log").write_text(text)
        run(["true"], executor=here, joblog=tmp_path / "log", resume=True)
        head, line = (tmp_path / "log").read_text().splitlines()
        assert head.startswith("Seq\tHost")
        assert line.startswith("1\t")


class TestTemplates:
    @pytest.mark.parametrize(
        ("text", "filled"),
        [
            ("a {}", "a d/e.f.gz 2"),
            ("a", "a d/e.f.gz 2"),
            ("{1.} {1/} {1//} {1/.} {2}", "d/e.f e.f.gz d e.f 2"),
            ("{#} {1}", "7 d/e.f.gz"),
            ("{x} ${A} {1}", "{x} ${A} d/e.f.gz"),
        ],
    )
    def test_places(self, text, filled):
        assert Template(text).fill(["d/e.f.gz", "2"], 7) == filled

    def test_the_host(self):
        filled = Template("{host} {} {host}").fill(["{host}"])
        assert filled.on("h1") == "h1 '{host}' h1"
        assert str(Command(filled)) == "{host} '{host}' {host}"

    def test_a_missing_value(self):
        with pytest.raises(ValueError, match="no value number 3"):
            Template("{3}").fill(["a"])

    def test_several_inputs(self):
        assert [str(c) for c in commands_of("{1}{2}", "ab", "12")] == ["a1", "a2", "b1", "b2"]
        assert [str(c) for c in commands_of("{1}{2}", "ab", "12", zipped=True)] == ["a1", "b2"]

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(
            st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0")),
            min_size=2,
            max_size=2,
        )
    )
    def test_hostile_values_arrive_as_they_are(self, values):
        text = Template("printf '%s\\0' {1} {2} {} {host}").fill(values)
        shell = ["bash", "-c", text.on("h'1")]
        out = subprocess.run(shell, capture_output=True, check=True, stdin=subprocess.DEVNULL)
        assert out.stdout.decode().split("\0")[:-1] == [*values, *values, "h'1"]

    def test_hostile_values_through_ssh(self, pair):
        values = ["a'b", "$(touch x)", "`id`", "\n", "-n", '"', "*", "{}", "\\", "ü€"]
        done = run(list(commands_of("printf %s {}", values)), executor=pair)
        assert [one.text for one in done] == values


@pytest.mark.parametrize("path", [".", "x/..", ".."])
def test_cleaning_up_leaves_the_directory(pair, own_hosts, tmp_path, monkeypatch, path):
    """With no directory that is the user's home, where more is than what was sent."""
    here = tmp_path / "x" / "y"
    here.mkdir(parents=True)
    (here / "sent").touch()
    monkeypatch.chdir(tmp_path if path == "x/.." else here)
    for host in own_hosts:
        (host.home / "work" / "deep").mkdir(parents=True, exist_ok=True)
        (host.home / "work" / "kept").touch()
        (host.home / "work" / "deep" / "kept").touch()
    transfer = Transfer(send=(path,), cleanup=True)
    command = Command(["true"], directory="work/deep", transfer=transfer)
    for done in run([command] * 2, executor=pair):
        done.check()
    for host in own_hosts:
        assert (host.home / "work" / "kept").exists()
        assert (host.home / "work" / "deep" / "kept").exists()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"delay": -1.0}, "delay must be a number of seconds from 0 on, not -1.0"),
        ({"delay": float("nan")}, "delay must be .* not nan"),
        ({"delay": 2.0, "percent": 0}, "percent must be a positive number, not 0"),
    ],
)
def test_a_pace_that_cannot_be(settings, told):
    with pytest.raises(ConfigError, match=told):
        run([["true"]], **settings)
