"""Local workers: what they print, how they die, and that nothing of them remains."""

from __future__ import annotations

import ctypes
import gc
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import functions
import pytest
from functions import PATIENCE, run_python, script_environ
from helpers import core_of, is_worker, open_manager, wait_until
from sshd import descendants, stat_of

from ostap_parallel import Failure, WorkerLost, WorkManager
from ostap_parallel.engine.core import Core
from ostap_parallel.machine import local
from ostap_parallel.machine.cpus import usable_cpus
from ostap_parallel.machine.jobs import Job
from ostap_parallel.objects import serialize
from ostap_parallel.worker import execute
from ostap_parallel.worker.chunk import ChunkOutcome, pack_chunk, unpack_result

GONE_WITHIN = 5.0  # seconds after which nothing of a killed caller may remain


@pytest.fixture(scope="module")
def wm():
    with WorkManager(2, silent=True) as manager:
        yield manager


class TestOutput:
    """None of it breaks the protocol, and all of it arrives."""

    def test_of_all_kinds(self, wm, capfd):
        def work(item):
            print("by print", item)
            print("by print to stderr", item, file=sys.stderr)
            os.write(1, b"by os.write %d\n" % item)
            libc = ctypes.CDLL(None)
            libc.printf(b"by printf %d\n", item)
            libc.fflush(None)
            return item

        assert wm.process(work, [4, 5]) == [4, 5]
        out, err = capfd.readouterr()
        for item in 4, 5:
            for line in f"by print {item}", f"by os.write {item}", f"by printf {item}":
                assert line in out.splitlines()
            assert f"item {item - 4}: by print to stderr {item}" in err.splitlines()

    def test_c_output_needs_no_flushing(self, wm, capfd):
        assert wm.process(lambda x: ctypes.CDLL(None).printf(b"line %d\n", x), [7]) == [7]
        assert capfd.readouterr().out == "line 7\n"

    @pytest.mark.parametrize(("descriptor", "stream"), [(1, "out"), (2, "err")])
    def test_much_of_it(self, wm, capfd, descriptor, stream):
        def work(item):
            for _ in range(100):
                os.write(descriptor, b"x" * 9_999 + b"\n")
            return item

        assert wm.process(work, [1]) == [1]
        text = getattr(capfd.readouterr(), stream)
        assert text.count("x") == 100 * 9_999

    def test_a_line_without_an_end(self, wm, capsys):
        wm.process(lambda x: print("no end", end=""), [1])
        assert capsys.readouterr().out.splitlines() == ["no end"]

    def test_twice_without_what_was_before(self, wm, capsys):
        for word in "first", "second":
            wm.process(lambda x, word=word: print(word), [1])
            assert capsys.readouterr().out == f"{word}\n"

    def test_text_that_is_not_utf8(self, wm, capsys):
        wm.process(lambda x: os.write(1, b"caf\xe9\n"), [1])
        assert capsys.readouterr().out == "caf\\xe9\n"

    def test_the_last_words_of_a_worker(self, wm, capfd):
        def work(item):
            os.write(2, b"out of luck")
            os._exit(3)

        with pytest.raises(WorkerLost):
            wm.process(work, [1], lost_retries=0)
        assert "out of luck" in capfd.readouterr().err

    def test_streams_that_a_task_closes(self, wm, capfd):
        def work(item):
            os.close(1)
            os.close(0)
            sys.stdout.close()
            return item

        with WorkManager(1, silent=True) as single:
            assert single.process(work, [1]) == [1]
            assert single.process(functions.square, [2, 3]) == [4, 9]

    def test_standard_input_is_empty(self, wm):
        assert wm.process(lambda x: sys.stdin.read(), [1]) == [""]


@pytest.mark.slow
class TestLostWorkers:
    @pytest.mark.parametrize(
        ("how", "said"),
        [
            ("exit", "ended with exit status 3"),
            ("kill", "was killed by SIGKILL"),
            ("segfault", "was killed by SIGSEGV"),
        ],
    )
    def test_the_item_is_named_and_its_neighbours_succeed(self, wm, tmp_path, how, said):
        def work(item):
            functions.note(tmp_path, item)
            if item == 2:
                functions.die(how)
            return item

        found = wm.process(work, range(8), chunk_size=4, on_error="collect")
        assert [x for x in found if not isinstance(x, Failure)] == [0, 1, 3, 4, 5, 6, 7]
        (failure,) = wm.report.failures
        error = failure.error
        assert isinstance(error, WorkerLost)
        assert (error.item, error.host) == (2, "local")
        assert error.reason == f"worker {failure.pid} {said}"
        assert str(error) == f"item 2 on local: {error.reason}"
        assert functions.attempts(tmp_path, 2) == failure.attempts == 3
        assert (wm.report.submitted, wm.report.merged, wm.report.failed) == (8, 7, 1)
        assert wm.workers == {"local": 2}

    @pytest.mark.parametrize("retries", [0, 1])
    def test_attempts_as_many_as_wanted(self, wm, tmp_path, retries):
        def work(item):
            functions.note(tmp_path, item)
            functions.die("exit")

        with pytest.raises(WorkerLost, match=r"item 0 on local: worker .* exit status 3"):
            wm.process(work, [5], lost_retries=retries)
        assert functions.attempts(tmp_path, 5) == 1 + retries

    def test_an_item_that_survives_later(self, wm, tmp_path):
        def work(item):
            if functions.note(tmp_path, item) == 1 and item % 2:
                functions.die("kill")
            return item

        assert wm.process(work, range(4), chunk_size=1) == list(range(4))
        assert (wm.report.retried, wm.report.failed) == (2, 0)

    def test_the_whole_chunk_is_run_again(self, wm, tmp_path):
        # so the number of items in a chunk can be seen
        def work(item):
            if functions.note(tmp_path, item) == 1 and item == 17:
                functions.die("kill")
            return item

        assert wm.process(work, range(30), chunk_size=6) == list(range(30))
        assert wm.report.retried == 6
        again = [n for n in range(30) if functions.attempts(tmp_path, n) == 2]
        assert again == [12, 13, 14, 15, 16, 17]

    def test_all_items_kill_all_workers(self, wm):
        wm.process(lambda x: os._exit(3), range(4), on_error="collect", lost_retries=0)
        assert [type(f.error) for f in wm.report.failures] == [WorkerLost] * 4
        assert wm.process(functions.square, range(10)) == [x * x for x in range(10)]

    def test_a_worker_that_is_killed_from_outside(self, wm, tmp_path):
        def work(item):
            functions.note(tmp_path, f"begun-{os.getpid()}")
            functions.wait_for(tmp_path / "go")
            return item

        def kill():
            wait_until(lambda: len(list(tmp_path.glob("begun-*"))) == 2, PATIENCE, "two tasks")
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            (tmp_path / "go").touch()

        pids = wm._owned.backend.pids()
        killer = threading.Thread(target=kill)
        killer.start()
        assert wm.process(work, [1, 2], chunk_size=1) == [1, 2]
        killer.join()
        assert not set(pids) & set(wm._owned.backend.pids())

    def test_idle_workers_that_are_killed(self, wm):
        for pid in wm._owned.backend.pids():
            os.kill(pid, signal.SIGKILL)
        assert wm.process(functions.square, range(20)) == [x * x for x in range(20)]

    def test_a_worker_that_is_killed_as_it_starts(self, wm, monkeypatch):
        def has_started(worker, pid):
            started.append(pid)
            if len(started) < 3:
                os.kill(pid, signal.SIGKILL)
            go_on(worker, pid)

        started, go_on = [], local.Worker.has_started
        monkeypatch.setattr(local.Worker, "has_started", has_started)
        os.kill(wm._owned.backend.pids()[0], signal.SIGKILL)
        assert wm.process(functions.square, range(20)) == [x * x for x in range(20)]
        wait_until(lambda: len(started) == 3, PATIENCE, "the third start")
        assert wm.workers == {"local": 2}

    def test_a_worker_that_leaves_a_child_behind(self, wm, tmp_path):
        # the child has inherited the worker's descriptors: no end of file tells of its death
        def work(item):
            child = os.fork()
            if child == 0:
                signal.pause()
            (tmp_path / "child").write_text(str(child))
            os._exit(3)

        try:
            with pytest.raises(WorkerLost, match="exit status 3"):
                wait_for_run(partial(wm.process, work, [1], lost_retries=0), seconds=10)
            child = int((tmp_path / "child").read_text())
            wait_until(lambda: stat_of(child) is None, GONE_WITHIN, "the child to be gone")
        finally:
            child = int((tmp_path / "child").read_text())
            if stat_of(child):
                os.kill(child, signal.SIGKILL)

    def test_a_worker_whose_pipes_a_fork_of_c_code_holds(self):
        def work(item):
            libc = ctypes.CDLL(None)
            if libc.fork() == 0:
                libc.sleep(60)
            os.kill(os.getpid(), signal.SIGKILL)

        with WorkManager(1, silent=True) as manager:
            start = time.monotonic()
            with pytest.raises(WorkerLost, match="SIGKILL"):
                manager.process(work, [1], lost_retries=0)
            assert time.monotonic() - start < 50
            assert manager.process(abs, [-1]) == [1]

    def test_a_large_item_whose_reader_dies(self, wm):
        class Deadly:
            def __init__(self):
                self.data = b"x" * 1_000_000

            def __setstate__(self, state):
                os._exit(3)

        with pytest.raises(WorkerLost):
            wm.process(functions.same, [Deadly()], lost_retries=0)
        assert wm.process(len, [b"x" * 5_000_000]) == [5_000_000]


def wait_for_run(run, seconds):
    """Call `run` in a thread: return or raise what it does, or fail if it hangs."""
    outcome = []

    def call():
        try:
            outcome.append((run(), None))
        except BaseException as exc:
            outcome.append((None, exc))

    threading.Thread(target=call, daemon=True).start()
    value, error = wait_until(lambda: outcome, seconds, "the run to end")[0]
    if error is not None:
        raise error
    return value


class TestInterrupting:
    """Stopping a run takes what it runs along, and nothing else."""

    @pytest.mark.slow
    def test_a_task_that_ignores_it_is_killed(self, wm, tmp_path):
        def work(item):
            if item == 0:
                functions.wait_for(tmp_path / "deaf")
                raise LookupError("stop")
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            (tmp_path / "deaf").touch()
            time.sleep(60)

        with pytest.raises(LookupError):
            wm.process(work, [0, 1], chunk_size=1)
        assert wm.process(functions.square, range(10)) == [x * x for x in range(10)]

    @pytest.mark.slow
    def test_a_task_sees_it(self, wm, tmp_path):
        def work(item):
            if item == 0:
                functions.wait_for(tmp_path / "1")
                raise LookupError("stop")
            try:
                functions.note(tmp_path, 1)
                time.sleep(60)
            except KeyboardInterrupt:
                (tmp_path / "seen").touch()
                raise

        pids = wm._owned.backend.pids()
        with pytest.raises(LookupError):
            wm.process(work, [0, 1], chunk_size=1)
        assert (tmp_path / "seen").exists()
        assert wm.process(functions.square, [2]) == [4]
        assert wm._owned.backend.pids() == pids

    @pytest.mark.slow
    @pytest.mark.parametrize("where", ["local", "host"])
    def test_what_is_about_to_begin_ends_too(self, where, request):
        """It is neither waiting nor running then, or on its way to a host."""

        def work(item):
            if item == 0:
                raise LookupError("stop")
            time.sleep(60)

        if where == "local":
            manager = WorkManager(1, silent=True)
        else:
            manager = open_manager(request.getfixturevalue("hosts"), "h1*1")
        with manager:
            assert manager.wait_for_hosts(PATIENCE)
            for _ in range(20):
                with pytest.raises(LookupError):
                    manager.process(work, [0, 1], chunk_size=1)
                start = time.monotonic()
                assert manager.process(abs, [-1]) == [1]
                assert time.monotonic() - start < 50

    def test_a_job_that_a_worker_has_not_begun_is_interrupted(self, tmp_path):
        core = Core(1, lambda host, event: None)
        try:
            (pid,) = (one.pid for one in core.processes())
            os.kill(pid, signal.SIGSTOP)  # so that it cannot begin
            results = queue.SimpleQueue()
            call = serialize.dumps(execute.Call(time.sleep))
            chunk = pack_chunk([0], [60])
            core.add(Job(call, chunk, results.put))
            wait_until(lambda: list(core.queue.running()), PATIENCE, "the job to be sent")
            core.interrupt(grace=30)
            os.kill(pid, signal.SIGCONT)
            assert unpack_result(results.get(timeout=60)).answers == []
        finally:
            core.close()

    def test_a_worker_that_starts_again_is_left_alone(self, capfd):
        with WorkManager(1, silent=True) as manager:
            future = manager.executor.submit(time.sleep, 60)
            core = core_of(manager)
            wait_until(lambda: list(core.queue.running()), PATIENCE, "the job to be sent")
            (pid,) = (one.pid for one in core.processes())
            os.kill(pid, signal.SIGKILL)
            wait_until(
                lambda: [one.pid for one in core.processes()] != [pid],
                PATIENCE,
                "the next process",
            )
            while list(core.queue.running()) or not future.done():  # it may be tried again
                manager.executor.interrupt()
                time.sleep(0.001)
            assert manager.process(abs, [-1]) == [1]
            assert len(core.processes()) == 1
        assert "KeyboardInterrupt" not in capfd.readouterr().err

    @pytest.mark.slow
    def test_programs_that_tasks_started_end_too(self, wm, tmp_path):
        def work(item):
            if item == 0:
                functions.wait_for(tmp_path / "pid")
                raise LookupError("stop")
            program = subprocess.Popen(["sleep", "60"])
            (tmp_path / "part").write_text(str(program.pid))
            (tmp_path / "part").rename(tmp_path / "pid")
            program.wait()

        with pytest.raises(LookupError):
            wm.process(work, [0, 1], chunk_size=1)
        pid = int((tmp_path / "pid").read_text())
        wait_until(lambda: stat_of(pid) is None, GONE_WITHIN, "the program to end")


@pytest.mark.slow
class TestLife:
    @pytest.mark.parametrize("where", ["local", "host"])
    def test_workers_are_replaced_after_so_many_jobs(self, where, request, caplog):
        if where == "local":
            manager = WorkManager(1, tasks_per_worker=3, silent=True)
        else:
            manager = open_manager(request.getfixturevalue("hosts"), "h1*1", tasks_per_worker=3)
        with manager:
            pids = manager.process(lambda x: os.getpid(), range(12), chunk_size=1)
            assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [3, 3, 3, 3]
            assert (manager.report.retried, caplog.records) == (0, [])

    def test_no_workers_are_no_processes(self):
        before = set(descendants(os.getpid()))
        with WorkManager(0, silent=True) as manager:
            assert set(descendants(os.getpid())) == before
            assert manager.workers == {}

    def test_as_many_as_wanted(self):
        before = set(descendants(os.getpid()))
        with WorkManager(3, silent=True) as manager:
            new = set(descendants(os.getpid())) - before
            assert len(new) == 4  # with what starts workers
            assert {pid for pid in new if is_worker(pid)} == set(manager._owned.backend.pids())
            assert manager.workers == {"local": 3}
            assert repr(manager) == "<WorkManager local: 3>"
        assert set(descendants(os.getpid())) == before

    def test_autodetect(self):
        with WorkManager(silent=True) as manager:
            assert manager.workers == {"local": usable_cpus()}

    def test_closing_gives_everything_back(self):
        def state():
            threads = {t for t in threading.enumerate() if t.is_alive()}
            return len(os.listdir("/proc/self/fd")), len(threads), descendants(os.getpid())  # noqa: PTH208

        before = state()
        for n in range(10):
            with WorkManager(1, silent=True) as manager:
                if n < 5:
                    assert manager.process(functions.square, [n]) == [n * n]
                if n == 6:
                    manager.process(lambda x: os._exit(3), [1], on_error="collect")
                if n == 7:
                    next(manager.iexecute(functions.square, range(1000)))
        wait_until(lambda: state() <= before, GONE_WITHIN, "threads and descriptors")
        assert state()[2] == before[2]

    def test_a_forgotten_manager_is_cleaned_up(self):
        before = set(descendants(os.getpid()))
        manager = WorkManager(1, silent=True)
        assert manager.process(functions.square, [2]) == [4]
        assert set(descendants(os.getpid())) > before
        del manager
        wait_until(lambda: set(descendants(os.getpid())) == before, GONE_WITHIN, "no worker")

    def test_the_environment_of_the_caller_is_left_alone(self):
        before = dict(os.environ), list(sys.path), signal.getsignal(signal.SIGINT)
        with WorkManager(1, silent=True) as manager:
            seen = manager.process(lambda x: os.environ.get("PYTHONPATH"), [0])
        assert seen == [os.environ.get("PYTHONPATH")]
        assert (dict(os.environ), list(sys.path), signal.getsignal(signal.SIGINT)) == before

    def test_results_do_not_wait_for_the_garbage_collector(self):
        gc.collect()
        gc.disable()
        try:
            with WorkManager(2, silent=True) as manager:
                total = sum(manager.iexecute(functions.square, range(1000), chunk_size=10))
                held = [x for x in gc.get_objects() if isinstance(x, ChunkOutcome)]
        finally:
            gc.enable()
        assert total == sum(x * x for x in range(1000))
        assert len(held) <= 1  # the last one, in a frame or two

    def test_functions_do_not_pile_up_in_workers(self):
        with WorkManager(1, silent=True) as manager:
            for n in range(18):
                data = bytes([n]) * 3_000_000
                (size,) = manager.process(resident, [0], shared={"data": data})
                if n == 9:
                    first = size
            assert size - first < 18_000_000


def resident(item, data):
    """Return this process's resident memory, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


SCRIPT_HEAD = """\
import ctypes, os, sys, time
from ostap_parallel import TaskMerger, WorkManager

def work(item):
    if item >= 3:
        open(f"begun-{os.getpid()}", "w").close()
        WAIT
    return item

if __name__ == "__main__":
    wm = WorkManager(2, silent=True)
    print(*wm._owned.backend.pids(), flush=True)
"""

INTERRUPTED = (
    SCRIPT_HEAD
    + """
    try:
        wm.process(work, range(10), merger=TaskMerger(), chunk_size=1)
    except KeyboardInterrupt:
        print("interrupted", wm.report.result, wm.report.merged, wm.report.complete)
    print(wm.process(lambda x: x + 1, range(5)))
    wm.close()
"""
)

KILLED = SCRIPT_HEAD + "    wm.process(work, range(10), merger=TaskMerger(), chunk_size=1)\n"

FORGOTTEN = (
    SCRIPT_HEAD
    + """
    print(wm.process(lambda x: x + 1, range(3)))
    END
"""
)

# Waits that differ in who notices an interrupt or the end of the caller.
WAITS = {
    "python": "time.sleep(60)",
    "C": "ctypes.PyDLL(None).sleep(60)",  # holds the interpreter lock
}


class Script:
    """A script that works in another process group, as one started from a shell."""

    def __init__(self, folder, text):
        self.folder = Path(folder)
        (self.folder / "script.py").write_text(text)
        self.process = subprocess.Popen(
            [sys.executable, "script.py"],
            cwd=folder,
            env=script_environ(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        first = self.process.stdout.readline().split()
        assert first, self.process.communicate(timeout=PATIENCE)[0]
        assert all(word.isdigit() for word in first), first
        self.workers = list(map(int, first))

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()
        for pid in self.workers:
            if stat_of(pid):
                os.kill(pid, signal.SIGKILL)

    def read(self):
        """Return all that the script prints from now on, when it has ended."""
        text = self.process.stdout.read()  # of which some may have come with the first line
        self.process.wait(PATIENCE)
        return text

    def wait_until_begun(self):
        """Wait until both workers are in a task that does not end."""
        wait_until(lambda: len(list(self.folder.glob("begun-*"))) == 2, PATIENCE, "two tasks")

    def wait_until_gone(self):
        """Wait until no worker is left."""
        wait_until(lambda: not any(map(stat_of, self.workers)), GONE_WITHIN, "no worker left")


@pytest.mark.slow
class TestCallers:
    @pytest.mark.parametrize("wait", WAITS)
    def test_interrupted(self, tmp_path, wait):
        text = INTERRUPTED.replace("WAIT", WAITS[wait])
        with Script(tmp_path, text) as script:
            script.wait_until_begun()
            os.killpg(script.process.pid, signal.SIGINT)
            out = script.read()
            assert out.splitlines() == ["interrupted 3 3 False", "[1, 2, 3, 4, 5]"]
            assert script.process.returncode == 0
            script.wait_until_gone()

    @pytest.mark.parametrize("wait", WAITS)
    def test_killed(self, tmp_path, wait):
        with Script(tmp_path, KILLED.replace("WAIT", WAITS[wait])) as script:
            script.wait_until_begun()
            os.kill(script.process.pid, signal.SIGKILL)
            script.process.wait(PATIENCE)
            script.wait_until_gone()

    def test_killed_while_a_child_of_its_own_lives_on(self, tmp_path):
        # a fork, as multiprocessing makes them, has copies of all our descriptors
        text = KILLED.replace("WAIT", WAITS["python"]).replace(
            "    wm.process", "    if os.fork() == 0: time.sleep(60)\n    wm.process"
        )
        with Script(tmp_path, text) as script:
            script.wait_until_begun()
            child = set(descendants(script.process.pid)) - set(script.workers)
            try:
                os.kill(script.process.pid, signal.SIGKILL)
                script.process.wait(PATIENCE)
                script.wait_until_gone()
            finally:
                for pid in child:
                    os.kill(pid, signal.SIGKILL)

    def test_a_fork_that_exits_leaves_the_workers_alone(self, tmp_path):
        code = (
            "import os, sys\n"
            "from ostap_parallel import WorkManager\n"
            "with WorkManager(1, silent=True) as wm:\n"
            "    pids = wm.process(lambda x: os.getpid(), [1])\n"
            "    if os.fork() == 0: sys.exit()\n"
            "    os.wait()\n"
            "    print(wm.process(lambda x: os.getpid(), [1]) == pids)\n"
        )
        assert run_python("-c", code, cwd=tmp_path) == "True\n"

    @pytest.mark.parametrize("end", ["", "raise ValueError", "sys.exit(4)"])
    def test_forgot_to_close(self, tmp_path, end):
        with Script(tmp_path, FORGOTTEN.replace("WAIT", "pass").replace("END", end)) as script:
            out = script.read()
            assert out.splitlines()[0] == "[1, 2, 3]"
            assert script.process.returncode == {"": 0, "raise ValueError": 1}.get(end, 4)
            assert ("Traceback" in out) == ("raise" in end)
            script.wait_until_gone()

    def test_quiet_from_beginning_to_end(self, tmp_path):
        code = (
            "from ostap_parallel import WorkManager\n"
            "with WorkManager(2, silent=True) as wm:\n"
            "    print(wm.process(lambda x: x * x, range(4)))\n"
        )
        assert run_python("-X", "dev", "-c", code, cwd=tmp_path) == "[0, 1, 4, 9]\n"


@pytest.fixture
def control_groups(tmp_path):
    """Return a function that makes files of ``/proc`` and ``/sys`` below a directory."""

    def make(files):
        for name, text in files.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return tmp_path

    return make


V1 = "4:memory:/jobs/7\n3:cpu,cpuacct:/jobs/7\n1:name=systemd:/jobs/7\n"
V1_ROOT = "sys/fs/cgroup/cpu,cpuacct"


class TestUsableCpus:
    @pytest.mark.parametrize(
        ("files", "limit"),
        [
            ({}, None),
            ({"proc/self/cgroup": "0::/\n"}, None),
            ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "max 100000\n"}, None),
            ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "150000 100000\n"}, 2),
            ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "20000 100000\n"}, 1),
            (
                {
                    "proc/self/cgroup": "0::/a/b/c\n",
                    "sys/fs/cgroup/a/cpu.max": "300000 100000\n",
                    "sys/fs/cgroup/a/b/c/cpu.max": "400000 100000\n",
                },
                3,
            ),
            (  # in a container: the path is the host's, the limit is at the root
                {"proc/self/cgroup": "0::/far/away\n", "sys/fs/cgroup/cpu.max": "1000 1000\n"},
                1,
            ),
            (
                {
                    "proc/self/cgroup": V1,
                    f"{V1_ROOT}/jobs/7/cpu.cfs_quota_us": "350000\n",
                    f"{V1_ROOT}/jobs/7/cpu.cfs_period_us": "100000\n",
                },
                4,
            ),
            (
                {
                    "proc/self/cgroup": V1,
                    f"{V1_ROOT}/jobs/7/cpu.cfs_quota_us": "-1\n",
                    f"{V1_ROOT}/jobs/7/cpu.cfs_period_us": "100000\n",
                    f"{V1_ROOT}/jobs/cpu.cfs_quota_us": "100000\n",
                    f"{V1_ROOT}/jobs/cpu.cfs_period_us": "100000\n",
                },
                1,
            ),
            ({"proc/self/cgroup": V1, f"{V1_ROOT}/jobs/7/cpu.cfs_quota_us": "100\n"}, None),
            ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "garbage\n"}, None),
        ],
    )
    def test_control_groups(self, control_groups, monkeypatch, files, limit):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
        assert usable_cpus(control_groups(files)) == (limit or 8)

    @pytest.mark.slow
    def test_affinity(self, tmp_path):
        code = (
            "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
            "from ostap_parallel import WorkManager\n"
            "with WorkManager(silent=True) as wm: print(wm.workers)\n"
        )
        assert run_python("-c", code, cwd=tmp_path) == "{'local': 1}\n"
