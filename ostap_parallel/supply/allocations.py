"""The jobs of one entry of a server list: asked for together, and given out as they run."""

from __future__ import annotations

import contextlib
import logging
import secrets
import shlex
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ostap_parallel.config.batch import BatchConfig
from ostap_parallel.errors import HostError, JobRefused, QueueFull, SchedulerUnavailable
from ostap_parallel.schedulers.scheduler import End, JobSpec, JobState, Phase, Scheduler
from ostap_parallel.supply.lastwords import LastWords
from ostap_parallel.supply.site import Guard, Site
from ostap_parallel.supply.source import TryLater, Watch

logger = logging.getLogger(__name__)

# Seconds between two looks at jobs that wait: at first, and at most; and where the scheduler does
# not answer, at most.
FIRST_LOOK, LAST_LOOK, PATIENCE = 0.05, 5.0, 60.0

# Seconds for which a job may be unknown to the scheduler before it counts as gone, and for which
# a submission is looked for whose answer was lost.
UNKNOWN = 10.0

# Seconds that a submission may take: a full queue has sbatch wait for some minutes.
SUBMISSION = 60.0

# Jobs in a row that end before they are of use, until that is an error.
FAILURES = 3

# Directives that a session has no use for, or that qrsh does not know, and their words behind.
_NOT_OF_SESSIONS = {"-S": 1, "-o": 1, "-j": 1, "-t": 1, "-tc": 1, "-cwd": 0, "-wd": 1, "-r": 1}

# Seconds that more claims are waited for, which are submitted together.
GATHERING = 0.03


@dataclass(frozen=True, eq=False)
class Held:
    """A job that runs, and is somebody's.

    Attributes
    ----------
    id
        As messages name it.
    number
        By which steps are made in it; of a session that of its job, once it is known.
    ends
        When its wall time is over, by `time.monotonic`.
    """

    id: str
    number: str
    node: str
    ends: float | None

    @property
    def job(self) -> str:
        """By what the scheduler knows it."""
        return self.id if self.node else self.number


class Claim:
    """Who waits for a job."""

    def __init__(self, label: str, watch: Watch) -> None:
        self.label, self.watch = label, watch
        self.settled = threading.Event()
        self.held: Held | None = None
        self.error: HostError | None = None
        self._reason = ""

    def settle(self, outcome: Held | HostError) -> None:
        """Give it the job, or the reason why there is none."""
        if isinstance(outcome, Held):
            self.held = outcome
        else:
            self.error = outcome
        self.settled.set()

    def tell(self, reason: str) -> None:
        """Tell why it has to wait."""
        if reason != self._reason:
            self._reason = reason
            self.watch.queued(reason)


class Allocations:
    """Jobs of a batch system that hold what sessions use; see `holder.bash`.

    Nothing is submitted because a question was not answered, and what has been submitted is
    cancelled when it is not claimed any more, or when this process is gone.

    Parameters
    ----------
    name
        Of the entry.
    """

    def __init__(
        self, name: str, batch: BatchConfig, site: Site, scheduler: Scheduler, body: str
    ) -> None:
        self.name, self.batch, self.site = name, batch, site
        self._scheduler, self._body = scheduler, body
        self._token = secrets.token_hex(4)
        self._count = 0  # submissions
        self._claims: list[Claim] = []
        self._waiting: dict[str, float] = {}  # jobs, and since when they are unknown
        self._held: dict[str, Held] = {}  # by what messages call them
        self._doubtful = ""  # the name of a submission of which nobody knows whether it was done
        self._doubtful_since = 0.0
        self._failures = 0
        self._words = LastWords(site)
        self._not_before = 0.0
        self._checking, self._is_checked = threading.Lock(), False
        self._guarding = threading.Lock()  # never asked for by who has `_changed`
        self._guard: Guard | None = None
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()

    def spec(self, count: int = 1) -> JobSpec:
        """Return what is asked for."""
        return job_spec(f"{self.name}-{self._token}-{self._count}", self.batch, self._body, count)

    def claim(self, claim: Claim) -> Held:
        """Wait for a job that runs; raises HostError, `TryLater` if there may be one later."""
        with self._changed:
            if not claim.settled.is_set():  # it may have been abandoned before
                self._claims.append(claim)
            if self._claims and self._thread is None:
                self._thread = threading.Thread(target=self._run, name="allocations", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        claim.settled.wait()
        if claim.held is None:
            assert claim.error is not None
            raise claim.error
        return claim.held

    def abandon(self, claim: Claim) -> None:
        """Have a claim fail that waits, or will."""
        with self._changed:
            if not claim.settled.is_set():
                with contextlib.suppress(ValueError):
                    self._claims.remove(claim)
                claim.settle(HostError(claim.label, "start", "closed while it was starting"))
            self._changed.notify_all()

    def release(self, held: Held) -> None:
        """Cancel a job that is used no more."""
        with self._changed:
            self._held.pop(held.id, None)
            is_last = not (self._held or self._claims or self._waiting)
        if is_last:
            self._dismiss()
        elif job := held.job or self.number_of(held):
            with contextlib.suppress(SchedulerUnavailable):  # it ends by itself then
                self._scheduler.cancel([job])

    def check(self, label: str) -> None:
        """Raise HostError if the scheduler says that there can be no such job."""
        with self._checking:
            if self._is_checked:
                return
            try:
                self._scheduler.check(self._scheduler.script(self._session_spec(self.name)))
            except JobRefused as exc:
                raise HostError(label, "submit", exc.reason) from exc
            except SchedulerUnavailable as exc:
                raise TryLater(label, "submit", str(exc)) from exc
            self._is_checked = True

    def enter(self) -> Held:
        """Take notice of a session that is about to be submitted, by `session_argv`.

        Raises HostError, `TryLater` if it may be one later.
        """
        with self._changed:
            self._count += 1
            held = Held(f"{self.name}-{self._token}-{self._count}", "", "", None)
            self._held[held.id] = held
        try:
            self._guard_over(held.id)
        except SchedulerUnavailable as exc:
            self.release(held)
            raise TryLater(self.name, "submit", str(exc)) from exc
        except BaseException:
            self.release(held)
            raise
        return held

    def number_of(self, held: Held) -> str:
        """Return the number of a session's job; empty if it is not known yet."""
        with contextlib.suppress(SchedulerUnavailable):
            return "".join(self._scheduler.find(held.id)[-1:])
        return ""

    def session_argv(self, held: Held) -> list[str]:
        """Return what submits a session of SGE, and is its standard input and output."""
        lines = self._scheduler.script(self._session_spec(held.id)).splitlines()
        found = [line.removeprefix("#$ ") for line in lines if line.startswith("#$ ")]
        words = _of_sessions(shlex.split(" ".join(found)))
        return self.site.program(["qrsh", "-now", "n", *words, "bash", "-s"])

    def _session_spec(self, name: str) -> JobSpec:
        return replace(job_spec(name, self.batch, "", 0), warn=60)

    def state(self, held: Held) -> JobState | None:
        """Return the state of a job; ``None`` if the scheduler does not answer."""
        with contextlib.suppress(SchedulerUnavailable):
            return self._scheduler.states([held.job])[held.job] if held.job else None
        return None

    def succeeded(self) -> None:
        """Take notice that a job was of use."""
        self._failures = 0
        self._words.take()

    def failed(self, error: HostError) -> HostError:
        """Take notice that a job was of no use; return the error, final if it is one of many."""
        self._failures += 1
        if self._failures >= FAILURES:
            self._failures = 0
            reason = "\n".join(filter(None, [error.reason, self._words.take()]))
            return HostError(error.host, error.step, reason)
        return TryLater(error.host, error.step, error.reason)

    def explain(self, held: Held, patience: float = 3.0) -> str:
        """Return how a job has ended; empty if it has not, or nobody knows."""
        deadline = time.monotonic() + patience
        pause = FIRST_LOOK
        while True:
            with contextlib.suppress(SchedulerUnavailable):
                if not held.job:
                    return ""
                state = self._scheduler.states([held.job])[held.job]
                if state.phase is Phase.ENDED:
                    return self._describe(held, state)
                if state.is_suspended:
                    return f"job {held.id} is suspended: {state.words}"
                if state.phase is Phase.RUNNING and not is_completing(state):
                    if not self._scheduler.gives_way(held.job):
                        return ""
                    state = replace(state, end=End.PREEMPTED)
                    return self._describe(held, state)
            if time.monotonic() + pause > deadline:
                return ""
            time.sleep(pause)
            pause *= 2

    def _describe(self, held: Held, state: JobState) -> str:
        what = {
            End.WALLTIME: f"has reached its wall time{_of(self.batch.walltime)}",
            End.MEMORY: f"ran out of memory{_of(self.batch.memory)}",
            End.NODE: f"was lost with its node {held.node}".rstrip(),
            End.PREEMPTED: "was preempted by another job",
            End.CANCELLED: "was cancelled",
        }
        end = state.end or End.FAILED
        return f"job {held.id} {what.get(end, 'has ended')}: {state.words}"

    # -- what the thread does

    def _run(self) -> None:
        pause = FIRST_LOOK
        time.sleep(GATHERING)
        while True:
            try:
                pause = self._look(pause)
            except HostError as exc:  # of the login host
                self._fail_all(HostError(self.name, exc.step, exc.reason))
                pause = LAST_LOOK
            except Exception as exc:  # the claims must not wait for ever
                logger.exception("%s: its jobs cannot be looked after", self.name)
                self._fail_all(HostError(self.name, "submit", str(exc)))
                pause = LAST_LOOK
            with self._changed:
                if not self._claims and not self._waiting and not self._doubtful:
                    self._thread = None
                    is_last = not self._held
                    break
                count = len(self._claims)
                self._changed.wait(pause)
                if len(self._claims) > count:
                    pause = FIRST_LOOK
        if is_last:
            self._dismiss()

    def _look(self, pause: float) -> float:
        """Submit what is missing, and see what has become of the rest; return the next pause."""
        try:
            if self._doubtful:
                self._find_doubtful()
            missing = len(self._claims) - len(self._waiting)
            if missing > 0 and not self._doubtful and time.monotonic() >= self._not_before:
                self._submit(missing)
            elif missing < 0:
                surplus = list(self._waiting)[missing:]
                self._scheduler.cancel(surplus)
                for job in surplus:
                    del self._waiting[job]
            if self._waiting and self._see_to_waiting():
                return FIRST_LOOK
        except SchedulerUnavailable as exc:
            self._tell(str(exc))
            return min(PATIENCE, max(1.0, 2 * pause))
        return min(LAST_LOOK, 1.5 * pause)

    def _submit(self, count: int) -> None:
        self._count += 1
        spec = self.spec(count)
        if self._failures:
            spec = replace(spec, output=self._words.output())
        self._guard_over(spec.name, is_there=False)
        try:
            array = self._scheduler.submit(self._scheduler.script(spec), SUBMISSION)
        except SchedulerUnavailable as exc:
            self._doubtful, self._doubtful_since = spec.name, time.monotonic()
            self._tell(str(exc))
            return
        except JobRefused as exc:
            self._fail_all(HostError(self.name, "submit", exc.reason))
        except QueueFull as exc:
            self._tell(str(exc))
            self._not_before = time.monotonic() + LAST_LOOK
        else:
            self._adopt(array, count)
        self._guard_over(spec.name)

    def _guard_over(self, name: str, is_there: bool = True) -> None:
        """Have jobs of this name cancelled when we are gone, also if they are not there yet."""
        with self._guarding:
            if self._guard is None or not self._guard.is_there():
                self._guard = self.site.guard(self._scheduler.name)
            (self._guard.add if is_there else self._guard.expect)(name)

    def _adopt(self, array: str, count: int) -> None:
        first = self._scheduler.first
        self._waiting |= {f"{array}_{index}": 0.0 for index in range(first, first + count)}

    def _find_doubtful(self) -> None:
        """See whether a submission was done whose answer was lost."""
        if found := self._scheduler.find(self._doubtful):
            states = self._scheduler.states(found)
            self._waiting |= dict.fromkeys(states, 0.0)
        elif time.monotonic() - self._doubtful_since < UNKNOWN:
            return
        self._guard_over(self._doubtful)
        self._doubtful = ""

    def _see_to_waiting(self) -> bool:
        """Give out what runs, and tell why the rest does not; return whether any was given."""
        arrays = sorted({job.partition("_")[0] for job in self._waiting})
        states = self._scheduler.states(arrays)
        given, reason = False, ""
        for job in list(self._waiting):
            state = states.get(job) or JobState(Phase.UNKNOWN)
            if state.phase is Phase.RUNNING and state.host and not is_completing(state):
                given = self._give(job, state) or given
            elif state.phase is Phase.QUEUED:
                self._waiting[job] = 0.0
                reason = reason or _reason(state)
            elif state.phase is Phase.STUCK:
                self._scheduler.cancel([job])
                del self._waiting[job]
                self._fail(HostError(self.name, "queue", f"it will never start: {state.words}"))
            elif state.phase is Phase.ENDED or self._is_gone(job):
                del self._waiting[job]
                words = state.words if state.phase is Phase.ENDED else "the scheduler forgot it"
                error = self.failed(HostError(self.name, "queue", f"job {job}: {words}"))
                if not isinstance(error, TryLater):
                    self._fail(error)
                self._not_before = time.monotonic() + 0.5 * 2**self._failures
        if reason:
            self._tell(reason)
        return given

    def _is_gone(self, job: str) -> bool:
        since = self._waiting[job] = self._waiting[job] or time.monotonic()
        return time.monotonic() - since > UNKNOWN

    def _give(self, job: str, state: JobState) -> bool:
        ends = None if state.left is None else time.monotonic() + state.left
        held = Held(job, state.number or job, state.host, ends)
        with self._changed:
            if not self._claims:
                return False
            del self._waiting[job]
            self._held[job] = held
            self._claims.pop(0).settle(held)
        return True

    def _tell(self, reason: str) -> None:
        for claim in list(self._claims):
            claim.tell(reason)

    def _fail(self, error: HostError) -> None:
        with self._changed:
            if self._claims:
                claim = self._claims.pop(0)
                claim.settle(HostError(claim.label, error.step, error.reason))

    def _fail_all(self, error: HostError) -> None:
        while self._claims:
            self._fail(error)

    def _dismiss(self) -> None:
        """Have the guard cancel what there may still be."""
        with self._guarding, self._changed:
            if self._held or self._claims or self._waiting:
                return
            guard, self._guard = self._guard, None
        if guard is not None:
            guard.dismiss()
        self._words.take()
        self.site.close()


def _of_sessions(words: Iterable[str]) -> Iterator[str]:
    left = iter(words)
    for word in left:
        if word not in _NOT_OF_SESSIONS:
            yield word
        elif _NOT_OF_SESSIONS[word]:
            next(left, None)


def is_completing(state: JobState) -> bool:
    """Return whether a job runs only in name."""
    return state.words.startswith("COMPLETING")


def _of(what: str) -> str:
    return f" of {what}" if what else ""


def _reason(state: JobState) -> str:
    reason = state.reason or state.words.lower()
    return f"{reason}, expected to start at {state.start}" if state.start else reason


def job_spec(name: str, batch: BatchConfig, body: str, count: int = 1) -> JobSpec:
    """Return what is asked for by one submission."""
    return JobSpec(
        name="".join(letter if letter.isalnum() else "-" for letter in name),
        body=body,
        cpus=batch.cpus,
        memory=batch.memory,
        walltime=batch.walltime,
        elements=count,
        requeue=False,  # another one is asked for, if there is still something to do
        directory="/",
        options=batch.options,
        skip=batch.skip,
    )


def holder() -> str:
    """Return the script of a job that waits for sessions."""
    return Path(__file__).with_name("holder.bash").read_text()
