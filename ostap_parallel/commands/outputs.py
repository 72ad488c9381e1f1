"""Where what commands print is kept: in memory, or in files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ostap_parallel.commands.command import Done
from ostap_parallel.errors import ConfigError
from ostap_parallel.worker.printed import Taken


class Outputs:
    """Keeps what commands print.

    Parameters
    ----------
    keep
        Bytes of each output that are kept in memory.
    results
        A directory for all of it.
    overflow
        A directory for what is longer, or a function that makes it when there is any.

    Attributes
    ----------
    is_whole
        Whether nothing is left out.
    """

    def __init__(
        self,
        keep: int,
        results: Path | str | None,
        overflow: Callable[[], Path] | Path | str | None,
    ) -> None:
        if keep < 0:
            raise ConfigError(f"keep must be a number of bytes from 0 on, not {keep!r}")
        self.keep = keep
        self._results = None if results is None else Path(results)
        self._overflow = self._results if overflow is None else overflow
        self.is_whole = self._overflow is not None

    def put(self, done: Done, *taken: Taken) -> list[tuple[Path, str, int]]:
        """Keep what a command has printed; return what is to be fetched: file, place and size.

        Raises OSError if a file cannot be written.
        """
        out, err = (output.data for output in taken)
        places = [output.place for output in taken]
        chosen = self._results if self._results or not any(places) else self._overflow
        if chosen is None:
            done.data = (out, err)
            return []
        folder = Path(chosen() if callable(chosen) else chosen)
        folder /= str(done.number)
        folder.mkdir(parents=True, exist_ok=True)
        done.files = (folder / "stdout", folder / "stderr")
        for path, output in zip(done.files, taken, strict=True):
            path.write_bytes(output.data)
        named = zip(done.files, taken, strict=True)
        return [(path, output.place, output.size) for path, output in named if output.place]
