"""Getting shared objects and modules to hosts: once each, for as long as they may be needed."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from ostap_parallel.errors import HostError
from ostap_parallel.supply.source import STEP
from ostap_parallel.worker.shared import Blob

if TYPE_CHECKING:
    from ostap_parallel.engine.client import Connection


class Abandoned(Exception):
    """An object has not been sent to a host because nobody waits for it any more."""


class _Delivery:
    """A blob on one host, kept there by a connection."""

    def __init__(self) -> None:
        self.sending = threading.Lock()
        self.location = ""  # there; empty until it has arrived
        self.connection: Connection | None = None
        self.abandoned = False

    def abandon(self) -> None:
        self.abandoned = True
        if self.connection is not None:
            with contextlib.suppress(OSError):  # wakes the thread that sends
                self.connection.socket.shutdown(socket.SHUT_RDWR)

    def send(self, blob: Blob, connection: Connection) -> None:
        """Send a blob unless it is there already; raises HostError if it is refused."""
        self.connection = connection
        if self.abandoned:
            raise Abandoned
        connection.send(f"{blob.kind} {blob.digest} {blob.size}")
        answer = connection.receive().decode()
        if answer == "send":
            blob.send(connection.socket)
            answer = connection.receive().decode()
        kind, _, rest = answer.partition(" ")
        if kind != "at":
            raise HostError(connection.label, STEP, f"{rest}; make room there or set tmpdir")
        self.location = rest


class Deliveries:
    """Where blobs are on hosts.

    Parameters
    ----------
    connect
        Connects to the store of a host; raises HostError.
    """

    def __init__(self, connect: Callable[[str], Connection]) -> None:
        self._connect = connect
        self._lock = threading.Lock()
        self._deliveries: WeakKeyDictionary[Blob, dict[str, _Delivery]] = WeakKeyDictionary()

    def locate(self, blob: Blob, label: str) -> str:
        """Return where a blob is on a host; the first who asks sends it, others wait for that.

        Raises
        ------
        Abandoned
            It was interrupted.
        HostError
            The host cannot take it, or does not answer.
        OSError, RuntimeError
            The connection has broken.
        """
        with self._lock:
            delivery = self._deliveries.setdefault(blob, {}).setdefault(label, _Delivery())
        with delivery.sending:
            if not delivery.location:
                try:
                    delivery.send(blob, self._connect(label))
                except Exception:
                    if delivery.abandoned:
                        raise Abandoned(f"sending to {label} was interrupted") from None
                    raise
            return delivery.location

    def interrupt(self, blobs: Collection[Blob]) -> None:
        """Give up what is being sent of these."""
        self._abandon(lambda blob, label, delivery: blob in blobs and not delivery.location)

    def forget(self, host: str) -> None:
        """Give up all that is or was sent to a host."""
        self._abandon(lambda blob, label, delivery: label == host)

    def _abandon(self, condition: Callable[[Blob, str, _Delivery], bool]) -> None:
        with self._lock:
            for blob, deliveries in self._deliveries.items():
                for label, delivery in list(deliveries.items()):
                    if condition(blob, label, delivery):
                        del deliveries[label]
                        delivery.abandon()
