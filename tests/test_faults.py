"""What goes wrong in a task stays that task's, here and on a host: real signals, real hangs."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import itertools
import os
import queue
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import faults
import functions
import pytest
from functions import PATIENCE, run_python
from helpers import importable, wait_until
from sshd import descendants

from ostap_parallel import (
    Failure,
    RemoteError,
    SerializeError,
    ServersUnavailable,
    TaskMerger,
    TaskTimeout,
    WorkerLost,
    WorkManager,
)
from ostap_parallel.engine.core import Core
from ostap_parallel.errors import RemoteTraceback
from ostap_parallel.machine import local, output
from ostap_parallel.machine.jobs import Job
from ostap_parallel.machine.server import Server
from ostap_parallel.objects import serialize
from ostap_parallel.worker import execute
from ostap_parallel.worker.chunk import MAX_TEXT, pack_chunk, unpack_result


@pytest.fixture(scope="module", params=["local", "h1"])
def wm(request):
    """A manager with one worker, here or on a host."""
    if request.param == "local":
        with WorkManager(1, silent=True) as manager:
            yield manager
        return
    hosts = request.getfixturevalue("one_host")
    path = importable(hosts)
    with WorkManager(
        0, "h1*1", ssh_config=hosts.ssh_config, config=(), environment=path, silent=True
    ) as manager:
        assert manager.wait_for_hosts(PATIENCE), manager.executor.hosts
        yield manager


@pytest.fixture
def folder(request, wm, host, tmp_path):
    """A directory that the worker can write to; a host has a /tmp of its own."""
    if host == "local":
        yield faults.Folder(tmp_path, tmp_path)
        return
    machine = request.getfixturevalue("one_host")[host]
    here = Path(tempfile.mkdtemp(dir=machine.tmp))
    yield faults.Folder(here, Path(machine.inside(here)))
    shutil.rmtree(here)


@pytest.fixture
def host(wm):
    """The name of the host of `wm`."""
    return next(iter(wm.workers))


def works(wm):
    """Whether the one worker does what it should."""
    return wm.process(functions.square, range(5)) == [0, 1, 4, 9, 16]


@pytest.mark.slow
class TestCulprit:
    """The item that ended the worker, and no other, pays for it."""

    @pytest.mark.parametrize("how", faults.DEATHS)
    def test_it_is_named_and_its_neighbours_are_not_blamed(self, wm, host, folder, how):
        die, said = faults.DEATHS[how]

        def work(item):
            functions.note(folder.there, item)
            if item == 13:
                die()
            return item

        # not one attempt more for whom is to blame: a neighbour that was blamed would fail
        found = wm.process(work, range(10, 20), chunk_size=10, on_error="collect", lost_retries=0)
        assert [x for x in found if not isinstance(x, Failure)] == [*range(10, 13), *range(14, 20)]
        error = found[3].error
        assert isinstance(error, WorkerLost)
        assert (error.item, error.host) == (3, host)
        assert error.reason == f"worker {found[3].pid} {said}"
        # those before it lost their results with the worker, those behind it had not begun
        assert [functions.attempts(folder.here, n) for n in range(10, 20)] == [2, 2, 2, *[1] * 7]
        assert found[3].attempts == 1
        assert wm.report.retried == 3

    def test_many_of_them_in_a_chunk(self, wm, folder):
        def work(item):
            functions.note(folder.there, item)
            if item % 2:
                functions.die("kill")
            return item

        found = wm.process(work, range(24), chunk_size=24, on_error="collect", lost_retries=0)
        assert [x for x in found if not isinstance(x, Failure)] == [*range(0, 24, 2)]
        assert [failure.index for failure in wm.report.failures] == [*range(1, 24, 2)]
        assert max(functions.attempts(folder.here, n) for n in range(0, 24, 2)) == 2

    def test_as_often_as_allowed_and_alone(self, wm, folder):
        def work(item):
            (folder.there / f"{functions.note(folder.there, item)}-{item}").touch()
            if item == 2:
                functions.die("exit")
            return item

        found = wm.process(work, range(4), chunk_size=4, on_error="collect")
        assert (found[2].attempts, functions.attempts(folder.here, 2)) == (3, 3)
        assert found[:2] + found[3:] == [0, 1, 3]

    def test_while_its_argument_is_read(self, wm):
        items = [1, faults.ReadsBadly("die"), 3]
        found = wm.process(type, items, chunk_size=3, on_error="collect", lost_retries=0)
        assert [found[0], found[2]] == [int, int]
        assert isinstance(found[1].error, WorkerLost)

    def test_a_set_up_that_kills_blames_every_item(self, wm):
        class Deadly(faults.Sum):
            def worker_init(self):
                os._exit(4)

        wm.process(Deadly(), range(3), on_error="collect", lost_retries=0)
        assert {type(f.error) for f in wm.report.failures} == {WorkerLost}
        assert len(wm.report.failures) == 3
        assert works(wm)

    def test_a_death_between_items_blames_none(self, wm):
        for size in 1, 3:
            (pid,) = wm.process(functions.pid_of, [0])
            os.kill(pid, signal.SIGKILL)
            found = wm.process(functions.square, range(5), chunk_size=size, lost_retries=0)
            assert found == [0, 1, 4, 9, 16]

    def test_memory_that_is_not_to_be_had(self, wm, host):
        class Limited(faults.Sum):
            def worker_init(self):
                limit = 1 << 30
                resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))

            def process(self, jobid, item):
                if item == 1:
                    return len(bytearray(2 << 30))
                if item == 2:
                    libc = ctypes.CDLL(None)
                    libc.malloc.restype = ctypes.c_void_p
                    ctypes.memset(libc.malloc(ctypes.c_size_t(2 << 30)) or 0, 0, 1)
                return item

        try:
            assert wm.process(Limited(), range(4), chunk_size=4, on_error="collect") == 3
            python, c = sorted(wm.report.failures, key=lambda failure: failure.index)
            assert isinstance(python.error, MemoryError)
            assert isinstance(c.error, WorkerLost)
            assert (c.index, c.error.host) == (2, host)
            assert c.error.reason.endswith("was killed by SIGSEGV")
        finally:  # the limit stays
            wm.process(lambda x: os._exit(0), [1], on_error="collect", lost_retries=0)


@pytest.mark.slow
class TestTimeout:
    HANGS = (
        faults.hang_in_python,
        faults.hang_in_reading,
        faults.hang_in_reading_by_dill,
        faults.hang_in_an_error,
        faults.hang_in_c,
        faults.swallow,
        faults.deaf,
        faults.stop,
    )

    @pytest.mark.parametrize("hang", HANGS, ids=lambda hang: hang.__name__)
    def test_the_item_fails_and_no_other(self, wm, host, folder, hang):
        def work(item):
            if item == 2:
                functions.note(folder.there, item)
                return hang(item)
            return item

        found = wm.process(work, range(5), chunk_size=5, on_error="collect", timeout=0.3)
        assert found[:2] + found[3:] == [0, 1, 3, 4]
        error = found[2].error
        assert isinstance(error, TaskTimeout)
        assert isinstance(error, TimeoutError)
        assert (error.item, error.host, error.seconds) == (2, host, 0.3)
        assert str(error) == f"item 2 on {host}: not done after 0.3 s"
        assert functions.attempts(folder.here, 2) == found[2].attempts == 1
        assert works(wm)

    def test_the_argument_is_read_within_it(self, wm):
        items = [1, faults.ReadsBadly("hang"), 3]
        found = wm.process(type, items, chunk_size=3, on_error="collect", timeout=0.3)
        assert isinstance(found[1].error, TaskTimeout)
        assert [found[0], found[2]] == [int, int]

    def test_it_is_raised_and_tells_where(self, wm):
        with pytest.raises(TaskTimeout) as caught:
            wm.process(faults.hang_in_python, [1], timeout=0.2)
        assert isinstance(caught.value.__cause__, RemoteTraceback)
        assert "in hang_in_python" in str(caught.value.__cause__)
        with pytest.raises(TaskTimeout):
            list(wm.iexecute(faults.hang_in_python, [1], timeout=0.2))

    def test_a_task_can_clean_up(self, wm, folder):
        def work(item):
            try:
                time.sleep(60)
            except KeyboardInterrupt:
                (folder.there / "cleaned").touch()
                return "late"

        pid = wm.process(functions.pid_of, [0])
        with pytest.raises(TaskTimeout):
            wm.process(work, [1], timeout=0.2)
        assert (folder.here / "cleaned").exists()
        assert wm.process(functions.pid_of, [0]) == pid  # the worker was not ended

    @pytest.mark.parametrize(
        "hang", [faults.hang_in_python, faults.hang_in_c], ids=["soft", "hard"]
    )
    def test_only_retries_count(self, wm, folder, hang):
        def work(item):
            if functions.note(folder.there, item) < 2:
                hang(item)
            return item

        assert wm.process(work, [1], timeout=0.3, retries=1) == [1]
        with pytest.raises(TaskTimeout):
            wm.process(hang, [1], timeout=0.3, lost_retries=5)

    def test_a_worker_that_dies_is_no_timeout(self, wm):
        with pytest.raises(WorkerLost, match="exit status 1"):
            wm.process(lambda x: os._exit(1), [1], timeout=30, lost_retries=0)

    def test_an_alarm_of_the_task_is_no_timeout(self, wm):
        def work(item):
            signal.alarm(1)
            time.sleep(20)

        with pytest.raises(WorkerLost, match="SIGALRM"):
            wm.process(work, [1], timeout=30, lost_retries=0)

    def test_the_limit_is_for_each_item(self, wm):
        def work(item):
            time.sleep(0.25)
            return item

        assert wm.process(work, range(5), chunk_size=5, timeout=1) == list(range(5))

    def test_it_ends_with_its_run(self, wm):
        assert wm.process(functions.square, range(5), timeout=0.3) == [0, 1, 4, 9, 16]
        pid = wm.process(functions.pid_of, [0])
        # longer than a limit of the run before, with all its patience
        assert wm.process(lambda x: time.sleep(3), [1]) == [None]
        assert wm.process(functions.pid_of, [0]) == pid

    def test_alarms_of_the_task_itself(self, wm):
        class Alarm(Exception):
            pass

        def work(item):
            def ring(number, frame):
                raise Alarm

            signal.signal(signal.SIGALRM, ring)
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            time.sleep(60)

        found = wm.process(work, [1], on_error="collect")
        assert found[0].error.__class__.__name__ == "Alarm"
        with pytest.raises(WorkerLost, match="SIGALRM"):  # as in any process without a handler
            wm.process(lambda x: [signal.alarm(1), time.sleep(60)], [1], lost_retries=0)

    @pytest.mark.parametrize("fails", [True, False])
    def test_an_alarm_that_c_code_has_held_up(self, wm, fails):
        def work(item):
            def ring(number, frame):
                raise OverflowError("alarm")

            signal.signal(signal.SIGALRM, ring)
            kill = ctypes.CDLL(None).kill
            calls = [(os.getpid(), signal.SIGALRM if item == 50 else 0)]
            if fails and item == 50:
                calls.append(None)  # an error, before Python has a look
            return 0 in itertools.islice(itertools.starmap(kill, calls), fails, None)

        settings = {"on_error": "collect", "chunk_size": 60, "lost_retries": 0}
        found = wm.process(work, range(60), **settings)
        assert [type(one) for one in found] == [*[bool] * 50, Failure, *[bool] * 9]
        assert repr(found[50].error) == "OverflowError('alarm')"

    def test_a_time_limit_that_c_code_has_held_up(self, wm):
        def work(item):
            calls = [(60_000_000,), None]  # the first returns as time is over
            list(itertools.starmap(ctypes.CDLL(None).usleep, calls))

        pid = wm.process(functions.pid_of, [0])
        with pytest.raises(TaskTimeout):
            wm.process(work, [1], timeout=0.3, lost_retries=0)
        assert wm.process(functions.pid_of, [0]) == pid

    @pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), True, "1", 1e300])
    def test_what_is_no_time(self, wm, timeout):
        with pytest.raises(ValueError, match="timeout must be a positive number of seconds"):
            wm.process(functions.square, [1], timeout=timeout)

    def test_other_executors_have_none(self):
        with ThreadPoolExecutor(1) as pool, WorkManager(executor=pool, silent=True) as other:
            with pytest.raises(TypeError, match="timeout is for our own workers"):
                other.process(functions.square, [1], timeout=1)
            assert other.process(functions.square, [2]) == [4]


class TestLeftovers:
    """An item finds its worker as the first one found it."""

    @pytest.mark.parametrize("how", faults.WAYS)
    def test_the_next_item_does_not_see_it(self, wm, how):
        def work(item):
            time.sleep(execute.BRIEF)
            return faults.leave(how) if item == 1 else faults.state()

        # what it leaves may reach it itself
        found = wm.process(work, range(3), chunk_size=3, on_error="collect")
        assert found[2] == found[0]
        assert found[0]["pid"] == wm.process(functions.pid_of, [1])[0]  # nor does it end

    def test_nor_does_the_next_chunk_though_the_item_was_brief(self, wm):
        masks = wm.process(os.umask, [0o077, 0o077], chunk_size=1)  # each returns the old one
        assert masks[0] == masks[1] != 0o077

    def test_output_goes_on(self, wm, capfd):
        def work(item):
            print("item", item)
            for how in "closed descriptors", "closed streams", "other streams":
                faults.leave(how)

        wm.process(work, range(2), chunk_size=2)
        lines = capfd.readouterr().out.splitlines()
        assert [line.removeprefix("h1: ") for line in lines] == ["item 0", "item 1"]

    def test_what_a_set_up_does_stays(self, wm):
        class Prepared(faults.Sum):
            def worker_init(self):
                os.environ["PREPARED"] = "1"
                os.chdir("/")

            def process(self, jobid, item):
                faults.leave("environment")
                os.chdir("/usr")
                return int(os.environ.pop("PREPARED"))

        assert wm.process(Prepared(), range(3), chunk_size=3) == 3

    def test_what_a_set_up_that_fails_does_is_taken_back(self, wm):
        class Failing(faults.Sum):
            def worker_init(self):
                faults.leave("environment")
                raise LookupError("on purpose")

        before = wm.process(lambda x: faults.state(), [1])
        with pytest.raises(LookupError):
            wm.process(Failing(), range(3))
        assert wm.process(lambda x: faults.state(), [1]) == before

    def test_a_fork_that_comes_back(self, wm, folder):
        def work(item):
            if item == 1:
                os.fork()
            functions.note(folder.there, item)
            return item

        pid = wm.process(functions.pid_of, [0])
        assert wm.process(work, range(4), chunk_size=4) == [0, 1, 2, 3]
        wait_until(lambda: functions.attempts(folder.here, 1) == 2, PATIENCE, "the fork")
        assert wm.process(functions.pid_of, [0]) == pid
        assert [functions.attempts(folder.here, n) for n in range(4)] == [1, 2, 1, 1]

    def test_a_worker_with_threads_ends(self):
        before = set(descendants(os.getpid()))
        with WorkManager(1, silent=True) as manager:
            manager.process(lambda x: faults.leave("threads"), range(3))
        assert set(descendants(os.getpid())) == before


class TestValues:
    """Results, items and exceptions that lie."""

    @pytest.mark.parametrize("how", ["raise", "exit"])
    def test_results_that_cannot_be_read(self, wm, how):
        work = lambda item: faults.ResultThat(how) if item == 1 else item  # noqa: E731
        found = wm.process(work, range(3), chunk_size=3, on_error="collect")
        assert [found[0], found[2]] == [0, 2]
        assert "not to be read" in str(found[1].error)
        assert isinstance(found[1].error, (SerializeError, RemoteError))

    def test_arguments_that_cannot_be_read(self, wm):
        items = [1, faults.ReadsBadly("raise"), 3]
        found = wm.process(type, items, chunk_size=3, on_error="collect")
        assert [found[0], found[2]] == [int, int]
        assert isinstance(found[1].error, LookupError)

    def test_modules_that_a_function_names_are_imported(self, wm, monkeypatch):
        monkeypatch.setattr(faults, "only_here", (x for x in "ab"), raising=False)
        assert wm.process(lambda item: hasattr(faults, "only_here"), [1]) == [False]

    def test_results_that_refuse_every_question(self, wm):
        found = wm.process(lambda item: faults.Hostile(), range(2))
        assert [type(one) for one in found] == [faults.Hostile] * 2
        found = wm.process(functions.same, [faults.Hostile()], merger=lambda a, b: a)
        assert type(found) is faults.Hostile

    def test_items_that_refuse_every_question(self, wm):
        def work(item):
            raise KeyError("on purpose")

        found = wm.process(work, [faults.Hostile(), faults.Hostile()], on_error="collect")
        assert [type(failure.error) for failure in found] == [KeyError] * 2
        assert "Hostile" in str(wm.report)

    @pytest.mark.parametrize("kind", [faults.HostileError, faults.HostileExit])
    def test_exceptions_that_refuse_every_question(self, wm, kind):
        def work(item):
            raise kind("on purpose")

        (failure,) = wm.process(work, [1], on_error="collect")
        assert type(failure.error) is kind
        assert "in work" in failure.traceback
        assert kind.__name__ in str(wm.report)

    @pytest.mark.parametrize(
        "error",
        [
            SystemExit(3),
            KeyboardInterrupt("mine"),
            GeneratorExit("mine"),
            asyncio.CancelledError("mine"),
            StopIteration("mine"),
            BaseException("mine"),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_what_would_end_the_caller(self, wm, error):
        def work(item):
            raise error

        name = f"{type(error).__module__}.{type(error).__name__}".removeprefix("builtins.")
        with pytest.raises(RemoteError, match=f"^{name}: ") as caught:
            wm.process(work, [1])
        assert caught.value.name == name
        assert "in work" in str(caught.value.__cause__)
        with pytest.raises(RemoteError):
            list(wm.iexecute(work, [1]))
        assert works(wm)

    def test_recursion(self, wm):
        with pytest.raises(RecursionError) as caught:
            wm.process(faults.deep, [0])
        assert "in deep" in str(caught.value.__cause__)
        with pytest.raises((SerializeError, RecursionError)):
            wm.process(faults.deep_list, [100_000])
        assert works(wm)

    @pytest.mark.skipif(sys.version_info < (3, 11), reason="new in Python 3.11")
    def test_groups_of_exceptions(self, wm):
        def work(item):
            raise ExceptionGroup("two", [ValueError(1), KeyError("k")])  # noqa: F821

        with pytest.raises(ExceptionGroup) as caught:  # noqa: F821
            wm.process(work, [1])
        assert [repr(one) for one in caught.value.exceptions] == ["ValueError(1)", "KeyError('k')"]

    def test_exceptions_known_on_the_worker_only(self, wm):
        def work(item):
            import types

            module = types.ModuleType("only_there")
            exec("class Odd(Exception): pass", vars(module))
            sys.modules["only_there"] = module
            raise module.Odd("on purpose")

        with pytest.raises(RemoteError, match=r"^only_there\.Odd: on purpose") as caught:
            wm.process(work, [1])
        assert "in work" in str(caught.value.__cause__)

    @pytest.mark.slow
    def test_huge_messages(self, wm):
        def work(item):
            raise ValueError("x" * 10_000_000)

        (failure,) = wm.process(work, [1], on_error="collect")
        assert failure.error.args == ("x" * 10_000_000,)
        assert len(failure.traceback) < 2 * MAX_TEXT
        assert failure.traceback.startswith("Traceback")

    def test_attributes_that_do_not_travel(self, wm):
        def work(item):
            try:
                raise KeyError("the cause")
            except KeyError as cause:
                raise faults.Stop("on purpose") from cause

        with pytest.raises(RemoteError, match="Stop: on purpose") as caught:
            wm.process(work, [1])
        text = str(caught.value.__cause__)
        assert (
            text.index("KeyError: 'the cause'") < text.index("direct cause") < text.index("Stop")
        )


class TestOutput:
    @pytest.mark.slow
    def test_more_than_a_chunk_may_print(self, wm, capfd):
        def work(item):
            if item == 0:
                for _ in range(output.MAX_OUTPUT // 2**20 + 8):
                    os.write(item + 1, (b"x" * 1023 + b"\n") * 1024)
            print("item", item)

        wm.process(work, range(2), chunk_size=1)
        out, err = capfd.readouterr()
        assert out.count("x") == output.MAX_OUTPUT // 1024 * 1023
        assert f"{8 * 2**20 + 7} bytes more than the {output.MAX_OUTPUT}" in err
        assert "item 0" not in out  # it came behind
        assert "item 1" in out

    @pytest.mark.slow
    @pytest.mark.parametrize("where", ["local", "h1"])
    def test_four_workers_at_once(self, tmp_path, request, where):
        arguments = ["local"]
        if where != "local":
            arguments = ["h1*4", request.getfixturevalue("one_host").ssh_config]
        (tmp_path / "script.py").write_text(FLOOD)
        with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:
            done = subprocess.run(
                [sys.executable, "script.py", *map(str, arguments)],
                cwd=tmp_path,
                env=functions.script_environ(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                timeout=100,
            )
        assert done.returncode == 0, (tmp_path / "err").read_text()[-2000:]
        results, peaks = (tmp_path / "results").read_text().splitlines()
        assert results == "[0, 1, 2, 3]"
        assert max(map(int, peaks.split())) < 100_000  # KiB, of the caller and of the server
        for name in "out", "err":
            with (tmp_path / name).open("rb") as file:
                for line in file:
                    words = set(re.sub(rb"^(h1)?(, )?(item \d)?: ", b"", line).strip())
                    assert len(words) <= 1 or b"bytes more" in line, line[:200]


FLOOD = """
import ctypes, os, resource, sys
from pathlib import Path
from ostap_parallel import WorkManager

def flood(item):
    libc = ctypes.CDLL(None)
    for descriptor, first in (1, ord("a")), (2, 1):
        piece = bytes([first + item]) * 2**20
        for _ in range(64):
            libc.write(descriptor, piece, len(piece))
    return item

def peak(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    return status.partition("VmHWM:")[2].split()[0]

if sys.argv[1] == "local":
    wm = WorkManager(4, silent=True)
else:
    wm = WorkManager(0, sys.argv[1], ssh_config=sys.argv[2], config=(), silent=True)
with wm:
    wm.wait_for_hosts()
    found = wm.process(flood, range(4), chunk_size=1)
    peaks = [peak(os.getpid())]
    peaks += [peak(host.about["pid"]) for host in wm.report.hosts]
    Path("results").write_text(f"{found}\\n{' '.join(peaks)}\\n")
"""


@pytest.mark.slow
class TestManagers:
    """Several of them, anywhere."""

    @pytest.fixture
    def single(self):
        with WorkManager(1, silent=True) as manager:
            yield manager

    def test_two_at_once_in_threads(self):
        with WorkManager(1, silent=True) as one, WorkManager(1, silent=True) as two:
            with ThreadPoolExecutor(2) as threads:
                runs = [
                    threads.submit(m.process, functions.square, range(500)) for m in (one, two)
                ]
                assert [run.result(PATIENCE) for run in runs] == [[x * x for x in range(500)]] * 2
            assert one.process(functions.pid_of, [0]) != two.process(functions.pid_of, [0])

    def test_what_is_interrupted_disturbs_nothing_else(self, wm, folder):
        def slowly(item):
            functions.note(folder.there, item)
            functions.wait_for(folder.there / "go")
            return item

        with ThreadPoolExecutor(1) as threads:
            other = threads.submit(wm.process, slowly, range(3), chunk_size=1, lost_retries=0)
            wait_until(lambda: (folder.here / "0").exists(), PATIENCE, "the first item")
            for _ in range(12):
                queued = wm.executor.submit(abs, -1)
                wm.executor.interrupt([queued])
                with pytest.raises(CancelledError):
                    queued.result(PATIENCE)
            (folder.here / "go").touch()
            assert other.result(PATIENCE) == [0, 1, 2]
        assert [functions.attempts(folder.here, item) for item in range(3)] == [1, 1, 1]

    def test_a_call_that_runs_is_interrupted_alone(self, wm, folder):
        def deaf(item):
            functions.note(folder.there, item)
            while True:
                with contextlib.suppress(KeyboardInterrupt):
                    time.sleep(60)

        for work in time.sleep, deaf:
            running, next_one = wm.executor.submit(work, 60), wm.executor.submit(abs, -1)
            if work is deaf:
                wait_until(lambda: (folder.here / "60").exists(), PATIENCE, "the call to begin")
            wm.executor.interrupt([running])
            with pytest.raises(CancelledError):
                running.result(PATIENCE)
            assert next_one.result(PATIENCE) == 1

    def test_two_runs_of_one_manager_with_different_limits(self, wm):
        with ThreadPoolExecutor(2) as threads:
            quick = threads.submit(wm.process, functions.square, range(300), timeout=30)
            other = threads.submit(wm.process, lambda x: x, range(300), chunk_size=3)
            assert quick.result(PATIENCE) == [x * x for x in range(300)]
            assert other.result(PATIENCE) == list(range(300))

    def test_ten_one_after_another(self):
        def now():
            files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
            return files, threading.active_count(), descendants(os.getpid())

        with WorkManager(1, silent=True):
            pass  # loads what is loaded once
        before = now()
        for n in range(10):
            with WorkManager(1, silent=True) as manager:
                if n % 5 == 0:
                    assert manager.process(functions.square, [n]) == [n * n]
        wait_until(lambda: now() <= before, 5, "threads and descriptors are given back")
        assert now()[2] == before[2]

    def test_within_a_task(self, single):
        def outer(item):
            with WorkManager(1, silent=True) as inner:
                return inner.process(functions.square, range(item), timeout=30)

        assert single.process(outer, [2, 3]) == [[0, 1], [0, 1, 4]]

    def test_errors_from_within_a_task(self, single):
        def outer(item):
            with WorkManager(1, silent=True) as inner:
                inner.process(faults.hang_in_python, range(3), timeout=0.2)

        # the inner one's own: the outer run has no time limit
        with pytest.raises(TaskTimeout, match=r"item 0 on local: not done after 0\.2 s"):
            single.process(outer, [1])

    def test_a_task_with_workers_of_its_own_that_is_ended(self, single, tmp_path):
        def outer(item):
            with WorkManager(2, silent=True) as inner:
                pids = inner._owned.backend.pids()
                (tmp_path / "pids").write_text(" ".join(map(str, pids)))
                inner.process(faults.hang_in_c, range(2), chunk_size=1)

        with pytest.raises(TaskTimeout):
            single.process(outer, [1], timeout=3)
        pids = (tmp_path / "pids").read_text().split()
        gone = lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids)  # noqa: E731
        wait_until(gone, 5, "the inner workers to end")
        assert works(single)

    def test_a_fork_of_the_caller(self):
        with WorkManager(1, silent=True) as manager:
            pids = manager._owned.backend.pids()
            child = os.fork()
            if child == 0:
                os._exit(_in_a_fork(manager))
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
            assert manager.process(functions.square, range(5)) == [0, 1, 4, 9, 16]
            assert manager._owned.backend.pids() == pids

    def test_in_a_thread(self):
        def run():
            with WorkManager(1, silent=True) as manager:
                return manager.process(functions.square, range(5), timeout=PATIENCE)

        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(run).result(PATIENCE) == [0, 1, 4, 9, 16]

    def test_in_an_asyncio_program(self):
        async def main():
            ticks = 0
            with WorkManager(1, silent=True) as manager:
                run = asyncio.create_task(
                    asyncio.to_thread(manager.process, lambda x: time.sleep(0.05), range(4))
                )
                while not run.done():
                    ticks += 1
                    await asyncio.sleep(0.01)
                return ticks, await run

        ticks, found = asyncio.run(main())
        assert found == [None] * 4
        assert ticks > 2  # the loop was not held up


def _in_a_fork(manager):
    """Return 7 if a fork of the caller can use managers as it should."""
    try:
        try:
            manager.process(functions.square, [1])
        except RuntimeError as exc:
            assert "not its forks" in str(exc)  # noqa: PT017
        manager.close()  # not its own: nothing happens
        with WorkManager(1, silent=True) as own:
            assert own.process(functions.square, range(3)) == [0, 1, 4]
        return 7
    except BaseException:
        traceback.print_exc()
        return 8


class TestStopping:
    """Of a run that does not come to its end, all is told."""

    def test_a_merger_that_raises(self, wm):
        def merge(merged, result):
            if result == 30:
                raise LookupError("not this one")
            return merged + result

        with pytest.raises(LookupError) as caught:
            wm.process(lambda x: 10 * x, range(6), merger=merge, ordered=True)
        assert "while the result of item 3 was merged" in "".join(format_exception(caught.value))
        report = wm.report
        assert (report.result, report.merged, report.complete) == (30, 3, False)
        assert "not complete" in str(report)
        assert works(wm)

    def test_a_merger_that_raises_from_something(self, wm):
        def merge(merged, result):
            raise LookupError("outer") from KeyError("inner")

        with pytest.raises(LookupError) as caught:
            wm.process(functions.square, range(3), merger=merge, ordered=True)
        text = "".join(format_exception(caught.value))
        assert text.index("KeyError: 'inner'") < text.index("LookupError: outer")
        assert "while the result of item 1 was merged" in text

    def test_an_item_that_fails(self, wm, host):
        def work(item):
            if item == 3:
                raise LookupError("this one")
            return item

        with pytest.raises(LookupError) as caught:
            wm.process(work, range(6), merger=TaskMerger(), ordered=True, chunk_size=1)
        assert (wm.report.result, wm.report.merged) == (3, 3)
        assert f"item 3 on {host}" in "".join(format_exception(caught.value))

    def test_results_are_asked_for_once(self, wm):
        class Costly(faults.Sum):
            asked = 0

            def results(self):
                self.asked += 1
                return self.total

        task = Costly()
        assert wm.process(task, range(100)) == 4950
        assert task.asked == 1


def format_exception(error):
    return traceback.format_exception(type(error), error, error.__traceback__)


class TestServers:
    """The engine, where workers cannot be had."""

    @pytest.fixture
    def server(self):
        told = threading.Event()
        server = Server(lambda event: None, 1, on_empty=told.set)
        server.told = told
        yield server
        server.close()

    def test_no_job_waits_for_workers_that_will_not_come(self, server, monkeypatch):
        monkeypatch.setattr(local.Worker, "_open", refuse)
        call = serialize.dumps(execute.Call(functions.die))
        chunk = pack_chunk([0], [serialize.dumps("exit")])
        results = queue.SimpleQueue()
        server.queue.add(Job(call, chunk, results.put))
        lost = unpack_result(results.get(timeout=PATIENCE))
        assert (lost.index, lost.by_worker) == (0, True)
        assert lost.reason.endswith("ended with exit status 3")
        assert server.told.wait(PATIENCE)

    def test_nor_for_those_of_the_caller(self, monkeypatch):
        core = Core(1, lambda host, event: None)
        try:
            monkeypatch.setattr(local.Worker, "_open", refuse)
            os.kill(core.processes()[0].pid, signal.SIGKILL)
            wait_until(lambda: not core.ncpus, PATIENCE, "no worker is left")
            results = queue.SimpleQueue()
            core.add(Job(b"", b"", results.put))
            later = unpack_result(results.get(timeout=PATIENCE))
            assert (later.reason, later.by_worker) == ("no worker is left", False)
        finally:
            core.close()

    def test_a_run_ends_when_the_last_worker_cannot_be_replaced(self, monkeypatch):
        with WorkManager(1, silent=True) as manager:
            monkeypatch.setattr(local.Worker, "_open", refuse)
            with pytest.raises(ServersUnavailable, match="no local worker"):
                manager.process(functions.die, ["kill"])

    def test_workers_that_cannot_be_started_leave_no_descriptors(self, tmp_path):
        (tmp_path / "script.py").write_text(FEW_DESCRIPTORS)
        failures = int(run_python("script.py", cwd=tmp_path))
        assert failures > 4  # at the connection, at pipes, and at the memory


def refuse(worker):
    raise OSError("no descriptors are left")


FEW_DESCRIPTORS = """
import os, resource
from ostap_parallel.engine.core import Core

def count():
    return len(os.listdir("/proc/self/fd"))

server = Core(1, lambda host, event: None)
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
before, failures = count(), 0
first = max(map(int, os.listdir("/proc/self/fd")))
for room in range(100):
    resource.setrlimit(resource.RLIMIT_NOFILE, (first + room, hard))
    try:
        server.set_ncpus(2)
        break
    except OSError:
        failures += 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert count() == before, (room, before, count())
print(failures)
server.close()
"""
