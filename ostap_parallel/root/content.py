"""What objects of C++ hold, told the same way in all processes."""

from __future__ import annotations

import json
from typing import Any

from ostap_parallel.root.objects import name_of_global, owner_of
from ostap_parallel.root.start import ready

# Members that say nothing of what an object holds: marks, what names it for this process, memory
# that nobody has written to.
_INCIDENTAL = {"fBits", "fUniqueID", "fTreeOffset", "fTimeStamp"}
_NAMING = {"TUUID", "TProcessID"}


def parts_of(obj: Any) -> Any:
    """Return what an object, a function or a method holds, as plain data; or raise TypeError.

    The bytes that ROOT writes differ from process to process where RooFit's objects and chains are
    in them.
    """
    kind = type(obj).__name__
    if kind == "CPPOverload":
        owner = owner_of(obj)
        scope = str(getattr(getattr(obj, "im_class", None), "__cpp_name__", ""))
        return [kind, scope, owner, obj.__name__]
    if kind == "TemplateProxy":
        return [kind, str(obj.__doc__)]
    if kind == "nullptr_t":
        return [kind]
    if isinstance(obj, int):
        return [type(obj).__cpp_name__, int(obj)]  # type: ignore[attr-defined]
    if (name := name_of_global(obj)) is not None:
        return [kind, name]
    text = str(ready().TBufferJSON.ToJSON(obj))
    try:
        found = json.loads(text)
    except ValueError as exc:
        raise TypeError(f"ROOT cannot tell what a {kind} holds") from exc
    if found is None:
        raise TypeError(f"ROOT cannot tell what a {kind} holds")
    return [type(obj).__cpp_name__, _strip(found)]


def _strip(found: Any) -> Any:
    if isinstance(found, list):
        return [_strip(one) for one in found]
    if not isinstance(found, dict):
        return found
    if found.get("_typename") in _NAMING:
        return None
    return {name: _strip(value) for name, value in found.items() if name not in _INCIDENTAL}
