"""Completion of commands, options and files in the shell, by argcomplete where it is installed."""

from __future__ import annotations

import argparse
import os

from ostap_parallel.cli.run import ProgramParser


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell and exit, if it has started this to have a line completed."""
    if "_ARGCOMPLETE" not in os.environ:
        return
    import argcomplete  # without it nothing is run: that would be a surprise behind a Tab

    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                if isinstance(command, ProgramParser):  # which does not parse its program
                    command.add_argument("words", nargs="*", metavar="PROGRAM")
    argcomplete.autocomplete(parser)
