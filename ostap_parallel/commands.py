"""Commands on local cores and on hosts; see `ostap_parallel.faces.commands`."""

from ostap_parallel.faces.commands import *  # noqa: F403
from ostap_parallel.faces.commands import __all__ as __all__
