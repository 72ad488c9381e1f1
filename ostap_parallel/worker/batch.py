"""A batch of calls of joblib's, on a worker that need not have joblib."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
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


@dataclass(frozen=True)
class Mapped:
    """Stands for an array in a file that its owner may write to; read, it is that array.

    Attributes
    ----------
    path, inode, size
        The file, by which it is known where it was opened.
    begin, length
        Of the part that is mapped, in bytes.
    offset, shape, dtype, strides
        Of the array in that part.
    """

    path: str
    inode: int
    size: int
    begin: int
    length: int
    offset: int
    shape: tuple[int, ...]
    dtype: Any
    strides: tuple[int, ...]

    @classmethod
    def of(cls, array: Any) -> Mapped | None:
        """Return what stands for an array if it is in such a file."""
        whole = array
        while type(getattr(whole, "base", None)).__name__ == "memmap":
            whole = whole.base
        if type(whole).__name__ != "memmap" or whole.mode not in ("r+", "w+"):
            return None
        path = whole.filename
        if path is None or array.dtype.hasobject:
            return None
        try:
            found = Path(path).stat()
        except OSError:  # it was removed
            return None
        start = (one.__array_interface__["data"][0] for one in (array, whole))
        offset = next(start) - next(start)
        return cls(
            *(os.path.abspath(path), found.st_ino, found.st_size),  # noqa: PTH100
            *(whole.offset, whole.nbytes, offset, array.shape, array.dtype, array.strides),
        )

    def __reduce__(self) -> Any:
        return open_map, tuple(vars(self).values())


def open_map(path: str, inode: int, size: int, begin: int, length: int, *array: Any) -> Any:
    """Return the array of a `Mapped`; raises FileNotFoundError if that file is not here."""
    import numpy  # type: ignore[import-not-found,unused-ignore]

    found = Path(path).stat()
    if (found.st_ino, found.st_size) != (inode, size):
        text = f"{path} is another file here: what tasks write to must be on a disk of all hosts"
        raise FileNotFoundError(text)
    mapped = numpy.memmap(path, numpy.uint8, "r+", begin, (length,))
    offset, shape, dtype, strides = array
    return numpy.ndarray.__new__(numpy.memmap, shape, dtype, mapped, offset, strides)
