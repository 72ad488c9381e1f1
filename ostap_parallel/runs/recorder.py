"""What a run gives, into its report and into what is merged."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any, Literal

from ostap_parallel.errors import WorkerLost, add_note
from ostap_parallel.runs.display import caller, show_as
from ostap_parallel.runs.dump import Dump
from ostap_parallel.runs.history import History
from ostap_parallel.runs.outcome import Batch, Combined, Outcome
from ostap_parallel.runs.progress import ProgressReporter
from ostap_parallel.runs.report import Failure, Report
from ostap_parallel.runs.run import Run
from ostap_parallel.runs.tails import Tails
from ostap_parallel.runs.task import Task
from ostap_parallel.views.timeline import Timeline

OnError = Literal["raise", "collect"]


class Recorder:
    """Takes the outcomes of a run, one after another, into its report.

    Parameters
    ----------
    timeline
        Keeps when what ran where; ``None``: that is not kept.
    tails
        Knows what workers have printed last.
    """

    def __init__(
        self,
        run: Run,
        reporter: ProgressReporter,
        timeline: Timeline | None = None,
        tails: Tails | None = None,
    ) -> None:
        self.report = Report(left_out=run.trust.left_out, look=run.running, timeline=timeline)
        self._run = run
        self._history = History(run, timeline, tails)
        self._reporter = reporter
        self._start = time.monotonic()

    def merge(self, task: Task, on_error: OnError, dump: Dump) -> None:
        """Merge the results of the whole run by a task's own way of merging."""
        __tracebackhide__ = True
        task.initialize_local()
        try:
            for arrival in self.arrivals(on_error):
                if isinstance(arrival, Batch):
                    self._merge_batch(task, arrival, dump)
                elif arrival.error is None:
                    self._merge_one(task, arrival.index, arrival.value, dump)
                elif isinstance(task, ListTask):
                    task.merge_results(self.report.failures[-1])
            task.finalize()
        finally:  # however it ends; only now, as it may cost much
            self.report.result = task.results()
        dump.write_final(self.report.merged, self.report.result)
        self.complete()

    def complete(self) -> None:
        """Note that the run has come to its end, with nothing lost on the way."""
        report = self.report
        assert report.submitted == report.merged + report.failed, report
        report.complete = True

    def _merge_batch(self, task: Task, batch: Batch, dump: Dump) -> None:
        if isinstance(task, ListTask) and not dump:
            task.results().extend(batch.values)
            self.report.merged += len(batch)
            return
        if isinstance(batch, Combined):
            self._merge_one(task, batch.index, batch.values[0], dump, len(batch))
            return
        for index, value in zip(batch.indices, batch.values, strict=True):
            self._merge_one(task, index, value, dump)

    def _merge_one(self, task: Task, index: int, value: Any, dump: Dump, count: int = 1) -> None:
        dump.write_result(self.report.merged, index, value)
        try:
            task.merge_results(value, index)
        except Exception as exc:
            others = f" and of the next {count - 1}" if count > 1 else ""
            add_note(exc, f"while the result of item {index}{others} was merged")
            raise
        self.report.merged += count
        dump.write_merged(self.report.merged, task.results)

    def arrivals(self, on_error: OnError) -> Iterator[Batch | Outcome]:
        """Yield what arrives; raise the first error, or record it and go on."""
        __tracebackhide__ = True
        report = self.report
        with self._watched(), self._history.noting(), closing(self._run.arrivals()) as arrivals:
            try:
                for arrival in arrivals:
                    report.submitted = self._run.submitted
                    if isinstance(arrival, Batch):
                        report.count(arrival)
                        self._reporter.advance(len(arrival))
                    else:
                        self._count(arrival, on_error)
                    yield arrival
            finally:
                report.submitted = self._run.submitted
                report.retried, report.copies = self._run.retried, self._run.copies
                report.wall = time.monotonic() - self._start

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Note behind the block what ran when the run was stopped."""
        try:
            yield
        finally:
            self.report.ran, self.report.look = self._run.running(), None
            self.report.stragglers = self._run.stragglers

    def _count(self, outcome: Outcome, on_error: OnError) -> None:
        __tracebackhide__ = True
        self.report.resumed += outcome.error is None and not outcome.attempts
        if outcome.host and not isinstance(outcome.error, WorkerLost):
            self.report.count(outcome)
        self._reporter.advance(1, int(outcome.error is not None))
        if outcome.error is not None:
            self._fail(outcome, on_error)

    def _fail(self, outcome: Outcome, on_error: OnError) -> None:
        __tracebackhide__ = True
        assert outcome.error is not None
        failure = Failure.of(outcome, self._history.output(outcome.index))
        self.report.failures.append(failure)
        self.report.stats.add(failure.host, 0.0, njobs=0, nfailed=1)
        if on_error == "raise":
            where = f"on {failure.host}, process {failure.pid}"
            note = f"item {failure.index} ({failure.item}) {where}"
            add_note(outcome.error, note)
            show_as(outcome.error, f"{failure.traceback.rstrip()}\n{note}, from {caller()}")
            raise outcome.error


class ListTask(Task):
    """Merges into a list."""

    def initialize_local(self) -> None:
        self._results: list[Any] = []

    def process(self, jobid: int, item: Any) -> Any:
        raise AssertionError("this task only merges")

    def merge_results(self, result: Any, jobid: int = -1) -> None:
        self._results.append(result)

    def results(self) -> list[Any]:
        return self._results
