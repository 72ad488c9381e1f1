"""Tasks that submit tasks and wait for them: on any worker, to any depth, whatever dies."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import FIRST_COMPLETED, CancelledError
from pathlib import Path

import functions
import pytest
from functions import PATIENCE
from helpers import core_of, importable, kill, open_manager, wait_until, workers_of
from servers import open_server

from ostap_parallel import Executor, TaskTimeout, WorkerLost, WorkManager
from ostap_parallel.worker import nested


class Place:
    """A manager with two workers, and a directory that they see."""

    def __init__(self, manager, here, there, name):
        self.manager, self.here, self.there, self.name = manager, here, there, name
        self.submit = manager.executor.submit

    def call(self, function, *args):
        return self.submit(function, *args).result(PATIENCE)

    def pids(self):
        if self.name == "local":
            return self.manager.executor.backend.pids()
        return wait_until(self._two_there, PATIENCE, "two workers")

    def _two_there(self):
        pids = workers_of(self.manager, "h1")
        return pids if len(pids) == 2 else None


@pytest.fixture(scope="module", params=["local", "h1"])
def manager(request):
    if request.param == "local":
        with WorkManager(2, silent=True) as manager:
            yield manager
        return
    hosts = request.getfixturevalue("one_host")
    with open_manager(hosts, "h1*2", environment=importable(hosts)) as manager:
        assert manager.wait_for_hosts(PATIENCE), manager.executor.hosts
        yield manager


@pytest.fixture
def place(manager, request):
    name = next(iter(manager.workers))
    with contextlib.ExitStack() as stack:
        if name == "local":
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            yield Place(manager, folder, folder, name)
        else:
            host = request.getfixturevalue("one_host")[name]
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=host.tmp)))
            yield Place(manager, folder, Path(host.inside(folder)), name)


def wait_until_nested(manager):
    """Wait until a task waits for others."""
    stacks = core_of(manager).nesting._stacks
    wait_until(lambda: len(stacks) > 0, PATIENCE, "a nested task")


class TestTrees:
    def test_of_many_tasks(self, place):
        assert place.call(functions.tree, 7) == 255

    def test_of_runs(self, place):
        assert place.manager.process(functions.tree, [2, 3, 4]) == [7, 15, 31]
        assert place.manager.report.retried == 0

    @pytest.mark.slow
    @pytest.mark.parametrize("where", ["one worker", "two workers", "two hosts"])
    def test_as_of_scoop(self, where, request):
        """With a worker that is killed in the middle."""
        if where == "two hosts":
            hosts = request.getfixturevalue("hosts")
            manager = open_manager(hosts, "h1*1 h2*2", environment=importable(hosts))
        else:
            manager = WorkManager(1 if where == "one worker" else 2, silent=True)
        with manager:
            assert manager.wait_for_hosts(PATIENCE)
            future = manager.executor.submit(functions.tree, 12)
            wait_until_nested(manager)
            local = manager.executor.backend.pids()
            kill(local[-1:] or workers_of(manager, "h2")[-1:])
            assert future.result(100) == 8191

    @pytest.mark.slow
    def test_a_chain_that_is_deeper_than_python_allows_calls(self):
        with WorkManager(1, silent=True) as manager:
            assert manager.executor.submit(functions.chain, 300).result(PATIENCE) == 300

    @pytest.mark.slow
    def test_few_of_its_tasks_are_alive(self):
        """Depth first: what is begun and not ended is no more than the depth of the tree."""

        def count(depth):
            global alive, most
            alive = globals().get("alive", 0) + 1
            most = max(globals().get("most", 0), alive)
            if depth:
                for child in nested.submit_all([(count, (depth - 1,), {})] * 3):
                    child.result()
            alive -= 1
            return most

        with WorkManager(1, silent=True) as manager:
            assert manager.executor.submit(count, 4).result(PATIENCE) <= 5


class TestSharedServers:
    @pytest.mark.slow
    def test_programs_do_not_wait_for_one_another_for_ever(self):
        where = {"path": [Path(__file__).parent]}
        with open_server("secret", **where) as one, open_server("secret", **where) as other:
            names = [f"localhost:{port}" for port in (one, other)]
            with (
                Executor(0, names, secret="secret") as mine,
                Executor(0, names, secret="secret") as yours,
            ):
                for _ in range(5):
                    sums = [who.submit(functions.sum_of_children, 4) for who in (mine, yours) * 3]
                    assert [future.result(PATIENCE) for future in sums] == [6] * 6


class TestWaiting:
    def test_children_run_at_the_same_time(self, place):
        def parent(folder):
            calls = [(functions.meet, (folder, name, "ab"), {}) for name in "ab"]
            return [child.result() for child in nested.submit_all(calls)]

        assert len(set(place.call(parent, place.there))) == 2

    def test_for_the_first(self, place):
        def parent(folder):
            slow = nested.submit(functions.wait_for, folder / "go")
            while not slow.running():  # elsewhere: who waits may run what it waits for itself
                time.sleep(0.01)
            quick = nested.submit(abs, -1)
            done, pending = nested.wait([slow, quick], return_when=FIRST_COMPLETED)
            (folder / "go").touch()
            rest = list(nested.as_completed(pending))
            return [f.result() for f in done], [f.result() for f in rest], slow.done()

        assert place.call(parent, place.there) == ([1], [None], True)

    def test_not_for_too_long(self, place):
        def parent(folder):
            futures = nested.submit_all([(functions.wait_for, (folder / "go",), {})] * 2)
            seen = []
            with contextlib.suppress(concurrent.futures.TimeoutError):
                seen.append(futures[0].result(0))
            seen += nested.wait(futures, 0).done
            (folder / "go").touch()
            return seen, [future.result() for future in futures]

        assert place.call(parent, place.there) == ([], [None, None])

    def test_errors_arrive_in_the_parent(self, place):
        def parent():
            try:
                nested.submit(divmod, 1, 0).result()
            except ZeroDivisionError as exc:
                return str(exc), str(exc.__cause__)

        text, cause = place.call(parent)
        assert "division" in text
        assert "ZeroDivisionError" in cause

    def test_futures_stay_where_they_are(self, place):
        def parent():
            future = nested.submit(abs, -1)
            try:
                nested.submit(str, future)
            except Exception as exc:
                return type(exc).__name__, str(exc), future.result()

        name, text, value = place.call(parent)
        assert (name, value) == ("SerializeError", 1)
        assert "stays in the task" in text

    def test_by_threads(self, place):
        def parent():
            results = []
            futures = nested.submit_all([(abs, (-n,), {}) for n in range(8)])
            threads = [
                threading.Thread(target=lambda f=f: results.append(f.result())) for f in futures
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return sorted(results)

        assert place.call(parent) == list(range(8))

    @pytest.mark.parametrize("shared", [False, True])
    def test_by_threads_for_what_others_run(self, place, shared):
        """Each thread gets its own results, and one that all wait for arrives at all."""

        def parent(folder):
            results = []
            number = 1 if shared else 4
            calls = [(functions.wait_for, (folder / "go",), {})] * number
            futures = nested.submit_all(calls) * (4 // number)
            threads = [
                threading.Thread(target=lambda f=f: results.append(f.result())) for f in futures
            ]
            for thread in threads:
                thread.start()
            (folder / "begun").touch()
            for thread in threads:
                thread.join(PATIENCE)
            return len(results)

        future = place.submit(parent, place.there)
        wait_until((place.here / "begun").exists, PATIENCE, "the threads")
        (place.here / "go").touch()
        assert future.result(2 * PATIENCE) == 4

    def test_by_a_thread_that_outlives_a_task_on_top(self):
        def child():
            ask = lambda: nested.constant("never", PATIENCE)  # noqa: E731
            threading.Thread(target=ask, daemon=True).start()
            time.sleep(0.02)
            return os.getpid()

        def parent():
            return nested.submit(child).result() == os.getpid()

        with WorkManager(1, silent=True) as manager:
            pids = manager.executor.backend.pids()
            assert manager.executor.submit(parent).result(PATIENCE)
            assert manager.executor.backend.pids() == pids

    def test_by_a_thread_of_the_only_worker(self):
        def parent():
            results = []
            target = lambda: results.append(nested.submit(os.getpid).result())  # noqa: E731
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
            return results == [os.getpid()]

        with WorkManager(1, silent=True) as manager:
            assert manager.executor.submit(parent).result(PATIENCE)

    @pytest.mark.parametrize("error", [SystemExit, StopIteration, KeyboardInterrupt])
    def test_by_a_thread_for_what_ends_a_thread(self, error):
        def child():
            raise error

        def parent():
            errors = []
            target = lambda: errors.append(nested.submit(child).exception())  # noqa: E731
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
            return [type(error).__name__ for error in errors]

        with WorkManager(1, silent=True) as manager:
            assert manager.executor.submit(parent).result(PATIENCE) == ["RemoteError"]

    def test_constants(self, place):
        def child(name):
            return nested.constant(name, 10)

        def parent(name):
            futures = nested.submit_all([(child, (name,), {})] * 2)
            nested.set_constant(name, [1, 2])
            return [future.result() for future in futures]

        name = f"of {place.here}"
        assert place.call(parent, name) == [[1, 2]] * 2
        assert place.manager.executor.backend.constant(name) == [1, 2]
        with pytest.raises(TypeError, match="already exists"):
            place.manager.executor.backend.set_constant(name, 3)
        with pytest.raises(KeyError):
            place.call(lambda: nested.constant("unknown", 0.1))

    def test_outside_of_tasks(self):
        assert not nested.available()
        with pytest.raises(RuntimeError, match="needs a task"):
            nested.submit(abs, 1)


class TestState:
    """What one task does to its worker, others do not see."""

    def test_of_the_process(self):
        def child():
            os.chdir("/")
            os.environ["NESTED"] = "child"
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
            sys.setrecursionlimit(500)

        def look():
            return os.environ.get("NESTED"), Path.cwd() == Path("/usr")

        def parent():
            os.chdir("/usr")
            os.environ["NESTED"] = "parent"
            fired = []
            signal.signal(signal.SIGALRM, lambda *_: fired.append(1))
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            limit = sys.getrecursionlimit()
            nested.submit(child).result()
            seen = nested.submit(look).result()
            while not fired:
                time.sleep(0.01)
            return look(), seen, sys.getrecursionlimit() == limit

        with WorkManager(1, silent=True) as manager:
            found = manager.executor.submit(parent).result(PATIENCE)
        assert found == (("parent", True), (None, False), True)

    @pytest.mark.parametrize("child", ["time.sleep(60)", "ctypes.PyDLL(None).sleep(60)"])
    def test_a_time_limit_is_that_of_the_parent(self, child):
        """Whatever runs on top of it then, and whether that heeds an interrupt."""

        def parent(item):
            if item:
                nested.submit(exec, f"import ctypes, time; {child}").result()
            return item

        with WorkManager(1, silent=True) as manager:
            with pytest.raises(TaskTimeout) as caught:
                manager.process(parent, [0, 1], timeout=0.5, chunk_size=2)
            assert caught.value.item == 1
            assert manager.process(parent, [0, 0], timeout=20) == [0, 0]
            assert manager.report.retried == 0


@pytest.mark.slow
class TestLosses:
    @pytest.mark.parametrize("which", ["newest", "oldest"])
    def test_a_worker_that_is_killed_in_the_middle(self, place, which):
        future = place.submit(functions.tree, 9)
        wait_until_nested(place.manager)
        kill([place.pids()[-1 if which == "newest" else 0]])
        assert future.result(100) == 1023

    def test_a_child_that_ends_its_worker(self, place):
        def parent(folder):
            try:
                nested.submit(deadly, folder).result()
            except WorkerLost as exc:
                return str(exc)

        def deadly(folder):
            functions.note(folder, "deadly")
            os._exit(3)

        assert "exit status 3" in place.call(parent, place.there)
        assert functions.attempts(place.here, "deadly") >= 3

    def test_a_child_that_ends_its_parents_worker(self, tmp_path):
        """It is run on top of its parent, which is not to blame; yet this has an end."""

        def parent():
            return nested.submit(deadly).result()

        def deadly():
            functions.note(tmp_path, "deadly")
            os.kill(os.getpid(), signal.SIGKILL)

        with WorkManager(1, silent=True) as manager:
            with pytest.raises(WorkerLost):
                manager.executor.submit(parent).result(PATIENCE)
            assert manager.executor.submit(abs, -1).result(PATIENCE) == 1
        assert functions.attempts(tmp_path, "deadly") == 3


class TestStopping:
    def test_children_end_with_their_parents(self, place):
        def child(folder, name):
            functions.note(folder, name)
            try:
                time.sleep(60)
            except KeyboardInterrupt:
                functions.note(folder, f"end {name}")
                raise

        def parent(folder):
            for future in nested.submit_all([(child, (folder, n), {}) for n in "abc"]):
                future.result()

        pids = place.pids()
        future = place.submit(parent, place.there)
        wait_until(lambda: len(list(place.here.iterdir())) == 2, PATIENCE, "two children")
        begun = {path.name for path in place.here.iterdir()}
        place.manager.executor.interrupt([future])
        with pytest.raises(CancelledError):
            future.result(PATIENCE)
        ends = begun | {f"end {name}" for name in begun}
        wait_until(lambda: {p.name for p in place.here.iterdir()} >= ends, PATIENCE, "their ends")
        assert place.call(abs, -1) == 1
        assert {path.name for path in place.here.iterdir()} == ends
        assert place.pids() == pids

    def test_one_child(self, place):
        def parent(folder):
            running, waiting, other = nested.submit_all(
                [(functions.meet, (folder, "one", ["never"]), {})] * 2 + [(abs, (-1,), {})]
            )
            while not running.running():
                time.sleep(0.01)
            functions.wait_for(folder / "one")
            cancelled = running.cancel(), waiting.cancel(), running.cancel(interrupt=True)
            return cancelled, running.cancelled(), other.result()

        assert place.call(parent, place.there) == ((False, True, True), True, 1)

    def test_what_nobody_waits_for(self, place, caplog):
        def parent():
            nested.submit_all([(time.sleep, (60,), {})] * 3)
            return 1

        assert place.call(parent) == 1
        assert place.call(abs, -1) == 1
        wait_until(lambda: "nested tasks were given up" in caplog.text, PATIENCE, "a warning")

    @pytest.mark.slow
    def test_by_ctrl_c(self, tmp_path):
        script = (
            "from pathlib import Path\n"
            "import time\n"
            "from ostap_parallel import WorkManager\n"
            "from ostap_parallel.worker import nested\n"
            "def grow(depth):\n"
            "    if depth == 3: Path('begun').touch()\n"
            "    time.sleep(0.01)\n"
            "    [f.result() for f in nested.submit_all([(grow, (depth + 1,), {})] * 2)]\n"
            "with WorkManager(2, silent=True) as wm:\n"
            "    pids = wm.executor.backend.pids()\n"
            "    try:\n"
            "        wm.process(grow, [0, 0])\n"
            "    except KeyboardInterrupt:\n"
            "        print(wm.process(abs, [-1]), wm.executor.backend.pids() == pids)\n"
        )
        with subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=tmp_path,
            env=functions.script_environ(),
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                wait_until((tmp_path / "begun").exists, PATIENCE, "a task of depth 3")
                process.send_signal(signal.SIGINT)
                assert process.communicate(timeout=PATIENCE)[0] == "[1] True\n"
            finally:
                process.kill()


def test_a_future_does_not_pickle():
    with pytest.raises(TypeError, match="stays in the task"):
        pickle.dumps(nested.Future(1))
