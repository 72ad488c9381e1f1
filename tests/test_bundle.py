"""The bundle holds what a host needs, and runs wherever python3 is."""

from __future__ import annotations

import json
import os
import py_compile
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import MAGIC_NUMBER
from pathlib import Path
from types import ModuleType

import dill
import ppft
import pytest

from ostap_parallel.machine.serve import MARK
from ostap_parallel.supply.bundle import NAME, bundle

VERSION = sys.version_info[:2]


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The bundle as it is on a host."""
    return put(bundle(VERSION), tmp_path_factory.mktemp("bundle"))


def put(data, folder):
    """Do what a host does."""
    (folder / NAME).write_bytes(data)
    return folder / NAME


def start(archive, *arguments, directory):
    """Start the bundle under a bare interpreter: no environment, no site-packages."""
    base = getattr(sys, "_base_executable", sys.executable)
    return subprocess.Popen(
        [base, "-S", "-E", str(archive), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=directory,
        env={"PATH": os.defpath},
        text=True,
    )


def test_it_holds_the_packages_and_no_more(archive):
    with zipfile.ZipFile(archive) as content:
        names = set(content.namelist())
    top = {name.partition("/")[0] for name in names}
    assert top == {"__main__.py", "ostap_parallel", "ppft", "cloudpickle", "dill"}
    for part in "tests", "test":
        assert [name for name in names if f"/{part}/" in name] == []
    for module in ostap_modules():
        assert {f"ostap_parallel/{module}", f"ostap_parallel/{module}c"} <= names


def ostap_modules():
    root = Path(sys.modules["ostap_parallel"].__file__).parent
    return [path.relative_to(root).as_posix() for path in root.rglob("*.py")]


def test_it_is_made_once_for_hosts_that_start_together():
    version = (3, 99)  # which no other test asks for
    with ThreadPoolExecutor(8) as threads:
        bundles = list(threads.map(bundle, [version] * 8))
    assert all(one is bundles[0] for one in bundles)


def test_it_serves_without_any_installed_package(archive, tmp_path):
    private = tmp_path / "private"
    private.mkdir()
    (private / "file").touch()
    with start(archive, "refuse", directory=tmp_path) as process:
        settings = {"ncpus": 2, "directory": str(private), "timeout": 60}
        process.stdin.write(json.dumps(settings) + "\n")
        process.stdin.flush()
        assert process.stdout.readline() == f"{MARK}step server\n", process.stderr.read()
        line = process.stdout.readline()
        assert line.startswith(MARK), process.stderr.read()
        event = json.loads(line.removeprefix(MARK))
        assert event["kind"] == "ready"
        assert (event["ncpus"], event["pid"]) == (2, process.pid)
        assert event["ppft"] == ppft.__version__
        process.stdin.write('{"do": "ping", "id": 5}\n')
        process.stdin.flush()
        answer = json.loads(process.stdout.readline().removeprefix(MARK))
        assert answer == {"kind": "done", "id": 5}
        process.stdin.close()
        assert process.wait(60) == 0
    assert not private.exists()


def test_packages_come_from_the_bundle(archive):
    base = getattr(sys, "_base_executable", sys.executable)
    code = (
        f"import sys; sys.path.insert(0, {str(archive)!r})\n"
        "import dill, ppft, ostap_parallel.machine.serve, ostap_parallel.worker.process\n"
        "from ostap_parallel import IS_ORIGIN, futures, shared, logger\n"  # as tasks do
        "print(dill.__file__, dill.__version__, ppft.__file__, ppft.__version__, sep='\\n')"
    )
    done = subprocess.run([base, "-I", "-S", "-c", code], capture_output=True, text=True)
    dill_file, dill_version, ppft_file, ppft_version = done.stdout.splitlines()
    assert dill_file.startswith(str(archive))
    assert ppft_file.startswith(str(archive))
    assert (dill_version, ppft_version) == (dill.__version__, ppft.__version__)


def test_modules_are_compiled_for_this_version(archive):
    with zipfile.ZipFile(archive) as content:
        assert content.read("ostap_parallel/machine/serve.pyc")[:4] == MAGIC_NUMBER


def test_what_is_compiled_already_is_not_compiled_again(tmp_path, monkeypatch):
    package = ModuleType("package")
    package.__path__ = [str(tmp_path / "package")]
    source = tmp_path / "package/__init__.py"
    source.parent.mkdir()
    source.write_text("VALUE = 1\n")
    when = source.stat().st_mtime_ns
    py_compile.compile(str(source))
    source.write_text("VALUE = 2\n")
    os.utime(source, ns=(when, when))  # it looks as it did, so what was compiled is good
    monkeypatch.setattr("ostap_parallel.supply.bundle._PACKAGES", [package])
    there = tmp_path / "there"
    there.mkdir()
    folder = put(bundle((3, 97)), there)
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); import package; print(package.VALUE)"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("1\n", "")


def test_a_python_of_another_minor_version_refuses(tmp_path):
    other = VERSION[0], VERSION[1] + 1
    path = put(bundle(other), tmp_path)
    with start(path, "refuse", directory=tmp_path) as process:
        _, words = process.communicate('{"ncpus": 1}\n', timeout=60)
    assert process.returncode != 0
    assert f"is Python {VERSION[0]}.{VERSION[1]}, but the caller runs" in words
    assert f"the caller runs Python {other[0]}.{other[1]}" in words
    assert "python_mismatch = allow" in words


def test_a_client_that_says_nothing_is_no_error(archive, tmp_path):
    with start(archive, "refuse", directory=tmp_path) as process:
        _, words = process.communicate("", timeout=60)
    assert process.returncode == 1
    assert words == ""
