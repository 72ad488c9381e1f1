"""joblib's loops on our workers."""

from __future__ import annotations

import gc
import os
import signal
import site
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import functions
import joblib
import numpy as np
import pytest
from foreign import FOREIGN, open_foreign
from helpers import importable, open_manager, wait_until
from joblib import Parallel, delayed
from sshd import descendants

from ostap_parallel import ConfigError, Executor, WorkManager
from ostap_parallel.joblib import OstapBackend, register
from ostap_parallel.views import live


@pytest.fixture(scope="module", autouse=True)
def _registered():
    register()
    yield
    del joblib.parallel.BACKENDS["ostap"]


@pytest.fixture(scope="module")
def manager():
    with WorkManager(2, silent=True) as manager:
        yield manager


@pytest.fixture
def _ostap(manager):
    """Loops run on the manager's workers."""
    with joblib.parallel_config(backend="ostap", executor=manager):
        yield


def late(go, item):
    if item == 0:
        functions.wait_for(go)
    return item


def refuse(item):
    raise functions.Refusal(item, "not wanted")


def row(table, index):
    return float(table[index].sum()), table.flags.writeable


def difference(x, y):
    return float(x[-1] - (y["y"] if isinstance(y, dict) else y)[-1])


def inner(count):
    backend, _ = joblib.parallel.get_active_backend()
    squares = Parallel(n_jobs=2)(delayed(functions.square)(n) for n in range(count))
    return type(backend).__name__, squares


def hang(folder, item):
    functions.note(folder, f"begun-{item}")
    time.sleep(functions.PATIENCE)
    functions.note(folder, "ended")


@pytest.mark.usefixtures("_ostap")
class TestLoops:
    def test_results_are_in_order(self):
        squares = Parallel()(delayed(functions.square)(n) for n in range(300))
        assert squares == [n * n for n in range(300)]
        assert Parallel()(delayed(lambda x, y=1: x + y)(n, y=2) for n in range(3)) == [2, 3, 4]
        assert Parallel()([]) == []

    def test_they_run_on_the_workers(self, manager):
        pids = set(Parallel(batch_size=1)(delayed(functions.pid_of)(n) for n in range(8)))
        assert pids <= set(manager.executor.backend.pids())

    def test_generators(self, tmp_path):
        calls = [delayed(partial(late, str(tmp_path / "go")))(n) for n in range(3)]
        found = Parallel(return_as="generator_unordered", batch_size=1)(calls)
        assert {next(found), next(found)} == {1, 2}
        (tmp_path / "go").touch()
        assert list(found) == [0]
        assert list(Parallel(return_as="generator")(calls)) == [0, 1, 2]

    def test_loops_at_the_same_time_do_not_mix(self):
        calls = [delayed(functions.same)(n) for n in range(1, 10)]
        found = Parallel(return_as="generator", batch_size=1)(calls)
        with pytest.raises(functions.Refusal):
            Parallel()(delayed(refuse)(n) for n in range(5))
        assert Parallel()(delayed(abs)(n) for n in (-1, -2)) == [1, 2]
        assert list(found) == list(range(1, 10))

    def test_one_object_for_several_loops(self):
        with Parallel(batch_size=1) as parallel:
            with pytest.raises(functions.Refusal):
                # one: of more that fail at once joblib may keep some for its next loop
                parallel(delayed(refuse)(n) for n in range(1))
            assert parallel(delayed(abs)(n) for n in range(-9, 0)) == list(range(9, 0, -1))

    def test_an_exception_arrives_with_its_traceback(self):
        with pytest.raises(functions.Refusal) as caught:
            Parallel()(delayed(refuse)(n) for n in range(5))
        assert caught.value.reason == "not wanted"
        assert "in refuse" in str(caught.value.__cause__)

    def test_what_cannot_be_sent(self):
        with pytest.raises(Exception, match="stays here"):
            Parallel()(delayed(functions.same)(functions.Unsendable()) for _ in range(9))

    @pytest.mark.slow
    def test_a_dead_worker_ends_the_loop_and_no_other(self):
        with pytest.raises(Exception, match="killed by SIGKILL"):
            Parallel()(delayed(functions.die)("kill") for _ in range(2))
        assert Parallel()(delayed(abs)(n) for n in (-1, -2)) == [1, 2]

    def test_loops_within_use_threads(self):
        assert Parallel()(delayed(inner)(n) for n in (1, 2)) == [
            ("ThreadingBackend", [0]),
            ("ThreadingBackend", [0, 1]),
        ]

    def test_timeout_interrupts_what_runs(self, tmp_path):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            Parallel(timeout=0.2)(delayed(hang)(str(tmp_path), n) for n in range(2))
        assert type(caught.value).__name__ == "TimeoutError"
        assert Parallel()(delayed(abs)(n) for n in (-1, -2)) == [1, 2]  # the workers are free
        assert not (tmp_path / "ended").exists()

    def test_ctrl_c_interrupts_what_runs(self, tmp_path):
        def interrupt():
            wait_until((tmp_path / "begun-0").exists, functions.PATIENCE, "the first to begin")
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            Parallel(batch_size=1)(delayed(hang)(str(tmp_path), n) for n in range(2))
        thread.join()
        assert Parallel()(delayed(abs)(n) for n in (-1, -2)) == [1, 2]
        assert not (tmp_path / "ended").exists()

    def test_large_arguments_that_come_again_are_shared(self):
        table = np.arange(40 * 5000.0).reshape(40, 5000)
        calls = [delayed(row)(table, n) for n in range(20)]
        sums, writeable = zip(*Parallel(batch_size=1, max_nbytes="1M")(calls), strict=True)
        assert sums == tuple(table[:20].sum(axis=1))
        assert not any(writeable)  # as with joblib's own backends
        _, writeable = zip(*Parallel(batch_size=1, max_nbytes=None)(calls), strict=True)
        assert all(writeable)

    def test_shared_arguments_keep_their_places(self):
        one, two = np.full(200_000, 1.0), np.full(200_000, 2.0)
        pairs = [(one, two), (two, one), (one, one), (two, {"y": one})] * 5
        found = Parallel(batch_size=1)(delayed(difference)(*pair) for pair in pairs)
        assert found == [-1.0, 1.0, 0.0, 1.0] * 5
        found = Parallel(batch_size=1)(delayed(difference)(y=y, x=x) for x, y in pairs[:3] * 5)
        assert found == [-1.0, 1.0, 0.0] * 5

    def test_n_jobs(self):
        assert [joblib.effective_n_jobs(n) for n in (-1, -2, -9, 1, 2, 7)] == [2, 1, 1, 1, 2, 2]
        with pytest.raises(ValueError, match="no meaning"):
            joblib.effective_n_jobs(0)


def loop_by_name(item):
    def inner(number):
        with joblib.parallel_config("ostap", ncpus=1):
            return sum(Parallel(n_jobs=2)(delayed(abs)(-one) for one in range(number)))

    return Parallel(n_jobs=2, backend="ostap")(delayed(inner)(number) for number in range(item))


def test_loops_in_tasks_that_name_the_backend():
    found = Parallel(n_jobs=2, backend="ostap")(delayed(loop_by_name)(item) for item in (3, 4))
    assert found == [[0, 0, 1], [0, 0, 1, 3]]
    assert joblib.parallel.BACKENDS["ostap"] is OstapBackend
    with ThreadPoolExecutor(1) as threads, joblib.parallel_config("ostap", executor=threads):
        assert Parallel(n_jobs=2)(delayed(abs)(item) for item in (-3, 4)) == [3, 4]
    assert joblib.parallel.BACKENDS["ostap"] is OstapBackend


class Gauge:
    """Counts how many threads are in it at the same time; there is one, wherever it is sent."""

    def __init__(self):
        self.lock, self.now, self.most = threading.Lock(), 0, 0

    def __call__(self, _):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.01)
        with self.lock:
            self.now -= 1

    def __reduce__(self):
        return "GAUGE"


GAUGE = Gauge()


def test_no_more_than_n_jobs_run_at_once():
    gauge = GAUGE
    with ThreadPoolExecutor(4) as threads:
        loop = Parallel(n_jobs=2, backend=OstapBackend(executor=threads), batch_size=1)
        loop(delayed(gauge)(n) for n in range(12))
    assert gauge.most == 2


def test_no_callback_of_a_loop_that_was_stopped_is_under_way(tmp_path):
    """joblib would take what it brings for an outcome of the next loop of the same object."""
    begun, stopped = threading.Event(), threading.Event()
    seen = []

    class Callback:
        def __init__(self, parallel):
            self.parallel = parallel

        def __call__(self, done):
            begun.set()
            seen.append(stopped.wait(0.5))

    class Calls:
        items = ((late, (str(tmp_path / "go"), 0), {}),)

    with ThreadPoolExecutor(2) as threads:
        backend = OstapBackend(executor=threads)
        loop = Parallel(n_jobs=2, backend=backend)
        backend.configure(2, loop)
        backend.submit(Calls, Callback(loop))
        (tmp_path / "go").touch()  # not before: the callback is to be called by the thread
        assert begun.wait(functions.PATIENCE)
        loop._aborting = True
        backend.abort_everything()
        stopped.set()
    assert seen == [False]


class TestWorkers:
    def test_they_end_with_the_block(self):
        before = set(descendants(os.getpid()))
        with joblib.parallel_config(backend="ostap", ncpus=2):
            pids = set(Parallel()(delayed(functions.pid_of)(n) for n in range(9)))
            assert pids == set(Parallel()(delayed(functions.pid_of)(n) for n in range(9))) | pids
            assert pids <= set(descendants(os.getpid()))
        gc.collect()
        wait_until(
            lambda: not set(descendants(os.getpid())) - before, functions.PATIENCE, "no workers"
        )

    @pytest.mark.slow
    def test_on_hosts(self, hosts):
        environment = importable(hosts)
        settings = {"ssh_config": hosts.ssh_config, "config": (), "environment": environment}
        with joblib.parallel_config(backend="ostap", ncpus=0, servers="h1*1 h2*1", **settings):
            assert joblib.effective_n_jobs(-1) == 2
            squares = Parallel()(delayed(functions.square)(n) for n in range(100))
        assert squares == [n * n for n in range(100)]
        gc.collect()

    @pytest.mark.heavy
    def test_scikit_learn(self, hosts):
        from sklearn.datasets import load_iris
        from sklearn.model_selection import cross_val_score
        from sklearn.svm import SVC

        environment = f"export PYTHONPATH={':'.join(site.getsitepackages())}"
        wm = open_manager(hosts, environment=environment)
        features, classes = load_iris(return_X_y=True)
        expected = cross_val_score(SVC(), features, classes, cv=10)
        with wm, joblib.parallel_config(backend="ostap", executor=wm, max_nbytes=1000):
            found = cross_val_score(SVC(), features, classes, cv=10)
        assert list(found) == list(expected)

    def test_a_single_job_runs_here_but_not_a_single_host(self, hosts):
        wm = open_manager(hosts, "h1*1")
        with wm, joblib.parallel_config(backend="ostap", executor=wm):
            assert joblib.effective_n_jobs(-1) == 2
            assert joblib.effective_n_jobs(1) == 1

    @pytest.mark.parametrize("kind", ["ours", *FOREIGN])
    def test_any_executor(self, kind):
        with Executor(2) if kind == "ours" else open_foreign(kind) as executor:
            loop = Parallel(backend=OstapBackend(executor=executor))
            assert len({*loop(delayed(os.urandom)(8) for _ in range(9))}) == 9
            assert loop(delayed(functions.square)(n) for n in range(9)) == [
                n * n for n in range(9)
            ]

    def test_wrong_settings(self):
        with pytest.raises(ConfigError, match="ncpus"):
            Parallel(backend="ostap", n_jobs=2, ncpus="many")(delayed(abs)(n) for n in range(3))
        with pytest.raises(TypeError, match="leave out other settings"):
            OstapBackend(servers="h1", executor=ThreadPoolExecutor(1))
        with pytest.raises(TypeError, match="must be a WorkManager or an Executor, not 4"):
            OstapBackend(executor=4)
        with pytest.raises(TypeError, match="no setting sorvers"):
            Parallel(backend="ostap", n_jobs=2, sorvers="h1")(delayed(abs)(n) for n in range(3))


def test_a_loop_is_told_of_to_who_looks(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "DELAY", 0.05)
    register()
    go = tmp_path / "go"

    def told():
        return [run for run in live.runs() if run["process"] == os.getpid()]

    loop = Parallel(backend="ostap", n_jobs=2, ncpus=2)
    thread = threading.Thread(target=loop, args=[[delayed(functions.wait_for)(go, 60.0)] * 2])
    thread.start()
    try:
        (run,) = wait_until(
            lambda: [one for one in live.runs() if one["process"] == os.getpid()], 60.0, "it tells"
        )
    finally:
        go.touch()
        thread.join(60.0)
    assert run["title"] == "a loop of joblib"
    assert {one["item"] for one in run["running"]} <= {"wait_for"}


def write(table, index, value):
    table[index] = value
    table.flush()
    return type(table).__name__, float(table.sum())


class TestFilesThatTasksWriteTo:
    """As joblib's manual has it: ``np.memmap(..., mode="w+")`` takes what tasks find."""

    @pytest.mark.usefixtures("_ostap")
    def test_they_write_to_the_file(self, tmp_path):
        table = np.memmap(tmp_path / "out", dtype="f8", mode="w+", shape=(6, 4), offset=64)
        calls = (delayed(write)(table, n, n + 1) for n in range(3))
        found = Parallel(n_jobs=2, max_nbytes=10)(calls)
        assert {kind for kind, _ in found} == {"memmap"}
        again = np.memmap(tmp_path / "out", dtype="f8", mode="r", shape=(6, 4), offset=64)
        assert table[:, 0].tolist() == again[:, 0].tolist() == [1, 2, 3, 0, 0, 0]

    @pytest.mark.usefixtures("_ostap")
    @pytest.mark.parametrize("part", [np.s_[2:5], np.s_[::-1], np.s_[:, 1:3], np.s_[1::2, ::-2]])
    def test_parts(self, tmp_path, part):
        table = np.memmap(tmp_path / "out", dtype="i4", mode="w+", shape=(6, 4), order="F")
        expected = np.zeros((6, 4), "i4")
        Parallel(n_jobs=2)([delayed(write)(table[part].T, 0, 8), delayed(abs)(-1)])
        write(expected[part].T.view(_Flushed), 0, 8)
        assert table.tolist() == expected.tolist()

    @pytest.mark.usefixtures("_ostap")
    def test_those_that_are_read_stay_as_they_were(self, tmp_path):
        np.arange(5.0).tofile(tmp_path / "in")
        table = np.memmap(tmp_path / "in", dtype="f8", mode="r")
        found = Parallel(n_jobs=2)(delayed(row)(table, n) for n in range(3))
        assert [value for value, _ in found] == [0, 1, 2]

    def test_a_host_that_does_not_have_the_file_says_so(self, hosts, tmp_path):
        table = np.memmap(tmp_path / "out", dtype="f8", mode="w+", shape=(2,))
        wm = open_manager(
            hosts, "h1*2", environment=f"export PYTHONPATH={site.getsitepackages()[0]}"
        )
        with (
            wm,
            joblib.parallel_config(backend="ostap", executor=wm),
            pytest.raises(FileNotFoundError, match="out"),
        ):
            Parallel(n_jobs=2)(delayed(np.sum)(table) for _ in range(2))


class _Flushed(np.ndarray):
    def flush(self):
        pass
