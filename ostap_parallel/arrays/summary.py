"""What there is to say about a run: how many of what, and errors, like ones together."""

from __future__ import annotations

from collections import Counter

from ostap_parallel.arrays.run import Run
from ostap_parallel.objects.serialize import name_and_text
from ostap_parallel.views.groups import groups_of

SHOWN = 10


def summary(run: Run) -> str:
    """Return counts, and the errors of items, like ones together, the most frequent first."""
    failures = run.failures()
    left = run.total - run.ended
    done = run.ended - len(failures)
    lines = [
        f"{run.directory}: {state_of(run)}",
        f"  {run.total} items: {done} done, {len(failures)} failed, {left} left",
    ]
    groups = groups_of(
        {
            "index": failure.index,
            "error": name_and_text(failure.error),
            "traceback": failure.traceback,
            "host": failure.host,
        }
        for failure in failures
        if failure.error is not None
    )
    lines += [f"  {group}" for group in groups[:SHOWN]]
    if len(groups) > SHOWN:
        lines.append(f"  and {len(groups) - SHOWN} kinds of errors more")
    return "\n".join(lines)


def state_of(run: Run) -> str:
    """Return in a word how a run stands."""
    if run.is_done:
        return "done"
    return "cancelled" if run.is_cancelled else "under way"


def states(run: Run) -> dict[str, int]:
    """Return how many jobs there are of each state, as the scheduler says now."""
    found = run.settings.scheduler().states(run.jobs())
    return dict(Counter(state.words or state.phase.value for state in found.values()))
