"""The decorators of `pathos.profile`; see `ostap_parallel.worker.profiling`.

Decorated functions import this on bare hosts: what only callers need is loaded when it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ostap_parallel.worker.profiling import clear_stats as clear_stats
from ostap_parallel.worker.profiling import disable_profiling as disable_profiling
from ostap_parallel.worker.profiling import dump_stats as dump_stats
from ostap_parallel.worker.profiling import enable_profiling as enable_profiling
from ostap_parallel.worker.profiling import get_stats as get_stats
from ostap_parallel.worker.profiling import not_profiled as not_profiled
from ostap_parallel.worker.profiling import print_stats as print_stats
from ostap_parallel.worker.profiling import process_id as process_id
from ostap_parallel.worker.profiling import profile as profile
from ostap_parallel.worker.profiling import profiled as profiled
from ostap_parallel.worker.profiling import start_profiling as start_profiling
from ostap_parallel.worker.profiling import stop_profiling as stop_profiling
from ostap_parallel.worker.profiling import thread_id as thread_id

if TYPE_CHECKING:
    from ostap_parallel.runs.profiles import clear_worker_stats as clear_worker_stats
    from ostap_parallel.runs.profiles import total_stats as total_stats
    from ostap_parallel.runs.profiles import worker_stats as worker_stats

_OF_CALLERS = ("clear_worker_stats", "total_stats", "worker_stats")


def __getattr__(name: str) -> Any:
    if name in _OF_CALLERS:
        return getattr(importlib.import_module("ostap_parallel.runs.profiles"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
