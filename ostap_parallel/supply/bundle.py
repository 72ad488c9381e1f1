"""What a bare host is sent: an archive that makes python3, bash and tar enough.

It holds this package, dill and ppft: as source and, for interpreters of our own minor version,
compiled, so that a host does not compile them. It stays an archive there: to unpack it takes
longer than a server and its workers do to start, who import from it once for all.
"""

from __future__ import annotations

import functools
import io
import marshal
import threading
import zipfile
from importlib.machinery import SourceFileLoader
from importlib.util import MAGIC_NUMBER, source_hash
from pathlib import Path

import cloudpickle
import dill
import ppft

import ostap_parallel
from ostap_parallel.machine.serve import MARK

_PACKAGES = (ostap_parallel, ppft, cloudpickle, dill)

NAME = "ppserver"  # of the file there, by which a host's list of processes names it

LEVEL = 1  # of compression: a host waits for it

# Runs first, under whatever interpreter the host has: it must be understood by all of them.
_MAIN = """\
import os, re, subprocess, sys
wanted, have, mismatch = {version!r}, tuple(sys.version_info[:2]), sys.argv[1]
def listed(folder):
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []
def interpreters():
    versions = os.path.join(
        os.environ.get("PYENV_ROOT") or os.path.expanduser("~/.pyenv"), "versions")
    folders = [one for one in os.environ.get("PATH", "").split(":") if "/shims" not in one]
    folders += [os.path.join(versions, one, "bin") for one in listed(versions)]
    names = ["python3.%d" % minor for minor in range(10, 20)]
    paths = [os.path.join(folder, name) for folder in folders for name in names]
    return [path for path in paths if os.access(path, os.X_OK)]
def modules():
    # of environment modules: python/3.12.4 and the like, beneath the folders of MODULEPATH
    found = []
    for folder in os.environ.get("MODULEPATH", "").split(":"):
        for name in listed(folder):
            if name.lower() in ("python", "cpython", "python3"):
                versions = listed(os.path.join(folder, name))
                versions = [one for one in versions if re.match("3[.]1[0-9]", one)]
                found += [name + "/" + re.sub("[.]lua$", "", one) for one in versions]
    return found
if have < (3, 10) or (have != wanted and mismatch != "allow"):
    found, named = interpreters(), modules()
    good = [path for path in found if path.endswith("python%d.%d" % wanted)]
    fit = [one for one in named if re.match("[^/]*/%d[.]%d([.]|-|$)" % wanted, one)]
    hint = "none with a version in its name is on PATH there"
    if found:
        hint = "there are " + ", ".join(sorted(set(found), key=found.index))
    if named:
        hint += "; modules: " + ", ".join(named)
    if good:
        hint = "set python = " + good[0] + " (" + hint + ")"
    elif fit:
        hint = "add module load " + fit[0] + " to its environment (" + hint + ")"
    needs, more = "and 3.10 is the oldest that will do", ""
    if have >= (3, 10):
        needs = "but the caller runs Python %d.%d, whose functions it cannot run" % wanted
        more = " (With python_mismatch = allow it runs what it can import by name, and commands.)"
    sys.stderr.write("%s is Python %d.%d, %s: give the host another interpreter with "
        "python=...: %s.%s\\n" % ((sys.executable,) + have + (needs, hint, more)))
    sys.exit(1)
nice, required = sys.argv[2:] or ("0", "")
os.nice(int(nice))
required = required.split()
if required:
    sys.stdout.write("%sstep requires\\n" % {mark!r})
    sys.stdout.flush()
    script = "import importlib, sys; sys.path.insert(0, sys.argv[1]); "
    script += "[importlib.import_module(name) for name in sys.argv[2:]]"
    argv = [sys.executable, "-c", script, sys.path[0]] + required
    if subprocess.call(argv, stdin=subprocess.DEVNULL, stdout=2):
        sys.stderr.write("%s cannot import all of %s\\n" % (sys.executable, ", ".join(required)))
        sys.exit(1)
sys.stdout.write("%sstep server\\n" % {mark!r})
sys.stdout.flush()
from ostap_parallel.machine.serve import main
sys.exit(main())
"""


_making = threading.Lock()


def bundle(version: tuple[int, int]) -> bytes:
    """Return the archive (zip) for hosts of callers that run Python `version`."""
    with _making:  # hosts start at the same time, and a cache would make one for each of them
        return _make(version)


@functools.cache
def _make(version: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=LEVEL) as archive:
        archive.writestr("__main__.py", _MAIN.format(version=version, mark=MARK))
        for package in _PACKAGES:
            root = Path(package.__path__[0])
            for path in sorted(root.rglob("*.py")):
                if "tests" in path.relative_to(root).parts:
                    continue
                name = f"{package.__name__}/{path.relative_to(root).as_posix()}"
                source = path.read_bytes()
                archive.writestr(name, source)
                archive.writestr(f"{name}c", _compiled(name, path, source))
    return buffer.getvalue()


def _compiled(name: str, path: Path, source: bytes) -> bytes:
    """Return the module as a .pyc that is never checked against its source (PEP 552).

    What is compiled here already is taken: to compile all would take longer than the start of a
    host. The path in it is ours.
    """
    code = SourceFileLoader(name, str(path)).get_code(name)
    unchecked = (1).to_bytes(4, "little")
    return MAGIC_NUMBER + unchecked + source_hash(source) + marshal.dumps(code)
