"""What jobs print that end before they are of use: for who else would be told a number only."""

from __future__ import annotations

import contextlib

from ostap_parallel.errors import HostError, SchedulerUnavailable
from ostap_parallel.supply.site import Site

# In the home directory, as that is what hosts share if they share anything. A job whose script
# begins removes its file, see `holder.bash`: so those are left of which nothing else is known.
_MAKE = 'mktemp -d "$HOME/.ostap-parallel-words.XXXXXX"'
_TAKE = 'tail -q -c 2000 -- "$1"/* 2>/dev/null | tail -n 20; rm -rf -- "$1"'


class LastWords:
    """A directory for what jobs of an entry print, if it is wanted.

    Jobs print nothing that is kept as long as all is well: a file that cannot be written would end
    a job that can do without.
    """

    def __init__(self, site: Site) -> None:
        self._site = site
        self._directory = ""

    def output(self) -> str:
        """Return a path for the output of jobs that are about to be submitted."""
        if not self._directory:
            with contextlib.suppress(SchedulerUnavailable, HostError):
                done = self._site.run(["sh", "-c", _MAKE])
                self._directory = "" if done.status else done.output.strip()
        return f"{self._directory}/said" if self._directory else "/dev/null"

    def take(self) -> str:
        """Return what has been printed, the last of it, and remove it."""
        directory, self._directory = self._directory, ""
        if directory:
            with contextlib.suppress(SchedulerUnavailable, HostError):
                return self._site.run(["sh", "-c", _TAKE, "sh", directory]).output.strip()
        return ""
