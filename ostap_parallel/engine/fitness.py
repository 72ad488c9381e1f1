"""Hosts where workers cannot be prepared for calls: an initializer fails there, for example."""

from __future__ import annotations

from collections.abc import Mapping

from ostap_parallel.logs import logger_of
from ostap_parallel.worker.chunk import ChunkOutcome, unpack_answer

logger = logger_of(__name__)

# After so many calls in a row whose worker could not be prepared a host gets no more of them, as
# long as another one is up.
STRIKES = 3

Places = frozenset[str]


class Fitness:
    """What is known of hosts from the calls that they have had."""

    def __init__(self) -> None:
        self._strikes: dict[str, int] = {}  # calls in a row that have failed, by host

    def count(self, result: ChunkOutcome) -> bool:
        """Take notice of a call's outcome; return whether its worker could not be prepared."""
        if result.was_prepared:
            self._strikes.pop(result.host, None)
            return False
        strikes = self._strikes[result.host] = self._strikes.get(result.host, 0) + 1
        if strikes == STRIKES:
            _, error, _ = unpack_answer(result, 0, "the call")
            text = "%s gets no calls while others are up, as its workers cannot be prepared: %s"
            logger.warning(text, result.host, error)
        return True

    def __bool__(self) -> bool:
        """Return whether there is anything to be heeded."""
        return bool(self._strikes)

    def places(self, workers: Mapping[str, int], tried: Places) -> Places | None:
        """Return the hosts for a call that has been tried on some; ``None``: any will do."""
        unfit = {host for host, strikes in self._strikes.items() if strikes >= STRIKES}
        if not unfit and not tried:
            return None
        up = frozenset(host for host, count in workers.items() if count)
        return up - tried - unfit or up - tried or None
