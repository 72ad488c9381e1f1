"""The command sync-dirs, with whatever names files have."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from ostap_parallel import cli
from ostap_parallel.cli.sync_dirs import default_command

NAMES = ["plain", "with space", "new\nline", "-rf", "host:name", "'quoted\"", "$HOME *", "ü"]


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "from"
    for number, name in enumerate(NAMES):
        below = folder / f"{name}-dir"
        below.mkdir(parents=True)
        for file in (folder / name, below / name):
            file.write_text(f"{number} {file.parent.name}")
            os.utime(file, (1e9, 1e9 + number))
    (folder / "empty").mkdir()
    (folder / "link").symlink_to("plain")
    (folder / "to-dir").symlink_to("plain-dir")
    return folder


def contents(folder):
    found = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        if file.is_symlink():
            found[name] = str(file.readlink())
        else:
            found[name] = (file.read_text(), file.stat().st_mtime) if file.is_file() else None
    return found


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["1", "4"])
def test_all_that_is_there_is_copied(source, tmp_path, parallel, capsys):
    target = tmp_path / "new" / "to"
    argv = ["sync-dirs", "--parallel", parallel, str(source), str(target)]
    for _ in range(2):  # again, over what is there
        assert cli.main(argv) == 0
        assert contents(target) == contents(source)
    assert capsys.readouterr() == ("", "")
    assert cli.main([*argv[:1], "--verbose", *argv[1:]]) == 0
    printed = capsys.readouterr().out
    assert all(str(target / name) in printed for name in NAMES)


@pytest.mark.slow
def test_a_command_of_yours(source, tmp_path):
    program = tmp_path / "program"
    program.write_text(f"#!{sys.executable}\nimport shutil, sys\nshutil.copyfile(*sys.argv[2:])\n")
    program.chmod(0o700)
    target = tmp_path / "to"
    (source / "to-dir").unlink()
    assert cli.main(["sync-dirs", "-c", f"'{program}' -x", str(source), str(target)]) == 0
    assert (target / "with space").read_text() == (source / "with space").read_text()


def test_rsync_where_there_is_one(source, tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    cp = shutil.which("cp")
    (folder / "rsync").write_text(f'#!/bin/sh\n[ "$1" = -a ] && shift && exec {cp} -pP "$@"\n')
    monkeypatch.setenv("PATH", str(folder))
    assert default_command() == ["cp", "-pP"]
    (folder / "rsync").chmod(0o700)
    assert default_command() == ["rsync", "-a"]
    assert cli.main(["sync-dirs", str(source), str(tmp_path / "to")]) == 0
    assert contents(tmp_path / "to") == contents(source)


def test_what_fails_is_told_and_the_rest_goes_on(source, tmp_path, capsys):
    program = tmp_path / "program"
    program.write_text(
        '#!/bin/sh\ncase "$1" in *space) echo no space >&2; exit 3;; esac\nexec cp -pP "$@"\n'
    )
    program.chmod(0o700)
    target = tmp_path / "to"
    assert cli.main(["sync-dirs", "--command", str(program), str(source), str(target)]) == 1
    assert capsys.readouterr().err.count("with space: no space\n") == 2
    assert (target / "plain").exists()
    assert not (target / "with space").exists()


@pytest.mark.parametrize("target", [".", "below", "with space-dir/x"])
def test_a_directory_within_itself(source, target, capsys):
    assert cli.main(["sync-dirs", str(source), str(source / target)]) == 2
    assert "is in" in capsys.readouterr().err


def test_no_directory(tmp_path, capsys):
    assert cli.main(["sync-dirs", str(tmp_path / "none"), str(tmp_path / "to")]) == 2
    assert "not a directory" in capsys.readouterr().err
    assert not Path(tmp_path / "to").exists()
