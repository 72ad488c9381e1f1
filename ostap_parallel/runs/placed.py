"""Runs whose items have hosts: each goes to where its data are."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ostap_parallel.engine.names import Absences, labels_of
from ostap_parallel.errors import HostError
from ostap_parallel.runs.chunking import Chunk, Packing
from ostap_parallel.runs.outcome import Outcome
from ostap_parallel.runs.run import Run

# Chunks that are under way for each worker of a host.
AHEAD = 2


@dataclass
class PlacedRun(Run):
    """A run of which each item has a host.

    Parameters
    ----------
    where
        Returns the host of an item, or ``None`` for any.
    strict
        Items run there only; those of a host that cannot be had fail, by `HostError`. Otherwise
        hosts that have none of their own left, or none at all, help the others.

    Raises
    ------
    TypeError
        The items have no length: they all have to be known.
    """

    where: Callable[[Any], str | None] = lambda item: None
    strict: bool = True

    _labels: list[str] = field(default_factory=list)  # of the items; "" for any
    _queues: dict[str, deque[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.total is None:
            raise TypeError("where= needs items whose number is known, in a list for example")
        if not self.backend.abilities.interrupt:
            raise TypeError(f"where= needs hosts, and {self.backend.name} has none")
        self.items = list(self.items)
        self._absences = Absences(self.backend)
        known: dict[str | None, str] = {None: ""}
        for index, item in enumerate(self.items):
            name = self.where(item)
            if name not in known:
                (known[name],) = list(labels_of([str(name)], self.backend))[:1]
            self._labels.append(known[name])
            self._queues.setdefault(known[name], deque()).append(index)

    def _feed(self) -> None:
        """Keep all hosts busy with items of theirs."""
        most = self.backend.window()
        workers = self.backend.workers
        self._give_up_hopeless(set(workers))
        under_way = Counter(label for places in self._pinned.values() for label in places)
        for label, count in workers.items():
            while (
                under_way[label] < AHEAD * count
                and len(self._running) < (self.window or most)
                and (found := self._chunk_for(label, sum(workers.values())))
            ):
                self._send(*found, places=frozenset([label]))
                under_way[label] += 1
        self._exhausted = not any(self._queues.values())
        # What is left waits for a host that is not up, of which `wake` tells.
        self._is_paused = not self._exhausted or bool(self._again)

    def _chunk_for(self, label: str, workers: int) -> tuple[Chunk, bytes] | None:
        """Return a chunk for a host, if there is one that it may do."""
        for position, items in enumerate(self._again):
            if not self.strict or self._labels[items[0].index] in ("", label):
                del self._again[position]
                self._again.appendleft(items)
                return self._take_again(workers)
        queue = self._queue_for(label)
        while queue:
            packing = Packing(self._cache, together=True)
            size = max(1, min(self._wanted_size(workers), -(-len(queue) // AHEAD)))
            assert isinstance(self.items, list)
            while queue and size and packing.has_room(self.items[queue[0]]):
                size, index = size - 1, queue.popleft()
                self._next += 1
                self._add(packing, index, self.items[index])
            if packing.items:
                chunk = packing.chunk()
                return chunk, packing.message(chunk.indices, self._id, self._limit)
        return None

    def _queue_for(self, label: str) -> deque[int] | None:
        """Return the items that a host takes from: its own, those of any, or others' most."""
        for name in (label, ""):
            if queue := self._queues.get(name):
                return queue
        return None if self.strict else max(self._queues.values(), key=len, default=None)

    def _give_up_hopeless(self, up: set[str]) -> None:
        """Give up the items of hosts that cannot be had."""
        if not self.strict:
            return
        reasons = self._absences.reasons()
        for label, queue in self._queues.items():
            if label and label not in up and reasons.get(label, "?"):
                reason = reasons.get(label) or "it is not among the hosts"
                lost = [items for items in self._again if self._labels[items[0].index] == label]
                self._again = type(self._again)(one for one in self._again if one not in lost)
                indices = [*queue, *(item.index for items in lost for item in items)]
                self._next += len(queue)
                queue.clear()
                self._unsent.extend(self._refused(index, label, reason) for index in indices)

    def _refused(self, index: int, label: str, reason: str) -> Outcome:
        assert isinstance(self.items, list)
        error = HostError(label, "run", reason.removeprefix(f"{label}: "))
        return Outcome(index, self.items[index], error=error, traceback=str(error))
