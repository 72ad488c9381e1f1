"""Random numbers of ROOT and RooFit."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any, ClassVar


class _Seeded:
    """What the generators were last seeded with, and whether there is one of RooFit."""

    digest: ClassVar[bytes | None] = None
    watched: ClassVar[Any] = None  # the ROOT whose RooFit we learn of
    has_roofit: ClassVar[bool] = False


def seed(digest: bytes | None) -> None:
    """Seed ``gRandom``, and the generator of RooFit as soon as that is used."""
    root = sys.modules.get("ROOT")
    if root is None or not hasattr(root, "gRandom"):
        return
    _Seeded.digest = digest
    _watch(root)
    root.gRandom.SetSeed(_word(digest, 0))
    if _Seeded.has_roofit:
        _seed_roofit(root)


def _seed_roofit(root: Any) -> None:
    root.RooRandom.randomGenerator().SetSeed(_word(_Seeded.digest, 4))


def _word(digest: bytes | None, begin: int) -> int:
    """Return a seed; 0 would mean that ROOT finds one."""
    found = os.urandom(8) if digest is None else digest
    return int.from_bytes(found[begin : begin + 4], "big") | 1


def _watch(root: Any) -> None:
    """Have RooFit seeded when the first class of it is used."""
    if _Seeded.watched is root:
        return
    _Seeded.watched = root

    def notice(cls: type, name: str) -> None:
        if not _Seeded.has_roofit:
            _Seeded.has_roofit = True
            _seed_roofit(root)

    with contextlib.suppress(AttributeError):  # of releases that have no such thing
        root.pythonization("Roo", is_prefix=True)(notice)
