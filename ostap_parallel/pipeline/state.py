"""What a recipe has finished already, in a file, so that it goes on from there."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ostap_parallel.config.files import find_danger
from ostap_parallel.errors import ConfigError
from ostap_parallel.objects import serialize
from ostap_parallel.runs.identity import Digester

MAGIC = b"ostap-parallel recipe 1\n"

# Begins each entry: how long its key and its value are.
HEAD = struct.Struct("!II")


class State:
    """Entries in a file, each there as a whole or not at all, also after a crash.

    Parameters
    ----------
    path
        The file; it is made by the first entry.

    Raises
    ------
    ConfigError
        It is another file, or one that others can write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: dict[bytes, bytes] = {}
        try:
            with path.open("rb") as file:
                danger = find_danger(os.fstat(file.fileno()))
                data = b"" if danger else file.read()
        except FileNotFoundError:
            return
        except OSError as exc:
            raise ConfigError(f"{path}: {exc.strerror}") from exc
        if danger:  # it is read as pickle does it
            raise ConfigError(f"{path} is not read, for it could run code: {danger}")
        if not data.startswith(MAGIC) and not MAGIC.startswith(data):
            raise ConfigError(f"{path} is no state of a recipe")
        end = self._read(data) if len(data) > len(MAGIC) else 0
        if end < len(data):  # whoever wrote the last one was killed
            with path.open("rb+") as file:
                file.truncate(end)

    def _read(self, data: bytes) -> int:
        """Take the entries; return where the last whole one ends."""
        position = len(MAGIC)
        while position + HEAD.size <= len(data):
            sizes = HEAD.unpack_from(data, position)
            begin = position + HEAD.size
            if begin + sum(sizes) > len(data):
                break
            key = data[begin : begin + sizes[0]]
            position = begin + sum(sizes)
            self._entries[key] = data[position - sizes[1] : position]
        return position

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> Any:
        """Return what came of the thing with a key; ``None`` if it was not finished."""
        found = self._entries.get(key)
        return None if found is None else serialize.loads(found)

    def put(self, key: bytes, value: Mapping[str, Any]) -> None:
        """Note that something was finished."""
        packed = serialize.pack(dict(value), "the results")
        self._entries[key] = packed
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab", opener=_open) as file:
            entry = HEAD.pack(len(key), len(packed)) + key + packed
            file.write(entry if file.tell() else MAGIC + entry)


def _open(path: str, flags: int) -> int:
    return os.open(path, flags, 0o644)


def key_of(*parts: Any) -> bytes:
    """Return what is the same for equal parts, in any process."""
    return Digester().digest(parts)
