"""What a script has told libraries of Python for its whole process: workers tell theirs the same.

A worker that has not imported such a library tells it as soon as a task does so.
"""

from __future__ import annotations

import contextlib
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import cloudpickle

from ostap_parallel import libraries

Values = dict[str, Any]


class _Library(NamedTuple):
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


def _options_of_pandas(group: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in group.items():
        if isinstance(value, dict):
            yield from _options_of_pandas(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _read_pandas(pandas: Any) -> Values:
    return dict(_options_of_pandas(pandas.options.d))


# How pandas tells what an option begins with, and nowhere else.
_DESCRIBED = re.compile(r"\[default: (.*)\] \[currently: (.*)\]", re.DOTALL)


def _usual_of_pandas(pandas: Any) -> Values:
    found = {}
    for name, value in _read_pandas(pandas).items():
        if texts := _DESCRIBED.search(pandas.describe_option(name, _print_desc=False)):
            found[name] = value if texts[1] == texts[2] else texts  # which no option is
    return found


_LIBRARIES = {
    "numpy": _Library(
        lambda numpy: {**numpy.geterr(), **numpy.get_printoptions()},
        lambda numpy: {**_ERRORS, **_SHOWN},
        _put_numpy,
    ),
    "matplotlib": _Library(
        lambda matplotlib: matplotlib.rcParams,
        _usual_of_matplotlib,
        lambda matplotlib, name, value: matplotlib.rcParams.update({name: value}),
    ),
    "pandas": _Library(
        _read_pandas, _usual_of_pandas, lambda pandas, name, value: pandas.set_option(name, value)
    ),
    # of the standard library, what holds for a process
    "sys": _Library(
        lambda sys: {"digits": sys.get_int_max_str_digits()},
        lambda sys: {"digits": sys.int_info.default_max_str_digits},
        lambda sys, name, value: sys.set_int_max_str_digits(value),
    ),
    "csv": _Library(
        lambda csv: {"field_size_limit": csv.field_size_limit()},
        lambda csv: {"field_size_limit": 131072},
        lambda csv, name, value: csv.field_size_limit(value),
    ),
    "socket": _Library(
        lambda socket: {"timeout": socket.getdefaulttimeout()},
        lambda socket: {"timeout": None},
        lambda socket, name, value: socket.setdefaulttimeout(value),
    ),
    "mpmath": _Library(
        lambda mpmath: {"prec": mpmath.mp.prec},
        lambda mpmath: {"prec": 53},
        lambda mpmath, name, value: setattr(mpmath.mp, name, value),
    ),
}


class _Here:
    """What this process, a worker, was told: packed, by library; and what was so before."""

    told: ClassVar[dict[str, bytes]] = {}
    before: ClassVar[dict[str, Values]] = {}


# Of each library, all that was read of it last, and what was not usual of that: to compare takes
# a tenth of the time to find this, and each call does it.
_seen: dict[str, tuple[Values, Values]] = {}


def look() -> dict[str, Values]:
    """Return what this process has told libraries that is not what they begin with."""
    found = {}
    for name, library in _LIBRARIES.items():
        if (module := sys.modules.get(name)) is not None:
            with contextlib.suppress(Exception):  # it is just being imported, or another release
                if values := _unusual(name, library, module):
                    found[name] = values
    return found


def _unusual(name: str, library: _Library, module: Any) -> Values:
    now = library.read(module)
    before, values = _seen.get(name, ({}, {}))
    # as of a plain dictionary, here and below: matplotlib's chooses a backend when it is looked at
    if not dict.__eq__(now, before):
        usual, items = library.usual(module), dict.items(now)
        # copies, as a script may change what is there
        before = {key: [*value] if type(value) is list else value for key, value in items}
        values = {key: before[key] for key in before if key in usual and before[key] != usual[key]}
        _seen[name] = before, values
    return values


def pack() -> dict[str, bytes]:
    """Return `look`, each library's packed: a host need not have what its values are made of."""
    found = {}
    for name, values in look().items():
        found[name] = _pack(values)
    return found


def _pack(values: Values) -> bytes:
    try:
        data: bytes = cloudpickle.dumps(values)  # functions of the script's format numbers, too
    except Exception:
        data = cloudpickle.dumps({key: values[key] for key in values if _is_sent(values[key])})
    return data


def _is_sent(value: Any) -> bool:
    with contextlib.suppress(Exception):
        cloudpickle.dumps(value)
        return True
    return False


def told() -> dict[str, bytes]:
    """Return what this process was told, as `pack` does in that of the caller."""
    return _Here.told


def take(wanted: Mapping[str, bytes]) -> None:
    """Tell libraries here what `pack` has returned, or when they are imported."""
    changed = [name for name in {*_Here.told, *wanted} if wanted.get(name) != _Here.told.get(name)]
    _Here.told = dict(wanted)
    for name in changed:
        if name in sys.modules:
            _tell(name)
    if wanted:
        libraries.watch_for(_LIBRARIES, _tell)


def _tell(name: str) -> None:
    """Tell a library; what holds no more is again as it was."""
    library, module = _LIBRARIES[name], sys.modules[name]
    before = _Here.before.setdefault(name, {})
    if not before and name not in _Here.told:
        return
    with contextlib.suppress(Exception):  # what the values are made of is not here
        values = pickle.loads(_Here.told[name]) if name in _Here.told else {}
        now = library.read(module)
        for key, value in {**before, **values}.items():
            # another release, or a font that is missing
            with contextlib.suppress(Exception), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the caller has been warned
                before[key] = before.get(key, now[key])
                library.put(module, key, value)
        _Here.before[name] = {key: before[key] for key in before if key in values}
