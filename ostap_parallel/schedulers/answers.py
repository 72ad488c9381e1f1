"""What the answers of a scheduler's commands mean, as far as that is alike for all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ostap_parallel.errors import JobRefused, QueueFull, SchedulerUnavailable
from ostap_parallel.schedulers.scheduler import Done, Runner

# How the words begin of commands that do not understand what they are given.
_OWN = ("sbatch:", "qsub:")


def ask(run: Runner, argv: Sequence[str], known: Iterable[str] = (), data: str = "") -> Done:
    """Run a command that only asks, and raise `SchedulerUnavailable` if it fails.

    But not if it says one of the `known` texts: this is an answer, too.
    """
    done = run(argv, data)
    if done.status and not any(text in done.words for text in known):
        raise SchedulerUnavailable(argv[0], done.words)
    return done


def refuse(command: str, done: Done, full: Iterable[str] = (), unsure: Iterable[str] = ()) -> None:
    """Raise what a submission that has failed means; see `Scheduler.submit`.

    Parameters
    ----------
    full
        Texts of a queue that has no room.
    unsure
        Texts of a scheduler that cannot be reached.
    """
    if not done.status:
        return
    if any(text in done.words for text in full):
        raise QueueFull(command, done.words)
    # 255 is also of ssh, by which a command of the site's may lead to that of the scheduler
    is_away = done.status == 255 and not done.words.startswith(_OWN)
    if any(text in done.words for text in unsure) or done.status in (126, 127) or is_away:
        raise SchedulerUnavailable(command, done.words)
    raise JobRefused(command, done.words)
