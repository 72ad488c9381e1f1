"""Makes one measurement and writes it to a file: ``module:function``, arguments in JSON, file."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path


def main() -> None:
    """Call the function that the command line names."""
    name, arguments, answer = sys.argv[1:]
    module, _, function = name.partition(":")
    figures = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    # In one step: what is there is complete.
    partial = Path(f"{answer}.part")
    partial.write_text(json.dumps(figures))
    partial.rename(answer)


if __name__ == "__main__":
    main()
