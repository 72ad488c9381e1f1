"""The user's own modules get to hosts, once for each content; what has changed is noticed."""

from __future__ import annotations

import _json
import importlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import functions
import pytest
from helpers import importable, open_manager, wait_until
from sshd import HostOptions

from ostap_parallel import ConfigError, Executor, WorkManager, cli
from ostap_parallel.config import load_settings
from ostap_parallel.supply import syncing
from ostap_parallel.supply.syncing import Modules, find_sources
from ostap_parallel.worker.modules import Unpacked

pytestmark = pytest.mark.slow

PATIENCE = 60


def write(directory: Path, **texts: str) -> Path:
    """Write modules; ``a__b`` is a module b of a package a."""
    for name, text in texts.items():
        file = directory.joinpath(*name.split("__")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.parent != directory:
            (file.parent / "__init__.py").touch()
        file.write_text(text)
    return directory


def everywhere(manager, name):
    """Return what each worker has for a module: (version, directory) by host."""
    count = 40 * sum(manager.workers.values())
    found = set()
    for batch in manager.iexecute(functions.version_of, [name] * count, chunk_size=1):
        found.add(batch)
    return found


@pytest.fixture
def sent(monkeypatch):
    """The hosts that modules were sent to."""
    found, pieces = [], syncing.Archive.pieces

    def watch(self, size):
        for number, piece in enumerate(pieces(self, size)):
            if not number:
                found.append(self.digest)
            yield piece

    monkeypatch.setattr(syncing.Archive, "pieces", watch)
    return found


@pytest.fixture
def lib(tmp_path, monkeypatch):
    """A directory that is on the path here; what was imported from it is forgotten."""
    lib = tmp_path / "my modules é"
    lib.mkdir()
    monkeypatch.syspath_prepend(lib)
    before = set(sys.modules)
    yield lib
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture
def wm(hosts, lib):
    """A manager of a local worker and two hosts that have what is in `lib`."""
    write(lib, op_one="VERSION = 1", op_lib__deep="VERSION = 1")
    given = {"environment": importable(hosts), "sync": lib}
    with open_manager(hosts, "h1*2 h2*1", 1, **given) as manager:
        assert manager.wait_for_hosts(PATIENCE)
        yield manager


def test_each_kind_of_source(hosts, lib, tmp_path, sent):
    write(lib, op_module="VERSION = 1", op_pack__inner="VERSION = 2")
    write(tmp_path / "a", op_part__b="VERSION = 3", op_file="VERSION = 4")
    write(tmp_path / "b", op_loose="VERSION = 5")
    sync = [
        importlib.import_module("op_module"),
        importlib.import_module("op_pack.inner"),
        tmp_path / "a" / "op_part" / "b.py",  # stands for the whole package
        str(tmp_path / "a" / "op_file.py"),
        tmp_path / "b",
    ]
    wanted = {"op_module": 1, "op_pack.inner": 2, "op_part.b": 3, "op_file": 4, "op_loose": 5}
    given = {"environment": importable(hosts), "sync": sync}
    with open_manager(hosts, "h1*2", 1, **given) as manager:
        assert manager.wait_for_hosts(PATIENCE)
        for name, version in wanted.items():
            found = everywhere(manager, name)
            assert {found_version for found_version, _ in found} == {version}
            there = [place for _, place in found if place.startswith("/tmp/ostap-parallel.")]
            assert (len(found), len(there)) == (2, 1)
        assert len(sent) == 1


def test_a_change_is_noticed_in_the_next_run(wm, hosts, lib, sent):
    def versions(name):
        return {version for version, _ in everywhere(wm, name)}

    assert versions("op_one") == versions("op_lib.deep") == {1}
    write(lib, op_one="VERSION = 2")  # as long as before, and maybe in the same second
    assert versions("op_one") == {2}
    assert versions("op_lib.deep") == {1}
    assert len(sent) == 4
    (lib / "op_one.py").touch()
    assert versions("op_one") == {2}
    assert len(sent) == 4
    write(lib, op_lib__deep="VERSION = 3", op_new="VERSION = 4")
    assert {wm.executor.submit(functions.version_of, "op_new").result()[0] for _ in "abc"} == {4}
    assert versions("op_lib.deep") == {3}
    shutil.rmtree(lib / "op_lib")
    with pytest.raises(ModuleNotFoundError) as kept_error:
        everywhere(wm, "op_lib.deep")
    assert kept_error.value.__traceback__ is not None  # holds what the run was made of
    write(lib, op_lib__deep="VERSION = 1")
    assert versions("op_lib.deep") == {1}

    def kept():
        # a worker that has had no item since keeps what it has used
        wm.process(functions.version_of_slowly, ["op_lib.deep"] * 12, chunk_size=1)
        return [sorted(host.tmp.glob("ostap-parallel.*/sync-*")) for host in hosts]

    try:  # what nobody needs any more is removed
        wait_until(lambda: list(map(len, kept())) == [1, 1], PATIENCE, "one directory each")
    except AssertionError:
        raise AssertionError(kept(), wm.executor.hosts) from None


def test_the_next_map_of_an_executor_notices_a_change(lib):
    write(lib, op_one="VERSION = 1\ndef version(x): return VERSION")
    version = importlib.import_module("op_one").version
    with Executor(1, sync=lib) as executor:
        assert list(executor.map(version, range(3))) == [1, 1, 1]
        write(lib, op_one="VERSION = 2\ndef version(x): return VERSION")
        assert list(executor.map(version, range(3))) == [2, 2, 2]


def test_a_run_keeps_what_it_began_with(wm, lib):
    def versions():
        for version, _ in wm.iexecute(functions.version_of, ["op_one"] * 60, chunk_size=1):
            yield version

    old = versions()
    assert next(old) == 1
    write(lib, op_one="VERSION = 2")
    assert set(versions()) == {2}
    assert 1 in set(old)  # on hosts; there are no old files here


def test_modules_find_what_is_beside_them(wm, lib):
    text = "import pathlib\nVERSION = (pathlib.Path(__file__).parent / 'data é.txt').read_text()"
    write(lib, op_data=text)
    (lib / "data é.txt").write_text("one")
    compiled = lib / "op_lib" / Path(_json.__file__).name
    shutil.copy(_json.__file__, compiled)
    assert {version for version, _ in everywhere(wm, "op_data")} == {"one"}
    (lib / "data é.txt").write_text("two")
    assert {version for version, _ in everywhere(wm, "op_data")} == {"two"}

    def file_of_compiled(item):
        return importlib.import_module("op_lib._json").__file__

    found = set(wm.process(file_of_compiled, range(100), chunk_size=1))
    assert len(found) == 3
    assert {Path(file).name for file in found} == {compiled.name}


def test_a_missing_module_is_explained(hosts, lib, tmp_path):
    write(lib, op_unknown="")

    def use(item):
        import op_unknown

        return op_unknown

    def told(error):
        return "name it in sync=" in f"{error} {getattr(error, '__notes__', '')}"

    with open_manager(hosts, "h1*1", sync=write(tmp_path / "other", op_other="")) as manager:
        with pytest.raises(ModuleNotFoundError) as caught:
            manager.process(use, [1])
        assert told(caught.value)
        with pytest.raises(ModuleNotFoundError) as caught:
            manager.executor.submit(use, 1).result()
        assert told(caught.value)


def test_servers_that_run_already_keep_clients_apart(one_host, lib, monkeypatch):
    command = [sys.executable, "-m", "ostap_parallel", "launch", "h1*2"]
    command += ["--ssh-config", str(one_host.ssh_config)]
    write(lib, op_one="VERSION = 1")

    def version(item):
        import op_one

        return op_one.VERSION

    how = {"cwd": functions.PROJECT, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **how) as launched:
        exports = [launched.stdout.readline().partition("=")[2].strip() for _ in "ab"]
        servers, secret = (shlex.split(text)[0] for text in exports)
        monkeypatch.setenv("OSTAP_PPSECRET_FILE", secret)
        with (
            WorkManager(0, servers, sync=lib, silent=True) as mine,
            WorkManager(0, servers, silent=True) as other,
        ):
            for wanted in 1, 2:
                write(lib, op_one=f"VERSION = {wanted}")
                assert set(mine.process(version, range(20), chunk_size=1)) == {wanted}
                with pytest.raises(ModuleNotFoundError):
                    other.process(version, range(20), chunk_size=1)
        launched.send_signal(signal.SIGINT)


def test_a_host_without_room(make_hosts, lib):
    hosts = make_hosts(each=[HostOptions(tmp_size="12M"), HostOptions()])
    write(lib, op_one="VERSION = 1")
    (lib / "noise").write_bytes(os.urandom(12 << 20))
    given = {"environment": importable(hosts), "sync": lib}
    with open_manager(hosts, **given) as manager:
        assert manager.wait_for_hosts(PATIENCE)
        assert {version for version, _ in everywhere(manager, "op_one")} == {1}
        bad, good = manager.report.hosts
        assert (bad.state, good.state) == ("failed", "up")
        assert "No space left on device" in bad.error.reason


def names(modules):
    return sorted(found.name for found in modules._find())


def test_what_is_left_out(tmp_path):
    lib = write(tmp_path / "lib", a="", p__b="", build__c="", p__build="")
    write(lib / "dist", no="")
    write(lib / ".git", no="")
    write(lib / "__pycache__", no="")
    write(lib / "my.egg-info", no="")
    write(lib / "environment", no="")
    (lib / "environment" / "pyvenv.cfg").touch()
    (lib / ".hidden.py").touch()
    os.mkfifo(lib / "pipe")
    wanted = ["a.py", "build/__init__.py", "build/c.py", "p/__init__.py", "p/b.py", "p/build.py"]
    assert names(Modules(find_sources(lib))) == wanted


def test_links_modes_and_names_arrive(tmp_path):
    lib = write(tmp_path / "lib", a="A")
    write(tmp_path / "elsewhere", b="B")
    (lib / "linked").symlink_to(tmp_path / "elsewhere")
    (lib / "file.py").symlink_to("a.py")
    (lib / "linked" / "back").symlink_to(lib)
    (lib / "nowhere").symlink_to("gone")
    (lib / "run me.sh").touch(0o755)
    odd = os.fsdecode(b"odd\xff\n.txt")
    (lib / odd).write_text("odd")
    archive = Modules(find_sources(lib)).look()
    with Path(archive.location).open("rb") as file:
        file.seek(64)
        unpacked = Unpacked(file.read(), str(tmp_path))
    root = Path(unpacked.location, "0")
    found = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert found == {"a.py", "file.py", "linked/b.py", "run me.sh", odd}
    assert (root / "file.py").read_text() == "A"
    assert [os.access(root / name, os.X_OK) for name in ("run me.sh", "a.py")] == [True, False]
    del unpacked
    assert not root.exists()


def test_what_a_path_stands_for(tmp_path, monkeypatch):
    top = write(tmp_path, p__q__r="", p__q__s="")
    (top / "p" / "__init__.py").touch()
    (top / "p" / "plain").mkdir()

    def root_of(*parts):
        (source,) = find_sources(top.joinpath(*parts))
        return [path.relative_to(top).as_posix() for path in (source.path, source.root)]

    assert root_of("p", "q", "r.py") == root_of("p", "q") == root_of("p") == ["p", "."]
    assert root_of("p", "plain") == ["p/plain", "p/plain"]
    monkeypatch.syspath_prepend(top / "p" / "q")
    assert root_of("p", "q", "r.py") == ["p/q/r.py", "p/q"]


def test_only_content_counts(tmp_path):
    lib = write(tmp_path / "lib", a="A")
    bytecode = lib / "__pycache__" / f"a.{sys.implementation.cache_tag}.pyc"
    bytecode.parent.mkdir()
    os.utime(lib / "a.py", (1, 1))
    modules = Modules(find_sources(lib))
    first = modules.look()
    bytecode.touch()
    os.utime(lib / "a.py", (2, 2))
    assert modules.look() is first
    assert not bytecode.exists()  # Python might take it for that of another content
    shutil.copytree(lib, tmp_path / "copy")
    assert Modules(find_sources(tmp_path / "copy")).look().digest == first.digest
    (lib / "a.py").chmod(0o755)
    assert modules.look().digest != first.digest


def test_a_file_that_vanishes_while_it_is_read(tmp_path, monkeypatch):
    lib = write(tmp_path / "lib", a="A", b="B")
    read = syncing._Found.read

    def vanish(found):
        if found.name == "b.py":
            found.path.unlink()
        return read(found)

    monkeypatch.setattr(syncing._Found, "read", vanish)
    digest = Modules(find_sources(lib)).look().digest
    assert digest == Modules(find_sources(lib)).look().digest


@pytest.mark.parametrize(
    ("sync", "text"),
    [
        ("{lib}/gone", "no such file or directory: {lib}/gone"),
        (sys, "the module sys has no file"),
        ([3], "neither a path nor a module: 3"),
        ("{lib}/large", "the largest in it are big.root (3.0 MiB), data (2.0 MiB), a.py"),
    ],
)
def test_what_cannot_be_sent(tmp_path, monkeypatch, sync, text):
    large = write(tmp_path / "large", a="A")
    write(large / "data", x="").joinpath("x.dat").write_bytes(bytes(2 << 20))
    (large / "big.root").write_bytes(bytes(3 << 20))
    monkeypatch.setattr(syncing, "MAX_BYTES", 4 << 20)
    sync = sync.format(lib=tmp_path) if isinstance(sync, str) else sync
    with pytest.raises(ConfigError, match=re.escape(text.format(lib=tmp_path))):
        Executor(1, sync=sync)


def test_a_directory_that_vanishes(tmp_path):
    lib = write(tmp_path / "lib", a="A")
    with WorkManager(1, silent=True, sync=lib) as manager:
        shutil.rmtree(lib)
        with pytest.raises(ConfigError, match="no such file or directory any more"):
            manager.process(abs, [1])


def test_the_configuration_names_them(tmp_path, capsys):
    (tmp_path / "conf").write_text("[Parallel]\nsync = 'my lib' /other\n[Parallel:x]\nuser=me\n")
    assert load_settings("h", config=tmp_path / "conf").sync == (
        tmp_path / "my lib",
        Path("/other"),
    )
    assert cli.main(["config", "--config", str(tmp_path / "conf"), "h"]) == 0
    assert f"hosts get:\n  {tmp_path}/my lib\n  /other\n" in capsys.readouterr().out
    (tmp_path / "conf").write_text("[Parallel:x]\nsync = lib\n")
    with pytest.raises(ConfigError, match="sync: it belongs into"):
        load_settings("h", config=tmp_path / "conf")
