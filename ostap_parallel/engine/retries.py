"""How often what was lost is run again: one ladder for items, calls and nested tasks."""

from __future__ import annotations

from dataclasses import dataclass

from ostap_parallel.worker.chunk import ChunkOutcome, Lost

# How often is run again what has ended its worker; and what is not to blame, as its host was lost
# or something else has ended the worker: one that takes every host along must end.
LOST_RETRIES = 2
HOST_RETRIES = 8


@dataclass(frozen=True)
class Limits:
    """How often something may be run again, by the reason.

    Attributes
    ----------
    failed
        It raised, or took too long.
    lost
        Its worker died by it.
    blameless
        It was lost by the fault of others.
    """

    failed: int = 0
    lost: int = LOST_RETRIES
    blameless: int = HOST_RETRIES


@dataclass(kw_only=True)
class Attempts:
    """How often something has run in vain, by the same reasons."""

    failed: int = 0
    lost: int = 0
    blameless: int = 0

    @property
    def attempts(self) -> int:
        """How often it will have run when this time is over."""
        return 1 + self.failed + self.lost + self.blameless

    def count(self, result: Lost | ChunkOutcome) -> None:
        """Count an attempt that has given nothing; one that was given back is not to blame."""
        if not isinstance(result, Lost) or not result.by_worker:
            self.blameless += 1
        elif result.timed_out:
            self.failed += 1
        else:
            self.lost += 1

    def may_go_on(self, limits: Limits) -> bool:
        """Return whether to try again."""
        few_losses = self.lost <= limits.lost and self.blameless <= limits.blameless
        return few_losses and self.failed <= limits.failed
