"""Programs, one for each kind of what scripts define: what it means here it means on workers.

Each runs as a script, and asserts by itself: `wm` is a manager of it.
"""

from __future__ import annotations

import textwrap

# Submodules that are used by their dotted names, also where another import has loaded them.
SUBMODULES = """
    import concurrent.futures
    import importlib.util
    import logging.handlers
    import os.path
    import urllib.request
    import xml.dom.minidom
    import email.mime.text as text
    def quote(x): return urllib.request.quote(x)
    def parse(x): return xml.dom.minidom.parseString(x).documentElement.tagName
    def find(x): return importlib.util.find_spec(x) is not None
    def base(x): return os.path.basename(x)
    def thread(x):
        with concurrent.futures.ThreadPoolExecutor(1) as pool: return pool.submit(len, x).result()
    class Handled:
        def capacity(self, x): return logging.handlers.BufferingHandler(x).capacity
    def mime(x): return text.MIMEText(x).get_payload()
    # run
    assert wm.process(quote, ["a b"]) == ["a%20b"]
    assert wm.process(parse, ["<t/>"]) == ["t"]
    assert wm.process(find, ["os"]) == [True]
    assert wm.process(base, ["a/b"]) == ["b"]
    assert wm.process(thread, ["abc"]) == [3]
    assert wm.process(Handled().capacity, [3]) == [3]
    assert wm.process(mime, ["x"]) == ["x"]
    assert wm.process(lambda x: xml.dom.minidom.parseString(x).nodeType, ["<t/>"]) == [9]
"""

NAMES_ITSELF = """
    class Vec:
        def __init__(self, x): self.x = x
        def plus(self): return self.x + Vec.ONE.x
        def grown(self): return Vec(self.x + 1)
    Vec.ONE = Vec(1)
    class Plugin:
        known = {}
        def __init_subclass__(cls): Plugin.known[cls.__name__] = cls
    class First(Plugin):
        def run(self): return 1
    class Meta(type):
        known = {}
        def __init__(cls, name, bases, namespace):
            super().__init__(name, bases, namespace); Meta.known[name] = cls
    class Registered(metaclass=Meta):
        def run(self): return 2
    @dataclasses.dataclass
    class Conf:
        n: int = 1
        default: typing.ClassVar["Conf"] = None
    Conf.default = Conf(5)
    class Trouble(Exception): pass
    Trouble.usual = Trouble("usual")
    def fail(x): raise Trouble(x)
    class Shape:
        @functools.singledispatchmethod
        def area(self, x): return "any"
        @area.register
        def _(self, x: int): return "int"
    class Left: pass
    class Right: pass
    Left.other, Right.other = Right(), Left()
    class Parent:
        def make(self): return type(self), __class__
    # run
    assert wm.process(lambda v: v.plus(), [Vec(2)]) == [3]
    assert type(wm.process(lambda v: v.grown(), [Vec(2)])[0]) is Vec
    assert wm.process(lambda name: Plugin.known[name]().run(), ["First"]) == [1]
    assert wm.process(lambda x: First().run(), [1]) == [1]
    assert wm.process(lambda name: Meta.known[name]().run(), ["Registered"]) == [2]
    assert wm.process(lambda x: Conf.default.n, [1]) == [5]
    assert type(wm.process(Vec, [1])[0]) is Vec
    try: wm.process(fail, [1])
    except Trouble: pass
    else: raise AssertionError
    assert wm.process(lambda s: (s.area(1), s.area("a")), [Shape()]) == [("int", "any")]
    assert wm.process(lambda x: type(x.other.other) is type(x), [Left(), Right()]) == [True, True]
    assert wm.process(Parent.make, [Parent()]) == [(Parent, Parent)]
"""

HOOKS = """
    class Base:
        kinds = {}
        def __init_subclass__(cls, kind, **more):
            super().__init_subclass__(**more)
            assert kind == "a", kind
            Base.kinds[kind] = cls
            assert cls.must_have
    class Sub(Base, kind="a"):
        must_have = True
        def run(self): return 3
    class Keyed(type):
        def __new__(meta, name, bases, namespace, *, key):
            cls = super().__new__(meta, name, bases, namespace); cls.key = key; return cls
        def __init__(cls, name, bases, namespace, *, key): super().__init__(name, bases, namespace)
    class WithKey(metaclass=Keyed, key=7):
        def run(self): return 4
    class Described:
        def __set_name__(self, owner, name): self.name = name
        def __get__(self, obj, owner=None): return self.name
    class Owner:
        field = Described()
    # run
    assert wm.process(lambda s: s.run(), [Sub()]) == [3]
    assert wm.process(lambda x: Base.kinds[x]().run(), ["a"]) == [3]
    assert wm.process(lambda w: (w.run(), type(w).key), [WithKey()]) == [(4, 7)]
    assert wm.process(lambda o: o.field, [Owner()]) == ["field"]
"""

HOOKED_BASES = """
    import abc
    T = typing.TypeVar("T")
    KNOWN = []
    class Abstract(abc.ABC):
        def __init_subclass__(cls, **more):
            super().__init_subclass__(**more); KNOWN.append(cls.must_have)
        @abc.abstractmethod
        def run(self): ...
    class Concrete(Abstract):
        must_have = 1
        def run(self): return 1
    class Generic(typing.Generic[T]):
        def __init_subclass__(cls, *, kind, **more):
            super().__init_subclass__(**more); cls.kind = kind
    class Bound(Generic[int], kind=2):
        def run(self): return self.kind
    class Protocol(typing.Protocol):
        def __init_subclass__(cls, **more): super().__init_subclass__(**more); cls.must_have
        must_have = 1
        def run(self) -> int: ...
    class Follows(Protocol):
        def run(self): return 3
    class Dict(collections.UserDict):
        def __init_subclass__(cls, **more): super().__init_subclass__(**more); cls.must_have
    class OwnDict(Dict):
        must_have = 1
        def run(self): return len(self) + 4
    class Mapping(collections.abc.Mapping):
        def __init_subclass__(cls, **more): super().__init_subclass__(**more); cls.must_have
    class OwnMapping(Mapping):
        must_have = 1
        def __getitem__(self, key): return key
        def __iter__(self): return iter("a")
        def __len__(self): return 1
        def run(self): return len(dict(self)) + 4
    class Slotted:
        __slots__ = ("a",)
        def __init_subclass__(cls, **more): super().__init_subclass__(**more); cls.must_have
    class MoreSlots(Slotted):
        __slots__ = ("b",)
        must_have = 1
        def run(self): return 6 + hasattr(self, "__dict__")
    ALL = Concrete, Bound, Follows, OwnDict, OwnMapping, MoreSlots
    def later(x):
        class Late(Abstract):
            must_have = 7
            def run(self): pass
        return KNOWN[-1]
    # run
    assert wm.process(lambda o: o.run(), [c() for c in ALL]) == [1, 2, 3, 4, 5, 6]
    assert wm.process(lambda n: ALL[n]().run(), range(6)) == [1, 2, 3, 4, 5, 6]
    assert wm.process(later, [1]) == [7]
"""

BY_NAME = """
    T = typing.TypeVar("T")
    P = typing.ParamSpec("P")
    UserId = typing.NewType("UserId", int)
    class Missing:
        def __reduce__(self): return "MISSING"
    MISSING = Missing()
    def same_type(x: T) -> T: return x
    def called(x: typing.Callable[P, T]): return x
    def user(x: UserId) -> UserId: return UserId(x)
    def default(x, y=MISSING): return y is MISSING
    @dataclasses.dataclass
    class Node(typing.Generic[T]):
        value: T
    class Bounded(typing.Generic[T]):
        kind: typing.ClassVar[type] = int
        def first(self, x: "list[T]") -> T: return x[0]
    Pairs = list[tuple[T, T]]
    # run
    assert wm.process(same_type, [1]) == wm.process(user, [1]) == wm.process(called, [1]) == [1]
    assert wm.process(lambda x: Node(x).value, [1]) == [1]
    assert wm.process(default, [1]) == [True]
    assert wm.process(lambda x: x is MISSING, [MISSING]) == [True]
    assert wm.process(lambda x: MISSING, [1])[0] is MISSING
    assert wm.process(lambda b: b.first([4]), [Bounded()]) == [4]
    assert wm.process(lambda x: Node[int](x).value, [1]) == [1]
    assert wm.process(lambda x: len(typing.get_args(Pairs)), [1]) == [1]
    assert wm.process(lambda x: typing.get_type_hints(same_type)["x"] is T, [1]) == [True]
"""

NEW_GENERICS = """
    class S[T]:
        def __init__(self, x: T): self.x = x
        def get(self) -> T: return self.x
    def first[T](x: list[T]) -> T: return x[0]
    type A = int | list[A]
    def alias(x: A) -> A: return A.__value__ is not None
    # run
    assert wm.process(lambda x: S(x).get(), [1]) == [1]
    assert wm.process(lambda s: s.get(), [S(2)]) == [2]
    assert type(wm.process(S, [1])[0]) is S
    assert wm.process(first, [[3]]) == [3]
    assert wm.process(alias, [1]) == [True]
"""

GENERIC_BASES = """
    import pathlib, tempfile
    D = tempfile.mkdtemp(); sys.path.insert(0, D)
    pathlib.Path(D, "storage.py").write_text('''
    import typing
    T = typing.TypeVar("T")
    KNOWN = {}
    class Store(typing.Generic[T]):
        def __init__(self, x): self.x = x
        def get(self): return self.x
    class Known:
        def __init_subclass__(cls, **keywords): KNOWN[cls.__name__] = cls
    ''')
    import storage
    class Mine(storage.Store):
        def twice(self): return 2 * self.x
    class Fixed(storage.Store[int]):
        limit = 1
    class Proto(typing.Protocol):
        def run(self): ...
    class Runs(Proto):
        def run(self): return 8
    class Kept(storage.Known): pass
    def is_store(o): return isinstance(o, storage.Store)
    # run
    assert wm.process(is_store, [Mine(1)]) == [True], "the class has lost its base"
    assert wm.process(lambda x: Mine(x).get(), [3]) == [3]
    assert wm.process(lambda x: Mine(x).twice(), [3]) == [6]
    for Fixed.limit in 1, 2:
        assert wm.process(lambda x: Fixed.limit, [0]) == [Fixed.limit], "changes do not arrive"
    assert wm.process(lambda r: r.run(), [Runs()]) == [8]
    assert wm.process(lambda x: storage.KNOWN["Kept"] is Kept, [0]) == [True]
"""

ENUM_MAKERS = """
    @dataclasses.dataclass
    class Size:
        mass: float
        legs: int = 0
    class Beast(Size, enum.Enum):
        BEETLE = 0.1, 6
        DOG = 20.0, 4
    class Axis(bytes, enum.Enum):
        def __new__(cls, value, label):
            obj = bytes.__new__(cls, [value]); obj._value_ = value; obj.label = label
            return obj
        X = 0, "east"
        Y = 1, "north"
    class Planet(enum.Enum):
        EARTH = (5.9, 6.3)
        def __init__(self, mass, radius): self.mass, self.radius = mass, radius
        @property
        def density(self): return self.mass / self.radius
    class Numbered(enum.Enum):
        def __new__(cls, text):
            obj = object.__new__(cls); obj._value_ = len(cls.__members__) + 1; obj.text = text
            return obj
        ONE = "one"
        TWO = "two"
    class Plain(enum.Enum):
        def _generate_next_value_(name, start, count, last): return name.lower()
        RED = enum.auto()
    class Perm(enum.Flag):
        R = 4
        W = 2
        RW = R | W
        @classmethod
        def parse(cls, text): return cls[text.upper()]
    class Ordered(enum.IntEnum):
        LOW = 1
        HIGH = 2
        LEAST = 1
    # run
    assert wm.process(lambda b: (b.legs, b.mass), list(Beast)) == [(6, 0.1), (4, 20.0)]
    assert wm.process(lambda a: a.label, list(Axis)) == ["east", "north"]
    assert wm.process(lambda a: Axis(1) is Axis.Y, [0]) == [True]
    assert wm.process(lambda p: p.density, [Planet.EARTH]) == [Planet.EARTH.density]
    assert wm.process(lambda n: (n.text, Numbered(2) is Numbered.TWO), list(Numbered)) == [
        ("one", True), ("two", True)]
    assert wm.process(lambda p: p.value, list(Plain)) == ["red"]
    assert wm.process(lambda p: (Perm.parse("r") in p, p is Perm.R | Perm.W), [Perm.RW]) == [
        (True, True)]
    assert wm.process(lambda o: o is Ordered.LEAST, list(Ordered)) == [True, False]
    assert wm.process(same, [*Beast, *Axis, *Numbered]) == [*Beast, *Axis, *Numbered]
"""

ENUM_FUNCTIONS = """
    class Op(enum.Enum):
        ADD = enum.member(lambda a, b: a + b)
        def __call__(self, a, b): return self.value(a, b)
    class Part(enum.Enum):
        HALF = enum.member(functools.partial(int.__floordiv__))
        @enum.nonmember
        class Inner: z = 3
    # run
    assert wm.process(lambda o: o(2, 3), [Op.ADD]) == [5]
    assert wm.process(lambda p: p.Inner.z, [Part.HALF]) == [3]
"""

METACLASSES = """
    import abc, array, copyreg
    class Creator(type):
        def __new__(meta, name, base, namespace):
            return super().__new__(meta, name, (base,), namespace)
        def __init__(cls, name, base, namespace): super().__init__(name, (base,), namespace)
        def __reduce__(cls): return create, (cls.__name__, cls.__bases__[0], cls.extra)
    copyreg.pickle(Creator, Creator.__reduce__)
    def create(name, base, extra):
        made = Creator(name, base, {"extra": extra, "fitness": lambda self: len(self) + extra})
        globals()[name] = made
        return made
    create("Individual", list, 5)
    class Registry(abc.ABCMeta):
        def __new__(meta, name, bases, namespace):
            cls = super().__new__(meta, name, bases, namespace); cls.tag = name.lower(); return cls
    class Strict(type):
        def __setattr__(cls, name, value):
            if name.startswith("_no"): raise AttributeError("refused")
            super().__setattr__(name, value)
        def __delattr__(cls, name): raise AttributeError("refused")
    class Refuses(metaclass=Strict):
        _no = 1
        def run(self): return self._no
    class Reduced:
        def __init__(self, x): self.x = x
    def reduce(one): return remake, (one.x + 100,)
    def remake(x): return Reduced(x)
    copyreg.pickle(Reduced, reduce)
    class Hidden:
        __slots__ = "__own", "y"
        def __init__(self, own): self.__own = own
        def run(self): return self.__own
    class Tagged(metaclass=Registry):
        @abc.abstractmethod
        def f(self): ...
    class Done(Tagged):
        def f(self): return self.tag
    # run
    assert wm.process(lambda i: i.fitness(), [Individual([1, 2])]) == [7]
    assert wm.process(lambda x: Individual([x]).fitness(), [1]) == [6]
    assert type(wm.process(same, [Individual([1])])[0]) is Individual
    assert wm.process(lambda d: (d.f(), isinstance(d, Tagged)), [Done()]) == [("done", True)]
    assert wm.process(lambda r: r.run(), [Refuses()]) == [1]
    assert wm.process(lambda r: r.x, [Reduced(1)]) == [101]
    assert wm.process(lambda r: r, [Reduced(1)])[0].x == 201  # it travels twice
    assert wm.process(lambda h: h.run(), [Hidden(3)]) == [3]
"""

LOCKS = """
    import logging, threading
    LOCK, RLOCK, COND = threading.Lock(), threading.RLock(), threading.Condition()
    EVENT, SEMAPHORE = threading.Event(), threading.Semaphore(2)
    HANDLER = logging.Handler()
    class Fit:
        def __init__(self, n): self.n = n
        @functools.cached_property
        def square(self): return self.n ** 2
    class Box:
        def __init__(self, x):
            self.x, self.lock, self.plain = x, threading.RLock(), threading.Lock()
    def locked(x):
        with LOCK, RLOCK, COND, SEMAPHORE: return x
    def set_event(x): EVENT.set(); return EVENT.is_set()
    def handled(x): HANDLER.acquire(); HANDLER.release(); return x
    RLOCK.acquire()
    # run
    assert wm.process(lambda f: f.square, [Fit(3)]) == [9]
    assert wm.process(locked, [1]) == [1]
    assert wm.process(set_event, [1]) == [True]
    assert wm.process(handled, [1]) == [1]
    (box,) = wm.process(Box, [1])
    assert box.lock.acquire(timeout=2) and box.plain.acquire(timeout=2)
"""

FILES = """
    import pathlib, tempfile
    FOLDER = tempfile.mkdtemp()
    LOG = open(os.path.join(FOLDER, "log.txt"), "w"); LOG.write("a header\\n"); LOG.flush()
    READ = open(LOG.name)
    TEMP = tempfile.NamedTemporaryFile("w+"); TEMP.write("mine"); TEMP.flush()
    RAW = open(os.path.join(FOLDER, "raw.txt"), "wb"); RAW.write(b"raw"); RAW.flush()
    def write(x): LOG.write("x"); return x
    def name(x): return TEMP.name
    def raw(x): return RAW.name
    def give(path):
        file = open(path, "w"); file.write("done"); file.flush()
        return file
    def quiet(call, *args):
        try: call(*args)
        except Exception as exc: return str(exc)
        return "no error"
    import logging
    class Noisy:
        def __init__(self): self.handler = logging.FileHandler(os.path.join(FOLDER, "h.txt"), "w")
    # run
    for function in write, name, raw:
        assert "file" in quiet(wm.process, function, [1])
    assert "file" in quiet(wm.process, same, [TEMP])
    noisy = Noisy(); pathlib.Path(FOLDER, "h.txt").write_text("kept")
    assert "file" in quiet(wm.process, same, [noisy])
    assert pathlib.Path(FOLDER, "h.txt").read_text() == "kept"
    assert pathlib.Path(LOG.name).read_text() == "a header\\n"
    assert pathlib.Path(RAW.name).read_text() == "raw"
    assert os.path.exists(TEMP.name)
    result = os.path.join(FOLDER, "result.txt")
    assert "file" in quiet(wm.process, give, [result])
    assert not os.path.exists(result) or pathlib.Path(result).read_text() == "done"
    assert wm.process(lambda x: print(x, file=sys.stdout) or 1, ["out"]) == [1]
    STREAM = sys.stderr
    assert wm.process(lambda x: STREAM is sys.stderr, [1]) == [True]
"""

MADE_MODULES = """
    import importlib.util, pathlib, tempfile, types
    FILE = pathlib.Path(tempfile.mkdtemp(), "odd name.py")
    FILE.write_text("K = 5\\ndef add(x): return x + K\\n"
        "class Thing:\\n    def go(self): return add(1)\\n")
    spec = importlib.util.spec_from_file_location("made_of_a_file", FILE)
    made = importlib.util.module_from_spec(spec); sys.modules["made_of_a_file"] = made
    spec.loader.exec_module(made)
    loose = importlib.util.module_from_spec(spec)  # not even in sys.modules
    spec.loader.exec_module(loose)
    bare = types.ModuleType("bare_module"); sys.modules["bare_module"] = bare
    exec("def triple(x): return x * 3 + (extra or 0)\\nextra = None", vars(bare))
    def use(x): return made.add(x)
    def use_loose(x): return loose.add(x)
    def use_bare(x): return bare.triple(x)
    def import_bare(x):
        import bare_module
        from made_of_a_file import add
        return bare_module.triple(x), add(x)
    class Imports:
        def go(self, x):
            import bare_module as one
            return one.triple(x)
    # run
    assert wm.process(made.add, [1]) == wm.process(use, [1]) == wm.process(use_loose, [1]) == [6]
    assert wm.process(lambda t: t.go(), [made.Thing()]) == [6]
    assert type(wm.process(same, [made.Thing()])[0]) is made.Thing
    assert wm.process(bare.triple, [2]) == wm.process(use_bare, [2]) == [6]
    assert wm.process(import_bare, [2]) == [(6, 7)] and wm.process(Imports().go, [2]) == [6]
"""

CTYPES = """
    import ctypes
    class Point(ctypes.Structure):
        _fields_ = [("x", ctypes.c_int), ("y", ctypes.c_double)]
        def total(self): return self.x + self.y
    class Both(ctypes.Union):
        _fields_ = [("i", ctypes.c_int), ("b", ctypes.c_byte * 4)]
    Row = Point * 2
    def tabulated(x): return tabulated.table[x]
    tabulated.table = {1: "one"}
    def counted(x): counted.calls += 1; return counted.calls
    counted.calls = 0
    # run
    assert wm.process(lambda p: p.total(), [Point(1, 2.5)]) == [3.5]
    assert wm.process(lambda x: Point(x, 1).total(), [1]) == [2]
    assert wm.process(lambda x: Both(i=x).i, [1]) == [1]
    assert wm.process(lambda x: ctypes.sizeof(Point) == x, [ctypes.sizeof(Point)]) == [True]
    assert wm.process(lambda x: Row(Point(x, 1))[0].x, [4]) == [4]
    (back,) = wm.process(same, [Point(1, 2)]); assert type(back) is Point and back.y == 2
    assert wm.process(tabulated, [1]) == ["one"]
    assert wm.process(counted, [1]) == [1]
"""

CLOSURES_OF_MODULES = """
    import pathlib, tempfile
    D = tempfile.mkdtemp(); sys.path.insert(0, D)
    pathlib.Path(D, "makers.py").write_text('''
    STATE = (n for n in ())  # cannot be sent
    COUNT = [0]
    def bump(): COUNT[0] += 1; return COUNT[0]
    def maker(n):
        def inner(x):
            getattr(STATE, "n", None)
            return bump() * 0 + x + n
        return inner
    def counter():
        def count(x): COUNT[0] += 1; return COUNT[0], bump()
        return count
    ''')
    pathlib.Path(D, "packed").mkdir()
    pathlib.Path(D, "packed", "inner.py").write_text("def value(): return 7")
    pathlib.Path(D, "packed", "__init__.py").write_text('''
    def relative():
        def inner(x):
            from . import inner as one
            from .inner import value
            return one.value() + value() + x
        return inner
    ''')
    import makers, packed
    # run
    assert wm.process(makers.maker(5), [1]) == [6]
    assert wm.process(packed.relative(), [1]) == [15]
    ((own, seen),) = wm.process(makers.counter(), [1])
    assert seen == own + 1, "its globals are copies"
"""

REGISTERED = """
    import cloudpickle, pathlib, tempfile
    D = tempfile.mkdtemp(); sys.path.insert(0, D)
    pathlib.Path(D, "here_only").mkdir()
    pathlib.Path(D, "here_only", "inner.py").write_text('''
    K = 3
    class Thing:
        def go(self): return K
    ''')
    pathlib.Path(D, "here_only", "__init__.py").write_text('''
    from here_only.inner import K, Thing
    FACTOR = 2
    def scaled(x): return x * FACTOR * K
    ''')
    import here_only
    cloudpickle.register_pickle_by_value(here_only)
    here_only.FACTOR = 5
    def use(x): return here_only.scaled(x)
    # run
    assert wm.process(here_only.scaled, [1]) == wm.process(use, [1]) == [15]
    assert wm.process(lambda one: one.go(), [here_only.Thing()]) == [3]
    assert type(wm.process(same, [here_only.Thing()])[0]) is here_only.Thing
    assert cloudpickle.list_registry_pickle_by_value() == {"here_only"}
"""
REDUCERS = """
    import collections, contextvars, types, weakref
    class Odd:
        def __init__(self, x): self.x = x
        def __reduce__(self): return Odd, (self.x + 1,)
    class Stated:
        def __init__(self): self.x, self.gen = 1, (n for n in ())
        def __getstate__(self): return {"x": self.x}
    class Slotted:
        __slots__ = "a", "__dict__"
    class Named(str):
        def __new__(cls, text): self = super().__new__(cls, text); self.more = 1; return self
    Point = collections.namedtuple("Point", "x y")
    class Typed(typing.TypedDict): x: int
    class Cached:
        @functools.lru_cache
        def f(self, x): return x + 1
    class Later:
        def __init__(self): self.f = lambda x: x + 1
    def generic(x: "list[int]", *, key: "Odd" = None): return x
    space = types.SimpleNamespace(a=1)
    view = memoryview(b"abc")
    keys = {"a": 1}.keys()
    proxy = types.MappingProxyType({"a": 1})
    part = functools.partialmethod(lambda self, x: x, 2)
    class WithPart: go = part
    class OfNoModule:
        __module__ = None
        def __reduce__(self): return OfNoModule, ()
        def go(self): return 4
    # run
    assert wm.process(lambda o: o.go(), [OfNoModule()]) == [4]
    assert wm.process(lambda o: o.x, [Odd(1)]) == [2]
    assert wm.process(lambda s: s.x, [Stated()]) == [1]
    slotted = Slotted(); slotted.a = 1; slotted.b = 2
    assert wm.process(lambda s: (s.a, s.b), [slotted]) == [(1, 2)]
    assert wm.process(lambda n: (n, n.more), [Named("a")]) == [("a", 1)]
    assert wm.process(lambda p: p._replace(x=2), [Point(1, 1)]) == [Point(2, 1)]
    assert wm.process(lambda x: Typed(x=x), [1]) == [{"x": 1}]
    assert wm.process(lambda c: c.f(1), [Cached()]) == [2]
    assert wm.process(lambda o: o.f(1), [Later()]) == [2]
    assert wm.process(generic, [1]) == [1]
    assert wm.process(lambda x: (space.a, bytes(view), list(keys), proxy["a"]), [1]) == [
        (1, b"abc", ["a"], 1)]
    assert wm.process(lambda w: w.go(), [WithPart()]) == [2]
"""

PYDANTIC = """
    import pydantic
    class Inner(pydantic.BaseModel):
        x: int = 1
    class Model(pydantic.BaseModel):
        inner: Inner = Inner()
        names: list[str] = []
        @pydantic.field_validator("names")
        @classmethod
        def upper(cls, names): return [name.upper() for name in names]
        def count(self): return len(self.names)
    class Tree(pydantic.BaseModel):
        children: "list[Tree]" = []
    # run
    assert wm.process(lambda m: (m.count(), m.inner.x), [Model(names=["a"])]) == [(1, 1)]
    assert wm.process(lambda x: Model(names=[x]).names, ["a"]) == [["A"]]
    assert type(wm.process(Model, [])) is list
    assert type(wm.process(same, [Model()])[0]) is Model
    assert wm.process(lambda x: len(Tree(children=[Tree()]).children), [1]) == [1]
"""

MIXED = """
    import decimal, fractions, random, re, uuid
    rng = random.Random(3)
    pattern = re.compile("a+")
    class WithGlobals:
        table = {"a": 1}
        def look(self, x): return self.table[x] + OFFSET
    OFFSET = 2
    def gen(n):
        for k in range(n): yield k
    async def co(x): return x
    def run_co(x):
        import asyncio
        return asyncio.run(co(x))
    def nested(x):
        def deeper(y): return [pattern.match(y).group() for _ in gen(2)]
        return deeper(x)
    def star(*args, sep="-", **kw): return sep.join(args)
    class Ctx:
        def __enter__(self): return self
        def __exit__(self, *exc): pass
    def managed(x):
        with Ctx() as ctx: return type(ctx).__name__
    def posonly(x, /, y=1): return x + y
    method = WithGlobals().look
    # run
    assert wm.process(method, ["a"]) == [3]
    assert wm.process(run_co, [1]) == [1]
    assert wm.process(nested, ["aab"]) == [["aa", "aa"]]
    assert wm.process(star, ["a"]) == ["a"]
    assert wm.process(managed, [1]) == ["Ctx"]
    assert wm.process(posonly, [1]) == [2]
    assert wm.process(lambda x: type(rng.random()), [1]) == [float]
"""

SHARED_GLOBALS = """
    A = []; B = {"a": A}; C = (B, A)
    class Ant:
        def __init__(self): self.n, self.friends = 0, A
        def go(self): self.n += 1
    ant = Ant(); actions = [ant.go]; table = {"ant": ant}; table["self"] = table
    REG = {}
    class Base:
        reg = REG
        def __init_subclass__(cls): REG[cls.__name__] = cls
    class X(Base): pass
    class Y(Base): pass
    def by_default(x, cache=A, *, more=B): return cache is A and more is B
    def deco(f, seen=REG):
        @functools.wraps(f)
        def w(x): return seen is REG and f(x)
        return w
    @deco
    def decorated(x): return True
    def grows(x): A.append(x); return B["a"] is A, C[0] is B, C[1] is A, len(B["a"])
    def goes(x): actions[0](); return ant.n, table["ant"] is ant, table["self"] is table
    def knows(x): return Base.reg is REG, X.reg is Y.reg, sorted(REG), REG["X"] is X
    def friend(x): ant.friends.append(x); return len(A)
    class Tree:
        known = {}
        def __init__(self, n, parent=None): self.n, self.parent = n, parent; Tree.known[n] = self
    root = Tree("r"); kid = Tree("k", root)
    def held(x): return kid.parent is root, Tree.known["k"] is kid, Tree.known["r"] is root
    alone, other = [1], {"x": [1]}
    def apart(x): alone.append(x); return other["x"]
    # run
    for _ in range(2):
        assert wm.process(grows, [1, 1], chunk_size=2) == [(True, True, True, n) for n in (1, 2)]
        assert wm.process(goes, [1, 1], chunk_size=2) == [(n, True, True) for n in (1, 2)]
        assert wm.process(knows, [1]) == [(True, True, ["X", "Y"], True)]
        assert wm.process(by_default, [1]) == wm.process(decorated, [1]) == [True]
        assert wm.process(held, [1]) == [(True, True, True)]
        assert wm.process(friend, [1, 1], chunk_size=2) == [1, 2]
        assert wm.process(apart, [1, 1], chunk_size=2) == [[1], [1]]
    assert wm.executor.submit(goes, 1).result() == (1, True, True)
    assert [wm.executor.submit(grows, 1).result()[:3] for _ in range(2)] == [(True,) * 3] * 2
    assert A == [] and ant.n == 0
"""

HOLDS_POOL = """
    from ostap_parallel import Executor, Pool
    from ostap_parallel.pools import ParallelPool
    def double(x): return 2 * x
    class Study:
        def __init__(self, pool): self.pool = pool
        def work(self, x): return 3 * x
        def run(self, items): return self.pool.map(self.work, items)
        def nested(self, n): return list(self.pool.map(double, range(n)))
    class Toolbox: pass
    # run
    study = Study(wm.pool)
    assert list(study.run([1, 2])) == [3, 6]
    assert wm.pool.map(study.nested, [3]) == [[0, 2, 4]]
    assert wm.pool.map(lambda x: study, [1])[0].pool is wm.pool
    assert wm.process(Study(wm).work, [1]) == [3]
    assert wm.process(lambda n: wm.process(double, [n]), [4]) == [[8]]
    assert list(wm.executor.map(Study(wm.executor).nested, [2])) == [[0, 2]]
    class Shares:
        pool = wm.pool
        def __init__(self, x): self.x = x
        def work(self, y): return self.x * y
    assert list(Shares.pool.map(Shares(3).work, [1, 2])) == [3, 6]
    assert [one.x for one in Shares.pool.map(Shares, [1, 2])] == [1, 2]
    assert Shares.pool.map(lambda n: list(Shares.pool.map(double, [n])), [4]) == [[8]]
    toolbox = Toolbox(); toolbox.map = wm.pool.map
    assert wm.process(lambda n: list(toolbox.map(double, [n] * 300))[-1], [4]) == [8]
    def verbs(n):
        pool = study.pool
        asked = pool.apipe(double, n) if hasattr(pool, "apipe") else pool.apply_async(double, (n,))
        return asked.get(), list(pool.imap(double, [n])), wm.executor.submit(double, n).result()
    assert wm.process(verbs, [1]) == [(2, [2], 2)]
"""

WITH_POOL = "objects that hold their pool"
KINDS = {
    WITH_POOL: HOLDS_POOL,
    "submodules": SUBMODULES,
    "global variables that hold one another": SHARED_GLOBALS,
    "classes that name themselves": NAMES_ITSELF,
    "hooks of subclasses": HOOKS,
    "hooks of bases from libraries": HOOKED_BASES,
    "what pickles as a name": BY_NAME,
    "generic bases": GENERIC_BASES,
    "makers of enumerations": ENUM_MAKERS,
    "metaclasses": METACLASSES,
    "locks": LOCKS,
    "open files": FILES,
    "modules made at run time": MADE_MODULES,
    "ctypes and attributes of functions": CTYPES,
    "closures of modules": CLOSURES_OF_MODULES,
    "modules that the user sends by value": REGISTERED,
    "reducers": REDUCERS,
    "functions of many forms": MIXED,
}
RECENT = {"functions of enumerations": (3, 11), "new generics": (3, 12)}
KINDS["functions of enumerations"] = ENUM_FUNCTIONS
KINDS["new generics"] = NEW_GENERICS
NEEDS = {"pydantic": "pydantic"}
KINDS["pydantic"] = PYDANTIC

PREAMBLE = """\
import abc, collections, dataclasses, enum, functools, operator, os, sys, typing
from ostap_parallel import TaskMerger, Task, WorkManager
def same(item):
    return item
"""


def program(body: str, manager: str = "WorkManager(2, silent=True)") -> str:
    """Return a program that runs `body`, whose manager is `wm`."""
    head, _, rest = textwrap.dedent(body).partition("# run\n")
    lines = [PREAMBLE, head, "if __name__ == '__main__':"]
    lines += [f"    with {manager} as wm:", textwrap.indent(rest, " " * 8)]
    return "\n".join([*lines, "    print('ok')", ""])
