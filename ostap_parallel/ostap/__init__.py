"""The names that Ostap's `parallel.py` and `task.py` take; see `ostap_parallel.ostap.manager`."""

from ostap_parallel.ostap.manager import *  # noqa: F403
from ostap_parallel.ostap.manager import __all__ as __all__
