"""Statistics, reports and progress."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import textwrap
import time

import nbclient
import nbformat
import pytest

from ostap_parallel import WorkManager
from ostap_parallel.errors import HostError, WorkerLost
from ostap_parallel.runs.progress import open_progress, render_workers
from ostap_parallel.runs.report import Failure, Report, Statistics, StatMerger, describe
from ostap_parallel.supply.source import HostStatus
from ostap_parallel.views.words import duration

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def failure(index, error, attempts=1):
    return Failure(index, describe([index]), error, "traceback", "lxplus701", 42, attempts)


class TestStatistics:
    def test_a_block_is_one_job(self):
        with Statistics("here") as stat:
            time.sleep(0.01)
            stat.stop()  # leaving the block does not count again
        assert stat.njobs == 1
        assert 0.01 <= stat.time < 1

    def test_the_default_host_is_this_one(self):
        assert Statistics().host
        assert Statistics(None).host == Statistics().host

    def test_adding_keeps_the_host(self):
        stat = Statistics("a")
        stat += Statistics("b", 2.0, 3)
        stat.add(0.5)
        assert stat == Statistics("a", 2.5, 4)

    def test_mergers_that_share_a_host(self):
        one, two = StatMerger(), StatMerger()
        one.add("far", 1.0)
        one += Statistics("near", 2.0, 2)
        two.add("far", 3.0, 5)
        one += two
        assert dict(one) == {"far": Statistics("far", 4.0, 6), "near": Statistics("near", 2.0, 2)}
        assert (len(one), one.njobs, one.time) == (2, 8, 6.0)
        assert dict(two) == {"far": Statistics("far", 3.0, 5)}

    def test_table(self):
        stats = StatMerger()
        stats.add("[b]near", 30.0, 3)
        stats.add("far", 10.0, 1)
        lines = stats.table("Title", prefix="# ").splitlines()
        assert all(line.startswith("# ") for line in lines)
        assert lines[0] == "# Title"
        assert [re.split(r"\s{2,}", line)[1:] for line in lines[1:]] == [
            ["#jobs", "%", "total time", "time/job", "server"],
            ["3", "75.0", "30 s", "10 s", "[b]near"],
            ["1", "25.0", "10 s", "10 s", "far"],
            ["4", "100.0", "40 s", "10 s", "total"],
        ]

    def test_table_of_failures_and_of_hosts_that_did_nothing(self):
        stats = StatMerger()
        stats.add("near", 30.0, 3)
        stats.add("near", 0.0, 0, nfailed=2)
        lines = stats.table(notes={"far": "queued"}).splitlines()
        assert [re.split(r"\s{2,}", line.strip()) for line in lines] == [
            ["#jobs", "#failed", "%", "total time", "time/job", "server"],
            ["0", "0", "0.0", "0 us", "-", "far (queued)"],
            ["3", "2", "100.0", "30 s", "10 s", "near"],
            ["3", "2", "100.0", "30 s", "10 s", "total"],
        ]

    def test_gain(self, capsys):
        stats = StatMerger()
        stats.add("near", 30.0, 3)
        stats.print_stats("# ", cputime=10.0)
        assert capsys.readouterr().out.splitlines()[-1] == "# gain: 3.00 = 30 s / 10 s"


class TestReport:
    def test_text(self):
        report = Report(submitted=10, merged=7, retried=2, wall=2.0, result=["secret"])
        report.stats.add("lxplus701", 6.0, 7)
        report.failures.append(failure(3, ValueError("bad\nthing"), attempts=2))
        refused = HostError("lxplus702", "connect", "Permission denied")
        report.hosts += [HostStatus("lxplus701", "up"), HostStatus("lxplus702", "failed")]
        report.hosts[1].error = refused
        first, *rest = str(report).splitlines()
        assert first == (
            "10 submitted = 7 merged + 1 failed + 2 unfinished, 2.0 s, gain 3.00, 2 retried, "
            "not complete"
        )
        assert rest[-2:] == [
            "host lxplus702 failed: connect: Permission denied",
            "item 3 ([3]) on lxplus701 (pid 42, 2 attempts): ValueError: bad thing",
        ]
        assert (report.failed, report.gain) == (1, 3.0)
        assert "secret" not in repr(report)

    @pytest.mark.parametrize(
        ("status", "text"),
        [
            (HostStatus("h2"), "h2 (still starting when the run ended)"),
            (HostStatus("h2", "queued", reason="priority"), "h2 (queued: priority)"),
            (HostStatus("h2", "up", 1), "h2 (up, but nothing was left for it)"),
            (HostStatus("h2", "failed"), "h2 (failed)"),
        ],
    )
    def test_hosts_that_did_nothing_stand_with_the_reason(self, status, text):
        report = Report(hosts=[status, HostStatus("h1", "up", 1)])
        report.stats.add("h1", 1.0, 1)
        assert text in report.table()
        assert "h1 (" not in report.table()

    def test_failures_in_one_line(self):
        report = Report(submitted=60)
        assert report.failed_in_short() == ""
        report.failures += [failure(n, ValueError("bad\nthing")) for n in (3, 1)]
        assert report.failed_in_short() == (
            "2 of 60 items FAILED; first: item 1 on lxplus701: ValueError: bad thing"
        )

    def test_failures_in_groups(self):
        def raised(index, error, line, host="h1"):
            where = f'File "/home/me/fit.py", line {line}, in fit'
            text = f'  {where}\n    do()\n  File "/usr/lib/python3/json/x.py", line 3, in do\n'
            return Failure(index, "[1]", error, f"Traceback\n{text}", host, 7, 1)

        report = Report(submitted=60)
        assert report.failed_in_groups() == ""
        report.failures += [raised(n, ValueError(f"bad \x1b{n}"), 81, "h2") for n in (40, 12, 17)]
        report.failures += [raised(5, ValueError("other"), 90)]
        report.failures += [
            Failure(n, "x", WorkerLost(n, host, f"worker {n} was killed"), "", host, n, 3)
            for n, host in ((8, "h2"), (7, "h1"))
        ]
        first, *groups = report.failed_in_groups().split("\n")
        assert first == "6 of 60 items FAILED; first: item 5 on h1: ValueError: other"
        assert groups == [
            "  3 x ValueError in fit.py:81, first item 12 on h2: bad ?12",
            "  2 x WorkerLost, first item 7 on h1: worker 7 was killed",
            "  1 x ValueError in fit.py:90, first item 5 on h1: other",
        ]
        assert groups[0].strip() in str(report)
        assert report.as_dict()["groups"][0]["place"] == "fit.py:81"

    def test_complete(self):
        report = Report(submitted=2, merged=2, complete=True)
        assert str(report) == "2 submitted = 2 merged + 0 failed, 0.0 s, gain 0.00"

    def test_shows_ten_failures(self):
        report = Report(failures=[failure(i, KeyError(i)) for i in range(13)])
        assert "item 9 " in str(report)
        assert "item 10 " not in str(report)
        assert str(report).endswith("... and 3 more failures")

    def test_a_failure_whose_error_has_no_text(self):
        assert str(failure(0, KeyError())).endswith("(pid 42): KeyError")


class Nasty:
    def __repr__(self):
        raise RuntimeError("no")


class Wide:
    def __repr__(self):
        return "wide\n    " * 1000


@pytest.mark.parametrize(
    ("obj", "text"),
    [
        (1, "1"),
        ("a b", "'a b'"),
        (range(3), "range(0, 3)"),
        ([1] * 100, "[1, 1, 1, 1, 1, 1, ...]"),
        (10**30, str(10**30)),
    ],
)
def test_describe(obj, text):
    assert describe(obj) == text


@pytest.mark.parametrize(
    "obj",
    [Nasty(), [Nasty()], Wide(), "x" * 10**6, 10**5000, b"y" * 999],
    ids=["nasty", "in a list", "wide", "text", "int", "bytes"],
)
def test_describe_never_fails_and_is_short(obj):
    text = describe(obj)
    assert 0 < len(text) <= 200
    assert "\n" not in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (2e-6, "2 us"),
        (0.0015, "1.5 ms"),
        (43.14, "43.1 s"),
        (99.96, "0:01:40"),
        (7500, "2:05:00"),
        (90_000, "1 day, 1:00:00"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


class TestLines:
    """Standard error is a file or a pipe, as under pytest's capture."""

    def open(self, total, clock):
        return open_progress(True, total, "process", lambda: {"local": 2, "lx": 8}, clock=clock)

    def test_at_most_one_in_thirty_seconds(self, capsys):
        clock = Clock()
        with self.open(500, clock) as progress:
            for second in range(1, 71):
                clock.now = 1000.0 + second
                progress.advance(5, failed=second % 35 == 0)
        assert capsys.readouterr().err.splitlines() == [
            "process: 150/500 items, 5.0/s, 70 s left, local:2 lx:8",
            "process: 300/500 items, 5.0/s, 40 s left, 1 failed, local:2 lx:8",
            "process: 350/500 items in 70 s, 2 failed, local:2 lx:8",
        ]

    def test_a_short_run_prints_nothing(self, capsys):
        with self.open(5, Clock()) as progress:
            progress.advance(5)
        assert capsys.readouterr() == ("", "")

    def test_unsized_input_and_slow_items(self, capsys):
        clock = Clock()
        with self.open(None, clock) as progress:
            clock.now += 100
            progress.advance(4)
        assert capsys.readouterr().err.splitlines() == [
            "process: 4 items, 25 s/item, local:2 lx:8",
            "process: 4 items in 0:01:40, local:2 lx:8",
        ]

    def test_the_rate_is_a_recent_one(self):
        clock = Clock()
        with self.open(None, clock) as progress:
            for _ in range(100):
                clock.now += 1
                progress.advance(1)
            for _ in range(70):
                clock.now += 1
                progress.advance(10)
                status = progress.status()
        assert "10.0/s" in status

    def test_a_closed_standard_error_does_not_matter(self, monkeypatch):
        clock = Clock()
        with open(os.devnull) as read_only:  # noqa: PTH123
            for stream in None, read_only:
                monkeypatch.setattr(sys, "stderr", stream)
                with self.open(5, clock) as progress:
                    clock.now += 40
                    progress.advance(1)
                assert progress.done == 1

    def test_disabled(self, capsys):
        clock = Clock()
        workers = {}.clear  # would not do: it must not even be asked
        with open_progress(False, 5, "process", workers, clock=clock) as progress:
            clock.now += 100
            progress.advance(2, failed=1)
        assert (progress.done, progress.failed) == (2, 1)
        assert capsys.readouterr() == ("", "")


def test_many_workers_are_summed_up():
    assert render_workers({"local": 2, "lxplus701": 8}) == "local:2 lxplus701:8"
    assert render_workers({f"lxplus70{i}": 8 for i in range(7)}) == "7 hosts, 56 workers"


def run_in_terminal(program, stdout=None, **environ):
    """Run a program in a pseudo-terminal of 100 columns; return what it showed, its status."""
    master, slave = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "100", **environ}
    code = "from ostap_parallel.runs.progress import open_progress\n" + textwrap.dedent(program)
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=slave,
        stdout=stdout or slave,
        stderr=slave,
        env=env,
        start_new_session=True,
    ) as process:
        os.close(slave)
        shown = b""
        while True:
            if not select.select([master], [], [], 20)[0]:
                process.kill()
                raise AssertionError("the program hangs")
            try:
                shown += os.read(master, 65536)
            except OSError:  # its end of the terminal is closed
                break
        os.close(master)
        status = process.wait(60)
    return ANSI.sub("", shown.decode()), status


class TestTerminal:
    def test_bar(self):
        shown, status = run_in_terminal("""
            import sys, time
            with open_progress(True, 50, "[b]squares", lambda: {"local": 2, "lx": 8}) as progress:
                for i in range(50):
                    progress.advance(1, failed=i == 7)
                    time.sleep(0.02)
                    if i == 20:
                        print("[red]a print[/nope]", "wide " * 40, "end")
                        print("a warning", file=sys.stderr)
                print("no newline", end="")
            print("the end")
        """)
        assert status == 0
        assert "[b]squares ━" in shown
        assert re.search(r"\d+/50 items, \d+\.\d/s, \d+ s left, ", shown)
        assert re.search(r"50/50 items in 1\.\d* s, 1 failed, local:2 lx:8", shown)
        assert "[red]a print[/nope] " + "wide " * 40 + " end" in shown.replace("\r\n", "\n")
        assert "a warning\r\n" in shown
        assert "no newline" in shown
        assert shown.rstrip().endswith("the end")

    def test_unsized_input_has_a_counter(self):
        shown, status = run_in_terminal("""
            with open_progress(True, None, "scan", lambda: {"local": 2}) as progress:
                progress.advance(1234)
        """)
        assert status == 0
        assert re.search(r"scan 1234 items in .*s, local:2", shown)
        assert "━" not in shown

    def test_a_narrow_terminal_keeps_one_line(self):
        shown, _ = run_in_terminal(
            """
            with open_progress(True, 10, "process", lambda: {"lxplus701": 800}) as progress:
                progress.advance(10)
            """,
            COLUMNS="50",
        )
        assert max(len(line) for line in re.split(r"[\r\n]+", shown)) <= 50

    def test_output_that_goes_to_a_file_gets_there(self, tmp_path):
        with (tmp_path / "out").open("w") as out:
            run_in_terminal(
                """
                with open_progress(True, 10, "process", lambda: {"local": 2}) as progress:
                    progress.advance(10)
                    print("for the file")
                """,
                stdout=out,
            )
        assert (tmp_path / "out").read_text() == "for the file\n"

    def test_a_dumb_terminal_gets_lines_only(self):
        shown, status = run_in_terminal(
            """
            with open_progress(True, 10, "process", lambda: {"local": 2}) as progress:
                progress.advance(10)
            """,
            TERM="dumb",
        )
        assert (shown, status) == ("", 0)

    def test_an_exception_passes_and_leaves_the_cursor(self):
        shown, status = run_in_terminal("""
            with open_progress(True, 10, "process", lambda: {"local": 2}) as progress:
                progress.advance(3)
                raise SystemExit(7)
        """)
        assert status == 7
        assert "3/10 items in" in shown


@pytest.mark.slow
def test_jupyter_has_one_display_and_needs_no_widgets():
    code = """
        import time
        from ostap_parallel.runs.progress import open_progress
        with open_progress(True, 20, "process", lambda: {"local": 2}) as progress:
            for _ in range(20):
                progress.advance(1)
                time.sleep(0.05)
    """
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(textwrap.dedent(code))])
    nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    (output,) = notebook.cells[0].outputs
    assert "━" in output["data"]["text/html"]
    assert re.search(r"20/20 items in 1.* s, local:2", output["data"]["text/html"])


def test_advancing_is_cheap():
    with open_progress(True, None, "process", dict) as progress:
        start = time.thread_time()
        for _ in range(100_000):
            progress.advance(1)
        assert time.thread_time() - start < 0.5
    assert progress.done == 100_000


def test_the_name_of_an_exception_steers_no_terminal():
    odd = type("\x1b[2J", (Exception,), {})

    def fail(item):
        raise odd("\x1b]0;")

    with WorkManager(1, silent=True) as wm:
        wm.process(fail, range(3), on_error="collect")
        report = wm.report
    assert report.failed == 3
    assert "\x1b" not in report.failed_in_groups() + str(report)
