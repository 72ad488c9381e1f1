"""The functions of SCOOP; see `ostap_parallel.faces.scoop`."""

from ostap_parallel.faces.scoop import *  # noqa: F403
from ostap_parallel.faces.scoop import __all__ as __all__
