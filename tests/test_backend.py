"""The protocol of backends, by one that is an array run over files."""

from __future__ import annotations

import itertools
import operator
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError, Future
from pathlib import Path

import faults
import pytest
from functions import PATIENCE, Unsendable
from helpers import wait_until

from ostap_parallel import Pool, SerializeError, TaskMerger, WorkerLost, WorkManager
from ostap_parallel.engine.backend import Backend, pack_function
from ostap_parallel.engine.foreign import backend_of
from ostap_parallel.worker.chunk import Lost, pack_result, unpack_result
from ostap_parallel.worker.execute import run_foreign


class Files(Backend):
    """Chunks are files in a directory, as are the answers; a process for each few of them.

    A batch system would start the processes, and the directory would be a shared one.
    """

    def __init__(self, directory: Path, jobs: int = 2) -> None:
        self.directory, self.jobs = directory, jobs
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._waiting = []  # names of chunks
        self._futures = {}
        self._processes = set()

    @property
    def workers(self):
        return {"files": self.jobs}

    def open(self, call):
        function = self.directory / f"{next(self._numbers)}.call"
        function.write_bytes(pack_function(call))

        def submit(chunk, *, is_short=False, hosts=None):
            future, name = Future(), f"{next(self._numbers)}.chunk"
            (self.directory / name).write_bytes(chunk)
            with self._lock:
                self._futures[name] = future
                self._waiting.append((function.name, name))
                if len(self._processes) < self.jobs:
                    self._start()
            return future

        return submit

    def _start(self):
        """Start a process for what waits now."""
        job, self._waiting = self._waiting, []
        argv = [sys.executable, __file__, str(self.directory), *itertools.chain(*job)]
        process = subprocess.Popen(argv, env=os.environ | {"PYTHONPATH": ":".join(sys.path)})
        self._processes.add(process)
        threading.Thread(target=self._watch, args=[process, job], daemon=True).start()

    def _watch(self, process, job):
        status = process.wait()
        with self._lock:
            self._processes.remove(process)
            if self._waiting:
                self._start()
        for _, name in job:
            future, answer = self._futures.pop(name), self.directory / f"{name}.answer"
            result = Lost("files", process.pid, f"exit status {status}", by_worker=True)
            if answer.exists():
                result = unpack_result(answer.read_bytes())
            if future.set_running_or_notify_cancel():
                future.set_result(result)


def run_array(directory: Path, names: list[str]) -> None:
    """Do what a job of the array does."""
    for function, name in zip(names[::2], names[1::2], strict=True):
        result = run_foreign((directory / function).read_bytes(), (directory / name).read_bytes())
        aside = directory / f"{name}.part"
        aside.write_bytes(pack_result(result))
        aside.rename(directory / f"{name}.answer")


@pytest.fixture
def backend(tmp_path):
    return Files(tmp_path)


@pytest.fixture
def wm(backend):
    with WorkManager(executor=backend, silent=True) as manager:
        yield manager


class TestArrayOverFiles:
    @pytest.mark.slow
    def test_results(self, wm):
        offset = 5
        assert wm.process(lambda x: x + offset, range(20)) == list(range(5, 25))
        assert wm.process(abs, range(20), merger=TaskMerger(operator.add)) == 190
        assert wm.process(faults.Sum(), range(10)) == 45
        assert wm.workers == {"Files": 2}

    @pytest.mark.slow
    def test_merged_by_the_workers(self, wm):
        merger = TaskMerger(operator.add, combine=True)
        assert wm.process(lambda x: [x], range(20), merger=merger, ordered=True) == [*range(20)]

    @pytest.mark.slow
    def test_shared_objects_and_retries(self, wm, tmp_path):
        def work(item, mark):
            if not Path(mark).exists():
                Path(mark).touch()
                raise OSError("not yet")
            return item

        mark = str(tmp_path / "mark")
        assert wm.process(work, range(3), shared={"mark": mark}, retries=1) == [0, 1, 2]
        assert wm.report.retried >= 1

    @pytest.mark.slow
    def test_failures(self, wm):
        def work(item):
            if item == 2:
                os._exit(3)
            return 1 / item

        found = wm.process(work, range(4), on_error="collect", chunk_size=1)
        assert (found[1], found[3]) == (1, 1 / 3)
        errors = [failure.error for failure in wm.report.failures]
        assert {type(error) for error in errors} == {ZeroDivisionError, WorkerLost}
        with pytest.raises(ZeroDivisionError) as caught:
            wm.process(work, [0])
        assert "in work" in str(caught.value.__cause__)

    def test_what_it_cannot_do_is_refused(self, wm):
        with pytest.raises(TypeError, match="Files cannot end an item"):
            wm.process(abs, [1], timeout=1)

    @pytest.mark.slow
    def test_calls(self, backend):
        assert backend.call(pow, (2, 3)).result(PATIENCE) == 8
        with Pool(executor=backend) as pool:
            assert pool.apply(int, ("101",), {"base": 2}) == 5
            assert pool.starmap(pow, [(2, 2), (3, 3)]) == [4, 27]
        slow = backend.call(time.sleep, (2,))
        wait_until(lambda: backend._processes, PATIENCE, "it runs")
        backend.give_up([slow])
        with pytest.raises(CancelledError):
            slow.result(0)
        with pytest.raises(WorkerLost, match="exit status 3"):
            backend.call(os._exit, (3,)).result(PATIENCE)
        with pytest.raises(SerializeError):
            backend.call(abs, (Unsendable(),))


def test_one_place_looks_at_types(backend):
    class Having:
        pass

    having = Having()
    having.backend = backend
    assert backend_of(backend) is backend_of(having) is backend
    with pytest.raises(TypeError, match="must be"):
        backend_of(having.__dict__)


if __name__ == "__main__":
    run_array(Path(sys.argv[1]), sys.argv[2:])
