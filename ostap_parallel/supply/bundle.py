"""What a bare host is sent: an archive that makes python3, bash and tar enough.

It holds this package, dill and ppft: as source and, for interpreters of our own minor version,
compiled, so that a host does not compile them for every worker. They are unpacked there: to
import them from a zip file would take each worker half as long again.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import marshal
import tarfile
import threading
from pathlib import Path

import cloudpickle
import dill
import ppft

import ostap_parallel
from ostap_parallel.worker.serve import MARK

_PACKAGES = (ostap_parallel, ppft, cloudpickle, dill)

FOLDER = "ppserver"  # that holds all of it, and by which a host's list of processes names it

# Runs first, under whatever interpreter the host has: it must be understood by all of them.
_MAIN = """\
import sys
wanted, have, mismatch = {version!r}, tuple(sys.version_info[:2]), sys.argv[1]
if have != wanted and mismatch != "allow":
    sys.stderr.write("%s is Python %d.%d, but the caller runs Python %d.%d: objects and code may "
        "not be understood; give the host another interpreter with python=..., or set "
        "python_mismatch = allow\\n" % ((sys.executable,) + have + wanted))
    sys.exit(1)
sys.stdout.write("%sstep server\\n" % {mark!r})
sys.stdout.flush()
from ostap_parallel.worker.serve import main
sys.exit(main())
"""


_making = threading.Lock()


def bundle(version: tuple[int, int]) -> bytes:
    """Return the archive (tar, gzip) for hosts of callers that run Python `version`."""
    with _making:  # hosts start at the same time, and a cache would make one for each of them
        return _make(version)


@functools.cache
def _make(version: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=3) as archive:
        folder = tarfile.TarInfo(FOLDER)
        folder.type, folder.mode = tarfile.DIRTYPE, 0o700
        archive.addfile(folder)
        _add(archive, "__main__.py", _MAIN.format(version=version, mark=MARK).encode())
        for package in _PACKAGES:
            root = Path(package.__path__[0])
            for path in sorted(root.rglob("*.py")):
                if "tests" in path.relative_to(root).parts:
                    continue
                name = f"{package.__name__}/{path.relative_to(root).as_posix()}"
                _add(archive, name, path.read_bytes())
                _add(archive, importlib.util.cache_from_source(name), _compiled(path))
    return buffer.getvalue()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(f"{FOLDER}/{name}")
    entry.size, entry.mode = len(content), 0o600
    archive.addfile(entry, io.BytesIO(content))


def _compiled(path: Path) -> bytes:
    """Return the module as a .pyc that is never checked against its source (PEP 552)."""
    source = path.read_bytes()
    code = compile(source, path.name, "exec", dont_inherit=True)
    unchecked = (1).to_bytes(4, "little")
    digest = importlib.util.source_hash(source)
    return importlib.util.MAGIC_NUMBER + unchecked + digest + marshal.dumps(code)
