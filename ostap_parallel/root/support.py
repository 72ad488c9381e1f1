"""What the other rooms ask about ROOT, see `libraries.Support`."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ostap_parallel.root import declared, options
from ostap_parallel.root.content import parts_of as parts_of
from ostap_parallel.root.numbers import seed as seed
from ostap_parallel.root.objects import find
from ostap_parallel.root.objects import reduce_class as reduce_class
from ostap_parallel.root.objects import way_of as way_of
from ostap_parallel.root.start import begin_in_worker, ready


def arrive() -> None:
    """Have ROOT begin as a worker's."""
    begin_in_worker()
    options.begin()


def state() -> tuple[Any, ...]:
    """Return what the program has declared, and what it has told ROOT otherwise."""
    return *declared.state(), *options.look()


def take(state: tuple[Any, ...]) -> None:
    """Declare, and tell ROOT, what `state` has returned there."""
    told = [one for one in state if isinstance(one, options.Option)]
    declared.take(one for one in state if not isinstance(one, options.Option))
    options.take(told)


def session() -> dict[str, Any]:
    """Return the libraries with dictionaries of ROOT's that are loaded here, and what is declared.

    There are none as long as ROOT has not begun.
    """
    if "cppyy" not in sys.modules:
        return {}
    root = sys.modules["ROOT"]
    own = Path(str(root.gROOT.GetSharedLibDir())).resolve()
    found = []
    for path in map(Path, str(root.gSystem.GetLibraries()).split()):
        if path.suffix == ".so" and path.parent.resolve() == own:
            found.append(path.stem)
        elif path.suffix == ".so" and any(path.parent.glob(f"{path.stem}*_rdict.pcm")):
            found.append(str(path))
    return {"libraries": found, "declared": declared.pack(declared.state())}


def read_files(names: Iterable[str]) -> dict[str, Any]:
    """Return files and libraries as a part of a session."""
    return {"declared": declared.pack(map(declared.read, names))}


def prepare(session: dict[str, Any]) -> list[tuple[str, str]]:
    """Load what `session` names, and have ready what the first object takes time for."""
    root = ready()
    for name in session.get("libraries", ()):
        if root.gSystem.FindDynamicLibrary(root.TString(name), True):
            root.gSystem.Load(name)
    _warm(root)
    failed = []
    for one in declared.unpack(session.get("declared", ())):
        try:
            declared.take([one])
        except Exception as exc:
            failed.append((one.name, str(exc)))
    return failed


def _warm(root: Any) -> None:
    """Use what most tasks use: what is compiled for the first use is there for all workers."""
    for kind in (root.TH1F, root.TH1D):
        histogram = kind("", "", 1, 0.0, 1.0)
        histogram.Fill(0.5)
        histogram.Fill(0.5, 1.0)
        histogram.Add(kind(histogram))
        histogram.SetDirectory(0)
        histogram.GetBinContent(1)
        histogram.GetEntries()
        make, args = way_of(kind)(None, histogram)  # type: ignore[misc]
        make(*args)
    options.look()
    root.gRandom.Rndm()
    root.gRandom.Gaus(0.0, 1.0)
    if "libRooFitCore" in str(root.gSystem.GetLibraries()):
        with contextlib.suppress(Exception):  # of a release that has it otherwise
            _warm_roofit(root)


def _warm_roofit(root: Any) -> None:
    service = root.RooMsgService.instance()
    level = service.globalKillBelow()
    service.setGlobalKillBelow(root.RooFit.FATAL)
    x = root.RooRealVar("x", "", 0.0, -5.0, 5.0)
    mean = root.RooRealVar("m", "", 0.0, -1.0, 1.0)
    width = root.RooRealVar("s", "", 1.0, 0.5, 2.0)
    gauss = root.RooGaussian("g", "", x, mean, width)
    data = gauss.generate(root.RooArgSet(x), 10)
    gauss.fitTo(data, PrintLevel=-1, Save=True)
    service.setGlobalKillBelow(level)


# What ROOT, and cppyy below it, say of a name that they do not know.
_UNKNOWN = re.compile(
    r"Failed to get attribute (\w+) from ROOT"
    r"|<(?:namespace|class) cppyy\.gbl\.?([\w.:]*) at \w+> has no attribute '(\w+)'"
)


# What Python says of an attribute that a class or its objects do not have.
_LACKING = re.compile(r"(?:type object )?'(\w+)'(?: object)? has no attribute '(\w+)'")


def advise(error: BaseException) -> str:
    """Return what to do where C++ is known here that was not where a task ran."""
    if not isinstance(error, AttributeError) or "cppyy" not in sys.modules:
        return ""
    if found := _LACKING.match(str(error)):
        return _advise_on_attribute(*found.groups())
    found = _UNKNOWN.search(str(error))
    if found is None:
        return ""
    name = found[1] or "::".join(filter(None, [*found[2].split("."), found[3]]))
    try:
        find(name)
    except Exception:
        return ""
    return f"{name} is known to ROOT here, but not where the task ran: {declared.HINT}"


def _advise_on_attribute(name: str, attribute: str) -> str:
    try:
        cls = find(name)
        if not hasattr(cls, "__cpp_name__") or not hasattr(cls, attribute):
            return ""
    except Exception:
        return ""
    return (
        f"{name} has {attribute} here, as Python code has set it, but not where the task ran: set "
        "it in a module that the task imports, or in worker_init of a Task"
    )
