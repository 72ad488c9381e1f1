"""README.md, the guide and the reference: their code runs as it stands; no option is left out.

One chapter (``#`` or ``##``) is one test, together with those behind it whose first block is
``<!-- continued -->``. Its blocks by kind, and by the HTML comment before them:

``python``
    All of a chapter are one script, so that its functions are those of a real ``__main__``;
    but one that is saved is left to the commands of the chapter.
``ini``, ``bash``
    With ``<!-- saved as NAME -->`` a file in the home directory, with ``<!-- saved on the hosts
    as NAME -->`` one in the homes of the hosts. Each ``ini`` block must parse as well.
``console``
    The ``ostap-parallel`` commands in it run; ``launch`` stays up while the script runs.

``<!-- not run: reason -->`` leaves a block out; its Python must compile all the same. The hosts of
the manual are private ssh servers, which the ``.ostaprc`` of a private home leads to.
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_type_hints

import pytest
from sshd import Hosts

import ostap_parallel
from ostap_parallel import errors
from ostap_parallel.cli import _parser, main
from ostap_parallel.cli.manual import text_of
from ostap_parallel.config import load_settings
from ostap_parallel.config.files import KEYS
from ostap_parallel.errors import CHAPTERS as CHAPTERS_NAMED
from ostap_parallel.faces.executor import Settings

ROOT = Path(__file__).parent.parent
NAMES = "lxplus701.cern.ch", "lxplus702.cern.ch"

_CHAPTER = re.compile(r"^##? ([^\n]+)$|^```.*?^```$", re.MULTILINE | re.DOTALL)
_BLOCK = re.compile(
    r"^(?:<!-- (?P<note>[^>]*) -->\n)?```(?P<kind>\w+)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_HEADING = re.compile(r"^#+ ([^\n]+)$|^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)")
_EXPORT = re.compile(r"export (\w+)=(.*)")


@dataclass(frozen=True)
class Block:
    """A code block; `line` is that of its first line in the document."""

    kind: str
    text: str
    note: str
    line: int

    def saved(self, where: str) -> str:
        """Return the name that the block is saved under, or nothing."""
        prefix = f"saved {where}as "
        return self.note.removeprefix(prefix) if self.note.startswith(prefix) else ""

    @property
    def runs(self) -> bool:
        return not self.note.startswith("not run: ")


@dataclass(frozen=True)
class Chapter:
    """The blocks under one heading of a document."""

    document: str
    title: str
    blocks: tuple[Block, ...]

    def __str__(self) -> str:
        return f"{self.document}: {self.title}"

    @property
    def script(self) -> str:
        """The Python blocks, on the lines where they stand in the document."""
        lines: list[str] = []
        for block in self.blocks:
            if block.kind == "python" and block.runs and not block.saved(""):
                lines += [""] * (block.line - 1 - len(lines)) + block.text.splitlines()
        return "\n".join([*lines, ""]) if lines else ""

    @property
    def commands(self) -> list[list[str]]:
        """The words after ``$ ostap-parallel``, of each command."""
        lines = [
            line
            for block in self.blocks
            if block.kind == "console" and block.runs
            for line in block.text.splitlines()
        ]
        words = [words_of(line) for line in lines if line.startswith("$ ")]
        return [command[1:] for command in words if command[0] == "ostap-parallel"]


def words_of(line: str) -> list[str]:
    """Return the words of a command after its prompt, without what it is redirected to."""
    return shlex.split(line[2:].partition(" > ")[0], comments=True)


def read_chapters(document: str) -> Iterator[Chapter]:
    text = (ROOT / document).read_text()
    starts = [(found.start(), found[1]) for found in _CHAPTER.finditer(text) if found[1]]
    ends = [start for start, _ in starts[1:]] + [len(text)]
    chapters: list[Chapter] = []
    for (start, title), end in zip(starts, ends, strict=True):
        blocks = tuple(
            Block(
                found["kind"],
                found["text"],
                found["note"] or "",
                text.count("\n", 0, found.start("text")) + 1,
            )
            for found in _BLOCK.finditer(text, start, end)
        )
        if blocks and blocks[0].note == "continued":
            before = chapters.pop()
            chapters.append(replace(before, blocks=before.blocks + blocks))
        elif any(block.kind != "text" for block in blocks):
            chapters.append(Chapter(document, title, blocks))
    yield from chapters


GUIDE = "PARALELL.md"
PAGES = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
DOCUMENTS = ["README.md", GUIDE, *PAGES]
CHAPTERS = [chapter for document in DOCUMENTS for chapter in read_chapters(document)]
MANUAL = "".join((ROOT / document).read_text() for document in [GUIDE, *PAGES])


@pytest.fixture
def home(hosts: Hosts, tmp_path: Path) -> Path:
    """A home directory whose settings lead ssh to the private hosts by the manual's names."""
    own = "".join(
        f"Host {name}\n  HostName {host.address}\n  Port {host.port}\n"
        for name, host in zip(NAMES, hosts, strict=True)
    )
    ssh_config = tmp_path / "ssh_config"
    ssh_config.write_text(own + hosts.ssh_config.read_text())
    home = tmp_path / "home"
    home.mkdir()
    (home / ".ostaprc").write_text(f"[Parallel]\nssh_options = -F {ssh_config}\n")
    return home


@contextmanager
def saved_files(chapter: Chapter, home: Path, hosts: Hosts) -> Iterator[None]:
    """Write the files that a chapter shows."""
    with ExitStack() as stack:
        for block in chapter.blocks:
            if name := block.saved(""):
                with (home / name).open("a") as file:
                    file.write(block.text)
            if name := block.saved("on the hosts "):
                for host in hosts:
                    (host.home / name).write_text(block.text)
                    stack.callback((host.home / name).unlink)
        yield


def run(argv: list[str], home: Path, **exports: str) -> None:
    done = subprocess.run(
        argv,
        cwd=home,
        env=environment(home) | exports,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, f"{shlex.join(argv)}:\n{done.stdout}\n{done.stderr}"


def environment(home: Path) -> dict[str, str]:
    kept = {name: text for name, text in os.environ.items() if not name.startswith("OSTAP_")}
    return kept | {"HOME": str(home), "PYTHONPATH": str(ROOT)}


def ostap_parallel_argv(words: list[str]) -> list[str]:
    return [sys.executable, "-m", "ostap_parallel", *words]


@contextmanager
def launched(words: list[str], home: Path) -> Iterator[dict[str, str]]:
    """Run ``ostap-parallel launch`` while the block runs; yield what it tells to export."""
    with subprocess.Popen(
        ostap_parallel_argv(words),
        cwd=home,
        env=environment(home),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            lines = [_EXPORT.fullmatch(process.stdout.readline().strip()) for _ in range(2)]
            yield {found[1]: shlex.split(found[2])[0] for found in lines if found}
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0


@pytest.mark.slow
@pytest.mark.parametrize("chapter", CHAPTERS, ids=str)
def test_chapter(chapter: Chapter, home: Path, hosts: Hosts) -> None:
    with saved_files(chapter, home, hosts), ExitStack() as stack:
        exports: dict[str, str] = {}
        for words in chapter.commands:
            if words[0] == "launch":
                exports |= stack.enter_context(launched(words, home))
            else:
                run(ostap_parallel_argv(words), home)
        if chapter.script:
            (home / "chapter.py").write_text(chapter.script)
            run([sys.executable, "chapter.py"], home, **exports)


def blocks(kind: str) -> list[object]:
    return [
        pytest.param(block, id=f"{chapter.document}:{block.line}")
        for chapter in CHAPTERS
        for block in chapter.blocks
        if block.kind == kind
    ]


@pytest.mark.parametrize("block", blocks("ini"))
def test_configuration_parses(block: Block, tmp_path: Path) -> None:
    for script in re.findall(r"^script = (.+)$", block.text, re.MULTILINE):
        (tmp_path / script).touch()
    file = tmp_path / "ostaprc"
    file.write_text(block.text)
    settings = load_settings(NAMES, config=file, environ={"HOME": str(tmp_path)})
    assert settings.sections
    assert settings.files == (file,)


@pytest.mark.parametrize("block", blocks("python"))
def test_python_compiles(block: Block) -> None:
    compile(block.text, "block", "exec")


@pytest.mark.parametrize("block", blocks("console"))
def test_commands_exist(block: Block) -> None:
    for line in block.text.splitlines():
        words = words_of(line) if line.startswith("$ ") else [""]
        if words[0].startswith("scripts/"):
            assert os.access(ROOT / words[0], os.X_OK)
        elif words[0] == "ostap-parallel":
            _parser().parse_args(words[1:])


def is_named(name: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(name)}(?!\w)", MANUAL) is not None


def test_manual_names_everything_public() -> None:
    manager = ostap_parallel.WorkManager
    methods = [name for name in vars(manager) if not name.startswith("_")]
    attributes = [
        *vars(ostap_parallel.Task),
        *ostap_parallel.Report.__dataclass_fields__,
        *ostap_parallel.Failure.__dataclass_fields__,
    ]
    parameters = [
        name
        for function in (ostap_parallel.Executor, manager, manager.process, manager.iexecute)
        for name in inspect.signature(function).parameters
        if name != "self"
    ]
    public = [name for name in attributes if not name.startswith("_")]
    settings = get_type_hints(Settings)  # what the faces pass on
    wanted = {*ostap_parallel.__all__, *methods, *public, *parameters, *settings, *KEYS}
    assert not sorted(name for name in wanted if not is_named(name))


def is_ours(kind: object) -> bool:
    return inspect.isclass(kind) and kind.__module__ == errors.__name__


def test_pages_name_what_is_theirs() -> None:
    manager = ostap_parallel.WorkManager
    settings = [*get_type_hints(Settings), *inspect.signature(manager).parameters]
    of_runs = [
        name
        for function in (manager.process, manager.iexecute)
        for name in inspect.signature(function).parameters
    ]
    left_out = {"self", "settings", "task", "func", "items", "timeout"}
    wanted = {
        "docs/manager.md": {*settings, *of_runs} - left_out,
        "docs/errors.md": set(ostap_parallel.Failure.__dataclass_fields__),
        "docs/configuration.md": set(KEYS),
    }
    wanted["docs/errors.md"] |= {
        name for name, kind in vars(errors).items() if name[0] != "_" and is_ours(kind)
    } - {"RemoteTraceback"}
    for page, names in wanted.items():
        text = (ROOT / page).read_text()
        assert not sorted(name for name in names if f"`{name}`" not in text), page


def test_manual_names_every_command_and_option() -> None:
    commands = next(
        action.choices
        for action in _parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    options = {
        option
        for command in commands.values()
        for action in command._actions
        if action.help != argparse.SUPPRESS
        for option in action.option_strings
        if option.startswith("--") and option != "--help"
    }
    assert not sorted(name for name in {*commands, *options} if not is_named(name))


def anchors(path: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub and Sphinx make them."""
    titles = [found[1] for found in _HEADING.finditer(path.read_text()) if found[1]]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", [*DOCUMENTS, "SECURITY.md", "CONTRIBUTING.md", "CHANGES.md"])
def test_links_lead_somewhere(document: str) -> None:
    here = ROOT / document
    for target in _LINK.findall(here.read_text()):
        file, _, anchor = target.partition("#")
        if "://" in target:
            continue
        path = here.parent / file if file else here
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def test_messages_name_chapters_that_are_there() -> None:
    texts = {path: path.read_text() for path in (ROOT / "ostap_parallel").rglob("*.py")}
    named = {name for text in texts.values() for name in re.findall(r"\bsee\([\"'](\w+)", text)}
    assert named == set(CHAPTERS_NAMED)
    assert named.isdisjoint(Path(page).stem for page in PAGES)
    for name, target in CHAPTERS_NAMED.items():
        file, _, anchor = target.partition("#")
        assert anchor in anchors(ROOT / "docs" / file), name
        assert text_of(name).startswith("#"), name
        assert text_of(target) == text_of(name)


def test_pages_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    for page in PAGES:
        assert main(["help", Path(page).stem]) == 0
        assert capsys.readouterr().out.rstrip() == (ROOT / page).read_text().rstrip()
    assert main(["help", "configuration#keys"]) == 0
    text = (ROOT / "docs/configuration.md").read_text()
    shown = capsys.readouterr().out.rstrip()
    assert shown.startswith("## Keys\n")
    assert shown in text
    assert "\n## " not in shown
    assert main(["help"]) == 0
    shown = capsys.readouterr().out
    assert "| hosts | Hosts |" in shown
    for wrong in "nothing", "../../README", "hosts#nothing":
        assert main(["help", wrong]) == 2
        assert "; there are:" in capsys.readouterr().err


def test_headings_of_a_document_differ() -> None:
    for document in DOCUMENTS:
        titles = [found[1] for found in _HEADING.finditer((ROOT / document).read_text())]
        titles = [title for title in titles if title]
        assert len(anchors(ROOT / document)) == len(titles), document


def test_each_page_is_in_the_navigation() -> None:
    text = (ROOT / "docs/index.md").read_text()
    trees = re.findall(r"^```{toctree}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    named = [line for tree in trees for line in tree.splitlines() if line and line[0] != ":"]
    pages = [Path(page).stem for page in PAGES if page != "docs/index.md"]
    of_docs = [name for name in named if not name.startswith("../")]
    assert sorted(of_docs) == sorted(pages), "docs/index.md names each page, in table and toctree"
    linked = {target.partition("#")[0] for target in _LINK.findall(text)}
    assert {f"{page}.md" for page in pages} <= linked


def test_the_guide_is_short() -> None:
    assert len((ROOT / GUIDE).read_text().splitlines()) <= 500


def test_chapters_of_the_guide_end_where_the_reference_is() -> None:
    text = (ROOT / GUIDE).read_text()
    starts = [found.start() for found in _CHAPTER.finditer(text) if found[1]]
    for start, end in zip(starts[1:], [*starts[2:], len(text)], strict=True):
        last = text[start:end].strip().split("\n\n")[-1]
        assert "](docs/" in last, text[start:end].splitlines()[0]


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 130
