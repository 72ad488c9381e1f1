"""What a function makes of random numbers that the seed of a run does not reach."""

from __future__ import annotations

import dis
import functools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from ostap_parallel.engine import baggage
from ostap_parallel.errors import see
from ostap_parallel.logs import logger_of
from ostap_parallel.objects import kinds

logger = logger_of(__name__)

# What numpy makes from the system's entropy unless it is given a seed.
_MAKERS = {
    *("default_rng", "RandomState", "SeedSequence"),
    *("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64"),
}

_DEPTH = 4  # of functions that functions refer to


def warn_of(function: Callable[..., Any]) -> None:
    """Note, once per function, that it makes generators that a seed of the run does not reach."""
    for code in _codes(function, set()):
        for name in _made(code):
            tell(getattr(code, "co_qualname", code.co_name), name)


@functools.lru_cache(maxsize=256)
def tell(function: str, name: str) -> None:
    """Note that a function calls something without a seed."""
    logger.warning(
        "%s calls %s() without a seed, which seed= does not reach: its numbers differ from run to "
        "run; ostap_parallel.rng() is the generator of the item%s",
        function,
        name,
        see("random"),
    )


def _made(code: types.CodeType) -> Iterator[str]:
    """Yield the makers that code calls without an argument."""
    name = ""
    for one in dis.get_instructions(code):
        if one.opname.startswith("LOAD_") and one.argval in _MAKERS:
            name = one.argval
        elif name and one.opname not in ("PRECALL", "PUSH_NULL", "CACHE"):
            if one.opname.startswith("CALL") and one.arg == 0:
                yield name
            name = ""


def _codes(one: Any, seen: set[int], depth: int = 0) -> Iterator[types.CodeType]:
    """Yield the code of a function, object or class, and of the user's own that it refers to."""
    if id(one) in seen or depth > _DEPTH or _is_installed(one):
        return
    seen.add(id(one))
    if isinstance(one, types.FunctionType):
        yield from _nested(one.__code__)
    elif isinstance(one, type):
        for value in vars(one).values():
            if isinstance(value, types.FunctionType):
                yield from _codes(value, seen, depth + 1)
        return
    else:
        yield from _codes(type(one), seen, depth)
    for _, value in baggage.references(one):
        if callable(value):
            yield from _codes(value, seen, depth + 1)


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _nested(constant)


def _is_installed(one: Any) -> bool:
    if not isinstance(one, types.FunctionType | type):
        return False
    module = sys.modules.get(str(one.__module__))
    return isinstance(module, types.ModuleType) and kinds.is_installed(module)
