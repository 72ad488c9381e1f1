"""Run Python functions and tasks on every core within reach: local ones and hosts by ssh.

The public names are loaded when they are first used: workers import this package too, and need
none of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ostap_parallel.errors import (
        ConfigError,
        HostError,
        OstapParallelError,
        RemoteError,
        SerializeError,
        ServersUnavailable,
        WorkerLost,
    )
    from ostap_parallel.manager import WorkManager
    from ostap_parallel.report import Failure, Report, Statistics, StatMerger
    from ostap_parallel.task import FuncTask, GenericTask, Task, TaskMerger

_HOMES = {
    "ConfigError": "errors",
    "Failure": "report",
    "FuncTask": "task",
    "GenericTask": "task",
    "HostError": "errors",
    "OstapParallelError": "errors",
    "RemoteError": "errors",
    "Report": "report",
    "SerializeError": "errors",
    "ServersUnavailable": "errors",
    "StatMerger": "report",
    "Statistics": "report",
    "Task": "task",
    "TaskMerger": "task",
    "WorkManager": "manager",
    "WorkerLost": "errors",
}

__all__ = [
    "ConfigError",
    "Failure",
    "FuncTask",
    "GenericTask",
    "HostError",
    "OstapParallelError",
    "RemoteError",
    "Report",
    "SerializeError",
    "ServersUnavailable",
    "StatMerger",
    "Statistics",
    "Task",
    "TaskMerger",
    "WorkManager",
    "WorkerLost",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
