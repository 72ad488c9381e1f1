"""C++ that a program declares, for itself and for its workers."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from ostap_parallel.errors import DeclarationError
from ostap_parallel.root.start import ready

HINT = (
    "declare it through ostap_parallel.root.declare(...), which does so on workers, too, or "
    "list its file or library in preload="
)

MACROS = frozenset((".C", ".c", ".cc", ".cpp", ".cxx"))
HEADERS = frozenset((".h", ".hh", ".hpp", ".hxx"))
LIBRARIES = frozenset((".so", ".dylib"))

# How ROOT is told to compile a macro.
_COMPILED = re.compile(r"\++[gO]?$")


@dataclass(frozen=True)
class Declared:
    """Something that is declared.

    Attributes
    ----------
    kind
        ``code``, ``macro``, ``header`` or ``library``.
    name
        Of code its first line, else the path or the name.
    text
        The content, but of libraries.
    """

    kind: str
    name: str
    text: str = ""


# What this process has, in its order; what is declared on a worker it tells to its own workers.
_declared: dict[Declared, None] = {}
_state: tuple[Declared, ...] = ()


def declare(*what: str | os.PathLike[str]) -> None:
    """Declare C++ here, and on every worker before it reads anything of a run.

    What has been declared already, with the same content, is not declared again.

    Parameters
    ----------
    what
        Each is C++ code, a header (``.h``), a macro (``.C``; compiled with ``+`` behind it), or a
        library, by its path or by its name (``libPhysics``). Of headers and macros the content is
        sent; libraries must be on the hosts.

    Raises
    ------
    DeclarationError
        There is no such file or library, or ROOT does not accept it; the compiler's messages are
        on standard error.
    """
    take(map(read, what))


def read(what: str | os.PathLike[str]) -> Declared:
    """Return what is to be declared; raises `DeclarationError` if it is not to be had."""
    text = os.fspath(what)
    kind = kind_of(text)
    if kind == "library":
        path = Path(text)
        return Declared(kind, str(path.absolute()) if path.exists() else text)
    if kind:
        path = Path(_COMPILED.sub("", text))
        try:
            plus = text[len(str(path)) :]
            return Declared(kind, f"{path.absolute()}{plus}", path.read_text())
        except OSError as exc:
            raise DeclarationError(text, f"it cannot be read: {exc.strerror}") from exc
    if not re.search(r"[{};#()]", text):
        raise DeclarationError(text, "neither C++, nor the name of a macro, a header or a library")
    return Declared("code", text.strip().partition("\n")[0], text)


def kind_of(text: str) -> str:
    """Return the kind of what has this name; nothing if it is code."""
    if not text.strip() or re.search(r"[{};#()\n]", text):
        return ""
    suffix = Path(_COMPILED.sub("", text)).suffix
    if suffix in LIBRARIES or re.fullmatch(r"lib\w+", text):
        return "library"
    return "macro" if suffix in MACROS else "header" if suffix in HEADERS else ""


def state() -> tuple[Declared, ...]:
    """Return what is declared here, the same object as long as nothing is added."""
    return _state


def take(wanted: Iterable[Declared]) -> None:
    """Declare what is not declared here yet."""
    global _state
    for one in wanted:
        if one not in _declared:
            _perform(one)
            _declared[one] = None
            _state = tuple(_declared)


def pack(wanted: Iterable[Declared]) -> list[tuple[str, ...]]:
    """Return what JSON can hold; undone by `unpack`."""
    return [astuple(one) for one in wanted]


def unpack(packed: Iterable[Iterable[str]]) -> list[Declared]:
    """Undo `pack`."""
    return [Declared(*one) for one in packed]


def _perform(one: Declared) -> None:
    root = ready()
    if one.kind == "library":
        _load(root, one)
    elif one.kind == "code":
        _check(root.gInterpreter.Declare(one.text), one)
    else:
        with _file_of(one) as path:
            root.gInterpreter.AddIncludePath(str(path.parent))
            if one.kind == "header":
                _check(root.gInterpreter.Declare(f'#include "{path}"'), one)
            else:
                plus = _COMPILED.search(one.name) if path == _path_of(one) else None
                _check(root.gROOT.LoadMacro(f"{path}{plus[0] if plus else ''}") == 0, one)


def _path_of(one: Declared) -> Path:
    return Path(_COMPILED.sub("", one.name))


@contextlib.contextmanager
def _file_of(one: Declared) -> Any:
    """Yield a file with the content: that which was named, if it is here and the same."""
    path = _path_of(one)
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if path.read_text() == one.text:
            yield path
            return
    with tempfile.TemporaryDirectory(prefix="declared-") as directory:
        copy = Path(directory) / path.name
        copy.write_text(one.text)
        yield copy


def _load(root: Any, one: Declared) -> None:
    names = [one.name] if Path(one.name).exists() else [Path(one.name).name]
    if not any(root.gSystem.Load(name) >= 0 for name in names):
        raise DeclarationError(
            one.name,
            "the library cannot be loaded here: install it, and have its directory in "
            "LD_LIBRARY_PATH (for hosts by environment= or profile=)",
        )


def _check(succeeded: Any, one: Declared) -> None:
    if not succeeded:
        where = os.uname().nodename
        reason = f"ROOT on {where} does not accept it; its messages are on standard error"
        raise DeclarationError(one.name, reason)
