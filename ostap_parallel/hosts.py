"""One host, to run commands and copy files; see `ostap_parallel.faces.hosts`."""

from ostap_parallel.faces.hosts import *  # noqa: F403
from ostap_parallel.faces.hosts import __all__ as __all__
