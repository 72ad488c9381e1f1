"""Which hosts a run trusts: where a failure may be the host's fault, and when a host is left out.

The rule, where there are several hosts (this machine's workers count as one):

- What is run again runs on a host where it has not failed, as long as such a host is up.
- *A failure that may be the host's* gets other opinions, though no retries are wanted: the item
  runs on up to `HostRules.opinions` other hosts. It may be the host's if a module is missing there
  or what prepares workers fails; and, in a run that collects failures, if nothing has succeeded
  there yet, or if nothing did in the last `HostRules.row` items. What fails on all these hosts is
  the item's failure; hosts that have been right so get twice as long a row each time.
- *While so many opinions are open as `HostRules.strikes`*, the host gets nothing new.
- *A host is left out* for the rest of the run when so many of the items that failed there have
  succeeded elsewhere, and none has succeeded there meanwhile, and a module was missing or the
  preparation failed, or it would be a chance below `HostRules.chance`, by how often items fail
  on the others, that a good host fails that often in a row. There is one warning of it. It is used
  again only if no other host is up, nor comes back in time.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ostap_parallel.engine.backend import AnyFuture, Backend
from ostap_parallel.engine.core import LOCAL
from ostap_parallel.errors import ByteCodeError, TaskTimeout, see
from ostap_parallel.logs import logger_of
from ostap_parallel.objects.serialize import name_and_text
from ostap_parallel.runs.chunking import Item
from ostap_parallel.runs.outcome import Outcome

logger = logger_of(__name__)

Places = frozenset[str]

# Seconds for which hosts that were left out are not used though no other one is up: those that
# are lost may come back.
ALONE = 60.0


@dataclass(frozen=True)
class HostRules:
    """When a host counts as a bad one.

    Attributes
    ----------
    opinions
        On so many other hosts an item is tried whose failure may be its host's; 0: all failures
        are the items', and no host is left out.
    strikes
        So many items must have failed on a host and succeeded on others before it is left out.
    row
        After so many failures in a row a host that has done well before is doubted again.
    chance
        A good host is left out with about this chance at most.
    patience
        Seconds from the beginning of a run in which the opinion of hosts that are starting is
        waited for; a run that collects failures waits until they are up, or have failed.
    """

    opinions: int = 3
    strikes: int = 3
    row: int = 3
    chance: float = 1e-6
    patience: float = 10.0

    def __post_init__(self) -> None:
        for name, least in ("opinions", 0), ("strikes", 1), ("row", 1):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a number from {least} on, not {value!r}")
        if not self.patience >= 0:
            raise ValueError(f"patience must be a number from 0 on, not {self.patience!r}")
        if not 0 <= self.chance <= 1:
            raise ValueError(f"chance must be from 0 to 1, not {self.chance!r}")


DEFAULT_RULES = HostRules()


@dataclass
class _Record:
    """What a host has done in this run.

    Attributes
    ----------
    row
        Failures since the last success.
    patience
        How many of them are waited for before it is doubted again.
    open
        Items that failed there and are tried elsewhere.
    strikes
        Items that failed there and succeeded elsewhere, since the last success there.
    of_host
        Whether one of these failures was of a kind that is a host's.
    """

    patience: int
    done: int = 0
    failed: int = 0
    row: int = 0
    open: int = 0
    strikes: int = 0
    of_host: bool = False
    is_cleared: bool = False
    last: str = ""


@dataclass
class Trust:
    """What a run has learned of its hosts.

    Parameters
    ----------
    collects
        The run goes on when an item fails, so there is time for other opinions.

    Attributes
    ----------
    left_out
        The hosts that are not used any more, and why.
    """

    backend: Backend
    rules: HostRules
    collects: bool = False
    left_out: dict[str, str] = field(default_factory=dict)
    _alone_since: float | None = None
    _begin: float = field(default_factory=time.monotonic)
    _records: dict[str, _Record] = field(default_factory=dict)

    def workers(self) -> int:
        """Return the number of workers that are used."""
        up = self._up()
        return sum(up[host] for host in self._usable() or up)

    def window(self) -> int:
        """Return how many chunks should be under way."""
        window = self.backend.window()
        if not self.left_out:
            return window
        if self._usable():
            self._alone_since = None
            return window * self.workers() // max(1, sum(self._up().values()))
        if self._alone_since is None:
            self._alone_since = time.monotonic()
        return 0 if self.time_alone() else window

    def time_alone(self) -> float | None:
        """Return for how many seconds more those left out are not used, if nobody else is up."""
        states = {
            host.state for host in list(self.backend.hosts) if host.name not in self.left_out
        }
        if self._alone_since is None or states.isdisjoint(("starting", "lost")):
            return None
        return max(0.0, self._alone_since + ALONE - time.monotonic()) or None

    def places(self, tried: Places = frozenset(), may_wait: bool = False) -> Places | None:
        """Return the hosts for what has failed on some; ``None``: any will do.

        Who `may_wait` waits for hosts that are starting if no other one is up.
        """
        busy = {host for host, one in self._records.items() if self._is_full(one)}
        if not (tried or busy or self.left_out):
            return None
        up = self._usable()
        soon = Places()
        if may_wait or (busy and not tried):
            soon = self._about_to_come(tried | busy)
        others = up - tried if tried else Places()
        good = up - busy if busy else Places()
        for places in up - tried - busy, others, soon, good, up if self.left_out else None:
            if places:
                return places
        return None

    def time_left(self) -> float | None:
        """Return for how many seconds more hosts are waited for; ``None``: as long as it takes."""
        if self.collects:
            return None
        return max(0.0, self._begin + self.rules.patience - time.monotonic())

    def stranded(self, pinned: Mapping[AnyFuture, Places]) -> list[AnyFuture]:
        """Return those of whose hosts none is up, nor is about to be for the first time."""
        there = self._up().keys() | self._about_to_come(Places())
        return [future for future, places in pinned.items() if places.isdisjoint(there)]

    def is_fit(self, host: str) -> bool:
        """Return whether what happens on a host tells anything of the items."""
        return not self._is_doubtful(host) or not self._usable() - {host}

    def count_done(self, host: str, count: int, items: Iterable[Item] = ()) -> None:
        """Take notice that so many items have succeeded on a host, among them those `items`."""
        record = self._record(host)
        record.done += count
        record.row = record.strikes = 0
        record.of_host = False
        for item in items:
            for other in item.tried:
                self._close(other)
                if other != host:
                    self._strike(other)
            item.tried = frozenset()

    def count_failed(self, item: Item, host: str, why: str, of_host: bool = False) -> None:
        """Take notice that an item has failed on a host, for now at least."""
        if host not in self._known():
            return
        record = self._record(host)
        record.failed += 1
        record.row += 1
        record.last = why
        record.of_host = record.of_host or of_host
        if host not in item.tried:
            item.tried |= {host}
            record.open += 1

    def count_given_up(self, item: Item) -> None:
        """Take notice that an item has failed for good; if on several hosts, it is not theirs."""
        for host in item.tried:
            self._close(host)
            if len(item.tried) > 1:
                record = self._record(host)
                record.is_cleared = True
                record.row, record.patience = 0, 2 * record.patience
        item.tried = frozenset()

    def may_be_the_hosts(self, item: Item, outcome: Outcome, of_host: bool) -> bool:
        """Return whether another host should try an item that has just failed on one."""
        if isinstance(outcome.error, TaskTimeout) or outcome.host not in self._known():
            return False
        if item.doubted >= self.rules.opinions or not self._has_others(item, outcome.host):
            return False
        return of_host or outcome.host in self.left_out or self._is_doubtful(outcome.host)

    def _has_others(self, item: Item, host: str) -> bool:
        tried = item.tried | {host}
        return bool((self._usable() - tried) | self._about_to_come(tried))

    def _about_to_come(self, tried: Places) -> Places:
        """Return the hosts that are waited for; who computes here waits for none."""
        if LOCAL in tried or self.time_left() == 0:
            return Places()
        starting = {host.name for host in list(self.backend.hosts) if host.state == "starting"}
        return frozenset(starting - self.left_out.keys() - tried)

    def _is_doubtful(self, host: str) -> bool:
        record = self._record(host)
        if not self.collects:
            return False
        return record.row >= record.patience or not (record.done or record.is_cleared)

    def _is_full(self, record: _Record) -> bool:
        return record.open >= self.rules.strikes and record.row >= self.rules.strikes

    def _strike(self, host: str) -> None:
        record = self._record(host)
        record.strikes += 1
        if host in self.left_out or record.strikes < self.rules.strikes or not self.rules.opinions:
            return
        others = [one for name, one in self._records.items() if name not in {host, *self.left_out}]
        failed = sum(one.failed for one in others)
        rate = (failed + 1) / (failed + sum(one.done for one in others) + 2)
        by_chance = 0.0 if record.of_host else rate**record.row
        if record.row >= self.rules.strikes and by_chance <= self.rules.chance:
            self._leave_out(host, record)

    def _leave_out(self, host: str, record: _Record) -> None:
        reason = f"{record.strikes} items failed there that others did; last: {record.last}"
        self.left_out[host] = reason
        logger.warning("%s is not used any more in this run: %s%s", host, reason, see("wrong"))

    def _close(self, host: str) -> None:
        self._record(host).open -= 1

    def _record(self, host: str) -> _Record:
        if host not in self._records:
            self._records[host] = _Record(self.rules.row)
        return self._records[host]

    def _up(self) -> dict[str, int]:
        return {host: count for host, count in self.backend.workers.items() if count}

    def _known(self) -> Places:
        return frozenset(self._up().keys() | {host.name for host in list(self.backend.hosts)})

    def _usable(self) -> Places:
        return frozenset(self._up().keys() - self.left_out.keys())


def why(outcome: Outcome) -> str:
    """Return a failure in one line."""
    assert outcome.error is not None
    return name_and_text(outcome.error).partition("\n")[0]


def is_of_host(outcome: Outcome, was_prepared: bool) -> bool:
    """Return whether a failure is of a kind that is a host's: it lacks what all items need."""
    return not was_prepared or isinstance(outcome.error, ImportError | ByteCodeError)
