"""Blocks of whole records, for the standard input of commands, as GNU parallel's ``--pipe``."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

# Bytes that are read at a time where records are counted.
AT_ONCE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """How input is cut.

    Attributes
    ----------
    size
        Bytes of a block, at most unless a record has more; it ends with one that is whole.
    records
        How many records a block has, in place of a size.
    ends
        How many of the texts below a record has, as that many lines.
    end, start
        What a record ends with, and what the next one begins with.
    is_bare
        Whether these are left out.
    header
        Lines at the beginning that each block begins with.
    """

    size: int = 1 << 20
    records: int | None = None
    ends: int = 1
    end: bytes = b"\n"
    start: bytes = b""
    is_bare: bool = False
    header: int = 0

    def read(self, file: IO[bytes]) -> Iterator[bytes]:
        """Yield the blocks of a file."""
        header = b"".join(file.readline() for _ in range(self.header))
        rest = b""
        while data := file.read(wanted := self._wanted(len(rest))):
            rest += data
            if self.records is None and len(data) < wanted and self.ends == 1:
                break  # the last block is what is left, whatever it ends with
            while cut := self._cut(rest):
                yield header + self._bare(rest[:cut])
                rest = rest[cut:]
                if self.records is None:
                    break
        if rest:
            yield header + self._bare(rest)

    def _wanted(self, there: int) -> int:
        """Return how many bytes to read, where so many are left of the last ones."""
        if self.records is not None:
            return AT_ONCE
        return self.size - there if there < self.size else self.size

    def _cut(self, data: bytes) -> int:
        """Return where the first block of some data ends; 0 if that cannot be known yet."""
        border = self.end + self.start
        if not border:
            return len(data)
        if self.records is None and self.ends == 1:
            last = data.rfind(border)
            return last + len(self.end) if last >= 0 else 0
        starts = (match.start() for match in re.finditer(re.escape(border), data))
        if self.records is not None:  # where none at the very beginning counts
            place = next(
                itertools.islice(filter(None, starts), self.records * self.ends - 1, None), None
            )
        else:
            place = next(reversed([*starts][self.ends - 1 :: self.ends]), None)
        return 0 if place is None else place + len(self.end)

    def _bare(self, block: bytes) -> bytes:
        if not self.is_bare:
            return block
        if self.end + self.start:
            block = block.replace(self.end + self.start, b"")
        return block.removeprefix(self.start).removesuffix(self.end)
