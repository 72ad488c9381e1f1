"""Run Python functions and tasks on every core within reach: local ones and hosts by ssh.

The public names are loaded when they are first used: workers import this package too, and need
none of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ostap_parallel import futures as futures
    from ostap_parallel.batch.pool import SgePool as SgePool
    from ostap_parallel.batch.pool import SlurmPool as SlurmPool
    from ostap_parallel.errors import CheckpointError as CheckpointError
    from ostap_parallel.errors import ConfigError as ConfigError
    from ostap_parallel.errors import HostError as HostError
    from ostap_parallel.errors import InitializerError as InitializerError
    from ostap_parallel.errors import OstapParallelError as OstapParallelError
    from ostap_parallel.errors import RemoteError as RemoteError
    from ostap_parallel.errors import SerializeError as SerializeError
    from ostap_parallel.errors import ServersUnavailable as ServersUnavailable
    from ostap_parallel.errors import StartError as StartError
    from ostap_parallel.errors import TaskTimeout as TaskTimeout
    from ostap_parallel.errors import WorkerLost as WorkerLost
    from ostap_parallel.faces.executor import Executor as Executor
    from ostap_parallel.faces.manager import WorkManager as WorkManager
    from ostap_parallel.faces.pool import Pool as Pool
    from ostap_parallel.faces.scoop import shared as shared
    from ostap_parallel.runs.checkpoint import Checkpoint as Checkpoint
    from ostap_parallel.runs.report import Failure as Failure
    from ostap_parallel.runs.report import Report as Report
    from ostap_parallel.runs.report import Statistics as Statistics
    from ostap_parallel.runs.report import StatMerger as StatMerger
    from ostap_parallel.runs.task import FuncTask as FuncTask
    from ostap_parallel.runs.task import GenericTask as GenericTask
    from ostap_parallel.runs.task import Task as Task
    from ostap_parallel.runs.task import TaskMerger as TaskMerger
    from ostap_parallel.runs.trust import HostRules as HostRules
    from ostap_parallel.supply.entries import Sge as Sge
    from ostap_parallel.supply.entries import Slurm as Slurm
    from ostap_parallel.worker.generators import rng as rng

_MODULES = {
    "batch.pool": "SgePool SlurmPool",
    "runs.checkpoint": "Checkpoint",
    "errors": "CheckpointError ConfigError HostError InitializerError OstapParallelError "
    "RemoteError SerializeError ServersUnavailable StartError TaskTimeout WorkerLost",
    "faces.executor": "Executor",
    "faces.manager": "WorkManager",
    "faces.pool": "Pool",
    "runs.report": "Failure Report Statistics StatMerger",
    "runs.task": "FuncTask GenericTask Task TaskMerger",
    "runs.trust": "HostRules",
    "faces.scoop": "shared",
    "supply.entries": "Sge Slurm",
    "worker.generators": "rng",
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names.split()}

# What SCOOP's package tells of the program; some of it changes.
_TOLD = {"CONFIGURATION", "DEBUG", "IS_ORIGIN", "IS_RUNNING", "MAIN_MODULE", "SIZE"}
_TOLD |= {"WORKING_DIRECTORY", "logger"}

__all__ = sorted([*_HOMES, "futures"])  # noqa: PLE0605

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    if name == "futures":
        return importlib.import_module(f"{__name__}.futures")
    home = "faces.scoop" if name in _TOLD else _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{home}")
    except AttributeError as exc:  # of this kind nobody would see it
        raise ImportError(f"{__name__}.{name}: {exc}") from exc
    value = getattr(module, name)
    if name not in _TOLD:
        globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
