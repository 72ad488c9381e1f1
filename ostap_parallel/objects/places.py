"""Where objects are: in modules that are sent by value, or in those that others can import."""

from __future__ import annotations

import sys
from types import FunctionType, ModuleType
from typing import Any

from ostap_parallel.objects import program
from ostap_parallel.objects.byvalue import Place


def module_of(obj: Any) -> str | None:
    """Return the name of the module that an object is of."""
    if isinstance(obj, FunctionType):
        name: str | None = obj.__globals__.get("__name__")
        return name
    return getattr(obj, "__module__", None)


def follow(module: ModuleType, name: str) -> Any:
    """Return what a module has by a dotted name, or ``None``."""
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def place_of(obj: Any, name: str | None = None) -> Place | None:
    """Return where an object is in a module that is sent by value."""
    module = sys.modules.get(getattr(obj, "__module__", None) or "")
    if module is None or not program.is_by_value(module):
        return None
    name = name or obj.__qualname__
    if follow(module, name) is not obj:
        return None
    return program.token_of(module), program.key_of(module), name


def is_importable(obj: Any) -> bool:
    """Whether importing `obj`'s module and following its qualified name gives `obj` again."""
    module = sys.modules.get(getattr(obj, "__module__", None) or "")
    if module is None or program.is_by_value(module):
        return False
    return follow(module, obj.__qualname__) is obj


def last_import() -> tuple[int, str]:
    """Return how many modules there are, and the name of the one that came last."""
    while True:
        try:
            return len(sys.modules), next(reversed(sys.modules))
        except RuntimeError:  # another thread has just imported one
            continue
