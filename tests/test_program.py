"""The caller's ``__main__`` as workers have it: one for all that a run, or a pool, calls."""

from __future__ import annotations

import functools
import gc
import importlib
import pickle
import re
import site
import subprocess
import sys
import textwrap
import threading
import uuid
import warnings
import weakref
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from functions import run_python, script_environ
from kinds import program

from ostap_parallel.objects import options, serialize
from ostap_parallel.objects.program import MANY_PROGRAMS, Space, inside

SHARED = """
    count, model, table = 0, None, {}
    def inc():
        global count
        count += 1
    def task(x):
        inc()
        return count
    def load():
        global model
        model = {"loaded": table.setdefault("times", 0) + 1}
        table["times"] += 1
    def use(x):
        if model is None: load()
        return model["loaded"], table["times"]
    class Seen:
        items = []
        def add(self, x): self.items.append(x); return len(Seen.items)
    def seen(x): return Seen().add(x) + len(Seen.items)
    # run
    for _ in range(2):  # a run begins with what is here
        assert wm.process(task, [0] * 3, chunk_size=3) == [1, 2, 3]
        assert wm.process(use, [0] * 2, chunk_size=2) == [(1, 1)] * 2
        assert wm.process(seen, [0] * 2, chunk_size=2) == [2, 4]
    count = 10
    assert wm.process(task, [0] * 3, chunk_size=3) == [11, 12, 13]
    assert count == 10 and model is None and not table
"""

NAMES = """
    import pickle
    from concurrent.futures import ProcessPoolExecutor
    LIMIT = 3
    class Fit:
        def __init__(self, x=1): self.x = x
        class Inner: pass
    def f(x): return x + LIMIT
    def dumped(x): return type(pickle.loads(pickle.dumps(Fit(x)))) is Fit, pickle.dumps(f)[:2]
    def inner(x): return type(pickle.loads(pickle.dumps(Fit.Inner()))) is Fit.Inner
    def imported(x):
        import __main__
        return __main__.f(x), __main__.Fit is Fit
    def evaluated(x): return eval("f(1)"), globals()["LIMIT"]
    def in_processes(x):
        with ProcessPoolExecutor(1) as pool:
            return list(pool.map(f, [x])), pool.submit(Fit, 4).result().x
    def spawned(x):
        import multiprocessing
        with multiprocessing.get_context("spawn").Pool(1) as pool: return pool.map(abs, [x])
    def about(x):
        return sys.argv, os.path.basename(sys.modules["__main__"].__file__), __file__ == x
    def own_name(x): return f.__module__, Fit.__module__, __name__
    # run
    assert wm.process(dumped, [1]) == [(True, b"\\x80\\x04")]
    assert wm.process(inner, [1]) == [True]
    assert wm.process(imported, [1]) == [(4, True)]
    assert wm.process(evaluated, [1]) == [(4, 3)]
    assert wm.process(in_processes, [1]) == [([4], 4)]
    assert wm.process(spawned, [-1]) == [[1]]
    assert wm.process(about, [__file__]) == [(sys.argv, "script.py", True)]
    assert wm.process(own_name, [0]) == [("__main__",) * 3]
    back = wm.process(lambda x: (f, Fit, lambda y: f(y)), [0])[0]
    assert back[0] is f and back[1] is Fit and back[2](1) == 4
"""

POOLS = """
    from ostap_parallel import Pool
    count, chosen, log = 0, None, []
    class Model:
        def __init__(self, x): self.x = x
        def scaled(self): return self.x * factor()
    def factor(): return 10
    def set_up(value):
        global chosen
        chosen = Model(value)
        log.append(value)
    def look(x): return chosen.scaled(), len(log), isinstance(chosen, Model)
    def bump(x):
        global count
        count += 1
        return count
    # run
    with Pool(1, initializer=set_up, initargs=(4,)) as pool:
        for _ in range(2):
            assert pool.map(look, [0]) == [pool.apply(look, (0,))] == [(40, 1, True)]
        assert [pool.apply(bump, (0,)) for _ in range(3)] == [1, 2, 3]
        assert pool.map(bump, [0] * 2) == [4, 5]
        assert pool.apply(bump, (0,)) == 6
        first = pool.imap(bump, iter([0] * 40), chunksize=1)
        second = pool.imap(bump, iter([0] * 40), chunksize=1)
        pairs = list(zip(first, second))  # they take turns, in one program
        assert sorted(sum(pairs, ())) == list(range(7, 87)), pairs
    assert chosen is None
"""

CLASSES = """
    import ctypes, time
    from ostap_parallel import Executor, Pool
    class Cfg:
        x, other, table = None, 1, {}
        class Inner: y = None
        @classmethod
        def fill(cls, v): cls.x = v; cls.table["v"] = v; cls.Inner.y = v
    class One:
        made = None
        @classmethod
        def get(cls):
            if cls.made is None: cls.made = [0]
            cls.made[0] += 1
            return cls.made[0]
    def fill(v): Cfg.fill(v)
    def look(i): return Cfg.x, Cfg.table["v"], Cfg.Inner.y, Cfg.other
    def count(i): return One.get()
    class C:
        v = 1
        def get(self): return 1
    class Point(ctypes.Structure):
        _fields_ = [("x", ctypes.c_int)]
        v = 1
    def slowly(x): time.sleep(0.004); return C.v, C().get(), Point(x).x - x + Point.v
    class A: scale = 1
    def add(x): A.more = x; return hasattr(A, "more")
    # run
    for initializer in fill, Cfg.fill:
        with Pool(1, initializer, (7,)) as pool:
            for Cfg.other in 1, 2:
                for _ in range(3):
                    assert pool.map(look, [1]) == [(7, 7, 7, Cfg.other)]
                    assert pool.apply(look, (1,)) == (7, 7, 7, Cfg.other)
            assert pool.map(count, range(3), 3) == [1, 2, 3]
            assert [pool.apply(count, (1,)) for _ in range(2)] == [4, 5]
            assert pool.map(count, range(3), 3) == [6, 7, 8]
            assert pool.apply(count, (1,)) == 9
            Cfg.x = 9
            assert [pool.apply(look, (1,))] == pool.map(look, [1]) == [(9, 7, 7, 2)]
        Cfg.x = None
    slow = wm.pool.imap(slowly, range(60), chunksize=1)
    values = [next(slow)]
    C.v, C.get, Point.v = 2, lambda self: 2, 2
    assert set(wm.process(slowly, range(10))) == {(2, 2, 2)}
    assert set([*values, *slow]) == {(1, 1, 1)}
    assert wm.process(lambda x: (hasattr(A, "more"), add(x)), [1] * 2, chunk_size=2) == [
        (False, True), (True, True)]
    assert wm.process(lambda x: hasattr(A, "more"), [1]) == [False]
    with Executor(1) as executor:
        assert executor.submit(lambda: A.scale).result() == 1
        del A.scale
        assert isinstance(executor.submit(lambda: A.scale).exception(), AttributeError)
"""

STATE = """
    import decimal, warnings
    decimal.getcontext().prec = 40
    warnings.filterwarnings("error", message="no .*", category=UserWarning)
    sys.setrecursionlimit(5000)
    def third(x): return len(str(decimal.Decimal(x) / 3)), decimal.getcontext().prec
    def warn(x):
        try: warnings.warn(x)
        except UserWarning: return True
        return False
    def deep(n): return n and deep(n - 1)
    # run
    assert wm.process(third, [1]) == [third(1)]
    assert wm.process(warn, ["no good", "well"]) == [True, False]
    assert wm.process(deep, [3000]) == [0]
"""

TURNS = """
    import asyncio, decimal, threading, time
    from ostap_parallel import Executor, futures
    def digits(x): time.sleep(0.002); return len(str(decimal.Decimal(1) / 3)) - 2
    def last(x): return sys.argv[-1]
    def limit(x): return sys.getrecursionlimit()
    def nested(x): return list(futures.map(digits, [1]))[0]
    async def iterate(): return [x async for x in wm.iexecute(digits, [1])]
    def in_thread(n):
        decimal.getcontext().prec = n
        found[n] = set(wm.process(digits, range(40), chunk_size=1))
    found = {}
    # run
    pool = wm.pool
    decimal.getcontext().prec = 40
    assert list(pool.imap(digits, [1])) == list(pool.uimap(digits, [1])) == [40]
    assert pool.map(digits, [1]) == pool.amap(digits, [1]).get() == [40]
    assert asyncio.run(iterate()) == wm.process(nested, [1]) == [40]
    slow = iter(wm.iexecute(digits, range(40), chunk_size=1))
    values = [next(slow)]
    sys.argv[:] = ["a", "b"]; decimal.getcontext().prec = 10; sys.setrecursionlimit(3000)
    assert set(wm.process(digits, range(20))) == {10}
    assert wm.process(limit, range(3)) == [3000] * 3 and wm.process(last, [1]) == ["b"]
    assert set([*values, *slow]) == {40}
    threads = [threading.Thread(target=in_thread, args=(n,)) for n in (12, 17)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert found == {12: {12}, 17: {17}}, found
    with Executor(1) as executor:
        decimal.getcontext().prec = 20
        assert executor.submit(digits, 1).result() == 20
        assert list(executor.map(digits, [1])) == [20]
"""

LEFT = """
    import decimal, locale, time, warnings
    from ostap_parallel import Pool
    def upset(x):
        sys.argv.append("more"); sys.setrecursionlimit(3333); os.chdir("/")
        context = decimal.getcontext(); context.prec = 7; context.traps[decimal.Inexact] = True
        warnings.simplefilter("error"); locale.setlocale(locale.LC_ALL, "C.UTF-8")
        os.environ.update(LEFT="1", TZ="XYZ-5"); time.tzset()
        return seen(x)
    def seen(x):
        context = decimal.getcontext()
        own = context.prec, context.rounding, context.traps[decimal.Inexact]
        process = sys.getrecursionlimit(), os.getcwd(), os.environ.get("LEFT"), time.tzname
        return own, process, list(sys.argv), len(warnings.filters), locale.setlocale(0)
    def set_up(): decimal.getcontext().prec = 50
    class Prepared(Task):
        def worker_init(self): sys.argv.append("set up"); sys.setrecursionlimit(2000)
        def initialize_local(self): self.found = []
        def process(self, jobid, x):
            return sys.argv[-1], sys.getrecursionlimit(), decimal.getcontext().prec
        def merge_results(self, result, jobid): self.found.append(result)
        def results(self): return self.found
    # run
    (before,) = wm.process(seen, [1])
    for run in wm.process, wm.pool.map, lambda f, items: [wm.executor.submit(f, 1).result()]:
        assert run(upset, [1]) != [before]
        assert wm.process(seen, [1]) == [before], run
        assert wm.process(Prepared(), [1]) == [("set up", 2000, 28)]
        assert wm.process(seen, [1]) == [before], run
    # a run keeps what it has set up while others take turns
    slow = iter(wm.iexecute(Prepared(), range(9), chunk_size=1))
    found = [next(slow)]
    assert wm.process(seen, [1]) == [before] == wm.process(upset, [1])[1:] + [before]
    assert {*found, *slow} == {("set up", 2000, 28)}
    with Pool(1, initializer=set_up) as pool:
        def look():
            assert pool.map(seen, [1])[0][0] == pool.apply(seen, (1,))[0]
            return pool.apply(seen, (1,))[0]
        assert look() == (50, "ROUND_HALF_EVEN", False)
        decimal.getcontext().rounding = "ROUND_UP"  # which is another field
        assert look() == (50, "ROUND_UP", False)
        pool.map(upset, [1])
        assert look() == (50, "ROUND_UP", False)
        decimal.getcontext().prec = 33
        assert look() == (33, "ROUND_UP", False)
"""

ZONES = """
    import time
    from ostap_parallel import FuncTask
    def move(x):
        before = time.localtime(0).tm_hour, time.tzname
        os.environ["TZ"] = "XYZ-5"; time.tzset()
        return before, time.localtime(0).tm_hour
    def hour(item): return time.localtime(0).tm_hour
    # run
    here = time.localtime(0).tm_hour, time.tzname
    assert wm.process(move, [0] * 3, chunk_size=3) == [(here, 5)] * 3
    zone = FuncTask(hour, merger=TaskMerger(None, init=[]), environment={"TZ": "ABC-7"})
    assert wm.process(zone, [0] * 2) == [7, 7]
    assert wm.process(lambda x: time.localtime(0).tm_hour, [0]) == [here[0]]
"""

FLAGS = """
    import warnings
    def flags(x):
        try: warnings.warn("no", UserWarning)
        except UserWarning: warned = True
        return sys.flags.optimize, sys.flags.utf8_mode, __debug__, warned
    # run
    assert wm.process(flags, [1]) == [flags(1)] == [(1, 1, False, True)], wm.process(flags, [1])
"""

TOLD = """
    import ctypes, logging
    class Keeps(logging.Handler):
        def emit(self, record): found.append(record.getMessage())
    found = []
    def log(size): logging.getLogger("mine").warning("x" * size)
    def fork(x):
        if (pid := os.fork()) == 0:
            logging.getLogger("mine").warning("of a child"); os._exit(0)
        os.waitpid(pid, 0)
    def tell(x): ctypes.CDLL(None).printf(b"chi2 = %d", x)
    # run
    logging.getLogger().addHandler(Keeps())
    wm.process(log, [10, 3 << 20]); wm.process(fork, [1])
    assert sorted(map(len, found)) == [10, 10, 3 << 20] and "of a child" in found, found
    wm.process(tell, [7])
"""

BLAME = """
    import hashlib, sqlite3
    from ostap_parallel import SerializeError
    steps, base = (one for one in ()), sqlite3.connect(":memory:")
    digest = hashlib.md5()
    def uses_steps(x): return next(steps)
    def calls(x): return uses_base(x)
    def uses_base(x): return base.execute(x)
    class Has:
        def method(self): return digest.digest()
    # run
    for function, parts in [
        (uses_steps, ("steps", "uses_steps")),
        (calls, ("base", "uses_base")),
        (Has().method, ("digest", "Has.method")),
        (lambda x: steps, ("steps", "<lambda>")),
    ]:
        try: wm.process(function, [1])
        except SerializeError as exc: text = str(exc)
        else: raise AssertionError(function)
        name, user = parts
        assert f"the global variable {name} of {user}: " in text, text
"""

HELD = """
    from ostap_parallel import shared
    FACTOR = 3
    def scale(x): return x * FACTOR
    class Model:
        def __init__(self): self.large = bytes(200_000)
        def use(self, x): return scale(x)
    model = Model()
    def first(x): return shared().use(x)
    def second(x): return shared().use(x) + 1, isinstance(shared(), Model)
    # run
    for _ in range(2):
        assert wm.process(first, [1, 2], shared=model) == [3, 6]
        assert wm.process(second, [1, 2], shared=model) == [(4, True), (7, True)]
        assert wm.process(lambda x: shared().use(x), [1], shared=model) == [3]
    FACTOR = 5
    assert wm.process(first, [1], shared=model) == [5]
"""

MANAGERS = """
    import multiprocessing
    from ostap_parallel import Pool, SerializeError
    def put(one, x): one[x] = x * x
    def add(one, x): one.append(x)
    def send(queue, lock, event, x):
        with lock: queue.put(x)
        event.set()
    def set_up(one):
        global ours
        ours = one
    ours = None
    def put_ours(x): ours[x] = x
    # run
    with Pool(2) as pool, multiprocessing.Manager() as manager:
        squares, items = manager.dict(), manager.list()
        pool.starmap(put, [(squares, 1), (squares, 2)])
        pool.apply(add, (items, 5))
        wm.process(functools.partial(add, items), [6])
        assert dict(squares) == {1: 1, 2: 4} and list(items) == [5, 6]
        queue, lock, event = manager.Queue(), manager.Lock(), manager.Event()
        pool.starmap(send, [(queue, lock, event, x) for x in range(3)])
        assert sorted(queue.get() for _ in range(3)) == [0, 1, 2] and event.is_set()
        with Pool(1, initializer=set_up, initargs=(squares,)) as other:
            other.map(put_ours, [7])
        assert squares[7] == 7
        for one in multiprocessing.Lock(), multiprocessing.Value("i"), multiprocessing.Queue():
            try: pool.map(id, [one])
            except SerializeError as exc: assert "multiprocessing.Manager()" in str(exc), exc
            else: raise AssertionError(one)
"""

FAR_MANAGERS = """
    import multiprocessing
    def put(one, x): one[x] = x
    # run
    with multiprocessing.Manager() as manager:
        squares = manager.dict()
        try: wm.process(functools.partial(put, squares), [1])
        except RuntimeError as exc: assert "cannot be reached from this host" in str(exc), exc
        else: assert dict(squares) == {1: 1}  # it is this machine
"""

FALSE = """
    from ostap_parallel import Pool
    class Falsy(Exception):
        def __bool__(self): return False
    def fail(x): raise Falsy(x)
    def nested(x):
        try: wm.pool.map(fail, [x])
        except Falsy: return "raised"
    # run
    with Pool(1) as pool:
        for call in [
            lambda: pool.map(fail, [1]), lambda: pool.map_async(fail, [1]).get(),
            lambda: list(pool.imap(fail, [1])), lambda: wm.process(fail, [1]),
            lambda: wm.pool.map(fail, [1]),
        ]:
            try: call()
            except Falsy: continue
            raise AssertionError("it was not raised")
    assert wm.process(nested, [1]) == ["raised"]
"""

CHANGING = """
    from math import floor
    factor, names, seen = 3, ["a"], []
    def helper(x): return x + 1
    def f(x, by=2, *, more=0): return helper(floor(x)) * factor + by + more
    def named(x): return names[x], len(names)
    def shared(x): return len(offset) if "offset" in globals() else x
    def again(n): return n if n < 2 else again(n - 1) + again(n - 2)
    def load(x):
        seen.append(x)
        return seen
    def later(x): return absent
    # run
    def both(function, *args, **kwargs):
        found = wm.executor.submit(function, *args, **kwargs).result()
        assert found == function(*args, **kwargs), (found, function, args)
        return found
    for _ in range(2):
        assert both(f, 1) == 8 and both(f, 1, 3) == 9 and both(f, 1.5, more=10) == 18
    factor = 4
    assert both(f, 1) == 10
    def helper(x): return x + 2
    assert both(f, 1) == 14
    old, f.__defaults__ = f.__defaults__, (5,)
    assert both(f, 1) == 17
    f.__defaults__ = old
    helper.__code__ = (lambda x: x + 3).__code__
    assert both(f, 1) == 18
    floor = lambda x: 100  # what was imported is the program's own now
    assert both(f, 1) == 414
    del floor
    floor = round
    assert both(f, 1) == 18
    names.append("b")
    assert both(named, 1) == ("b", 2)
    names[1] = "c"
    assert both(named, 1) == ("c", 2)
    assert both(shared, 1) == 1
    offset = "four"
    assert both(shared, 1) == 4
    assert both(again, 10) == 55
    again_before = again
    def again(n): return -n
    assert both(again, 10) == -10 and both(again_before, 10) == -17
    for _ in range(2):
        error = wm.executor.submit(later, 1).exception()
        assert type(error) is NameError, error
    absent = 7
    assert both(later, 1) == 7
    del absent
    # what a task leaves stays as long as the caller's is as it was
    assert [wm.executor.submit(load, x).result() for x in (1, 2)] == [[1], [1, 2]]
    seen = [0]
    assert wm.executor.submit(load, 3).result() == [0, 3]
    # by turns, and a function that has gone by its name
    for x in range(3):
        assert both(f, x) and both(named, 0) == ("a", 2)
    mine, f = f, None
    assert both(mine, 1) == 18
"""

PROGRAMS = {
    "changes between calls": CHANGING,
    "state": SHARED,
    "names": NAMES,
    "pools": POOLS,
    "classes": CLASSES,
    "settings": STATE,
    "settings that take turns": TURNS,
    "settings that tasks leave": LEFT,
    "zones": ZONES,
    "shared objects": HELD,
    "proxies on the way": FAR_MANAGERS,
    "false exceptions": FALSE,
    "blame": BLAME,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("place", ["local", "host"])
def test_a_program(tmp_path, request, name, place):
    manager = "WorkManager(1, silent=True)"
    if place == "host":
        config = str(request.getfixturevalue("ssh_config"))
        manager = f"WorkManager(0, 'h1*1', ssh_config={config!r}, config=(), silent=True)"
    (tmp_path / "script.py").write_text(program(PROGRAMS[name], manager))
    assert run_python("script.py", "seven", cwd=tmp_path).endswith("ok\n")


RELATIVE = """
from ostap_parallel import WorkManager
def use(x):
    from .other import K
    from . import other
    return x + K + other.K
if __name__ == "__main__":
    with MANAGER as wm:
        assert wm.process(use, [1]) == wm.process(lambda x: use(x), [1]) == [11]
"""


def manager_at(place, request):
    if place == "local":
        return "WorkManager(1, silent=True)"
    config = str(request.getfixturevalue("ssh_config"))
    return f"WorkManager(0, 'h1*1', ssh_config={config!r}, config=(), silent=True, MORE)"


@pytest.mark.slow
@pytest.mark.parametrize("place", ["local", "host"])
class TestOnBoth:
    def test_flags_of_the_interpreter(self, tmp_path, request, place):
        manager = manager_at(place, request).replace(", MORE", "")
        (tmp_path / "script.py").write_text(program(FLAGS, manager))
        options = "-O", "-X", "utf8", "-W", "error::UserWarning"
        assert run_python(*options, "script.py", cwd=tmp_path).endswith("ok\n")

    def test_large_records_children_s_and_text_without_an_end(self, tmp_path, request, place):
        manager = manager_at(place, request).replace(", MORE", "")
        (tmp_path / "script.py").write_text(program(TOLD, manager))
        assert "chi2 = 7" in run_python("script.py", cwd=tmp_path)

    def test_a_module_that_is_run_imports_relatively(self, tmp_path, request, place):
        package = tmp_path / "pack"
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "other.py").write_text("K = 5\n")
        manager = manager_at(place, request).replace("MORE", "sync=['pack']")
        (package / "tool.py").write_text(RELATIVE.replace("MANAGER", manager))
        run_python("-m", "pack.tool", cwd=tmp_path)


@pytest.mark.slow
def test_proxies_of_managers(tmp_path):
    (tmp_path / "script.py").write_text(program(MANAGERS))
    assert run_python("script.py", cwd=tmp_path).endswith("ok\n")


GOES_ON = """
    import enum, pickle
    class Value:
        def __init__(self, x): self.x = x
    class Kind(enum.Flag): A = 1; B = 2; C = 4
    class Number(enum.IntFlag): A = 1; B = 2
    def make(x): return Value(x), Kind.A | Kind(x), Number.B | x
    # run
    for _ in range(3):
        values = wm.process(make, range(1, 5), checkpoint="run.db")
        pickle.dumps(values), ~Kind.A, Number(11)
"""


@pytest.mark.slow
def test_reading_results_changes_no_class_for_a_checkpoint(tmp_path):
    (tmp_path / "script.py").write_text(program(GOES_ON))
    run_python("script.py", cwd=tmp_path)


def definitions_of(text, expression):
    """Return what a program with this text sends for an expression."""
    script = f"{textwrap.dedent(text)}\nimport sys\nfrom ostap_parallel.objects import serialize\n"
    script += f"sys.stdout.buffer.write(serialize.dumps({expression}))"
    environ = script_environ()
    done = subprocess.run([sys.executable, "-c", script], env=environ, stdout=subprocess.PIPE)
    return done.stdout


COUNTER = """
count = {0}
def bump():
    global count
    count += 1
    return count, __name__
"""


MAKES = """
import sys, types
made = types.ModuleType("made_here"); sys.modules["made_here"] = made; made.value = 1
def use(): return made.value
def find():
    import made_here
"""


class TestTwoPrograms:
    def test_modules_that_one_has_made_are_not_the_other_s(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
        one = definitions_of(MAKES, "use")
        other = definitions_of(MAKES.replace("; sys.modules", "; {}"), "find")
        with inside(Space(), stays=True):
            assert serialize.loads(one)() == 1
        with inside(Space(), stays=True), pytest.raises(ModuleNotFoundError):
            serialize.loads(other)()

    def test_those_of_callers_that_have_gone_are_forgotten(self):
        data = definitions_of("class Large: pass\ndef make(): return Large", "make")
        token = re.search(rb"[0-9a-f]{32}", data)[0]
        kinds = []
        for _ in range(2 * MANY_PROGRAMS):
            with inside(Space(is_fixed=True), stays=False):
                other = data.replace(token, uuid.uuid4().hex.encode())
                kinds.append(weakref.ref(serialize.loads(other)))
        gc.collect()
        alive = [kind for kind in kinds if kind() is not None]
        assert alive == kinds[-len(alive) :]
        assert 1 < len(alive) <= MANY_PROGRAMS

    def test_they_do_not_see_each_other(self):
        one, other = (definitions_of(COUNTER.format(n), "bump") for n in (0, 100))
        spaces = Space(is_fixed=True), Space(is_fixed=True)
        found = []
        for _ in range(3):
            for space, data in zip(spaces, (one, other), strict=True):
                with inside(space, stays=False):
                    found.append(serialize.loads(data)())
        assert found == [(n, "__main__") for n in (1, 101, 2, 102, 3, 103)]

    def test_this_process_keeps_its_own(self):
        before = sys.modules["__main__"]
        with inside(Space(), stays=False):
            serialize.loads(definitions_of(COUNTER.format(0), "bump"))()
            assert sys.modules["__main__"] is not before
        assert sys.modules["__main__"] is before


PREPARED = """
import sys
sys.argv = ["x", "{0}"]
import decimal
decimal.getcontext().prec = {0}
def seen(x): return sys.argv[1], str(decimal.getcontext().prec)
from ostap_parallel.worker.execute import Call
"""

SERVED = """
import sys
from ostap_parallel.worker import execute
from ostap_parallel.worker.chunk import pack_chunk, unpack_result
execute.executing.baseline = execute.Baseline()
calls = [execute.bind(bytes.fromhex(text)) for text in sys.argv[1:]]
for n in range(3):
    chunk = pack_chunk([0], [0], run=b"%d" % (n % 2))
    for call in calls:
        print(unpack_result(call(chunk)).values(1)[0])
"""


def test_programs_on_one_server_have_their_own_settings(tmp_path):
    sent = [definitions_of(PREPARED.format(n), "Call(seen)").hex() for n in (31, 32)]
    found = run_python("-c", SERVED, *sent, cwd=tmp_path).splitlines()
    assert found == [str((n, n)) for n in ("31", "32") * 3]


def test_pickle_is_left_alone():
    script = "import pickle; before = dict(pickle._Pickler.dispatch)\n"
    script += "from ostap_parallel import Pool\nassert pickle._Pickler.dispatch == before"
    run_python("-c", script, cwd=Path(__file__).parent)


LIBRARIES = """
    import numpy, pickle
    from ostap_parallel import Executor
    numpy.seterr(all="raise", under="ignore"); numpy.set_printoptions(precision=3, suppress=True)
    def written(x): return f"<{x:.2f}>"
    def divide(x):
        try: return str(numpy.ones(1) / x)
        except FloatingPointError: return "raised"
    def shown(x): return str(numpy.array([x / 3])), numpy.geterr()["over"]
    def hush(x): numpy.seterr(all="ignore"); return divide(x)
    # run
    assert wm.process(divide, [0, 3]) == ["raised", "[0.333]"]
    assert wm.process(shown, [1]) == [shown(1)] == [("[0.333]", "raise")]
    numpy.set_printoptions(precision=5)
    with numpy.errstate(divide="warn", over="ignore"):
        assert wm.process(shown, [1]) == [("[0.33333]", "ignore")]
        assert wm.executor.submit(shown, 1).result() == ("[0.33333]", "ignore")
    assert wm.executor.submit(shown, 1).result() == ("[0.33333]", "raise")
    numpy.set_printoptions(precision=8, suppress=False); numpy.seterr(over="warn")
    assert wm.process(shown, [1]) == [shown(1)] == [("[0.33333333]", "warn")]
    numpy.set_printoptions(precision=4, formatter={"float_kind": written}, linewidth=50)
    assert wm.process(shown, [1]) == [shown(1)] == [("[<0.33>]", "warn")]
    numpy.set_printoptions(legacy="1.13")
    assert wm.process(shown, [1]) == [shown(1)] == [("[ 0.3333]", "warn")]
"""

TABLES = """
    import pandas
    pandas.set_option("display.precision", 2, "display.width", 200)
    pandas.options.display.float_format = lambda value: f"<{value:.1f}>"
    def look(x):
        import pandas
        frame = pandas.DataFrame({"a": [x / 3] * 100})
        return repr(frame), pandas.get_option("display.width")
    def loaded(x): return "pandas" in sys.modules
    # run
    assert wm.process(loaded, [1]) == [False]
    assert wm.process(look, [1]) == [look(1)]
    pandas.reset_option("display.float_format")
    with pandas.option_context("display.max_rows", 8):
        assert wm.process(look, [1]) == [look(1)]
        assert "0.33" in look(1)[0] and len(look(1)[0].splitlines()) < 15
    assert wm.process(look, [1]) == [look(1)]
"""

DRAWN = """
    import matplotlib
    matplotlib.use("pdf")
    matplotlib.rcParams["figure.figsize"] = 3, 2
    matplotlib.rcParams["axes.prop_cycle"] = matplotlib.cycler(color=["red", "blue"])
    def look(x):
        import matplotlib.pyplot as plt
        figure, axes = plt.subplots()
        (line,) = axes.plot([1, 2])
        plt.close(figure)
        return tuple(figure.get_size_inches()), line.get_color(), len(plt.rcParams) > 100
    def loaded(x): return "matplotlib" in sys.modules
    # run
    assert wm.process(loaded, [1]) == [False]
    assert wm.process(look, [1]) == [((3.0, 2.0), "red", True)]
    matplotlib.rcParams["figure.figsize"] = matplotlib.rcParamsDefault["figure.figsize"]
    assert wm.process(look, [1]) == [((6.4, 4.8), "red", True)]
"""


@pytest.mark.slow
@pytest.mark.parametrize("place", ["local", "host"])
def test_what_a_script_tells_numpy(tmp_path, request, place):
    manager = manager_at(place, request).replace(", MORE", "")
    if place == "host":
        manager = manager[:-1] + f", environment='export PYTHONPATH={site.getsitepackages()[0]}')"
    (tmp_path / "script.py").write_text(program(LIBRARIES, manager))
    assert run_python("script.py", cwd=tmp_path).endswith("ok\n")


@pytest.mark.slow
def test_what_a_script_tells_matplotlib(tmp_path):
    (tmp_path / "script.py").write_text(program(DRAWN, "WorkManager(1, silent=True)"))
    assert run_python("script.py", cwd=tmp_path).endswith("ok\n")


WARNED = """
    import warnings
    from pathlib import Path
    Path("fitting.py").write_text("class Poor(UserWarning): pass\\nclass Poorer(Poor): pass")
    sys.path.insert(0, os.getcwd())
    import fitting
    class Own(UserWarning): pass
    warnings.filterwarnings("error", category=Own)
    warnings.filterwarnings("error", message="chi2", category=fitting.Poor)
    def outcome(text, category):
        try: warnings.warn(text, category)
        except Warning as exc: return type(exc).__name__
        return "shown"
    def own(x): return outcome("here", Own), outcome("there", UserWarning)
    def poor(x):
        import fitting
        return outcome("chi2", fitting.Poorer), outcome("status", fitting.Poor)
    def again(x):
        with warnings.catch_warnings():
            for action, message, category, module, line in list(warnings.filters):
                warnings.filterwarnings(action, "text", category, append=True)
    def nested(x):
        from ostap_parallel import futures
        return list(futures.map(own, [x]))
    # run
    assert wm.process(own, [1, 2]) == [("Own", "shown")] * 2
    assert wm.process(nested, [1]) == [[("Own", "shown")]]
    assert not LOCAL or wm.process(poor, [1]) == [("Poorer", "shown")]
    assert wm.process(again, [1]) == [None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Own)
        assert wm.process(own, [1]) == [("shown", "shown")]
    assert wm.process(own, [1]) == [("Own", "shown")]
"""


@pytest.mark.parametrize("place", ["local", "host"])
@pytest.mark.slow
def test_filters_of_warnings_of_any_module(tmp_path, request, place):
    manager = manager_at(place, request).replace(", MORE", "")
    text = program(WARNED, manager).replace("LOCAL", str(place == "local"))
    (tmp_path / "script.py").write_text(text)
    assert run_python("script.py", cwd=tmp_path).endswith("ok\n")


STANDARD = """
    import csv, socket
    sys.set_int_max_str_digits(5000); csv.field_size_limit(1 << 20); socket.setdefaulttimeout(7)
    csv.register_dialect("ours", delimiter="|")
    def split(line):
        import csv
        return next(csv.reader([line], "ours")), csv.list_dialects()[3:]
    def look(x):
        import csv, socket
        limits = sys.get_int_max_str_digits(), csv.field_size_limit()
        return len(str(10**4500)), *limits, socket.getdefaulttimeout()
    # run
    assert wm.process(look, [1]) == [(4501, 5000, 1 << 20, 7.0)]
    assert wm.process(split, ["a|b"]) == [(["a", "b"], ["ours"])]
    csv.register_dialect("ours", delimiter=";"); csv.register_dialect("more", "excel")
    assert wm.process(split, ["a;b"]) == [(["a", "b"], ["ours", "more"])]
    csv.unregister_dialect("more")
    assert wm.process(split, ["a;b"]) == [(["a", "b"], ["ours"])]
    csv.field_size_limit(131072); socket.setdefaulttimeout(None)
    assert wm.process(look, [1]) == [(4501, 5000, 131072, None)]
"""


@pytest.mark.parametrize("place", ["local", "host"])
@pytest.mark.slow
def test_limits_of_the_standard_library(tmp_path, request, place):
    manager = manager_at(place, request).replace(", MORE", "")
    (tmp_path / "script.py").write_text(program(STANDARD, manager))
    assert run_python("script.py", cwd=tmp_path).endswith("ok\n")


WITHOUT_PATIENCE = """\
import multiprocessing, socket
from ostap_parallel import Pool
from ostap_parallel.commands import run

socket.setdefaulttimeout(0.01)

def begin(lock, events):
    global held, told
    held, told = lock, events

def hold(n):
    with held:
        told.put(n)
        return n, socket.getdefaulttimeout()

done = run(["sleep 0.2; echo a", "sleep 0.2; echo b"], ncpus=1)
assert [(one.status, one.stdout) for one in done] == [(0, b"a\\n"), (0, b"b\\n")], done
lock, events = multiprocessing.Lock(), multiprocessing.Queue()
with Pool(1, begin, (lock, events)) as pool, lock:
    result = pool.apply_async(hold, (1,))
    result.wait(0.2)
    lock.release()
    assert result.get(60) == (1, 0.01)
    lock.acquire()
assert events.get(timeout=60) == 1
"""


def test_what_scripts_say_of_sockets_is_not_for_ours(tmp_path):
    (tmp_path / "script.py").write_text(WITHOUT_PATIENCE)
    run_python("script.py", cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.heavy
def test_what_a_script_tells_pandas(tmp_path):
    (tmp_path / "script.py").write_text(program(TABLES, "WorkManager(1, silent=True)"))
    assert run_python("script.py", cwd=tmp_path).endswith("ok\n")


class Own:
    """A record of the script's."""


class Tables(ModuleType):
    """What pandas has for its options, and no more."""

    def __init__(self):
        super().__init__("pandas")
        self.usual = {"display.width": 80, "display.html.border": 1, "old": None}
        display = {"width": 80, "html": {"border": 1}}
        self.options = SimpleNamespace(d={"display": display, "old": None})

    def get_option(self, name):
        *groups, name = name.split(".")
        return functools.reduce(dict.get, groups, self.options.d)[name]

    def set_option(self, name, value):
        if name == "old":
            warnings.warn("not for long", FutureWarning, stacklevel=1)
        *groups, name = name.split(".")
        functools.reduce(dict.get, groups, self.options.d)[name] = value

    def describe_option(self, name, _print_desc=True):
        now = self.get_option(name)
        return f"{name} : int\n    [of what]\n    [default: {self.usual[name]}] [currently: {now}]"


class TestOptions:
    def test_only_what_a_script_has_told_pandas_is_sent(self, monkeypatch):
        module = Tables()
        monkeypatch.setitem(sys.modules, "pandas", module)
        assert "pandas" not in options.look()
        module.set_option("display.html.border", 0)
        assert options.look()["pandas"] == {"display.html.border": 0}
        packed = options.pack()
        module.set_option("display.html.border", 1)
        assert "pandas" not in options.look()
        options.take(packed)
        assert module.options.d == {"display": {"width": 80, "html": {"border": 0}}, "old": None}
        options.take({})
        assert module.get_option("display.html.border") == 1

    def test_functions_of_the_script_are_sent_and_what_cannot_be_is_left_out(self, monkeypatch):
        module = Tables()
        monkeypatch.setitem(sys.modules, "pandas", module)
        module.set_option("display.width", lambda: 5)
        with pytest.warns(FutureWarning):
            module.set_option("old", (n for n in []))
        packed = options.pack()
        module.set_option("display.width", 80)
        module.options.d["old"] = None
        options.take(packed)
        assert module.get_option("display.width")() == 5
        assert module.get_option("old") is None
        options.take({})
        assert module.get_option("display.width") == 80

    def test_what_is_on_its_way_out_is_told_quietly(self, monkeypatch):
        module = Tables()
        monkeypatch.setitem(sys.modules, "pandas", module)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            options.take({"pandas": pickle.dumps({"old": 3})})
            assert module.get_option("old") == 3
            options.take({})
        assert module.get_option("old") is None

    def test_records_of_awkward_and_of_vector(self, monkeypatch, tmp_path):
        monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
        monkeypatch.syspath_prepend(tmp_path)
        (tmp_path / "awkward.py").write_text("behavior = {}")
        (tmp_path / "vector.py").write_text(
            "import awkward\nclass Vector: pass\nVector.__module__ = 'vector.backends'\n"
            "def register_awkward(): awkward.behavior['Vector'] = Vector\n"
        )
        for name in "awkward", "vector":
            monkeypatch.delitem(sys.modules, name, raising=False)
        awkward, vector = map(importlib.import_module, ("awkward", "vector"))
        assert not {"awkward", "vector"} & options.look().keys()
        vector.register_awkward()
        awkward.behavior["Track"] = Own
        assert options.look()["awkward"] == {"vector": True, "behavior": {"Track": Own}}
        packed = {name: options.pack()[name] for name in ("awkward", "vector")}
        for name in "awkward", "vector":
            monkeypatch.delitem(sys.modules, name)
        options.take(packed)
        behavior = importlib.import_module("vector").awkward.behavior  # which imports awkward
        assert behavior.keys() == {"Track", "Vector"}
        options.take({**packed, "awkward": pickle.dumps({"vector": True, "behavior": {}})})
        assert behavior.keys() == {"Vector"}
        options.take({})

    def test_what_sklearn_begins_with_is_that_of_a_new_thread(self, monkeypatch):
        module = ModuleType("sklearn")
        module.here = threading.local()
        module.get_config = lambda: {"output": "default", **vars(module.here)}
        module.set_config = lambda **config: vars(module.here).update(config)
        monkeypatch.setitem(sys.modules, "sklearn", module)
        assert "sklearn" not in options.look()
        module.set_config(output="pandas")
        packed = {"sklearn": options.pack()["sklearn"]}
        module.set_config(output="default")
        options.take(packed)
        assert module.get_config() == {"output": "pandas"}
        options.take({})
        assert module.get_config() == {"output": "default"}

    def test_precision_of_jax_and_backends_of_pyhf(self, monkeypatch):
        jax, pyhf = ModuleType("jax"), ModuleType("pyhf")
        names = "jax_debug_nans", "jax_disable_jit", "jax_enable_x64"
        jax.config = SimpleNamespace(**dict.fromkeys(names, False))
        jax.config.jax_default_matmul_precision = None
        jax.config.update = functools.partial(setattr, jax.config)

        def set_backend(name, optimizer, precision):
            tensors = SimpleNamespace(name=name, precision=precision)
            pyhf.get_backend = lambda: (tensors, SimpleNamespace(name=optimizer))

        pyhf.set_backend = set_backend
        pyhf.set_backend("numpy", "scipy", "64b")
        for module in jax, pyhf:
            monkeypatch.setitem(sys.modules, module.__name__, module)
        assert not {"jax", "pyhf"} & options.look().keys()
        jax.config.update("jax_enable_x64", True)
        pyhf.set_backend("numpy", "minuit", "64b")
        packed = {name: options.pack()[name] for name in ("jax", "pyhf")}
        jax.config.update("jax_enable_x64", False)
        pyhf.set_backend("numpy", "scipy", "64b")
        options.take(packed)
        assert jax.config.jax_enable_x64
        assert pyhf.get_backend()[1].name == "minuit"
        options.take({})
        assert not jax.config.jax_enable_x64
        assert pyhf.get_backend()[1].name == "scipy"

    def test_what_holds_no_more_is_as_it_was(self, monkeypatch):
        module = ModuleType("mpmath")
        module.mp = SimpleNamespace(prec=60)  # as an initializer has it
        monkeypatch.setitem(sys.modules, "mpmath", module)
        assert options.look()["mpmath"] == {"prec": 60}
        options.take({"mpmath": pickle.dumps({"prec": 200, "newer": 1})})
        assert module.mp.prec == 200
        module.mp.prec = 300  # by a task
        options.take({"mpmath": pickle.dumps({"prec": 200, "newer": 1})})
        assert module.mp.prec == 300
        options.take({})
        assert module.mp.prec == 60
        assert options.told() == {}

    def test_what_is_not_here_is_told_when_it_comes(self, monkeypatch, tmp_path):
        monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
        monkeypatch.delitem(sys.modules, "mpmath", raising=False)
        monkeypatch.syspath_prepend(tmp_path)
        (tmp_path / "mpmath.py").write_text("class mp: prec = 53")
        options.take({"mpmath": pickle.dumps({"prec": 80})})
        assert importlib.import_module("mpmath").mp.prec == 80
        options.take({"mpmath": b"what nobody can read"})
        options.take({})
        assert sys.modules["mpmath"].mp.prec == 53
