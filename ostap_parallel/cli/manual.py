"""``ostap-parallel help``: pages of the manual, which the package brings, and their chapters."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from ostap_parallel.errors import CHAPTERS, ConfigError

FOLDER = Path(__file__).parents[1] / "manual"

# A heading, or code, in which there is none.
_HEADING = re.compile(r"^(#+) ([^\n]+)$|^```.*?^```$", re.MULTILINE | re.DOTALL)


def add_arguments(add: Callable[..., object]) -> None:
    """Add what the command takes."""
    text = "a page, PAGE#CHAPTER, or what a message names; default: the list of pages"
    add("topic", nargs="?", default="", metavar="TOPIC", help=text)


def show(args: argparse.Namespace) -> int:
    """Print a page, or a chapter of one; in a terminal formatted."""
    text = text_of(args.topic)
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.markdown import Markdown

        Console().print(Markdown(text))
    else:
        print(text)
    return 0


def text_of(topic: str) -> str:
    """Return what the manual has about a topic; raises `ConfigError` if that is nothing."""
    if not topic:
        return _contents()
    page, _, anchor = CHAPTERS.get(topic, topic).partition("#")
    file = FOLDER / f"{page.removesuffix('.md').removeprefix('docs/')}.md"
    if "/" in page.removeprefix("docs/") or not file.is_file():
        pages = ", ".join(path.stem for path in _pages())
        raise ConfigError(f"there is no page {page!r}; there are: {pages}")
    text = file.read_text(encoding="utf-8")
    return _chapter(text, anchor, file.stem) if anchor else text.rstrip()


def _pages() -> list[Path]:
    return sorted(path for path in FOLDER.glob("*.md") if path.stem != "index")


def _contents() -> str:
    lines = ["# The manual", "", "| `ostap-parallel help` | is about |", "|---|---|"]
    for path in _pages():
        title = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        lines.append(f"| {path.stem} | {title} |")
    return "\n".join([*lines, "", "`PAGE#CHAPTER` shows one of its chapters."])


def _chapter(text: str, anchor: str, page: str) -> str:
    """Return a chapter with those below it."""
    found = [match for match in _HEADING.finditer(text) if match[1]]
    anchors = [_anchor(match[2]) for match in found]
    if anchor not in anchors:
        names = "\n  ".join(f"{page}#{one}" for one in anchors[1:])
        raise ConfigError(f"there is no chapter {anchor!r} in {page}; there are:\n  {names}")
    place = anchors.index(anchor)
    level = len(found[place][1])
    ends = (match.start() for match in found[place + 1 :] if len(match[1]) <= level)
    return text[found[place].start() : next(ends, len(text))].rstrip()


def _anchor(title: str) -> str:
    """Return how links name a heading, as GitHub and Sphinx do."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
