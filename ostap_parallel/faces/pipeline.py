"""LOFAR's pipeline jobs: recipes, and the data maps that tell which file is where."""

from ostap_parallel.faces.datamap import (
    DataMap,
    DataMapError,
    DataProduct,
    MultiDataMap,
    MultiDataProduct,
    align_data_maps,
    load_data_map,
    store_data_map,
    validate_data_maps,
)
from ostap_parallel.faces.recipe import (
    BaseRecipe,
    ComputeJob,
    PipelineException,
    PipelineQuit,
    RemoteCommandRecipeMixIn,
)

__all__ = [
    "BaseRecipe",
    "ComputeJob",
    "DataMap",
    "DataMapError",
    "DataProduct",
    "MultiDataMap",
    "MultiDataProduct",
    "PipelineException",
    "PipelineQuit",
    "RemoteCommandRecipeMixIn",
    "align_data_maps",
    "load_data_map",
    "store_data_map",
    "validate_data_maps",
]
