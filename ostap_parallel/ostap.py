"""The names that Ostap's `parallel.py` and `task.py` take; see `ostap_parallel.faces.ostap`."""

from ostap_parallel.faces.ostap import *  # noqa: F403
from ostap_parallel.faces.ostap import __all__ as __all__
