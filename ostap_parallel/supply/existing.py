"""Servers that are there already: started by somebody else, reached on a port of this machine."""

from __future__ import annotations

from ostap_parallel.machine.endpoint import Endpoint
from ostap_parallel.machine.handshake import derive_key
from ostap_parallel.supply.source import Grant, Server, Watch


class ExistingSource:
    """A server, or a tunnel to one, that others may use too: see `source.Source`."""

    keepalive: float | None = None
    may_rest = False
    is_spare = False

    def __init__(self, label: str, endpoint: Endpoint, limit: int | None = None) -> None:
        self.label = label
        self._grant = Grant(endpoint, limit, is_shared=True)

    @classmethod
    def local(cls, port: int, secret: str, limit: int | None = None) -> ExistingSource:
        """Return the one on a port of loopback whose key is made of `secret`."""
        endpoint = Endpoint(("127.0.0.1", port), derive_key(secret, port))
        return cls(f"localhost:{port}", endpoint, limit)

    def server(self, watch: Watch) -> Server:
        """Return the server, which needs no start."""
        return _Existing(self._grant)


class _Existing(Server):
    def __init__(self, grant: Grant) -> None:
        self._grant = grant

    def start(self) -> Grant:
        return self._grant
