"""A worker of this machine for who looks at processes, as at those of `multiprocessing`."""

from __future__ import annotations

import signal
import threading

from ostap_parallel.machine.local import Worker


class Handle:
    """What programs ask of a `multiprocessing.Process`, of a local worker.

    Attributes
    ----------
    pid
        Its process id.
    name
        What ``multiprocessing.current_process().name`` is in it.
    """

    daemon = True

    def __init__(self, worker: Worker, changed: threading.Condition) -> None:
        self._worker, self._changed = worker, changed
        self.pid, self.name = worker.pid, f"PoolWorker-{worker.number}"

    def __repr__(self) -> str:
        state = "started" if self.is_alive() else f"stopped exitcode={self.exitcode}"
        return f"<worker {self.name} pid={self.pid} {state}>"

    @property
    def ident(self) -> int:
        """Its process id."""
        return self.pid

    @property
    def exitcode(self) -> int | None:
        """Its exit status, or the negative number of a signal; ``None`` while it runs."""
        if self.is_alive():
            return None
        status = self._worker.status
        return -signal.SIGKILL if status is None else status  # as it is ended with its pool

    def is_alive(self) -> bool:
        """Return whether it has not ended yet."""
        return not self._worker.has_gone

    def join(self, timeout: float | None = None) -> None:
        """Wait until it has ended, or for `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._worker.has_gone, timeout)

    def terminate(self) -> None:
        """Send it and all that it has started SIGTERM; another one comes in its place."""
        self._worker.signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send it and all that it has started SIGKILL; another one comes in its place."""
        self._worker.signal(signal.SIGKILL)
