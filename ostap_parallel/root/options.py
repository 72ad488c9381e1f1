"""What a program tells ROOT for all that it does: how histograms begin, minimisers, messages."""

from __future__ import annotations

import contextlib
import pickle
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

from ostap_parallel.root.start import ready

# One call of C++ reads all: ROOT compiles the way to each function that Python calls.
_CODE = r"""
#include <Math/MinimizerOptions.h>
#include <TError.h>
#include <TH1.h>
#include <locale>
#include <sstream>
#include <string>

namespace ostap_parallel_options {

using Options = ROOT::Math::MinimizerOptions;

std::string look() {
  std::ostringstream out;
  out.imbue(std::locale::classic());  // the program may have another one than its workers
  out.precision(17);
  out << TH1::GetDefaultSumw2() << '\n'
      << TH1::AddDirectoryStatus() << '\n'
      << gErrorIgnoreLevel << '\n'
      << Options::DefaultMinimizerType() << '\n'
      << Options::DefaultMinimizerAlgo() << '\n'
      << Options::DefaultTolerance() << '\n'
      << Options::DefaultPrecision() << '\n'
      << Options::DefaultStrategy() << '\n'
      << Options::DefaultMaxFunctionCalls() << '\n'
      << Options::DefaultMaxIterations() << '\n'
      << Options::DefaultPrintLevel() << '\n'
      << Options::DefaultErrorDef();
  return out.str();
}

void take(const std::string& text) {
  std::istringstream in(text);
  in.imbue(std::locale::classic());
  std::string type, algo;
  bool sumw2, adds;
  int level, strategy, calls, iterations, print;
  double tolerance, precision, error;
  in >> sumw2 >> adds >> level;
  std::getline(in >> std::ws, type);
  std::getline(in, algo);
  in >> tolerance >> precision >> strategy >> calls >> iterations >> print >> error;
  if (!in) return;
  TH1::SetDefaultSumw2(sumw2);
  TH1::AddDirectory(adds);
  gErrorIgnoreLevel = level;
  Options::SetDefaultMinimizer(type.c_str(), algo.c_str());
  Options::SetDefaultTolerance(tolerance);
  Options::SetDefaultPrecision(precision);
  Options::SetDefaultStrategy(strategy);
  Options::SetDefaultMaxFunctionCalls(calls);
  Options::SetDefaultMaxIterations(iterations);
  Options::SetDefaultPrintLevel(print);
  Options::SetDefaultErrorDef(error);
}

}
"""


class Option(NamedTuple):
    """Something that ROOT was told."""

    name: str
    value: Any


# What to tell as soon as ROOT begins here.
_waiting: dict[str, Option] = {}


def look() -> tuple[Option, ...]:
    """Return what ROOT has been told here; nothing as long as it has not begun."""
    root = sys.modules.get("ROOT")
    if root is None or "cppyy" not in sys.modules:
        return ()
    found = []
    for name, (find, _) in _KINDS.items():
        with contextlib.suppress(Exception):  # of a release that has it otherwise
            found.append(Option(name, find(root)))
    return tuple(found)


def take(wanted: Iterable[Option]) -> None:
    """Tell ROOT here, or when it begins; what this release does not know is left out."""
    _waiting.update((option.name, option) for option in wanted)
    if "cppyy" in sys.modules:
        begin()


def begin() -> None:
    """Tell ROOT what has waited for it."""
    if not _waiting:
        return
    root, here = ready(), dict(look())
    for name, value in _waiting.values():
        if name in _KINDS and here.get(name, value) != value:
            with contextlib.suppress(Exception):
                _KINDS[name][1](root, value)
    _waiting.clear()


def _compiled(root: Any) -> Any:
    with contextlib.suppress(AttributeError):
        return root.ostap_parallel_options
    root.gInterpreter.Declare(_CODE)
    return root.ostap_parallel_options


def _find_common(root: Any) -> str:
    return str(_compiled(root).look())


def _take_common(root: Any, text: str) -> None:
    _compiled(root).take(text)


def _find_style(root: Any) -> bytes:
    return pickle.dumps(root.gStyle)


def _take_style(root: Any, data: bytes) -> None:
    pickle.loads(data).Copy(root.gStyle)


def _find_roofit(root: Any) -> tuple[Any, ...] | None:
    if "libRooFitCore" not in str(root.gSystem.GetLibraries()):
        return None
    service = root.RooMsgService.instance()
    streams = [service.getStream(number) for number in range(service.numStreams())]
    levels = tuple((bool(one.active), int(one.minLevel), int(one.topic)) for one in streams)
    config = root.RooAbsReal.defaultIntegratorConfig()
    told = int(service.globalKillBelow()), bool(service.silentMode())
    return *told, config.epsAbs(), config.epsRel(), levels


def _take_roofit(root: Any, found: tuple[Any, ...] | None) -> None:
    if found is None:
        return
    level, silent, absolute, relative, levels = found
    service = root.RooMsgService.instance()
    service.setGlobalKillBelow(root.RooFit.MsgLevel(level))
    service.setSilentMode(silent)
    for number, (active, least, topic) in enumerate(levels[: service.numStreams()]):
        stream = service.getStream(number)
        stream.active, stream.minLevel, stream.topic = active, root.RooFit.MsgLevel(least), topic
    config = root.RooAbsReal.defaultIntegratorConfig()
    config.setEpsAbs(absolute)
    config.setEpsRel(relative)


_KINDS: dict[str, tuple[Any, Any]] = {
    "common": (_find_common, _take_common),
    "style": (_find_style, _take_style),
    "roofit": (_find_roofit, _take_roofit),
}
