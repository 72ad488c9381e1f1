"""What `pip install` brings: a wheel is made of the sources, and looked into."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from datetime import date
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

from ostap_parallel import __version__

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ostap_parallel"


def pip(*words: object) -> None:
    command = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *map(str, words)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, made of a copy, as setuptools leaves files where it builds."""
    copy = tmp_path_factory.mktemp("sources")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("ostap_parallel", "scripts", "tests", "docs", "benchmarks", "examples"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored, symlinks=True)
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", folder, copy)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as file:
        return Parser().parsestr(file.read(f"{info()}/METADATA").decode())


def info() -> str:
    return f"ostap_parallel-{__version__}.dist-info"


def test_the_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if not name.startswith(info())}
    kinds = {".py", ".bash", ".typed"}
    sources = [path for path in PACKAGE.rglob("*") if path.suffix in kinds]
    wanted = {path.relative_to(ROOT).as_posix() for path in sources}
    wanted |= {f"ostap_parallel/manual/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    data = f"ostap_parallel-{__version__}.data/scripts/pplaunch"
    assert names == wanted | {data}
    assert {"ostap_parallel/py.typed", "ostap_parallel/supply/remote.bash"} <= names


def test_each_directory_of_sources_is_a_package() -> None:
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]


def test_metadata(metadata: Message) -> None:
    assert metadata["Version"] == __version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License"] == "BSD-3-Clause"
    extras = metadata.get_all("Provides-Extra")
    assert extras
    assert {"test", "docs", "completion"} <= set(extras)
    needed = [line for line in metadata.get_all("Requires-Dist") or [] if "extra ==" not in line]
    names = sorted(re.split(r"[ (<>=~]", line)[0] for line in needed)
    assert names == ["cloudpickle", "dill", "multiprocess", "pathos", "pox", "ppft", "rich"]
    classifiers = metadata.get_all("Classifier") or []
    assert "Typing :: Typed" in classifiers
    assert "Operating System :: POSIX :: Linux" in classifiers


@pytest.mark.slow
def test_installed_it_is_a_command(wheel: Path, tmp_path: Path) -> None:
    pip("install", "--no-deps", "--no-index", "--target", tmp_path, wheel)
    entries = ConfigParser()
    entries.read(tmp_path / info() / "entry_points.txt")
    assert dict(entries["console_scripts"]) == {"ostap-parallel": "ostap_parallel.cli:main"}
    help_ = ["ostap-parallel", "help", "keys"]
    told = (["ostap-parallel", "--version"], __version__), (["pplaunch", "-h"], "SER")
    for words, said in *told, (help_, "## Keys"):
        command = [str(tmp_path / "bin" / words[0]), *words[1:]]
        env = os.environ | {"PYTHONPATH": str(tmp_path)}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert said in done.stdout


def test_the_version_stands_in_one_place() -> None:
    assert "version" not in re.findall(r"^(\w+) = ", project_table(), re.MULTILINE)


def project_table() -> str:
    text = (ROOT / "pyproject.toml").read_text()
    return text.partition("[project]")[2].partition("\n[")[0]


def test_changes_are_told_by_release() -> None:
    text = (ROOT / "CHANGES.md").read_text()
    releases = re.findall(r"^## (\S+) \((\S+)\)$", text, re.MULTILINE)
    assert len(releases) == text.count("\n## ")
    assert releases[0][0] == __version__
    dates = [date.fromisoformat(day) for _, day in releases]
    assert dates == sorted(dates, reverse=True)
