"""What the command line tells of itself: examples that hold, and completion in the shell."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ostap_parallel.cli import _parser
from ostap_parallel.cli.examples import EXAMPLES

ROOT = Path(__file__).parents[1]


def commands() -> dict[str, argparse.ArgumentParser]:
    actions = _parser()._actions
    (found,) = [each for each in actions if isinstance(each, argparse._SubParsersAction)]
    return dict(found.choices)


def lines(name: str) -> list[str]:
    return EXAMPLES[name].strip().splitlines()


def test_each_command_has_an_example() -> None:
    assert set(EXAMPLES) == {"", *commands()}


@pytest.mark.parametrize("name", EXAMPLES)
def test_help_shows_the_examples(name: str) -> None:
    text = (commands()[name] if name else _parser()).format_help()
    shown = text.partition("examples:\n")[2].splitlines()
    assert [line.strip() for line in shown] == [line.strip() for line in lines(name)]


@pytest.mark.parametrize("line", [line for name in EXAMPLES for line in lines(name)])
def test_the_examples_can_be_parsed(line: str) -> None:
    parts = [shlex.split(part.split(" > ")[0], comments=True) for part in line.split(" | ")]
    ours = [words for words in parts if words[0] == "ostap-parallel"]
    assert ours or parts == [[".", "./servers.sh"]]
    for words in ours:
        assert callable(_parser().parse_args(words[1:]).run)


def test_who_reads_the_beginning_only_sees_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    argv = [sys.executable, "-m", "ostap_parallel", "help", "how-do-i"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(argv, stdout=writing, stderr=subprocess.PIPE, env=env, timeout=100)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def complete(line: str, folder: Path) -> list[str]:
    """Return what the shell is told when Tab is pressed behind a line."""
    answer = folder / "answer"
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
    }
    command = [sys.executable, "-m", "ostap_parallel"]
    subprocess.run(command, cwd=folder, env=env, timeout=60, check=True)
    return sorted(word.strip() for word in answer.read_text().split("\n") if word.strip())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("ostap-parallel ho", ["hosts"]),
        ("ostap-parallel do --resu", ["--results", "--resume", "--resume-failed"]),
        ("ostap-parallel run --hosts h1 h2*4 --tm", ["--tmpdir"]),
        ("ostap-parallel run -n 2 fi", ["fit.py"]),
        ("ostap-parallel hosts --script fi", ["fit.py"]),
    ],
)
def test_completion(line: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "fit.py").touch()
    assert complete(line, tmp_path) == words


@pytest.mark.parametrize("name", ["cli/__init__.py", "__main__.py"])
def test_what_argcomplete_looks_for(name: str) -> None:
    text = (ROOT / "ostap_parallel" / name).read_text()
    assert "PYTHON_ARGCOMPLETE_OK" in text[:1024]
