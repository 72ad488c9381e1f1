"""Where a server of ours is reached, and what proves that it is one."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Endpoint:
    """The address of a server as this machine reaches it, and the key that both ends know."""

    address: tuple[str, int]
    key: bytes = field(repr=False)
