"""Settings: which hosts to use and what to do on each, from arguments, environment and files.

`load_settings` resolves them once; what it returns is frozen and knows where each value came from.
"""

from ostap_parallel.config.host import HostConfig, Setting
from ostap_parallel.config.load import (
    HostArguments,
    Settings,
    check_arguments,
    check_servers,
    find_secret,
    load_settings,
    local_settings,
)

__all__ = [
    "HostArguments",
    "HostConfig",
    "Setting",
    "Settings",
    "check_arguments",
    "check_servers",
    "find_secret",
    "load_settings",
    "local_settings",
]
