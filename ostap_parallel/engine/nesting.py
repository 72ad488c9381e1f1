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

import itertools
import logging
import pickle
import signal
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ostap_parallel.engine.retries import HOST_RETRIES, LOST_RETRIES
from ostap_parallel.worker import serialize
from ostap_parallel.worker.chunk import ChunkOutcome, Lost, pack_result, unpack_result
from ostap_parallel.worker.engine import Task
from ostap_parallel.worker.nested import CANCELLED, REFUSED

if TYPE_CHECKING:
    from ostap_parallel.engine.client import ClientServer

logger = logging.getLogger(__name__)

# Jobs that one worker may have begun and not ended; then it runs only what it waits for.
MAX_STACK = 30

# Seconds until a task is sent anew that a server has refused, unless somebody has taken it.
AGAIN = 0.5

# Seconds that a task gets to come back when it was interrupted.
GRACE = 2.0


@dataclass(eq=False)
class Child:
    """A nested task, until its parent has got its result."""

    number: int
    chunk: bytes
    parent: Level
    task: Task | None = None  # its job, while it is in the queue or at the bottom of a stack
    level: Level | None = None  # where it runs, on top of others
    has_begun: bool = False
    is_interrupted: bool = False
    message: bytes | None = None  # its result
    lost: int = 0
    blameless: int = 0


@dataclass(eq=False)
class Level:
    """A job that a worker has begun, as the parent of nested tasks; the child, if it is one."""

    stack: Stack
    child: Child | None = None
    children: dict[int, Child] = field(default_factory=dict)
    ended: dict[int, Child] = field(default_factory=dict)  # those with a result it has not got
    wanted: dict[int, None] = field(default_factory=dict)  # those it waits for


@dataclass(eq=False)
class Stack:
    """The jobs that one worker has begun: the first, and those that it runs on top of others."""

    task: Task
    changed: threading.Condition
    modules: Any
    levels: list[Level] = field(default_factory=list)

    def is_interrupted(self, level: Level) -> bool:
        """Return whether a job is to end, or one below it."""
        below = self.levels[: self.levels.index(level) + 1]
        flags = (one.child.is_interrupted for one in below if one.child)
        return self.task.is_interrupted or any(flags)


class Nesting:
    """The nested tasks of one caller's server. Its threads ask for their workers' jobs."""

    def __init__(self, server: ClientServer) -> None:
        self.call = b""  # what runs them, packed
        self._server = server
        self._lock = threading.RLock()
        self._numbers = itertools.count()
        self._stacks: dict[Task, Stack] = {}
        self._waiting: OrderedDict[Child, None] = OrderedDict()  # no worker has begun them
        self._helpers: dict[Stack, None] = {}  # whose worker waits, and may run any
        self._constants: dict[str, bytes] = {}
        self._constant_set = threading.Condition(self._lock)

    def answer(self, task: Task, request: bytes) -> bytes:
        """Return the answer to a job's request, which may take a second."""
        depth, ended, kind, details = pickle.loads(request[1:])
        with self._lock:
            stack = self._stacks.get(task)
            if stack is None:
                changed = threading.Condition(self._lock)
                stack = self._stacks[task] = Stack(task, changed, task.modules)
                stack.levels.append(Level(stack))
            if ended is not None:
                self._leave(stack, ended)
            while len(stack.levels) > depth + 1:  # it was interrupted, and not heard of again
                self._leave(stack, pack_result(Lost("", 0, "it was interrupted")))
            level = stack.levels[-1]
            answer: tuple[Any, ...] = ("interrupted",)
            if not stack.is_interrupted(level):
                try:
                    answer = getattr(self, f"_answer_{kind}")(level, *details)
                except Exception as exc:
                    answer = ("error", exc)
        return pickle.dumps(answer, serialize.PROTOCOL)

    def close(self, task: Task, message: bytes) -> bytes:
        """Take note of the result of a job; return it, without blame if another one has it."""
        with self._lock:
            stack = self._stacks.pop(task, None)
            if stack is None:
                return message
            result = unpack_result(message)
            if len(stack.levels) > 1:
                top = Lost("", 0, "it was interrupted")
                if isinstance(result, Lost) and not result.timed_out:
                    top, result = result, replace(result, by_worker=False, index=None)
                    message = pack_result(result)
                self._leave(stack, pack_result(top))
            while len(stack.levels) > 1:
                self._leave(stack, pack_result(Lost("", 0, "another task has ended its worker")))
            self._give_up_children(stack.levels[0], result)
        return message

    def wake(self) -> None:
        """Have all who wait look whether they were interrupted."""
        with self._lock:
            for stack in self._stacks.values():
                stack.changed.notify_all()

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
            self._interrupt(child)
        if children and isinstance(result, ChunkOutcome) and result.answers and not result.failed:
            what = "%d nested tasks were given up, as the task that had submitted them has ended"
            logger.warning(what, len(children))

    def _interrupt(self, child: Child) -> None:
        child.is_interrupted = True
        if child.level is not None:
            self._interrupt_on_top(child, child.level)
        elif child.task is not None:
            self._server.interrupt([child.task])
        else:  # kept back
            self._waiting.pop(child, None)

    def _interrupt_on_top(self, child: Child, level: Level) -> None:
        stack = level.stack
        stack.changed.notify_all()

        def kill() -> None:
            with self._lock:
                if child.level is level:
                    self._server.signal(stack.task, signal.SIGKILL)

        if level is stack.levels[-1]:
            self._server.signal(stack.task, signal.SIGINT)
        timer = threading.Timer(GRACE, kill)
        timer.daemon = True
        timer.start()

    def _answer_check(self, level: Level) -> tuple[Any, ...]:
        return ("going on",)

    def _answer_count_workers(self, level: Level) -> tuple[Any, ...]:
        return "counted", self._server.count_workers()

    def _answer_submit(self, level: Level, chunks: list[bytes]) -> tuple[Any, ...]:
        children = [Child(next(self._numbers), chunk, level) for chunk in chunks]
        level.children.update((child.number, child) for child in children)
        for child in children:
            self._queue(child)
        return "submitted", [child.number for child in children]

    def _queue(self, child: Child) -> None:
        child.has_begun = False
        child.task = Task(
            self._server,
            partial(self._deliver, child),
            is_wanted=partial(self._begin, child),
            modules=child.parent.stack.modules,
        )
        child.task.is_nested = True
        self._waiting[child] = None
        self._server.insert(self.call, child.chunk, child.task)
        self._call_helper()

    def _call_helper(self) -> None:
        """Wake a worker that waits, if there is something that it may run."""
        if self._waiting and self._helpers:
            stack, _ = self._helpers.popitem()
            stack.changed.notify_all()

    def _begin(self, child: Child) -> bool:
        """Take note that a free worker begins a child."""
        with self._lock:
            child.has_begun = True
            self._waiting.pop(child, None)
            return not child.is_interrupted

    def _deliver(self, child: Child, message: bytes) -> None:
        """Take the result of a child that a free worker has run."""
        with self._lock:
            self._waiting.pop(child, None)
            child.task = None
            if message == REFUSED and not child.is_interrupted:
                self._keep_back(child)
                return
            result = (
                Lost("", 0, "it was refused") if message == REFUSED else unpack_result(message)
            )
            self._settle(child, result, message)

    def _keep_back(self, child: Child) -> None:
        """Leave a child to workers that wait, and send it anew if none takes it."""
        child.has_begun = False
        self._waiting[child] = None
        child.parent.stack.changed.notify_all()
        self._call_helper()

        def send() -> None:
            with self._lock:
                if child in self._waiting and child.task is None:
                    self._queue(child)

        timer = threading.Timer(AGAIN, send)
        timer.daemon = True
        timer.start()

    def _settle(self, child: Child, result: ChunkOutcome | Lost, message: bytes) -> None:
        """Keep a child's result for its parent, or run it again."""
        if isinstance(result, Lost) or not result.answers:
            if child.is_interrupted:
                message = CANCELLED
            elif self._is_worth_it(child, result):
                self._queue(child)
                return
        child.message = message
        level = child.parent
        if level.children.get(child.number) is child:
            level.ended[child.number] = child
            level.stack.changed.notify_all()

    def _is_worth_it(self, child: Child, result: ChunkOutcome | Lost) -> bool:
        """Count a loss; return whether to try again."""
        if isinstance(result, Lost) and result.by_worker:
            child.lost += 1
        else:
            child.blameless += 1
        few = child.lost <= LOST_RETRIES and child.blameless <= HOST_RETRIES
        return few and not self._server._exiting

    def _answer_wait(
        self,
        level: Level,
        numbers: list[int] | None,
        any_of_them: bool,
        seconds: float,
        helps: str,
    ) -> tuple[Any, ...]:
        if numbers is not None:
            if not level.children.keys() >= set(numbers):
                raise RuntimeError("a future can be waited for in the task that has made it only")
            level.wanted = dict.fromkeys(numbers)
        stack, deadline = level.stack, time.monotonic() + seconds
        while True:
            if stack.is_interrupted(level):
                return ("interrupted",)
            ready = [number for number in level.ended if number in level.wanted]
            is_enough = len(ready) == len(level.wanted) or (ready and any_of_them)
            found = None if is_enough else self._find(level, helps)
            left = deadline - time.monotonic()
            if is_enough or found or left <= 0:
                job = found and self._give(level, found, is_part=helps == "parts")
                self._call_helper()  # in place of this one
                return "waited", self._hand_over(level, ready), job
            if helps == "any" and len(stack.levels) < MAX_STACK:
                self._helpers[stack] = None
            stack.changed.wait(left)
            self._helpers.pop(stack, None)

    def _hand_over(self, level: Level, ready: list[int]) -> list[tuple[int, bytes]]:
        """Return results, which are not kept any longer."""
        found = []
        for number in ready:
            child = level.ended.pop(number)
            del level.children[number], level.wanted[number]
            assert child.message is not None
            found.append((number, child.message))
        return found

    def _find(self, level: Level, helps: str) -> Child | None:
        """Return a child for a worker that waits, taken out of the queue."""
        if helps != "none":
            for number in reversed(level.wanted):
                child = level.children[number]
                if child in self._waiting and self._take(child):
                    return child
        if helps == "any" and len(level.stack.levels) < MAX_STACK:
            for child in reversed(self._waiting):
                if child.parent.stack.modules is level.stack.modules and self._take(child):
                    return child
        return None

    def _take(self, child: Child) -> bool:
        # else a free worker has just taken it
        return child.task is None or self._server.take(child.task)

    def _give(self, level: Level, child: Child, is_part: bool) -> tuple[int, bytes]:
        """Give a job to a worker, to be run on top of others, or as a part of what waits."""
        del self._waiting[child]
        child.has_begun, child.task = True, None
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
        with self._lock:
            if name in self._constants:
                raise TypeError(f"this constant already exists: {name}")
            self._constants[name] = packed
            self._constant_set.notify_all()

    def constant(self, name: str, seconds: float | None) -> bytes | None:
        """Return the value of that name, for which to wait so long."""
        with self._lock:
            self._constant_set.wait_for(lambda: name in self._constants, seconds)
            return self._constants.get(name)

    def _answer_set_constant(self, level: Level, name: str, packed: bytes) -> tuple[Any, ...]:
        self.set_constant(name, packed)
        return ("set",)

    def _answer_constant(self, level: Level, name: str, seconds: float) -> tuple[Any, ...]:
        return "constant", self.constant(name, seconds)
