"""What travels between processes: above all that which workers cannot import."""

from __future__ import annotations

import functools
import inspect
import operator
import pickle
import re
import sys
import textwrap
from pathlib import Path

import functions
import pytest
from functions import run_python

from ostap_parallel import SerializeError, WorkManager
from ostap_parallel.objects import byvalue, serialize


@pytest.fixture(scope="module")
def wm():
    with WorkManager(2, silent=True) as manager:
        yield manager


# Each of these is a program of its own that ends with "ok": it asserts by itself.
PREAMBLE = """\
import abc, collections, dataclasses, enum, functools, operator, os, sys, typing
from ostap_parallel import TaskMerger, Task, WorkManager
HOME = os.getpid()
def abroad():
    assert os.getpid() != HOME
    return True
def same(item):
    assert abroad()
    return item
"""


def program(body):
    """Return a program that runs `body`, whose manager is `wm`."""
    head, _, rest = textwrap.dedent(body).partition("# run\n")
    lines = [PREAMBLE, head, "if __name__ == '__main__':"]
    lines += ["    with WorkManager(2, silent=True) as wm:", textwrap.indent(rest, " " * 8)]
    return "\n".join([*lines, "    print('ok')", ""])


FUNCTIONS = program("""
    import math as mathematics
    OFFSET = 100
    TABLE = {"a": [1]}
    def plain(x): return x + OFFSET
    def calls_others(x): return plain(x) + mathematics.floor(0.5)
    def factorial(n): return 1 if n < 2 else n * factorial(n - 1)
    def defaults(x, y=3, *, z=4): return x, y, z
    def make_adder(n):
        def adder(x): return x + n
        return adder
    def decorated(f):
        @functools.wraps(f)
        def wrapper(*args): return f(*args) + 1
        return wrapper
    @decorated
    def wrapped(x): return x * 10
    content = (n for n in range(3))  # cannot be sent; it is only an attribute's name
    class Callable:
        content = 1
        def uses(self, x): return [self.content + n for n in (x,) if self.content]
        def __init__(self, n): self.n = n
        def __call__(self, x): return x + self.n
        def method(self, x): return x * self.n
        @classmethod
        def of_class(cls, x): return cls.__name__, x
        @staticmethod
        def static(x): return -x
    # run
    assert wm.process(plain, [1, 2]) == [101, 102]
    assert wm.process(calls_others, [1]) == [101]
    assert wm.process(factorial, [5]) == [120]
    assert wm.process(defaults, [1]) == [(1, 3, 4)]
    assert wm.process(lambda x: x ** 2, [3]), wm.process(lambda x: x ** 3, [3]) == ([9], [27])
    two = [lambda x: x + 1, lambda x: x + 2]; assert wm.process(two[1], [1]) == [3]
    assert wm.process(make_adder(5), [1]) == [6]
    assert wm.process(wrapped, [2]) == [21]
    assert wm.process(functools.partial(defaults, y=7), [1]) == [(1, 7, 4)]
    assert wm.process(functools.partial(pow, 2), [3]) == [8]
    assert wm.process(Callable(3), [1]) == [4]
    assert wm.process(Callable(3).method, [2]) == [6]
    assert wm.process(Callable(3).uses, [2]) == [[3]]
    assert wm.process(Callable.of_class, [2]) == [("Callable", 2)]
    assert wm.process(Callable.static, [2]) == [-2]
    assert wm.process(lambda f: f(4), [plain, Callable(1), make_adder(2)]) == [104, 5, 6]
    OFFSET = 200
    assert wm.process(plain, [1]) == [201]
    def plain(x): return x - OFFSET
    assert wm.process(plain, [1]) == [-199]
""")

RUN_AGAIN = program("""
    seen = []
    def count(item): seen.append(item); return len(seen)
    class Cut:
        limit = 1
        def passed(self): return self.limit
    class Tighter(Cut): pass
    def limit(item): return Cut.limit
    class Prepared(Task):
        def initialize_local(self): self.seen = []
        def initialize_remote(self, jobid=-1): pass
        def worker_init(self): Cut.limit = 7
        def process(self, jobid, item): return Cut.limit
        def merge_results(self, result, jobid=-1): self.seen.append(result)
        def results(self): return self.seen
    # run
    for _ in range(3):  # an item of the class does not undo what worker_init has done with it
        assert wm.process(Prepared(), [1, Cut(), Tighter(), 2], chunk_size=4) == [7] * 4
    for _ in range(3):  # each run has the globals as they are here
        assert wm.process(count, range(4), chunk_size=4) == [1, 2, 3, 4]
    for Cut.limit in (1, 2, 1, 2, 1):
        assert wm.process(limit, range(4)) == [Cut.limit] * 4
        cuts = [Cut(), Tighter()] * 2
        assert wm.process(Cut.passed, cuts) == wm.pool.map(Cut.passed, cuts) == [Cut.limit] * 4
        calls = [wm.executor.submit(operator.attrgetter("limit"), cut) for cut in cuts]
        assert [call.result() for call in calls] == [Cut.limit] * 4
""")

GIVEN_ANEW = program("""
    import gc, weakref
    from ostap_parallel import Pool
    def is_even(n): return n == 0 or is_odd(n - 1)
    def is_odd(n): return n != 0 and is_even(n - 1)
    def about(n): return about.__doc__, about.__module__, dict(about.__annotations__), told()
    def told(): return told.__doc__
    # run
    seen = []
    with Pool(1) as pool:
        for _ in range(3):
            assert [pool.apply(is_even, (n,)) for n in (3, 4)] == [False, True]
            seen += map(weakref.ref, (is_even, is_odd))
            def is_even(n): return n == 0 or is_odd(n - 1)
            def is_odd(n): return n != 0 and is_even(n - 1)
        gc.collect()
        assert [one() for one in seen] == [None] * 6  # also of those that use each other
        for _ in range(2):
            assert pool.apply(about, (1,)) == (None, "__main__", {}, None)
        about.__doc__, about.__module__, told.__doc__ = "doc", "other", "told"
        assert pool.apply(about, (1,)) == ("doc", "other", {}, "told")
        for about.__annotations__["n"] in (int, str, "text"):
            assert pool.apply(about, (1,))[2] == about.__annotations__
""")

EACH_OTHER = program("""
    def is_even(n): return n == 0 or is_odd(n - 1)
    def is_odd(n): return n != 0 and is_even(n - 1)
    class Node:
        def __init__(self, depth): self.depth = depth
        def build(self): return build(self.depth)
    def build(depth): return [] if depth == 0 else [Node(depth - 1).build()]
    # run
    assert wm.process(is_even, [3, 4]) == [False, True]
    assert wm.process(lambda n: is_odd(n), [3, 4]) == [True, False]
    assert wm.process(build, [3]) == [build(3)] == [[[[[]]]]]
""")

CACHED = program("""
    @functools.lru_cache
    def cached(x): return x * 2
    @functools.lru_cache(maxsize=None)
    def fibonacci(n): return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)
    @functools.singledispatch
    def kind(x): return "object"
    @kind.register
    def _(x: int): return "int"
    # run
    assert wm.process(lambda x: cached(x), [4]) == [8]
    assert wm.process(cached, [4]) == [8]
    assert wm.process(fibonacci, [60]) == [1548008755920]
    assert wm.process(kind, [1, "a"]) == ["int", "object"]
""")

CLASSES = program("""
    T = typing.TypeVar("T")
    class Point:
        made = 0
        def __init__(self, x): self.x = x
        @property
        def double(self): return 2 * self.x
        def __eq__(self, other): return type(self) is type(other) and self.x == other.x
        class Inner: z = 3
    class Derived(Point):
        def __init__(self, x): super().__init__(x); self.y = x
    class Slots:
        __slots__ = ("x",)
        def __init__(self, x): self.x = x
    class Abstract(abc.ABC):
        @abc.abstractmethod
        def f(self): ...
    class Concrete(Abstract):
        def f(self): return 7
    class Meta(type): pass
    class WithMeta(metaclass=Meta): pass
    class Dictionary(dict): pass
    @dataclasses.dataclass
    class Data:
        x: int
        parts: list = dataclasses.field(default_factory=list)
    @dataclasses.dataclass(frozen=True, slots=True, order=True)
    class Frozen:
        x: int
    Pair = collections.namedtuple("Pair", "a b")
    class Trouble(Exception):
        def __init__(self, item): super().__init__(item); self.item = item
    def check(item):
        kinds = Point, Slots, Concrete, WithMeta, Dictionary, Data, Frozen, Pair
        return any(type(item) is kind for kind in kinds) and abroad()
    def make(name): return {"Point": Point(5), "Pair": Pair(1, 2), "Data": Data(3, [4])}[name]
    def fail(item): raise Trouble(item)
    # run
    there = [Point(1), Slots(2), Concrete(), WithMeta(), Dictionary(a=1), Data(1)]
    there += [Frozen(1), Pair(1, 2)]
    assert wm.process(check, there) == [True] * len(there)
    back = wm.process(same, there * 2)
    assert [type(one) for one in back] == [type(one) for one in there * 2]
    assert back[0] == Point(1) and back[1].x == 2 and back[4] == {"a": 1} and back[5] == Data(1)
    assert back[6] == Frozen(1) and back[7] == Pair(1, 2)
    assert wm.process(make, ["Point", "Pair", "Data"]) == [Point(5), Pair(1, 2), Data(3, [4])]
    def look(d): return isinstance(d, Point), d.double, d.y
    assert wm.process(look, [Derived(2)]) == [(True, 4, 2)]
    assert type(wm.process(same, [Derived(2)])[0]) is Derived
    assert type(wm.process(same, [Point.Inner()])[0]) is Point.Inner
    assert wm.process(same, [Point, Data, Pair]) == [Point, Data, Pair]
    assert wm.process(Data, [1, 2]) == [Data(1), Data(2)]
    nested = {"list": [Point(1), (Point(2),)], Frozen(3): {Frozen(4)}}
    assert wm.process(same, [nested]) == [nested]
    assert wm.process(same, [Point(1)], merger=TaskMerger(None, init=[])) == [Point(1)]
    try:
        wm.process(fail, [5])
    except Trouble as trouble:
        assert type(trouble) is Trouble and trouble.item == 5
    else:
        raise AssertionError
    # a class that was changed, as happens at a prompt
    Point.double = property(lambda self: 3 * self.x)
    assert wm.process(lambda p: p.double, [Point(2)] * 4) == [6] * 4
""")

ENUMS = program("""
    class Colour(enum.Enum):
        RED = 1
        GREEN = 2
        CRIMSON = 1
    class Number(enum.IntEnum):
        ONE = 1
    class Bits(enum.Flag):
        A = 1
        B = 2
    # run
    assert wm.process(same, list(Colour)) == list(Colour)
    assert wm.process(lambda c: c is Colour.RED, [Colour.CRIMSON, Colour.GREEN]) == [True, False]
    assert wm.process(same, [Number.ONE, Bits.A | Bits.B]) == [Number.ONE, Bits.A | Bits.B]
    assert wm.process(lambda n: n + 1, [Number.ONE]) == [2]
    assert wm.process(same, [Colour, {Colour.RED: 1}]) == [Colour, {Colour.RED: 1}]
""")

ENUM_MEMBERS = program("""
    class Rich(enum.Enum):
        A = (1, 2)
        B = (3, 4)
        def __init__(self, x, y): self.x = x; self.y = y
        def total(self): return self.x + self.y
        @property
        def double(self): return 2 * self.x
        @classmethod
        def first(cls): return cls.A
        @staticmethod
        def answer(): return 42
    class Side(enum.Enum):
        LEFT = enum.auto()
        RIGHT = enum.auto()
        def other(self): return Side.LEFT if self is Side.RIGHT else Side.RIGHT
        @classmethod
        def _missing_(cls, value): return cls.LEFT
    # run
    def use(m): return m.x, m.total(), m.double, type(m).first() is Rich.A, m.answer()
    assert wm.process(use, [Rich.A, Rich.B]) == [(1, 3, 2, True, 42), (3, 7, 6, True, 42)]
    assert wm.process(lambda s: s.other(), list(Side)) == [Side.RIGHT, Side.LEFT]
    assert wm.process(Side, [7]) == [Side.LEFT]
    assert wm.process(same, [Rich.B]) == [Rich.B]
""")

TEXT_ENUM = program("""
    class Kind(str, enum.Enum):
        SIGNAL = "signal"
        NOISE = "noise"
    # run
    assert wm.process(same, list(Kind)) == list(Kind)
    assert wm.process(lambda k: (k is Kind.NOISE, k.upper()), [Kind.NOISE]) == [(True, "NOISE")]
""")

NAMED_TUPLE = program("""
    class Hit(typing.NamedTuple):
        x: int
        y: int = 5
        def total(self): return self.x + self.y
        @property
        def double(self): return 2 * self.x
    # run
    def look(h): return h.total(), h.double, h._replace(x=0)
    assert wm.process(look, [Hit(1)]) == [(6, 2, Hit(0))]
    assert type(wm.process(same, [Hit(1)])[0]) is Hit
    assert wm.process(Hit, [3]) == [Hit(3)]
""")

TASKS = program("""
    class Sum(Task):
        def __init__(self, factor): self.factor = factor
        def initialize_local(self): self.total = 0
        def process(self, jobid, item): return abroad() and self.factor * item
        def merge_results(self, result, jobid=-1): self.total += result
        def results(self): return self.total
    # run
    assert wm.process(Sum(2), range(10)) == 90
    assert wm.process(Sum(3), range(10)) == 135
""")

RESULTS = program("""
    def make(item):
        class Local:
            def __init__(self): self.x = item
            class Nested:
                z = 3
        return {"lambda": lambda x: x + item, "instance": Local(), "nested": Local.Nested(),
                "class": Local, "closure": functools.partial(lambda a, b: a + b, item)}
    # run
    for n, made in enumerate(wm.process(make, range(4))):
        assert made["lambda"](10) == made["closure"](10) == 10 + n
        assert made["instance"].x == n and made["nested"].z == 3
        assert isinstance(made["instance"], made["class"])
""")

REFUSED = program("""
    import contextvars, ctypes, random, threading
    from sys import flags, float_info, version_info
    own, entropy = threading.local(), random.SystemRandom()
    class Own(threading.local):
        def __init__(self, x): self.x = x
    with_own = Own(2)
    level, unset = contextvars.ContextVar("level", default=1), contextvars.ContextVar("unset")
    c, maths = ctypes.CDLL(None), ctypes.CDLL("libm.so.6", use_errno=True)
    class Quotient(ctypes.Structure):
        _fields_ = [("quotient", ctypes.c_int), ("rest", ctypes.c_int)]
    c.div.restype = Quotient
    maths.cos.restype, maths.cos.argtypes = ctypes.c_double, [ctypes.c_double]
    cos, absolute, bare = maths.cos, c.abs, c["labs"]
    bare.restype, bare.argtypes = ctypes.c_long, [ctypes.c_long]
    def of_threads(x):
        found = []
        thread = threading.Thread(target=lambda: found.append(hasattr(own, "x")))
        thread.start(); thread.join()
        return own.x, found, with_own.x
    def in_context(x): return level.get(), changes(x), level.get(), unset.get("none")
    def changes(x): level.set(x)
    def of_system(x): return version_info[:2], flags.optimize, float_info.dig, entropy.random() < 1
    def of_c(x):
        return c.abs(-3), c.div(7, 2).rest, cos(0), maths.cos(0), absolute(-x), bare(-(1 << 40))
    # run
    own.x = 5
    assert wm.process(of_threads, [1]) == [(5, [False], 2)]
    assert wm.process(in_context, [3]) == [(1, None, 3, "none")]
    level.set(2)
    assert wm.process(in_context, [3]) == [(2, None, 3, "none")] and level.get() == 2
    assert wm.process(of_system, [1]) == [(version_info[:2], flags.optimize, float_info.dig, True)]
    assert wm.process(of_c, [4]) == [(3, 1, 1.0, 1.0, 4, 1 << 40)]
    assert wm.process(lambda f: f(-9), [absolute]) == [9]
    (there,) = wm.process(lambda x: (cos, level, own, maths), [1])  # and back
    assert there[0](0) == 1.0 and there[1].get() == 2 and there[2].x == 5 and there[3].cos(0) == 1
""")

PROGRAMS = {
    "functions": FUNCTIONS,
    "what pickle refuses": REFUSED,
    "functions that call each other": EACH_OTHER,
    "functions that are given anew": GIVEN_ANEW,
    "what changes between runs": RUN_AGAIN,
    "functions that are objects": CACHED,
    "classes": CLASSES,
    "enums": ENUMS,
    "members of enums": ENUM_MEMBERS,
    "text enum": TEXT_ENUM,
    "named tuple": NAMED_TUPLE,
    "tasks": TASKS,
    "results": RESULTS,
}


STAYS = program("""
    count, text = 0, "a"
    def counts(x):
        global count
        count += 1
        return count
    def marked(x):
        marked.times = getattr(marked, "times", 0) + 1
        return marked.times
    def hides(x):
        globals()["hidden"] = globals().get("hidden", 0) + 1
        return globals()["hidden"]
    def down(x): return 1 if x == 0 else down(x - 1) + helper(x)
    def helper(x): return len(text)
    def marks(x):
        helper.__defaults__ = None, 1
        return helper.__defaults__
    # run
    def submit(function, item): return one.executor.submit(function, item).result()
    with WorkManager(1, silent=True) as one:
        for n in 1, 2, 3:  # calls of a pool see what others have left
            assert submit(counts, 0) == submit(marked, 0) == submit(hides, 0) == n
            assert submit(down, 3) == 4
            assert submit(marks, 0) == (None, 1)
            # a run begins with what is here
            assert one.process(counts, [0, 0]) == one.process(marked, [0, 0]) == [1, 2]
        text, count = "bc", 10  # and so does what is changed here
        assert submit(down, 3) == 7
        assert submit(counts, 3) == 11
""")

GO_ON = program("""
    import os, pathlib, sys
    from ostap_parallel import Executor, Pool
    from ostap_parallel.pools import ParallelPool
    count, loaded, offset = 0, {}, 0
    def counts(x):
        global count
        count += 1
        loaded[x] = None
        return count, len(loaded)
    def plus(x): return x + offset
    class Sum:
        def __init__(self): self.total = 0
        def add(self, x): self.total += x; return self.total
    class Needs:
        def __call__(self, x): return x
        def __reduce__(self): return read, ()
    def read():
        import appears
        return abs
    # run
    one, pool, pathos = Executor(1), Pool(1), ParallelPool(1)
    for map_ in lambda *what: list(one.map(*what)), pool.map, pathos.map:
        assert map_(counts, [0, 0]) == [(1, 1), (2, 1)]  # what tasks have loaded is there
        assert map_(counts, [0, 1]) == [(3, 1), (4, 2)]  # in the next map, too
    pathos.clear()
    assert one.submit(counts, 2).result() == (5, 3)
    with WorkManager(executor=one, silent=True) as wm:
        assert wm.process(counts, [0]) == [(1, 1)]  # a run has its own
    assert list(one.map(counts, [2])) == [(6, 3)]
    count = 100  # what is changed here counts
    assert list(one.map(counts, [2])) == [(101, 3)]
    for _ in range(2):  # each item has an object of its own, as the originals send it
        assert pool.map(Sum().add, [1, 2]) == list(one.map(Sum().add, [1, 2])) == [1, 2]
    asked = []  # each with what was there then, though they take turns
    for offset in 10, 20, 30:
        asked.append(pool.map_async(plus, range(5), 1))
        asked.append(one.map(plus, range(5)))
    offset = 40
    for n, found in enumerate(asked):
        wanted = [x + 10 * (n // 2 + 1) for x in range(5)]
        assert (found.get() if n % 2 == 0 else list(found)) == wanted, n
    try: pool.map(Needs(), [1])
    except ModuleNotFoundError: pathlib.Path("appears.py").touch()
    assert pool.map(Needs(), [1]) == [1]  # an error is not kept
    draw = os.urandom
    os.urandom = lambda size: b"+" + draw(size - 1)  # whatever is drawn, a run has its own
    with WorkManager(executor=one, silent=True) as wm:
        assert [wm.process(counts, [5]) for _ in range(2)] == [[(101, 1)], [(101, 1)]]
    one.shutdown()
    pool.terminate()
""")

CHANGES = program("""
    import math
    class cmath:  # stands where a module was
        floor = staticmethod(lambda x: "other")
    def plain(x, y=1): return x + y
    def times_ten(x, y): return x * 10
    def rounds(x): return math.floor(x)
    def calls(x): return two(x)
    def has(x): return has.found + x
    # run
    def submit(function, item): return wm.executor.submit(function, item).result()
    assert submit(plain, 1) == submit(plain, 1) == 2
    plain.__defaults__ = (5,)
    assert submit(plain, 1) == 6
    plain.__code__ = times_ten.__code__
    assert submit(plain, 1) == 10
    assert submit(rounds, 1.5) == 1
    math = cmath
    assert submit(rounds, 1.5) == "other"
    for added in 1, 2:
        def two(x): return x + added
        has.found = added
        assert submit(calls, 1) == submit(has, 1) == 1 + added
""")


@pytest.mark.slow
class TestMain:
    def test_calls_of_a_pool_share_a_program_and_runs_begin_anew(self, tmp_path):
        assert run_python("-c", STAYS, cwd=tmp_path) == "ok\n"

    def test_maps_of_a_pool_go_on_with_what_tasks_have_left(self, tmp_path):
        assert run_python("-c", GO_ON, cwd=tmp_path) == "ok\n"

    def test_what_a_function_is_when_it_is_sent_counts(self, tmp_path):
        assert run_python("-c", CHANGES, cwd=tmp_path) == "ok\n"

    @pytest.mark.parametrize("name", PROGRAMS)
    def test_of_a_script(self, tmp_path, name):
        (tmp_path / "script.py").write_text(PROGRAMS[name])
        assert run_python("script.py", cwd=tmp_path) == "ok\n"

    @pytest.mark.parametrize("name", ["functions", "classes"])
    def test_of_the_command_line(self, tmp_path, name):
        assert run_python("-c", PROGRAMS[name], cwd=tmp_path) == "ok\n"

    @pytest.mark.parametrize("how", ["file", "command"])
    def test_of_ipython(self, tmp_path, how):
        pytest.importorskip("IPython")
        text = program("""
            class Point:
                def __init__(self, x): self.x = x
            def shift(p):
                return Point(p.x + OFFSET)
            OFFSET = 10
            # run
            found = wm.process(shift, [Point(n) for n in range(4)])
            assert [type(p) is Point and p.x for p in found] == [10, 11, 12, 13]
            assert wm.process(lambda x: x ** 2, range(4)) == [0, 1, 4, 9]
        """)
        (tmp_path / "script.py").write_text(text)
        what = ["script.py"] if how == "file" else ["-c", text]
        ipython = ["-m", "IPython", "--no-banner", "--colors=NoColor", *what]
        out = run_python(*ipython, cwd=tmp_path, IPYTHONDIR=str(tmp_path), TERM="dumb")
        assert out.splitlines()[-1] == "ok"

    def test_of_a_module_that_is_run(self, tmp_path):
        package = tmp_path / "package"
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "other.py").write_text("def three(): return 3\n")
        text = program("""
            from . import other
            def use(x): return x + other.three()
            # run
            assert wm.process(use, [1]) == [4]
        """)
        (package / "tool.py").write_text(text)
        assert run_python("-m", "package.tool", cwd=tmp_path) == "ok\n"

    def test_modules_beside_the_script(self, tmp_path):
        (tmp_path / "my_functions.py").write_text("def triple(x): return 3 * x\n")
        text = program("""
            import my_functions
            def use(x): return my_functions.triple(x)
            # run
            assert wm.process(my_functions.triple, [1]) == wm.process(use, [1]) == [3]
        """)
        (tmp_path / "script.py").write_text(text)
        (tmp_path / "elsewhere").mkdir()
        assert run_python("../script.py", cwd=tmp_path / "elsewhere") == "ok\n"


class TestHere:
    """From a module that workers can import; only what is inside functions cannot be."""

    def test_inline_lambdas_bring_nothing_else_of_their_line(self, wm, capsys):
        squares = wm.process(lambda x: x * x, range(3)) and print("once")
        assert squares is None
        assert capsys.readouterr().out == "once\n"

    def test_closures(self, wm):
        seen = []

        def outer(n):
            def inner(x):
                seen.append(x)  # of the worker's copy
                return x + n

            return inner

        assert wm.process(outer(5), range(3)) == [5, 6, 7]
        assert seen == []

    @pytest.mark.parametrize(
        ("function", "items", "expected"),
        [
            (len, ["abc"], [3]),
            (str.upper, ["abc"], ["ABC"]),
            ("a-b".split, ["-"], [["a", "b"]]),
            (operator.itemgetter(1), ["abc"], ["b"]),
            (functools.partial(int, base=2), ["101"], [5]),
            (re.compile(r"\d+").findall, ["a1b22"], [["1", "22"]]),
            (functions.square, [3], [9]),
        ],
    )
    def test_callables(self, wm, function, items, expected):
        assert wm.process(function, items) == expected

    @pytest.mark.parametrize(
        "item",
        [
            None,
            True,
            2**100,
            1.5,
            2j,
            "text \N{SNOWMAN} \ud800",
            b"bytes",
            bytearray(b"array"),
            (),
            [[]],
            {"a": {1, 2}},
            frozenset({3}),
            range(5),
            Ellipsis,
            NotImplemented,
            int,
            type(None),
            ValueError("x").__class__,
            slice(1, 2),
            Path("/a"),
            re.compile("x+"),
            sys,
            functions,
            functions.square,
            inspect.Parameter.empty,
        ],
        ids=lambda item: type(item).__name__,
    )
    def test_items_go_forth_and_back(self, wm, item):
        (back,) = wm.process(functions.same, [item])
        assert back == item
        assert type(back) is type(item)

    def test_arrays(self, wm):
        np = pytest.importorskip("numpy")
        array = np.arange(100_000.0).reshape(100, 1000)
        (back,) = wm.process(lambda a: a * 2, [array])
        assert (back == array * 2).all()
        assert wm.process(lambda x: x + 1, np.arange(3)) == [1, 2, 3]

    def test_one_object_in_an_item_stays_one(self, wm):
        part = []
        ((one, other),) = wm.process(functions.same, [(part, part)])
        assert one is other

    def test_deep_nesting_is_an_error_that_names_the_item(self, wm):
        deep = []
        for _ in range(100_000):
            deep = [deep]
        try:
            with pytest.raises(SerializeError, match=r"item 0 .a list."):
                wm.process(functions.same, [deep])
        finally:
            while deep:  # or its end would be as deep
                deep = deep[0]


class TestBytes:
    """The functions below it all, without workers."""

    def test_data_is_plain_pickle(self):
        data = {"a": [1, 2.5, "x", (None, b"y")], "f": functions.square, "c": functions.Refusal}
        assert serialize.dumps(data) == pickle.dumps(data, serialize.PROTOCOL)

    def test_what_is_importable_goes_by_name(self):
        assert b"square" in serialize.dumps(functions.square)
        assert len(serialize.dumps(functions.square)) < 100

    def test_the_error_says_what_and_why(self):
        with pytest.raises(SerializeError) as caught:
            serialize.pack(functions.Unsendable(), "my thing")
        error = pickle.loads(pickle.dumps(caught.value))
        assert (error.what, error.reason) == ("my thing", "ValueError: stays here")

    def test_functions_that_are_alike_keep_their_files(self):
        made = [{}, {}]
        for number, names in enumerate(made):
            exec(compile("def f(x): return x / 0", f"file{number}.py", "exec"), names)
        names = [serialize.loads(serialize.dumps(one["f"])).__code__.co_filename for one in made]
        assert names == ["file0.py", "file1.py"]

    def test_a_class_of_ours_is_the_same_after_a_round_trip(self):
        class Local:
            pass

        assert serialize.loads(serialize.dumps(Local)) is Local
        assert type(serialize.loads(serialize.dumps(Local()))) is Local

    def test_a_round_trip_here_leaves_the_class_alone(self):
        class Local:
            def method(self):
                return 1

        method = Local.method
        serialize.loads(serialize.dumps(Local()))
        assert Local.method is method

    def test_a_cache_makes_many_instances_small_work(self):
        class Local:
            pass

        cache = {}
        first = serialize.dumps(Local(), cache=cache)
        assert set(cache) == {Local}
        assert serialize.dumps(Local(), cache=cache) == first


class Unannotated:
    """Stands for a function of Python 3.14 whose annotations name what is not there."""

    @property
    def __annotations__(self):
        raise NameError("name 'ForTypeCheckers' is not defined")


def test_annotations_that_cannot_be_had_are_none():
    assert byvalue.annotations_of(Unannotated()) == {}
    assert byvalue.annotations_of(byvalue.annotations_of) == byvalue.annotations_of.__annotations__
