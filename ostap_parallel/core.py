"""The verbs of `pathos.core`; see `ostap_parallel.commands.core`."""

from ostap_parallel.commands.core import *  # noqa: F403
from ostap_parallel.commands.core import __all__ as __all__
