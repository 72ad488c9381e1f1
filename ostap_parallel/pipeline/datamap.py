"""LOFAR's data maps: which file is on which host."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ostap_parallel.errors import ConfigError

_SPACE = re.compile(r"(?:\s|#[^\n]*)*")
_BEGIN = re.compile(r"([^\s=\[\],#]+)\s*=\s*\[")
_ITEM = re.compile(r"""\s*(?:"([^"\n]*)"|'([^'\n]*)'|([^,\]]*))\s*([,\]])""")


class DataMapError(ConfigError):
    """A data map is malformed, or maps do not go together; the text names file and line."""


class DataProduct:
    """A file on a host.

    Attributes
    ----------
    skip
        Whether it is to be left out.
    """

    def __init__(self, host: Any, file: Any, skip: bool = True) -> None:
        self.host, self.file, self.skip = str(host), str(file), bool(skip)

    def __repr__(self) -> str:
        return repr({"host": self.host, "file": self.file, "skip": self.skip})

    def __str__(self) -> str:
        return f"{self.host}:{self.file}"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    __hash__ = None  # type: ignore[assignment]


class MultiDataProduct:
    """Files on a host, which may be left out together or one by one.

    Attributes
    ----------
    file, file_skip
        The files, and for each whether it is to be left out.
    """

    def __init__(
        self,
        host: Any,
        file: Sequence[str] | str,
        skip: bool = True,
        file_skip: Sequence[bool] | None = None,
    ) -> None:
        self.host, self.skip = str(host), bool(skip)
        if isinstance(file, str):  # so it stands in files of LOFAR's
            file = ast.literal_eval(file) if file.lstrip().startswith("[") else [file]
        self.file: list[str] = [str(one) for one in file]
        self.file_skip = [self.skip] * len(self.file) if file_skip is None else list(file_skip)
        if len(self.file_skip) != len(self.file):
            raise TypeError(f"{len(self.file)} files, but file_skip for {len(self.file_skip)}")
        if not all(isinstance(one, bool) for one in self.file_skip):
            raise TypeError("file_skip is made of True and False")

    def __repr__(self) -> str:
        fields = {"host": self.host, "skip": self.skip, "file": self.file}
        return repr({**fields, "file_skip": self.file_skip})

    def __str__(self) -> str:
        return f"{self.host}:{','.join(self.file)}"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    __hash__ = None  # type: ignore[assignment]


class DataMap:
    """Files and their hosts.

    Parameters
    ----------
    data
        Data products, or dictionaries or tuples of their fields.
    iterator
        What iterates over them: ``iter``, `TupleIterator` or `SkipIterator`.
    """

    product: type[Any] = DataProduct

    class TupleIterator:
        """Yields ``(host, file)``."""

        def __init__(self, data: Iterable[Any]) -> None:
            self._values = iter(data)

        def __iter__(self) -> Iterator[tuple[str, Any]]:
            return self

        def __next__(self) -> tuple[str, Any]:
            value = next(self._values)
            return value.host, value.file

    class SkipIterator:
        """Yields what is not to be left out."""

        def __init__(self, data: Iterable[Any]) -> None:
            self._values = (value for value in data if not value.skip)

        def __iter__(self) -> Iterator[Any]:
            return self

        def __next__(self) -> Any:
            return next(self._values)

    def __init__(
        self, data: Iterable[Any] = (), iterator: Callable[[Any], Iterator[Any]] = iter
    ) -> None:
        self.data = list(data)
        self.iterator = iterator

    def __repr__(self) -> str:
        return repr(self.data)

    def __iter__(self) -> Iterator[Any]:
        return self.iterator(self.data)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Any) -> Any:
        return self.data[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DataMap) and type(other) is type(self) and other.data == self.data

    __hash__ = None  # type: ignore[assignment]

    @property
    def data(self) -> list[Any]:
        """The data products."""
        return self._data

    @data.setter
    def data(self, data: Iterable[Any]) -> None:
        self._data = [self._made(item) for item in data]

    def append(self, item: Any) -> None:
        """Add a data product, or its fields; host and file alone are not to be left out."""
        if self.product is DataProduct and isinstance(item, tuple) and len(item) == 2:
            item = (*item, False)
        self._data.append(self._made(item))

    @classmethod
    def _made(cls, item: Any) -> Any:
        if isinstance(item, cls.product):
            return item
        try:
            if isinstance(item, dict):
                return cls.product(**item)
            if isinstance(item, tuple | list):
                return cls.product(*item)
        except (TypeError, ValueError, SyntaxError) as exc:
            raise DataMapError(f"{item!r} is no data product: {exc}") from exc
        raise DataMapError(f"{item!r} is no data product")

    @classmethod
    def load(cls, filename: Path | str) -> DataMap:
        """Return the map in a file: a Python literal, or ``host = [file, file]`` and so on.

        In the second form, and in that of tuples, nothing is to be left out. Raises DataMapError.
        """
        try:
            text = Path(filename).read_text("utf-8")
        except (OSError, ValueError) as exc:
            raise DataMapError(f"{filename}: {exc}") from exc
        begin = _SPACE.match(text)
        assert begin is not None
        if text[begin.end() :].startswith("["):
            return cls(_literal(text, str(filename)))
        products = list(_parameters(text, str(filename)))
        if cls.product is MultiDataProduct:
            return cls((host, files, False) for host, files in products)
        return cls((host, file, False) for host, files in products for file in files)

    def save(self, filename: Path | str) -> None:
        """Write the map to a file, as a Python literal with one product per line."""
        lines = "".join(f"  {item!r},\n" for item in self.data)
        Path(filename).write_text(f"[\n{lines}]\n", "utf-8")


class MultiDataMap(DataMap):
    """Sets of files and their hosts."""

    product = MultiDataProduct


def load_data_map(filename: Path | str) -> DataMap:
    """Return the map in a file; it yields ``(host, file)``. See `DataMap.load`."""
    found = DataMap.load(filename)
    found.iterator = DataMap.TupleIterator
    return found


def store_data_map(filename: Path | str, data: DataMap | Iterable[Any]) -> None:
    """Write a map, or what makes one, to a file."""
    (data if isinstance(data, DataMap) else DataMap(data)).save(filename)


def validate_data_maps(*maps: DataMap) -> bool:
    """Return whether maps are of the same length, with the same hosts in the same order."""
    hosts = [[item.host for item in one.data] for one in maps]
    return bool(hosts) and all(one == hosts[0] for one in hosts)


def align_data_maps(*maps: DataMap) -> None:
    """Leave out of all maps what is to be left out of one.

    Raises DataMapError unless there are two at least, which go together.
    """
    if len(maps) < 2:
        raise DataMapError("two data maps at least are wanted")
    if not validate_data_maps(*maps):
        raise DataMapError("the data maps are not of the same hosts in the same order")
    for items in zip(*(one.data for one in maps), strict=True):
        skip = any(item.skip for item in items)
        for item in items:
            item.skip = skip


def _literal(text: str, filename: str) -> Iterator[Any]:
    """Yield the items of a list; a tuple of host and file is not to be left out."""
    try:
        items = ast.literal_eval(text.strip())
    except SyntaxError as exc:
        before = len(text) - len(text.lstrip())
        line = (exc.lineno or 1) + text[:before].count("\n")
        raise DataMapError(f"{filename}: line {line}: {exc.msg}") from exc
    except (ValueError, MemoryError, RecursionError) as exc:
        line = _line_of(text)
        raise DataMapError(
            f"{filename}: line {line}: only text, lists and the like may be here"
        ) from exc
    for item in items:
        yield (*item, False) if isinstance(item, tuple) and len(item) == 2 else item


def _line_of(text: str) -> int:
    """Return the line of the first expression that is more than a literal."""
    kinds = ast.Expression, ast.List, ast.Tuple, ast.Dict, ast.Constant, ast.Load, ast.Set
    before = text[: len(text) - len(text.lstrip())].count("\n")
    for node in ast.walk(ast.parse(text.strip(), mode="eval")):
        if not isinstance(node, kinds) and hasattr(node, "lineno"):
            return int(node.lineno) + before
    return 1


def _parameters(text: str, filename: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each host with its files."""

    def fail(position: int, what: str) -> NoReturn:
        line = text.count("\n", 0, position) + 1
        raise DataMapError(f"{filename}: line {line}: {what}")

    position = 0
    while True:
        space = _SPACE.match(text, position)
        position = space.end() if space else position
        if position == len(text):
            return
        begin = _BEGIN.match(text, position)
        if begin is None:
            fail(position, f"host = [file, ...] is wanted, not {text[position:][:40]!r}")
        position, files = begin.end(), []
        while True:
            item = _ITEM.match(text, position)
            if item is None:
                fail(begin.start(), f"the list of {begin[1]} has no end")
            file = next(part for part in item.groups()[:3] if part is not None).strip()
            if "=" in file and "[" in file:
                fail(begin.start(), f"the list of {begin[1]} has no end")
            position = item.end()
            if file or item[4] == ",":
                if not file:
                    fail(item.start(), f"a file is missing in the list of {begin[1]}")
                files.append(file)
            if item[4] == "]":
                break
        yield begin[1], files
