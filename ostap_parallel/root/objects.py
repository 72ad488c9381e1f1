"""Objects, classes and functions of C++ as pickle sees them.

What reads one of them has ROOT initialised first: bytes of its objects that are read before crash
the process.
"""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable
from typing import Any

from ostap_parallel.root.declared import HINT
from ostap_parallel.root.start import ready

# What is one in each process: who refers to it means that of his own.
_GLOBALS = ("gRandom", "gROOT", "gSystem", "gStyle", "gEnv", "gInterpreter")


def way_of(kind: type) -> Callable[[Any, Any], Any] | None:
    """Return how objects of a type are reduced."""
    if kind.__name__ == "CPPOverload":
        return _function
    if kind.__name__ == "TemplateProxy":
        return _template
    if kind.__module__ == "ROOT._facade":
        return _proxy
    if kind.__name__ == "nullptr_t":
        return lambda pickler, null: (find, ("nullptr",))
    if issubclass(kind, type):
        return _class
    return _object if hasattr(kind, "__cpp_name__") else None


def _object(pickler: Any, obj: Any) -> Any:
    if isinstance(obj, int):  # an enumerator
        return find_value, (type(obj).__cpp_name__, int(obj))  # type: ignore[attr-defined]
    if (name := name_of_global(obj)) is not None:
        return find, (name,)
    if type(obj).__name__ == "TFitResultPtr":
        return make_fit, (int(obj), obj.Get() or None)
    _check(obj)
    make, args, *rest = obj.__reduce__()
    return make_object, (make.__module__, make.__name__, args), *rest


def _proxy(pickler: Any, proxy: Any) -> Any:
    """Reduce what stands for the present directory, pad or the like to its name."""
    named = {**vars(type(ready())), **vars(ready())}.items()
    return find, (next(name for name, one in named if one is proxy),)


# What does not hold what it is about, by the name of a class or of its name space, and what to do.
_BOUND = {
    "ROOT::RDF::RResultPtr": "return what its GetValue() gives, or a Clone() of that",
    "ROOT::RDF::": "make it in the function",
    "ROOT::RDataFrame": "make it in the function",
    "TTreeReader": "make it in the function",
}


def _check(obj: Any) -> None:
    """Raise PicklingError for what ROOT cannot write; to try ends the process, or loses it."""
    root, kind = ready(), type(obj)
    name = str(kind.__cpp_name__)
    if name.startswith(_DERIVED):
        return
    advice = next((text for start, text in _BOUND.items() if name.startswith(start)), None)
    if advice is None and isinstance(obj, root.TDirectoryFile):
        advice = "open the file in the task"
    if advice is None and isinstance(obj, root.TTree) and not isinstance(obj, root.TChain):
        advice = "open its file in the task, or use a TChain" if obj.GetCurrentFile() else None
    if advice is None and kind not in _writable:
        described = root.TClass.GetClass(name)
        if described and not described.HasDefaultConstructor():
            advice = "it has no constructor without arguments, by which it could be read"
        else:
            _writable.add(kind)
    if advice is not None:
        raise pickle.PicklingError(f"ROOT cannot write an object of {name}: {advice}")


_writable: set[type] = set()


def name_of_global(obj: Any) -> str | None:
    """Return the name of what is one in each process; ``None`` for other objects."""
    root = ready()
    address = root.addressof(obj)
    for name in _GLOBALS:
        if (one := getattr(root, name, None)) is not None and type(one) is type(obj):
            return name if root.addressof(one) == address else None
    return None


def make_object(module: str, name: str, args: tuple[Any, ...]) -> Any:
    """Make an object as ROOT does it; raises UnpicklingError if its class is not known here."""
    root = ready()
    cls = args[-1].decode() if isinstance(args[-1], bytes) else str(args[-1])
    if cls not in _known:
        if not root.TClass.GetClass(cls):
            raise pickle.UnpicklingError(f"the class {cls} of C++ is not known here: {HINT}")
        _known.add(cls)
    return getattr(importlib.import_module(module), name)(*args)


_known: set[str] = set()


def make_fit(status: int, result: Any) -> Any:
    """Return what a fit returns: ROOT itself writes nothing of what that points to."""
    root = ready()
    if result is not None:
        return root.TFitResultPtr(root.std.make_shared["TFitResult"](result))
    return root.TFitResultPtr(status or False)  # 0 would be taken for a null pointer


def reduce_class(cls: Any) -> tuple[Any, ...]:
    """Return how a class of C++, or its metaclass, is found."""
    if issubclass(cls, type):  # cppyy makes one for each class
        scope = str(cls.__module__).split(".")[2:]
        return find_meta, ("::".join([*scope, cls.__name__.removesuffix("_meta")]),)
    if cls.__cpp_name__.startswith(_DERIVED):
        return _derived(cls)
    return find, (cls.__cpp_name__,)


# Of classes that are derived from those of C++ in Python: what calls back from C++.
_DERIVED = "__cppyy_internal::Dispatcher"
_MADE = {"__cpp_cross__", "__dict__", "__weakref__"}


def _derived(cls: Any) -> tuple[Any, ...]:
    """Reduce a class of the user's: C++ learns when it is made which methods it has."""
    early: dict[str, Any] = {}
    late: dict[str, Any] = {}
    for name, value in vars(cls).items():
        if type(value).__module__ == "cppyy" or name in _MADE:
            continue
        names_class = "__class__" in getattr(getattr(value, "__code__", None), "co_freevars", ())
        (late if names_class else early)[name] = value
    return make_derived, (cls.__name__, cls.__bases__, early), late, None, None, set_late


def make_derived(name: str, bases: tuple[Any, ...], content: dict[str, Any]) -> Any:
    """Make a class that is derived from one of C++."""
    ready()
    return type(bases[0])(name, bases, content)


def set_late(cls: Any, content: dict[str, Any]) -> None:
    """Give a class what refers to it."""
    for name, value in content.items():
        setattr(cls, name, value)


def _class(pickler: Any, cls: Any) -> Any:
    derived = not issubclass(cls, type) and cls.__cpp_name__.startswith(_DERIVED)
    return pickler.reduce_class(cls) if derived else reduce_class(cls)


def _function(pickler: Any, function: Any) -> Any:
    """Reduce a function, or a method of an object, to its name in its class or name space."""
    owner = owner_of(function)
    if owner is not None:
        return getattr, (owner, function.__name__)
    scope = str(getattr(function.im_class, "__cpp_name__", ""))
    return find, ("::".join(filter(None, [scope, function.__name__])),)


def owner_of(function: Any) -> Any:
    """Return the object that a method is of; ``None`` for functions."""
    return getattr(function, "im_self" if hasattr(function, "im_self") else "__self__", None)


def _template(pickler: Any, function: Any) -> Any:
    first = str(function.__doc__ or "").partition("\n")[0]
    text = f"it is a template of C++ ({first}), of which the object that it is of cannot be told"
    raise pickle.PicklingError(f"{text}: call it in a function of Python")


def find(name: str) -> Any:
    """Return what has a name in C++; raises AttributeError if there is none here."""
    found: Any = ready()
    for part in _split(name):
        found = getattr(found, part)
    return found


def find_meta(name: str) -> Any:
    """Return the metaclass of a class of C++."""
    return type(find(name))


def find_value(name: str, value: int) -> Any:
    """Return an enumerator."""
    kind = find(name)
    return kind(value)


def _split(name: str) -> list[str]:
    """Return the parts of a name, those in the brackets of a template not taken apart."""
    parts, depth, begin = [], 0, 0
    for at, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if not depth and name.startswith("::", at):
            parts.append(name[begin:at])
            begin = at + 2
    return [*filter(None, parts), name[begin:]]
