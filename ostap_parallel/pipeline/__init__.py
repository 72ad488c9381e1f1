"""LOFAR's pipeline jobs: recipes, node scripts, and the data maps that tell which file is where.

Node scripts import this on bare hosts: what recipes need is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ostap_parallel.worker.node import LOFARnode as LOFARnode
from ostap_parallel.worker.node import LOFARnodeTCP as LOFARnodeTCP

if TYPE_CHECKING:
    from ostap_parallel.pipeline import ingredient as ingredient
    from ostap_parallel.pipeline.base import *  # noqa: F403
    from ostap_parallel.pipeline.datamap import *  # noqa: F403
    from ostap_parallel.pipeline.exceptions import *  # noqa: F403
    from ostap_parallel.pipeline.helpers import *  # noqa: F403
    from ostap_parallel.pipeline.recipe import *  # noqa: F403
    from ostap_parallel.pipeline.tasks import *  # noqa: F403

_NAMES = {
    "datamap": "DataMap DataMapError DataProduct MultiDataMap MultiDataProduct align_data_maps "
    "load_data_map store_data_map validate_data_maps",
    "tasks": "StatefulRecipe",
    "exceptions": "ExecutableMissing PipelineException PipelineQuit PipelineRecipeFailed "
    "PipelineRecipeNotFound",
    "recipe": "ComputeJob RemoteCommandRecipeMixIn",
    "base": "BaseRecipe",
    "helpers": "CatchLog4CPlus SubProcessGroup catch_segfaults create_directory "
    "delete_directory disk_usage get_mountpoint is_iterable log_process_output log_time "
    "read_initscript string_to_list",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted([*_HOMES, "LOFARnode", "LOFARnodeTCP", "ingredient"])  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name == "ingredient":
        return importlib.import_module(f"{__name__}.ingredient")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
