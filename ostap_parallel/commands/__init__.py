"""Commands on local cores and on hosts; see `ostap_parallel.commands.running`."""

from ostap_parallel.commands.running import *  # noqa: F403
from ostap_parallel.commands.running import __all__ as __all__
