"""Tasks that tasks have submitted: who runs them, and who learns of it; the caller's side.

Any worker that is free takes them from the queue as it takes other jobs. A worker that waits is
given, to run on top of what it runs already, one of those that it waits for, the newest; else the
newest of all. So the tree of tasks is gone through depth first, and few of its nodes are alive.

There is no deadlock. A task waits for its children only, as futures do not travel, and a task
that is run on top of another one keeps that from going on. Both lead from a task to one that was
begun later. Of all tasks that have begun and not ended, look at the last: it is on top of its
worker's stack, and those that it waits for have not begun, so its worker can begin one of them.
So a nested task must not wait at a server behind a task of another caller: a server that several
use refuses it unless it has a free worker, and for a while only those who wait can have it.
"""

from __future__ import annotations

import hashlib
import itertools
import pickle
import re
import signal
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from ostap_parallel.engine.retries import Attempts, Limits
from ostap_parallel.logs import logger_of
from ostap_parallel.machine import wire
from ostap_parallel.machine.jobs import Job, Queue
from ostap_parallel.machine.loop import Loop, Timer
from ostap_parallel.objects import serialize
from ostap_parallel.worker.chunk import INTERRUPTED, ChunkOutcome, Lost, pack_result, unpack_result
from ostap_parallel.worker.nested import CANCELLED

logger = logger_of(__name__)

# Jobs that one worker may have begun and not ended; then it runs only what it waits for.
MAX_STACK = 30

# Seconds until a task is sent anew that a server has refused, unless somebody has taken it.
AGAIN = 0.5

# Seconds that a task gets to come back when it was interrupted.
GRACE = 2.0

# Names what travels by value; each process has its own.
_TOKEN = re.compile(rb"[0-9a-f]{32}")

# Calls that have ended the worker of their parent, of which so many are remembered.
MAX_DEADLY = 256


@dataclass(eq=False)
class Child:
    """A nested task, until its parent has got its result."""

    number: int
    chunk: bytes
    parent: Level
    job: Job | None = None  # while it is in the queue or at the bottom of a stack
    level: Level | None = None  # where it runs, on top of others
    has_begun: bool = False
    is_interrupted: bool = False
    message: bytes | None = None  # its result
    attempts: Attempts = field(default_factory=Attempts)


@dataclass(eq=False)
class Level:
    """A job that a worker has begun, as the parent of nested tasks; the child, if it is one."""

    stack: Stack
    child: Child | None = None
    children: dict[int, Child] = field(default_factory=dict)
    ended: dict[int, Child] = field(default_factory=dict)  # those with a result it has not got
    wanted: dict[int, None] = field(default_factory=dict)  # those it waits for


@dataclass(eq=False)
class Waiting:
    """A request that has no answer yet."""

    level: Level
    any_of_them: bool
    helps: str
    timer: Timer | None = None
    constant: str | None = None  # what it waits for, in place of children


@dataclass(eq=False)
class Stack:
    """The jobs that one worker has begun: the first, and those that it runs on top of others."""

    job: Job
    modules: Any
    levels: list[Level] = field(default_factory=list)
    waiting: Waiting | None = None

    def is_interrupted(self, level: Level) -> bool:
        """Return whether a job is to end, or one below it."""
        below = self.levels[: self.levels.index(level) + 1]
        flags = (one.child.is_interrupted for one in below if one.child)
        return self.job.is_interrupted or any(flags)


class Nesting:
    """The nested tasks of one caller's engine. All is used with the loop's lock held.

    Attributes
    ----------
    call
        What runs them, packed.
    """

    def __init__(self, queue: Queue, loop: Loop) -> None:
        self.call = b""
        self._hearers: dict[str, Callable[[Any], object]] = {}
        self._queue, self._loop = queue, loop
        self._numbers = itertools.count()
        self._stacks: dict[Job, Stack] = {}
        self._unbegun: OrderedDict[Child, None] = OrderedDict()  # no worker has begun them
        self._helpers: dict[Stack, None] = {}  # whose worker waits, and may run any
        self._deadly: OrderedDict[bytes, int] = OrderedDict()  # by digest: how often
        self._constants: dict[str, bytes] = {}
        self._constant_set = threading.Condition(loop.lock)

    @property
    def depth(self) -> int:
        """The number of jobs that have asked for anything and not ended."""
        return len(self._stacks)

    def ask(self, job: Job, request: bytes) -> None:
        """Answer a job's request, at once or within the time that it names."""
        depth, ended, kind, details = pickle.loads(request[1:])
        stack = self._stacks.get(job)
        if stack is None:
            stack = self._stacks[job] = Stack(job, job.modules)
            stack.levels.append(Level(stack))
        answer: tuple[Any, ...] | None
        try:
            if ended is not None:
                self._leave(stack, ended)
            while len(stack.levels) > depth + 1:  # it was interrupted, and not heard of again
                self._leave(stack, pack_result(Lost("", 0, INTERRUPTED)))
            level = stack.levels[-1]
            answer = ("interrupted",)
            if not stack.is_interrupted(level):
                answer = getattr(self, f"_answer_{kind}")(level, *details)
        except Exception as exc:
            answer = ("error", exc)
        if answer is not None:
            self._reply(stack, answer)

    def hear(self, name: str, hearer: Callable[[Any], object] | None) -> None:
        """Have somebody get what tasks tell to a name, or nobody any more."""
        if hearer is None:
            self._hearers.pop(name, None)
        else:
            self._hearers[name] = hearer

    def _answer_tell(self, level: Level, name: str, value: Any) -> tuple[Any, ...]:
        if hearer := self._hearers.get(name):
            self._loop.deliver(partial(hearer, value))
        return ("told",)

    def _reply(self, stack: Stack, answer: tuple[Any, ...]) -> None:
        if stack.job.machine is not None:
            stack.job.machine.answer(stack.job, pickle.dumps(answer, serialize.PROTOCOL))

    def close(self, job: Job, message: bytes) -> bytes:
        """Take note of the result of a job; return it, without blame if another one has it."""
        stack = self._stacks.pop(job, None)
        if stack is None:
            return message
        self._stop_waiting(stack)
        result = unpack_result(message)
        if len(stack.levels) > 1:
            top = Lost("", 0, INTERRUPTED)
            if isinstance(result, Lost) and not result.timed_out:
                top, result = result, replace(result, by_worker=False, index=None)
                message = pack_result(result)
                self._blame(stack.levels[-1].child, top)
            self._leave(stack, pack_result(top))
        while len(stack.levels) > 1:
            self._leave(stack, pack_result(Lost("", 0, "another task has ended its worker")))
        self._give_up_children(stack.levels[0], result)
        return message

    def _blame(self, child: Child | None, lost: Lost) -> None:
        """Remember a call that has ended its worker, and with it those that wait for it there."""
        if child is not None and lost.by_worker:
            digest = _digest(child.chunk)
            self._deadly[digest] = self._deadly.pop(digest, 0) + 1
            while len(self._deadly) > MAX_DEADLY:
                self._deadly.popitem(last=False)

    def wake(self) -> None:
        """Have all who wait look whether they were interrupted."""
        with self._loop.lock:
            for stack in list(self._stacks.values()):
                self._look(stack)

    def _leave(self, stack: Stack, message: bytes) -> None:
        """Take the result of the job on top of a stack."""
        level, result = stack.levels.pop(), unpack_result(message)
        self._give_up_children(level, result)
        assert level.child is not None
        level.child.level = None
        self._settle(level.child, result, message)

    def _give_up_children(self, level: Level, result: ChunkOutcome | Lost) -> None:
        """Have what a job has not waited for end with it."""
        children = [child for child in level.children.values() if child.message is None]
        level.children.clear()
        for child in children:
            child.is_interrupted = True
        self._queue.interrupt([child.job for child in children if child.job is not None])
        for child in children:
            if child.job is None:
                self._interrupt(child)
        if children and isinstance(result, ChunkOutcome) and result.answers and not result.failed:
            text = "%d nested tasks were given up, as the task that had submitted them has ended"
            count = len(children)
            self._loop.deliver(lambda: logger.warning(text, count))

    def _interrupt(self, child: Child) -> None:
        child.is_interrupted = True
        if child.level is not None:
            self._interrupt_on_top(child, child.level)
        elif child.job is not None:
            self._queue.interrupt([child.job])
        else:  # kept back
            self._unbegun.pop(child, None)

    def _interrupt_on_top(self, child: Child, level: Level) -> None:
        stack = level.stack

        def kill() -> None:
            if child.level is level:
                self._signal(stack, signal.SIGKILL)

        if level is stack.levels[-1]:
            self._signal(stack, signal.SIGINT)
        self._look(stack)
        self._loop.call_later(GRACE, kill)

    def _signal(self, stack: Stack, number: int) -> None:
        if stack.job.machine is not None:
            stack.job.machine.signal(stack.job, number)

    def _answer_check(self, level: Level) -> tuple[Any, ...]:
        return ("going on",)

    def _answer_count_workers(self, level: Level) -> tuple[Any, ...]:
        return "counted", self._queue.count_workers()

    def _answer_submit(self, level: Level, chunks: list[bytes]) -> tuple[Any, ...]:
        children = [Child(next(self._numbers), chunk, level) for chunk in chunks]
        level.children.update((child.number, child) for child in children)
        for child in children:
            if self._deadly:
                child.attempts.lost = self._deadly.get(_digest(child.chunk), 0)
            if not child.attempts.may_go_on(Limits()):
                lost = Lost("", 0, "it has ended its worker each time")
                self._end(child, pack_result(lost))
            else:
                self._enqueue(child)
        return "submitted", [child.number for child in children]

    def _enqueue(self, child: Child) -> None:
        child.has_begun = False
        child.job = Job(
            self.call,
            child.chunk,
            partial(self._deliver, child),
            is_wanted=partial(self._begin, child),
            ask=self.ask,
            modules=child.parent.stack.modules,
            if_free=True,
        )
        self._unbegun[child] = None
        try:
            self._queue.add(child.job)
        except RuntimeError as exc:  # it is being closed
            self._deliver(child, pack_result(Lost("", 0, str(exc))))
        self._call_helper()

    def _call_helper(self) -> None:
        """Have a worker that waits look, if there is something that it may run."""
        if self._unbegun and self._helpers:
            stack, _ = self._helpers.popitem()
            self._look(stack)
            if stack.waiting is not None and stack.waiting.helps == "any":
                self._helpers[stack] = None

    def _begin(self, child: Child) -> bool:
        """Take note that a free worker begins a child."""
        child.has_begun = True
        self._unbegun.pop(child, None)
        return not child.is_interrupted

    def _deliver(self, child: Child, message: bytes) -> None:
        """Take the result of a child that a free worker has run."""
        self._unbegun.pop(child, None)
        child.job = None
        if message == wire.BUSY and not child.is_interrupted:
            self._keep_back(child)
            return
        refused = message == wire.BUSY
        result = Lost("", 0, "it was refused") if refused else unpack_result(message)
        self._settle(child, result, message)

    def _keep_back(self, child: Child) -> None:
        """Leave a child to workers that wait, and send it anew if none takes it."""
        child.has_begun = False
        self._unbegun[child] = None
        self._look(child.parent.stack)
        self._call_helper()

        def send() -> None:
            if child in self._unbegun and child.job is None:
                self._enqueue(child)

        self._loop.call_later(AGAIN, send)

    def _settle(self, child: Child, result: ChunkOutcome | Lost, message: bytes) -> None:
        """Keep a child's result for its parent, or run it again."""
        if isinstance(result, Lost) or not result.answers:
            if child.is_interrupted:
                message = CANCELLED
            elif self._is_worth_it(child, result):
                self._enqueue(child)
                return
        elif self._deadly:
            self._deadly.pop(_digest(child.chunk), None)
        self._end(child, message)

    def _end(self, child: Child, message: bytes) -> None:
        """Keep the result of a child until its parent asks for it."""
        child.message = message
        level = child.parent
        if level.children.get(child.number) is child:
            level.ended[child.number] = child
            self._look(level.stack)

    def _is_worth_it(self, child: Child, result: ChunkOutcome | Lost) -> bool:
        """Count a loss; return whether to try again."""
        child.attempts.count(result)
        return child.attempts.may_go_on(Limits()) and not self._queue.is_closed

    def _answer_wait(
        self,
        level: Level,
        numbers: list[int] | None,
        any_of_them: bool,
        seconds: float,
        helps: str,
    ) -> tuple[Any, ...] | None:
        if numbers is not None:
            if not level.children.keys() >= set(numbers):
                raise RuntimeError("a future can be waited for in the task that has made it only")
            level.wanted = dict.fromkeys(numbers)
        waiting = Waiting(level, any_of_them, helps)
        return self._answer_or_park(waiting, seconds)

    def _answer_or_park(self, waiting: Waiting, seconds: float) -> tuple[Any, ...] | None:
        """Return the answer, or keep the request until there is one or the time is over."""
        if answer := self._answer_of(waiting, seconds <= 0):
            return answer
        stack = waiting.level.stack
        stack.waiting = waiting
        if waiting.helps == "any" and len(stack.levels) < MAX_STACK:
            self._helpers[stack] = None
        waiting.timer = self._loop.call_later(seconds, lambda: self._look(stack, is_over=True))
        return None

    def _look(self, stack: Stack, is_over: bool = False) -> None:
        """Answer the request of a worker that waits, if there is an answer now."""
        waiting = stack.waiting
        if waiting is None:
            return
        answer = self._answer_of(waiting, is_over)
        if answer is not None:
            self._stop_waiting(stack)
            self._reply(stack, answer)

    def _stop_waiting(self, stack: Stack) -> None:
        if stack.waiting is not None and stack.waiting.timer is not None:
            stack.waiting.timer.cancel()
        stack.waiting = None
        self._helpers.pop(stack, None)

    def _answer_of(self, waiting: Waiting, is_over: bool) -> tuple[Any, ...] | None:
        """Return the answer to who waits; ``None`` if there is none yet."""
        level = waiting.level
        if level.stack.is_interrupted(level):
            return ("interrupted",)
        if waiting.constant is not None:
            packed = self._constants.get(waiting.constant)
            return ("constant", packed) if packed is not None or is_over else None
        ready = [number for number in level.ended if number in level.wanted]
        is_enough = len(ready) == len(level.wanted) or (ready and waiting.any_of_them)
        child = None if is_enough else self._find(level, waiting.helps, is_over)
        if not (is_enough or child or is_over):
            return None
        job = child and self._give(level, child, is_part=waiting.helps == "parts")
        self._helpers.pop(level.stack, None)
        self._call_helper()  # in place of this one
        return "waited", self._hand_over(level, ready), job

    def _hand_over(self, level: Level, ready: list[int]) -> list[tuple[int, bytes]]:
        """Return results, which are not kept any longer."""
        results = []
        for number in ready:
            child = level.ended.pop(number)
            del level.children[number], level.wanted[number]
            assert child.message is not None
            results.append((number, child.message))
        return results

    def _find(self, level: Level, helps: str, is_over: bool) -> Child | None:
        """Return a child for a worker that waits, taken out of the queue.

        One that has ended a worker is left to a free one, unless none has come for a while.
        """
        alone = is_over or self._queue.count_workers() < 2
        if helps != "none":
            for number in reversed(level.wanted):
                child = level.children[number]
                if child in self._unbegun and self._may_run_on_top(child, alone):
                    return child
        if helps == "any" and len(level.stack.levels) < MAX_STACK:
            for child in reversed(self._unbegun):
                fits = child.parent.stack.modules is level.stack.modules
                if fits and self._may_run_on_top(child, alone):
                    return child
        return None

    def _may_run_on_top(self, child: Child, alone: bool) -> bool:
        """Take a child out of the queue unless it is better left to a free worker."""
        if self._deadly and not alone and _digest(child.chunk) in self._deadly:
            return False
        # else a free worker has just taken it
        return child.job is None or self._queue.take(child.job)

    def _give(self, level: Level, child: Child, is_part: bool) -> tuple[int, bytes]:
        """Give a job to a worker, to be run on top of others, or as a part of what waits."""
        del self._unbegun[child]
        child.has_begun, child.job = True, None
        if is_part:
            del level.children[child.number], level.wanted[child.number]
        else:
            child.level = Level(level.stack, child)
            level.stack.levels.append(child.level)
        return child.number, child.chunk

    def _answer_is_running(self, level: Level, number: int) -> tuple[Any, ...]:
        child = level.children.get(number)
        return "is running", child is not None and child.has_begun and child.message is None

    def _answer_cancel(self, level: Level, number: int, interrupt: bool) -> tuple[Any, ...]:
        child = level.children.get(number)
        if child is None or child.message is not None or (child.has_begun and not interrupt):
            return "cancelled", False
        del level.children[number]
        level.wanted.pop(number, None)
        self._interrupt(child)
        return "cancelled", True

    def set_constant(self, name: str, packed: bytes) -> None:
        """Keep a value; raises TypeError if there is one of that name."""
        with self._loop.lock:
            if name in self._constants:
                raise TypeError(f"this constant already exists: {name}")
            self._constants[name] = packed
            self._constant_set.notify_all()
            self.wake()

    def constant(self, name: str, seconds: float | None) -> bytes | None:
        """Return the value of that name, for which to wait so long."""
        with self._loop.lock:
            self._constant_set.wait_for(lambda: name in self._constants, seconds)
            return self._constants.get(name)

    def _answer_set_constant(self, level: Level, name: str, packed: bytes) -> tuple[Any, ...]:
        self.set_constant(name, packed)
        return ("set",)

    def _answer_constant(self, level: Level, name: str, seconds: float) -> tuple[Any, ...] | None:
        waiting = Waiting(level, False, "none", constant=name)
        return self._answer_or_park(waiting, seconds)


def _digest(chunk: bytes) -> bytes:
    """Return what is the same for a call that another process submits again."""
    return hashlib.blake2b(_TOKEN.sub(b"", chunk), digest_size=16).digest()
