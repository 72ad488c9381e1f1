# PYTHON_ARGCOMPLETE_OK
"""``python -m ostap_parallel`` is ``ostap-parallel``."""

import sys

from ostap_parallel.cli import main

if __name__ == "__main__":
    sys.exit(main())
