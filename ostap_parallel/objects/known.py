"""What libraries of Python can be told for a whole process, and how to ask and to tell each."""

from __future__ import annotations

import importlib
import re
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Values = dict[str, Any]


class Library(NamedTuple):
    """What to ask a library for, what it begins with, and how to tell it."""

    read: Callable[[Any], Values]
    usual: Callable[[Any], Values]
    put: Callable[[Any, str, Any], object]


# What numpy says that it begins with.
_ERRORS = {"divide": "warn", "over": "warn", "under": "ignore", "invalid": "warn"}
_SHOWN = {"edgeitems": 3, "threshold": 1000, "floatmode": "maxprec", "precision": 8}
_SHOWN |= {"suppress": False, "linewidth": 75, "nanstr": "nan", "infstr": "inf", "sign": "-"}
_SHOWN |= {"formatter": None, "legacy": False, "override_repr": None}
_FORGOTTEN = "formatter", "override_repr"  # by each call that does not tell them


def _put_numpy(numpy: Any, name: str, value: Any) -> None:
    if name in _ERRORS:
        numpy.seterr(**{name: value})
    else:
        now = numpy.get_printoptions()
        kept = {key: now[key] for key in _FORGOTTEN if key in now}
        numpy.set_printoptions(**kept | {name: value})


# Of windows, which workers have none of.
_OF_WINDOWS = {"backend", "backend_fallback", "interactive", "toolbar"}


def _usual_of_matplotlib(matplotlib: Any) -> Values:
    items = dict.items(matplotlib.rcParamsDefault)
    return {name: value for name, value in items if name not in _OF_WINDOWS}


# Where the options of a pandas stand: by name, a dictionary and the key in it.
_Places = list[tuple[str, dict[str, Any], str]]


def _places_in(group: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    for name, value in group.items():
        if isinstance(value, dict):
            yield from _places_in(value, f"{prefix}{name}.")
        else:
            yield prefix + name, group, name


class _Options:
    """The options of pandas, whose places are looked for once: each call reads them."""

    def __init__(self) -> None:
        self._all: Any = None
        self._places: _Places = []

    def read(self, pandas: Any) -> Values:
        found = pandas.options.d
        if found is not self._all:
            self._all, self._places = found, list(_places_in(found))
        return {name: group[key] for name, group, key in self._places}


_options = _Options()


# How pandas tells what an option begins with, and nowhere else.
_DESCRIBED = re.compile(r"\[default: (.*)\] \[currently: (.*)\]", re.DOTALL)


def _usual_of_pandas(pandas: Any) -> Values:
    found = {}
    for name, value in _options.read(pandas).items():
        if texts := _DESCRIBED.search(pandas.describe_option(name, _print_desc=False)):
            found[name] = value if texts[1] == texts[2] else texts  # which no option is
    return found


# What a dialect of csv is made of, which pickle does not know.
_OF_DIALECTS = ["delimiter", "doublequote", "escapechar", "lineterminator", "quotechar", "quoting"]
_OF_DIALECTS += "skipinitialspace", "strict"
_USUAL_DIALECTS = {"excel", "excel-tab", "unix"}


def _read_csv(csv: Any) -> Values:
    names = sorted({*csv.list_dialects()} - _USUAL_DIALECTS)
    dialects = [(name, csv.get_dialect(name)) for name in names]
    told = {name: {key: getattr(one, key) for key in _OF_DIALECTS} for name, one in dialects}
    return {"field_size_limit": csv.field_size_limit(), "dialects": told}


def _put_csv(csv: Any, name: str, value: Any) -> None:
    if name == "field_size_limit":
        csv.field_size_limit(value)
        return
    for dialect in {*csv.list_dialects()} - _USUAL_DIALECTS - value.keys():
        csv.unregister_dialect(dialect)
    for dialect, parts in value.items():
        csv.register_dialect(dialect, **parts)


def _usual_of_sklearn(sklearn: Any) -> Values:
    found = {}
    # a thread begins with what holds for none
    thread = threading.Thread(target=lambda: found.update(sklearn.get_config()))
    thread.start()
    thread.join()
    return found


# Of jax, what decides on results.
_OF_JAX: Values = {"jax_enable_x64": False, "jax_debug_nans": False, "jax_disable_jit": False}
_OF_JAX |= {"jax_default_matmul_precision": None}


def _read_pyhf(pyhf: Any) -> Values:
    tensors, optimizer = pyhf.get_backend()
    return {"backend": (tensors.name, optimizer.name, tensors.precision)}


class _Behavior:
    """How records of awkward behave: as vector has it, and as the script does."""

    def __init__(self) -> None:
        self._before: Values = {}
        self._found: Values = {"vector": False, "behavior": {}}

    def read(self, awkward: Any) -> Values:
        if awkward.behavior != self._before:
            self._before = dict(awkward.behavior)
            own = {name: kind for name, kind in self._before.items() if not self._is_vector(kind)}
            self._found = {"vector": len(own) < len(self._before), "behavior": own}
        return dict(self._found)

    def put(self, awkward: Any, name: str, value: Any) -> None:
        if name == "vector":
            if value:
                importlib.import_module("vector")  # which is told, then
            return
        for key in self.read(awkward)["behavior"].keys() - value.keys():
            del awkward.behavior[key]
        awkward.behavior.update(value)

    def has_vector(self) -> bool:
        """Return whether vector was told to register its records."""
        awkward = sys.modules.get("awkward")
        return awkward is not None and bool(self.read(awkward)["vector"])

    @staticmethod
    def _is_vector(kind: Any) -> bool:
        return str(getattr(kind, "__module__", "")).startswith("vector.")


_behavior = _Behavior()

LIBRARIES = {
    "numpy": Library(
        lambda numpy: {**numpy.geterr(), **numpy.get_printoptions()},
        lambda numpy: {**_ERRORS, **_SHOWN},
        _put_numpy,
    ),
    "matplotlib": Library(
        lambda matplotlib: matplotlib.rcParams,
        _usual_of_matplotlib,
        lambda matplotlib, name, value: matplotlib.rcParams.update({name: value}),
    ),
    "pandas": Library(
        _options.read, _usual_of_pandas, lambda pandas, name, value: pandas.set_option(name, value)
    ),
    # of the standard library, what holds for a process
    "sys": Library(
        lambda sys: {"digits": sys.get_int_max_str_digits()},
        lambda sys: {"digits": sys.int_info.default_max_str_digits},
        lambda sys, name, value: sys.set_int_max_str_digits(value),
    ),
    "csv": Library(_read_csv, lambda csv: {"field_size_limit": 131072, "dialects": {}}, _put_csv),
    "socket": Library(
        lambda socket: {"timeout": socket.getdefaulttimeout()},
        lambda socket: {"timeout": None},
        lambda socket, name, value: socket.setdefaulttimeout(value),
    ),
    "sklearn": Library(
        lambda sklearn: sklearn.get_config(),
        _usual_of_sklearn,
        lambda sklearn, name, value: sklearn.set_config(**{name: value}),
    ),
    "jax": Library(
        lambda jax: {name: getattr(jax.config, name) for name in _OF_JAX},
        lambda jax: _OF_JAX,
        lambda jax, name, value: jax.config.update(name, value),
    ),
    "pyhf": Library(
        _read_pyhf,
        lambda pyhf: {"backend": ("numpy", "scipy", "64b")},
        lambda pyhf, name, value: pyhf.set_backend(*value),
    ),
    "awkward": Library(
        _behavior.read, lambda awkward: {"vector": False, "behavior": {}}, _behavior.put
    ),
    "vector": Library(
        lambda vector: {"is_registered": _behavior.has_vector()},
        lambda vector: {"is_registered": False},
        lambda vector, name, value: vector.register_awkward() if value else None,
    ),
    # what a manager's proxies want to see that come out of its other ones
    "multiprocess.process": Library(
        lambda process: {"key": bytes(process.current_process().authkey)},
        lambda process: {"key": b""},
        lambda process, name, value: setattr(process.current_process(), "authkey", value),
    ),
    "mpmath": Library(
        lambda mpmath: {"prec": mpmath.mp.prec},
        lambda mpmath: {"prec": 53},
        lambda mpmath, name, value: setattr(mpmath.mp, name, value),
    ),
}
