"""A batch of calls of joblib's, on a worker that need not have joblib."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any


def run_batch(
    calls: Sequence[tuple[Callable[..., Any], Sequence[Any], dict[str, Any]]], nested: bytes
) -> list[Any]:
    """Return what the calls give.

    `nested` is the pickled backend of loops within them.
    """
    with _use(nested):
        return [function(*args, **kwargs) for function, args, kwargs in calls]


def _use(nested: bytes) -> AbstractContextManager[Any]:
    try:
        from joblib import parallel, parallel_config
    except ImportError:  # then there are no loops within
        return nullcontext()
    backend, n_jobs = pickle.loads(nested)
    if "ostap" not in parallel.BACKENDS:  # they may ask for it by name, as where they come from

        def make(nesting_level: int | None = None, **settings: Any) -> Any:
            return type(backend)(nesting_level=nesting_level)

        parallel.register_parallel_backend("ostap", make)
    loops: AbstractContextManager[Any] = parallel_config(backend=backend, n_jobs=n_jobs)
    return loops
