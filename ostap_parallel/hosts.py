"""One host, to run commands and copy files; see `ostap_parallel.commands.host`."""

from ostap_parallel.commands.host import *  # noqa: F403
from ostap_parallel.commands.host import __all__ as __all__
