"""What the other rooms ask about ROOT, see `libraries.Support`."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

from ostap_parallel.root.numbers import seed as seed
from ostap_parallel.root.objects import reduce_class as reduce_class
from ostap_parallel.root.objects import way_of as way_of
from ostap_parallel.root.start import begin_in_worker, ready


def arrive() -> None:
    """Have ROOT begin as a worker's."""
    begin_in_worker()


def session() -> dict[str, Any]:
    """Return the libraries with dictionaries of ROOT's that are loaded here.

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
    return {"libraries": found}


def prepare(session: dict[str, Any]) -> None:
    """Load what `session` names, and have ready what the first object takes time for."""
    root = ready()
    for name in session.get("libraries", ()):
        if root.gSystem.FindDynamicLibrary(root.TString(name), True):
            root.gSystem.Load(name)
    histogram = root.TH1F("", "", 1, 0.0, 1.0)
    histogram.Fill(0.5)
    pickle.loads(pickle.dumps(histogram))
