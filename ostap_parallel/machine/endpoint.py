"""Where a server is reached, and what both ends prove to know there."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Endpoint:
    """The near end of a link to a server.

    Attributes
    ----------
    address
        Host and port to connect to; of loopback, unless the user has said otherwise.
    key
        What the server lets in only those who know it; it is not shown.
    """

    address: tuple[str, int]
    key: bytes = field(repr=False)
