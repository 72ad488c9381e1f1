"""What has become of chunks: by the files of their jobs, and by what the scheduler says."""

from __future__ import annotations

import contextlib
import logging
import secrets
import select
import socket
import time
from collections.abc import Iterable, Mapping

from ostap_parallel.arrays.early import Early
from ostap_parallel.arrays.layout import Layout
from ostap_parallel.arrays.records import Record, Told, is_alive, read, write_verdict
from ostap_parallel.errors import JobRefused, SchedulerUnavailable
from ostap_parallel.schedulers.scheduler import End, JobState, Phase, Scheduler

logger = logging.getLogger(__name__)

# Seconds between looks at files: at first, and by what each look without news makes them longer.
FIRST_LOOK = 0.05
GROWTH = 1.3

# Seconds between questions to the scheduler, at first and at most.
FIRST_QUESTION = 0.8
LAST_QUESTION = 60.0

# What a job has written before it ended badly may be invisible for so long, as part of the grace
# that one has that ended well.
BADLY = 0.1

# Ends of which a job that was told to end does not know which it is.
TOLD_TO_END = "ended"
CERTAIN = 15.0  # seconds after which the scheduler need not have said more

MOST_HINTS = 1000  # that are taken together

# Seconds between looks at what jobs have told that cannot tell that they have.
SURVEY = 20.0

STUCK = "stuck"
LOST = "lost"


class Hint:
    """Where jobs tell that there is news of a chunk, if they can reach this machine: a datagram.

    Who sends anything else is not listened to; what comes only has files looked at sooner.
    """

    def __init__(self, layout: Layout) -> None:
        self._token = secrets.token_hex(8)
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        try:
            self._socket.bind(("", 0))
            self.address(layout)
        except OSError as exc:
            logger.debug("no hints: %s", exc)

    def address(self, layout: Layout) -> None:
        """Write down where this is for jobs; raises OSError."""
        addresses = ["127.0.0.1", *_addresses()]
        port = self._socket.getsockname()[1]
        found = {"token": self._token, "addresses": addresses, "port": port}
        layout.write_json("hint", found)

    def wait(self, seconds: float) -> set[int] | None:
        """Wait for a hint; return the chunks that it is about, ``None``: there was none."""
        poll = select.poll()  # select() knows no descriptors above 1023
        poll.register(self._socket, select.POLLIN)
        if not poll.poll(1000 * seconds):
            return None
        numbers: set[int] | None = None
        with contextlib.suppress(OSError):
            for _ in range(MOST_HINTS):  # who sends them without end holds nobody up
                token, _, number = self._socket.recv(256).decode(errors="replace").partition(" ")
                if token == self._token:
                    numbers = numbers or set()
                    numbers |= {int(number)} if number.isdecimal() else set()
        return numbers

    def wake(self) -> None:
        """Have who waits wait no longer, from any thread."""
        with contextlib.suppress(OSError):
            self._socket.sendto(self._token.encode(), self._socket.getsockname())

    def close(self) -> None:
        """Listen no more."""
        self._socket.close()


def _addresses() -> Iterable[str]:
    """Yield how other machines may reach this one."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        asked.connect(("192.0.2.1", 9))  # nothing is sent; it only chooses an interface
        yield asked.getsockname()[0]
    with contextlib.suppress(OSError):
        yield socket.gethostbyname(socket.gethostname())


class Watcher:
    """Waits for chunks that have been submitted.

    Parameters
    ----------
    polling
        Seconds between looks at files, at most.
    grace
        Seconds that a file may stay invisible on another host.
    item_by_item
        Look at what jobs have told of items, too, while their chunks have not ended; see `early`.

    Attributes
    ----------
    states
        What the scheduler said last, by element.
    """

    def __init__(
        self,
        layout: Layout,
        scheduler: Scheduler,
        polling: float,
        grace: float,
        *,
        item_by_item: bool = False,
    ) -> None:
        self._layout, self._scheduler = layout, scheduler
        self._item_by_item = item_by_item
        self._polling, self._grace = polling, grace
        self._jobs: dict[int, str] = {}  # by chunk: its element
        self._arrays: dict[str, int] = {}  # by id
        self._ended: dict[int, tuple[float, int]] = {}  # since when, and how often that was said
        self._told: dict[int, tuple[float, Told]] = {}  # that do not know why they have ended
        self.states: dict[str, JobState] = {}
        self._is_woken = False
        self._pause, self._question = FIRST_LOOK, FIRST_QUESTION
        self._next_look = 0.0
        self._next_question = time.monotonic() + FIRST_QUESTION
        self._next_survey = time.monotonic() + SURVEY
        self._hint = Hint(layout)
        self._early = Early(layout)
        self._wanted: set[int] = set()  # chunks of whose items some may have ended

    def add(self, array: int, done: Iterable[int] = ()) -> None:
        """Wait for the chunks of an array, but for those that are done."""
        job, known = self._layout.job_id(array), set(done)
        self._arrays[job] = array
        for element, number in enumerate(self._layout.elements(array)):
            if number not in known:
                self._jobs[number] = f"{job}_{element + self._scheduler.first}"
        self._hurry()

    def __len__(self) -> int:
        return len(self._jobs)

    def cancel(self, numbers: Iterable[int]) -> None:
        """Cancel the jobs of chunks, and wait for them no longer."""
        elements = [self._jobs[number] for number in numbers if number in self._jobs]
        for number in numbers:
            self._forget(number)
        with contextlib.suppress(SchedulerUnavailable, JobRefused):
            self._scheduler.cancel(elements)

    def wake(self) -> None:
        """Have `news` return soon, from any thread."""
        self._is_woken = True
        self._hint.wake()

    def close(self) -> None:
        """Wait for nothing any more."""
        self._hint.close()

    def _hurry(self) -> None:
        self._pause, self._question = FIRST_LOOK, FIRST_QUESTION
        now = time.monotonic()
        self._next_look = now + FIRST_LOOK
        self._next_question = min(self._next_question, now + FIRST_QUESTION)

    def news(self, seconds: float) -> dict[int, Told]:
        """Return what jobs have told of the chunks that have ended; wait so long for the first."""
        end = time.monotonic() + seconds
        while True:
            due = min(self._next_look, self._next_question, end)
            hinted = self._hint.wait(max(0.0, due - time.monotonic()))
            found: dict[int, Told] = {}
            now = time.monotonic()
            if hinted is not None or now >= self._next_look:
                found |= self._look()
                self._pause = FIRST_LOOK if found else min(self._pause * GROWTH, self._polling)
                self._next_look = now + self._pause
            if now >= self._next_question and self._jobs:
                found |= self._ask()
                longer = min(1.5 * self._question, LAST_QUESTION)
                self._question = FIRST_QUESTION if found else longer
                self._next_question = time.monotonic() + self._question
            if self._item_by_item:
                self._want(hinted or set(), now)
            if found or self._wanted or now >= end or self._is_woken:
                self._is_woken = False
                return found

    def _want(self, hinted: set[int], now: float) -> None:
        """Note of which chunks there may be news of items."""
        self._wanted |= hinted & self._jobs.keys()
        if now >= self._next_survey:
            self._next_survey = now + SURVEY
            self._wanted |= self._jobs.keys()

    def early(self) -> dict[int, list[Record]]:
        """Return, by chunk, what was told of items whose chunks have not ended; after `news`.

        That an item was done is what stays; all else is known with the chunk.
        """
        wanted, self._wanted = self._wanted & self._jobs.keys(), set()
        with contextlib.suppress(OSError):  # that the directory has gone is noticed elsewhere
            return self._early.news(wanted) if wanted else {}
        return {}

    def _look(self) -> dict[int, Told]:
        found: dict[int, Told] = {}
        for number in self._layout.results(self._jobs.keys() - self._told.keys()):
            told = read(self._layout.root / self._layout.name("results", number))
            if not told.end:  # what was seen is not all of it
                continue
            if told.end == TOLD_TO_END:
                self._told[number] = time.monotonic(), told
                self._next_question = min(self._next_question, time.monotonic() + 0.2)
                self._question = FIRST_QUESTION
            else:
                found[number] = told
        for number in found:
            self._forget(number)
        return found

    def _forget(self, number: int) -> None:
        self._jobs.pop(number, None)
        self._ended.pop(number, None)
        self._told.pop(number, None)
        self._early.forget(number)

    def _ask(self) -> dict[int, Told]:
        """Ask the scheduler; return what is known of chunks whose jobs it says have ended."""
        try:
            states = self._scheduler.states(list(self._jobs.values()))
        except (SchedulerUnavailable, JobRefused) as exc:  # nothing follows from that
            logger.warning("asking again later: %s", exc)
            return {}
        now = time.monotonic()
        self.states = dict(states)
        found: dict[int, Told] = {}
        for number, element in list(self._jobs.items()):
            state = states.get(element) or JobState(Phase.UNKNOWN)
            if number in self._told:
                told = self._end_of_told(number, state, now)
            elif state.phase in (Phase.QUEUED, Phase.RUNNING):
                self._ended.pop(number, None)
                continue
            else:
                told = self._end_of(number, state, now)
            if told is not None:
                found[number] = told
        self._cancel_left(found, states)
        for number, told in found.items():
            self._give_up(number, told)
        return found

    def _cancel_left(self, numbers: Iterable[int], states: Mapping[str, JobState]) -> None:
        """Cancel jobs that nobody waits for any more, and that the scheduler may still begin."""
        over = Phase.ENDED, Phase.UNKNOWN
        left = [
            element
            for element in map(self._jobs.__getitem__, numbers)
            if element in states and states[element].phase not in over
        ]
        if left:
            with contextlib.suppress(SchedulerUnavailable, JobRefused):
                self._scheduler.cancel(left)

    def _end_of_told(self, number: int, state: JobState, now: float) -> Told | None:
        """Return what a job has told that was told to end, once it is known why."""
        since, told = self._told[number]
        if state.end in (None, End.DONE, End.FAILED) and now < since + CERTAIN:
            begun_anew = state.phase is Phase.QUEUED
            if not begun_anew:
                return None
            told.end, told.words = End.PREEMPTED.value, f"begun anew: {state.words}"
            return told
        told.end = state.end.value if state.end else LOST
        told.words = state.words or "it was told to end"
        return told

    def _end_of(self, number: int, state: JobState, now: float) -> Told | None:
        """Return what is known of a chunk whose job is said to be over, once that is certain."""
        since, count = self._ended.get(number, (now, 0))
        self._ended[number] = since, count + 1
        ended_well = state.end is End.DONE or state.phase is Phase.UNKNOWN
        grace = self._grace * (1.0 if ended_well else BADLY)
        if count == 0 or now < since + (0.5 if state.phase is Phase.STUCK else grace):
            self._question = FIRST_QUESTION
            return None
        parts = self._layout.parts(number)
        if state.phase is Phase.UNKNOWN and parts:
            now = self._layout.now()
            if any(is_alive(part, 3 * self._grace, now) for part in parts):
                return None
        told = read(*parts)
        told.end = state.end.value if state.end else LOST
        told.words = state.words or "the scheduler does not know it any more"
        if state.phase is Phase.STUCK:
            told.end, told.words = STUCK, state.reason or state.words
        return told

    def _give_up(self, number: int, told: Told) -> None:
        """Write down how a job has ended that could not do so itself."""
        element = self._jobs[number]
        job, _, index = element.partition("_")
        said = self._layout.said(self._arrays[job], index)
        told.words = "\n".join(filter(None, [told.words, said]))
        told.words = f"job {element}: {told.words}"
        name = self._layout.name("results", number)
        write_verdict(told, lambda data: self._layout.write(name, data))
        self._forget(number)
