"""What is submitted when, beside a scheduler whose answers the tests choose."""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import os
import resource
import shutil
import threading
import time
from dataclasses import replace

import pytest
from functions import PATIENCE
from helpers import wait_until

from ostap_parallel.arrays import settings, submitting
from ostap_parallel.arrays.backend import ArrayBackend
from ostap_parallel.arrays.layout import Header, Layout
from ostap_parallel.arrays.records import Record, Told, Writer, read, write_verdict
from ostap_parallel.arrays.run import Run, create
from ostap_parallel.arrays.sizes import chunk_size
from ostap_parallel.arrays.verdict import judge
from ostap_parallel.arrays.watching import LOST, Hint, Watcher
from ostap_parallel.cli import main
from ostap_parallel.errors import (
    JobRefused,
    OstapParallelError,
    QueueFull,
    SchedulerUnavailable,
    ServersUnavailable,
)
from ostap_parallel.schedulers.scheduler import JobState, Phase
from ostap_parallel.schedulers.slurm import Slurm
from ostap_parallel.worker.chunk import Lost
from ostap_parallel.worker.execute import Call

QUICK = {"polling": 0.1, "grace": 0.1}


class Answers(Slurm):
    """A scheduler that says what it is told to say, and takes all else."""

    def __init__(self):
        super().__init__(lambda *_: pytest.fail("no command is run"))
        self.errors: list[BaseException] = []
        self.names: list[str] = []
        self.cancelled: list[str] = []
        self.is_away = False
        self.count = 0  # of cores

    def submit(self, script, timeout=60.0):
        error = self.errors.pop(0) if self.errors else None
        if error is None or not isinstance(error, OstapParallelError):
            self.names.append(script.partition("--job-name=")[2].split()[0])
        if error is not None:
            raise error
        return str(len(self.names))

    def find(self, name):
        self._answer()
        return [str(n) for n, known in enumerate(self.names, 1) if known == name]

    def states(self, ids, *, ended=True):
        self._answer()
        return {job: JobState(Phase.QUEUED) for job in ids}

    def cancel(self, ids):
        self._answer()
        self.cancelled += ids

    def largest_array(self):
        return 1000

    def cores(self, options):
        self._answer()
        return self.count

    def _answer(self):
        if self.is_away:
            raise SchedulerUnavailable("squeue", "no answer")


@pytest.fixture
def answers(monkeypatch):
    made = Answers()
    monkeypatch.setitem(settings.SCHEDULERS, "slurm", lambda run: made)
    monkeypatch.setattr(submitting, "FIRST_REST", 0.0)
    return made


def full(count=1):
    return [QueueFull("sbatch", "temporarily unavailable") for _ in range(count)]


def make(tmp_path, count=1):
    return create(tmp_path / "run", settings.make("slurm"), abs, range(count))


def chunks_of(run):
    """Return the chunks of all elements of arrays."""
    layout = Layout(run.directory)
    return [number for array in layout.arrays() for number in layout.elements(array)]


class TestHowManyJobs:
    @pytest.mark.parametrize(
        ("total", "cores", "given", "jobs"),
        [
            (10**6, 4, {}, 16),  # four for each that may run at the same time
            (10**6, 4, {"limit": 10}, 40),
            (10**6, 64, {"cpus": 8, "processes": 1}, 32),
            (10**6, 9000, {}, 1000),
            (10**6, 9000, {"limit": 5000}, 1000),
            (10**6, 0, {}, 1000),  # nobody tells
            (64, 9000, {}, 64),
            (64, 4, {}, 16),
            (64, 9000, {"cpus": 8}, 8),  # all cores of a job have something to do
            (5, 0, {"cpus": 8}, 1),
            (0, 4, {}, 0),
        ],
    )
    def test_by_what_may_run_at_a_time(self, answers, total, cores, given, jobs):
        answers.count = cores
        made = settings.make("slurm", **given)
        size = chunk_size(total, made)
        assert replace(made, total=total, size=size).chunks == jobs

    def test_that_is_given(self, answers):
        made = settings.make("slurm", limit=1)
        assert [chunk_size(n, made, 40) for n in (10**6, 50, 3)] == [25_000, 2, 1]

    def test_while_the_scheduler_does_not_answer(self, answers):
        answers.is_away = True
        assert chunk_size(10**6, settings.make("slurm")) == 1000


class TestRuns:
    def test_what_there_was_no_room_for_is_submitted_once(self, answers, tmp_path):
        answers.errors = full(2)
        run = make(tmp_path)
        assert not run.wait(0.3)  # there is no room
        assert not run.wait(0.3)  # now there is
        assert not run.wait(3 * submitting.FIRST_REST + 2.5)
        assert chunks_of(run) == [0]
        assert len(answers.names) == 1

    def test_a_directory_that_is_removed_meanwhile_is_told_and_its_jobs_are_cancelled(
        self, answers, tmp_path
    ):
        make(tmp_path, 2)
        run = Run(tmp_path / "run", **QUICK)
        assert not run.wait(0.3)
        shutil.rmtree(run.directory)
        text = f"the directory of the run was removed before its end: '{run.directory}'"
        with pytest.raises(FileNotFoundError, match=text):
            run.wait(PATIENCE)
        assert answers.cancelled == ["1"]
        with pytest.raises(FileNotFoundError, match=text):
            run.results()

    def test_a_job_of_which_only_its_file_tells_is_not_lost_by_a_clock_that_is_wrong(
        self, answers, tmp_path, monkeypatch
    ):
        make(tmp_path)
        layout = Layout(tmp_path / "run")
        part = tmp_path / "run" / "results" / "0" / "0.1_0.0-0.part"
        part.touch()
        answers.states = lambda ids, ended=True: {job: JobState(Phase.UNKNOWN) for job in ids}
        watcher = Watcher(layout, answers, 0.1, grace=20.0)
        watcher.add(0)
        monkeypatch.setattr(time, "time", lambda: part.stat().st_mtime + 1000)
        watcher._ended[0] = time.monotonic() - 1000, 5
        assert watcher._ask() == {}
        os.utime(part, (1, 1))
        assert watcher._ask()[0].end == LOST
        watcher.close()

    def test_a_full_disk_is_named(self, tmp_path, monkeypatch):
        def fail(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        layout = Layout(tmp_path / "run")
        layout.create()
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/run/hint'"):
            layout.write("hint", b"")
        assert not list(layout.root.glob("*.tmp"))

    def test_of_what_a_disk_has_no_room_for_nothing_is_written(self, tmp_path):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        writer = Writer(tmp_path / "0.part", tmp_path / "0", "1_0", "host")
        writer.add("records", [Record(0, ok=True, answer=b"a")])
        size = (tmp_path / "0.part").stat().st_size
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5000, limits[1]))
            for _ in range(2):
                with pytest.raises(OSError, match=f"File too large: '{tmp_path}/0.part'"):
                    writer.add("records", [Record(1, ok=True, answer=b"b" * 10_000)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (tmp_path / "0.part").stat().st_size == size
        writer.add("records", [Record(2, ok=True, answer=b"c")])
        writer.close("done")
        told = read(tmp_path / "0")
        assert (sorted(told.records), told.end) == ([0, 2], "done")

    @pytest.mark.parametrize("text", ['{"kind": "slurm", "of_tomorrow": 1}', '{"kind": "sl'])
    def test_one_that_cannot_be_read_says_so(self, answers, tmp_path, text):
        run = make(tmp_path)
        (run.directory / "settings").write_text(text)
        with pytest.raises(OstapParallelError, match=f"{run.directory}: was not made by this"):
            Run(run.directory)

    def test_each_try_comes_later_than_the_one_before(self, answers, tmp_path, monkeypatch):
        monkeypatch.setattr(submitting, "FIRST_REST", 1000.0)
        answers.errors = full()
        submitter = make(tmp_path)._submitter
        assert submitter.submit_waiting() == []
        assert submitter.waiting == [(0, 1)]

    def test_items_that_a_later_chunk_has_are_not_begun_twice(self, answers, tmp_path):
        answers.errors = full()
        run = make(tmp_path)
        run.cancel()
        assert run.resubmit() == 1
        assert not run.wait(0.3)
        assert chunks_of(run) == [1]

    def test_nobody_submits_again_beside_who_looks_after_a_run(self, answers, tmp_path):
        run = make(tmp_path)
        with contextlib.ExitStack() as stack:
            assert run._lead(stack)
            with pytest.raises(OstapParallelError, match="is waited for by another"):
                Run(run.directory).resubmit()
            assert main(["jobs", str(run.directory), "--resubmit"]) == 1
        assert run.resubmit() == 0

    def test_a_fork_keeps_nobody_from_looking_after_a_run(self, answers, tmp_path):
        run = make(tmp_path)
        reader, writer = os.pipe()
        with contextlib.ExitStack() as stack:
            assert run._lead(stack)
            if not (pid := os.fork()):
                os.close(writer)
                os.read(reader, 1)  # until the other process lets it go
                os._exit(0)
            os.close(reader)
        with contextlib.ExitStack() as stack:
            found = run._lead(stack)
        os.close(writer)
        os.waitpid(pid, 0)
        assert found

    def test_who_waits_beside_another_keeps_no_files(self, answers, tmp_path):
        run = make(tmp_path)
        with contextlib.ExitStack() as stack, contextlib.ExitStack() as others:
            assert run._lead(stack)
            assert not Run(run.directory)._lead(others)
            kept = [one for one in gc.get_objects() if isinstance(one, io.BufferedWriter)]
            assert [one.name for one in kept].count(str(run.directory / "lock")) == 1

    def test_a_submission_that_is_interrupted_is_cancelled(self, answers, tmp_path):
        answers.errors = [KeyboardInterrupt()]
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path)
        assert answers.cancelled == ["1"]
        assert not (tmp_path / "run").exists()

    def test_cancelling_does_not_wait_for_a_scheduler_that_is_away(self, answers, tmp_path):
        run = make(tmp_path)
        (run.directory / "jobs/0.id").unlink()
        answers.is_away = True
        thread = threading.Thread(target=run.remove)
        thread.start()
        thread.join(PATIENCE)
        assert not thread.is_alive()
        assert not run.directory.exists()

    def test_a_cancelled_run_is_no_success(self, answers, tmp_path, capsys):
        run = make(tmp_path)
        run.cancel()
        assert main(["jobs", str(run.directory), "--wait"]) == 1
        assert main(["jobs", str(run.directory), "--results"]) == 1

    def test_directories_of_others_stay_as_they_are(self, answers, tmp_path):
        home = tmp_path / "mine"
        home.mkdir(mode=0o755)
        run = create(home / "run", settings.make("slurm"), abs, [1])
        run.remove()
        assert list(home.iterdir()) == []
        (home / "file").touch()
        with pytest.raises(FileExistsError):
            create(home, settings.make("slurm"), abs, [1])
        assert home.stat().st_mode & 0o777 == 0o755


def growing(attempt):
    return f"{attempt}G"


class TestVerdicts:
    @pytest.mark.parametrize(("memory", "tries"), [("1G", 2), (growing, 4)])
    def test_without_more_memory_it_is_tried_once_more(self, memory, tries):
        given = settings.make("slurm", memory=memory)
        record = Record(0, lost="SIGKILL", out_of_memory=True)
        told = Told({0: record}, end="done", has_begun=True)
        for attempt in range(1, tries):
            (again,) = judge(given, Header(0, [0], attempt), told).again
            assert (again.indices, again.attempt) == ([0], attempt + 1)
        assert judge(given, Header(0, [0], tries), told).records == {0: record}

    @pytest.mark.parametrize(("walltime", "tries"), [("1:00:00", 2), ("", 2), (lambda n: n, 4)])
    def test_without_more_time_it_is_tried_once_more(self, walltime, tries):
        given = settings.make("slurm", walltime=walltime, processes=2)
        told = Told(running={0, 1}, end="wall time", words="TIMEOUT", has_begun=True)
        for attempt in range(1, tries):
            (again,) = judge(given, Header(0, [0, 1], attempt), told).again
            assert (again.indices, again.attempt) == ([0, 1], attempt + 1)
        failed = judge(given, Header(0, [0, 1], tries), told).failed
        assert failed.keys() == {0, 1}
        assert f"wall time, {tries} times" in failed[0]

    def test_what_began_late_in_a_job_has_not_had_all_its_time(self):
        given = settings.make("slurm", walltime="1:00:00")
        told = Told({0: Record(0, ok=True)}, {1}, end="wall time", has_begun=True)
        (again,) = judge(given, Header(0, [0, 1], 2), told).again
        assert again.indices == [1]


class TestBackends:
    @pytest.fixture
    def array(self, answers, tmp_path):
        made = ArrayBackend(lambda: tmp_path / "run", settings.make("slurm"), 0.1, 0.1)
        yield made
        made.close()

    @pytest.fixture
    def begin(self, array):
        return array.open(Call(abs))

    def test_what_waited_hears_of_a_refusal(self, answers, begin):
        answers.errors = [*full(), JobRefused("sbatch", "never")]
        first = begin(b"")
        assert "never" in first.result(PATIENCE).reason
        with pytest.raises(ServersUnavailable):
            begin(b"")

    def test_what_nobody_wants_is_not_submitted_later(self, answers, begin, array):
        answers.errors = full(1000)
        future = begin(b"")
        wait_until(lambda: len(answers.errors) < 1000, PATIENCE, "there is no room")
        array.give_up([future])
        assert "interrupted" in future.result(PATIENCE).reason
        answers.errors.clear()
        other = begin(b"")
        wait_until(lambda: answers.names, PATIENCE, "the other is there")
        layout = array._layout
        assert [layout.elements(one) for one in layout.arrays()] == [[1]]
        assert not other.done()


def test_a_backend_has_no_more_jobs_at_a_time_than_its_limit(answers, tmp_path):
    array = ArrayBackend(lambda: tmp_path / "run", settings.make("slurm", limit=2), 0.1, 0.1)
    begin = array.open(Call(abs))
    futures = [begin(b"") for _ in range(5)]
    layout = array._layout

    def submitted():
        return [number for one in layout.arrays() for number in layout.elements(one)]

    wait_until(lambda: len(submitted()) == 2, PATIENCE, "two are there")
    array.give_up([futures[3]])
    assert futures[3].cancelled()
    told = Told(whole=Lost("node", 1, "over"), end="done")
    write_verdict(told, lambda data: layout.write(layout.name("results", 0), data))
    assert futures[0].result(PATIENCE).reason == "over"
    wait_until(lambda: submitted() == [0, 1, 2], PATIENCE, "one more is there")
    array.close()
    assert [future.result(PATIENCE).reason for future in futures[1:3]] == [
        "the pool was closed"
    ] * 2
    assert set(answers.cancelled) == {str(n) for n in range(1, len(answers.names) + 1)}


def test_a_program_with_many_files_hears_of_ends(tmp_path):
    layout = Layout(tmp_path / "run")
    layout.create()
    with contextlib.ExitStack() as stack:
        first = os.open("/dev/null", os.O_RDONLY)
        stack.callback(os.close, first)
        try:
            os.dup2(first, 1100)
        except OSError:
            pytest.skip("not so many files are allowed")
        stack.callback(os.close, 1100)
        hint = Hint(layout)
        stack.callback(hint.close)
        hint._socket = _moved(hint._socket, 1101)
        hint.wake()
        assert hint.wait(PATIENCE) is not None


def _moved(one, number):
    """Return a socket by another descriptor."""
    os.dup2(one.fileno(), number)
    one.close()
    return type(one)(fileno=number)


def test_who_sends_hints_without_end_holds_nobody_up(tmp_path):
    class Endless:
        def recv(self, size):
            return b"nothing of ours"

        def fileno(self):
            return reader

    layout = Layout(tmp_path / "run")
    layout.create()
    hint = Hint(layout)
    reader, writer = os.pipe()
    try:
        os.write(writer, b"a")
        real, hint._socket = hint._socket, Endless()
        assert not hint.wait(PATIENCE)
    finally:
        real.close()
        os.close(reader)
        os.close(writer)
