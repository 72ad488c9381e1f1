"""Setting the attributes of classes, past what their metaclasses do then."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

MISSING = object()  # in place of an attribute


def give_content(cls: type, content: dict[str, Any]) -> None:
    """Have a class have these attributes and no others; without what its metaclass does then."""
    now = vars(cls)
    for name in now.keys() - content.keys():
        give(cls, name, MISSING)
    for name, value in content.items():
        if now.get(name, MISSING) is not value:
            give(cls, name, value)


def give(cls: type, name: str, value: Any) -> None:
    """Set an attribute of a class, or take it, past what a metaclass of the user's does then."""
    for setter, deleter in (type.__setattr__, type.__delattr__), (setattr, delattr):
        try:
            if value is MISSING:
                deleter(cls, name)
            else:
                setter(cls, name, value)
        except TypeError:  # that of a metaclass in C must not be passed over
            continue
        except AttributeError:
            return
        else:
            return


def take(cls: type, names: Iterable[str]) -> None:
    """Have a class be without attributes of its own."""
    for name in names:
        give(cls, name, MISSING)
