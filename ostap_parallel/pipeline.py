"""LOFAR's pipeline jobs; see `ostap_parallel.faces.pipeline` and `ostap_parallel.worker.node`.

Node scripts import this on bare hosts: what recipes need is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ostap_parallel.worker.node import LOFARnode as LOFARnode
from ostap_parallel.worker.node import LOFARnodeTCP as LOFARnodeTCP

if TYPE_CHECKING:
    from ostap_parallel.faces.pipeline import *  # noqa: F403


def __getattr__(name: str) -> Any:
    if not name.startswith("_"):
        home = importlib.import_module("ostap_parallel.faces.pipeline")
        if name in home.__all__:
            return getattr(home, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
