"""Modules that the caller loads anew: workers that have them do so, too."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import time
import types

import pytest
from functions import run_python
from helpers import importable, open_manager

from ostap_parallel import Pool, WorkManager
from ostap_parallel.objects import places

OLD = """
K = 1
def f(x): return 1
class C:
    def m(self): return 1
    def old(self): return 0
"""
NEW = """
K = 2
def f(x): return 2
class C:
    def m(self): return f(0)
    new = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module, and what writes its text."""
    path = tmp_path / "reloaded_here.py"
    times = iter(range(10, 100, 10))

    def write(text):
        path.write_text(text)
        os.utime(path, (time.time() + next(times),) * 2)  # or old bytecode would do

    write(OLD)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module(path.stem)
    yield module, write
    del sys.modules[path.stem]


def see(wm, pool, module, held, kept):
    return [
        *wm.process(module.f, [1]),
        *wm.process(lambda x: (module.f(x), module.K, held(x), kept.m()), [1]),
        *wm.process(held, [1]),
        *pool.map(module.f, [1]),
        pool.apply(held, (1,)),
        pool.apply(module.f, (1,)),
    ]


def test_here(module):
    module, write = module
    held, kept = module.f, module.C()
    with WorkManager(1, silent=True) as wm, Pool(1) as pool:
        assert see(wm, pool, module, held, kept) == [1, (1, 1, 1, 1), 1, 1, 1, 1]
        write(NEW)
        # as long as the caller does not load it, neither do workers
        assert see(wm, pool, module, held, kept) == [1, (1, 1, 1, 1), 1, 1, 1, 1]
        importlib.reload(module)
        assert wm.process(module.f, [1]) == pool.map(module.f, [1]) == [2]
        assert wm.process(lambda x: (module.f(x), module.K), [1]) == [(2, 2)]
        assert pool.apply(module.f, (1,)) == 2
        assert wm.process(lambda c: (c.m(), c.new), [module.C()]) == [(2, 3)]
        with pytest.raises(AttributeError):
            wm.process(lambda c: c.old(), [module.C()])


WITHOUT_CELLS = """
class Base:
    def m(self): return 1
class C(Base):
    def grows(self): return 0
    def shrinks(self): return super().m()
    def moves(self, x): return (lambda: (x, 1))()
    @property
    def p(self): return 0
    @staticmethod
    def s(): return 0
def make(n):
    def inner(): return n
    return inner
made = make(5)
"""
WITH_CELLS = """
class Base:
    def m(self): return 2
class C(Base):
    def grows(self): return super().m() + 1
    def shrinks(self): return 7
    def moves(self, y): return (lambda: (y, super(__class__, self).m()))()
    @property
    def p(self): return super().m() + 2
    @staticmethod
    def s(): return __class__
def make(n):
    def inner(): return n * 10
    return inner
made = make(6)
"""


def test_what_a_worker_holds_has_the_new_code_whatever_it_closes_over(module):
    module, write = module

    def keep():
        sys.kept_here = module.C(), module.made, module.C

    def look():
        kept, made, cls = sys.kept_here
        calls = kept.grows(), kept.shrinks(), kept.moves(3), kept.p
        return calls, made(), kept.s() is cls if kept.s() else kept.s(), type(kept) is module.C

    write(WITHOUT_CELLS)
    importlib.reload(module)
    with Pool(1) as pool:
        pool.apply(keep)
        assert pool.apply(look) == ((0, 1, (3, 1), 0), 5, 0, True)
        write(WITH_CELLS)
        importlib.reload(module)
        assert pool.apply(look) == ((3, 7, (3, 2), 4), 60, True, False)
        write(WITHOUT_CELLS)
        importlib.reload(module)
        assert pool.apply(look) == ((0, 1, (3, 1), 0), 5, 0, False)


def test_one_that_is_removed_and_imported_again(module):
    module, write = module
    with WorkManager(1, silent=True) as wm:
        assert wm.process(module.f, [1]) == [1]
        for text, value in (NEW, 2), (OLD, 1):  # there are as many modules as before
            write(text)
            del sys.modules[module.__name__]
            module = importlib.import_module(module.__name__)
            assert wm.process(module.f, [1]) == [value]


def test_on_a_host(hosts, module):
    module, write = module
    with open_manager(hosts, "h1*1", environment=importable(hosts)) as wm:
        there = next(iter(hosts)).home / "library" / "reloaded_here.py"
        shutil.copy2(module.__file__, there)
        assert wm.process(module.f, [1]) == [1]
        write(NEW)
        shutil.copy2(module.__file__, there)
        importlib.reload(module)
        assert wm.process(module.f, [1]) == [2]


LAZY = """
import importlib.util, pathlib, sys
pathlib.Path("lazy.py").write_text("raise ImportError('it was loaded')")
spec = importlib.util.find_spec("lazy")
spec.loader = importlib.util.LazyLoader(spec.loader)
sys.modules["lazy"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
class Odd:
    def __getattr__(self, name):
        raise ImportError("it was asked")
sys.modules["odd"] = Odd()
from contextvars import ContextVar
from ostap_parallel import Pool
from ostap_parallel.worker import generators
known = ContextVar("known")
def value(x):
    return known.get()
if __name__ == "__main__":
    known.set(7)
    generators.find()
    with Pool(1) as pool:
        assert pool.map(abs, [1]) == [pool.apply(abs, (1,))]
        assert pool.map(value, [1]) == [7]
    print("ok")
"""


def test_who_looks_loads_nothing(tmp_path):
    (tmp_path / "script.py").write_text(LAZY)
    assert run_python("script.py", cwd=tmp_path) == "ok\n"


SESSION = """
import os, sys, time
from IPython.terminal.interactiveshell import TerminalInteractiveShell
sys.path.insert(0, ".")
def write(text, later):
    open("edited.py", "w").write(text)
    os.utime("edited.py", (time.time() + later,) * 2)
ip = TerminalInteractiveShell.instance()
def run(text):
    ip.run_cell(text).raise_error()
write("def f(x): return 1\\nclass C:\\n    def m(self): return 1\\n", 5)
run("%load_ext autoreload\\n%autoreload 2\\nimport edited\\nfrom edited import f as g")
run("from ostap_parallel import WorkManager, Pool")
run("wm, pool = WorkManager(1, silent=True), Pool(1)")
run("c = edited.C()\\ndef h(x): return edited.f(x), g(x), c.m()")
LOOK = "assert wm.process(edited.f, [1]) + wm.process(g, [1]) + wm.process(h, [1]) == %r"
LOOK += "\\nassert pool.map(h, [1]) + pool.map(g, [1]) + [pool.apply(h, (1,))] == %r"
run(LOOK % ([1, 1, (1, 1, 1)], [(1, 1, 1), 1, (1, 1, 1)]))
write("def f(x): return 2\\nclass C:\\n    def m(self): return 20\\n", 10)
run(LOOK % ([2, 2, (2, 2, 20)], [(2, 2, 20), 2, (2, 2, 20)]))
run("wm.close(); pool.terminate()")
print("ok")
"""


@pytest.mark.slow
def test_autoreload_of_ipython(tmp_path):
    pytest.importorskip("IPython")
    (tmp_path / "session.py").write_text(SESSION)
    more = {"IPYTHONDIR": str(tmp_path / "ipython")}
    assert run_python("session.py", cwd=tmp_path, **more).endswith("ok\n")


class Growing(dict):
    """Modules, of which another thread imports one just when somebody looks."""

    def __reversed__(self):
        found = super().__reversed__()
        self["late"] = None
        return found


def test_threads_may_import_while_somebody_looks(monkeypatch):
    monkeypatch.setattr(places, "sys", types.SimpleNamespace(modules=Growing(early=None)))
    assert places.last_import() == (2, "late")
