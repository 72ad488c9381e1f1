"""What a script has told libraries of Python for its whole process: workers tell theirs the same.

A worker that has not imported such a library tells it as soon as a task does so.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import cloudpickle

from ostap_parallel import libraries
from ostap_parallel.objects.known import LIBRARIES, Library, Values


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
    for name, library in LIBRARIES.items():
        if (module := sys.modules.get(name)) is not None:
            with contextlib.suppress(Exception):  # it is just being imported, or another release
                if values := _unusual(name, library, module):
                    found[name] = values
    return found


def _unusual(name: str, library: Library, module: Any) -> Values:
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
        libraries.watch_for(LIBRARIES, _tell)


def _tell(name: str) -> None:
    """Tell a library; what holds no more is again as it was."""
    library, module = LIBRARIES[name], sys.modules[name]
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
