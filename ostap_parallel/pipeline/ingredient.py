"""Typed inputs and outputs of recipes, as LOFAR's `lofaringredient` has them."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from ostap_parallel.errors import ConfigError
from ostap_parallel.pipeline.helpers import string_to_list


class IngredientError(ConfigError, TypeError):
    """An input or output of a recipe is not what it must be; the text names it."""


class Field:
    """What an input or output may be; to be derived from.

    Parameters
    ----------
    options
        Its options on the command line, as ``--executable``.
    help
        What it is.
    attrs
        ``default``; or ``optional=True``: it may be missing.

    Attributes
    ----------
    wanted
        What messages say that it must be.
    """

    wanted = ""

    def __init__(self, *options: str, help: str = "", **attrs: Any) -> None:
        self.optionstrings, self.help = options, help
        if "default" in attrs:
            self.default = attrs["default"]
        elif attrs.get("optional"):
            self.optional = True

    @property
    def is_required(self) -> bool:
        """Whether it must be given."""
        return not hasattr(self, "default") and not hasattr(self, "optional")

    def is_valid(self, value: Any) -> bool:
        """Return whether it may have a value; to be overridden."""
        raise NotImplementedError

    def coerce(self, value: Any) -> Any:
        """Return what a value means, if it can be told, as that of text."""
        return value

    def checked(self, name: str, value: Any) -> Any:
        """Return what a value means; raises IngredientError if it is not valid."""
        meant = self.coerce(value)
        if not self.is_valid(meant):
            wanted = self.wanted or f"a value for {type(self).__name__}"
            raise IngredientError(f"{name}: {wanted} is wanted, not {value!r}")
        return meant


class StringField(Field):
    """Text."""

    wanted = "text"

    def is_valid(self, value: Any) -> bool:
        """Return whether it is text."""
        return isinstance(value, str)


class _NumberField(Field):
    kind: type

    def is_valid(self, value: Any) -> bool:
        """Return whether it is one."""
        return isinstance(value, self.kind)

    def coerce(self, value: Any) -> Any:
        """Return a number for text."""
        with contextlib.suppress(ValueError, TypeError):
            return self.kind(value)
        return value


class IntField(_NumberField):
    """A whole number."""

    wanted, kind = "a whole number", int


class FloatField(_NumberField):
    """A number."""

    wanted, kind = "a number", float


class FileField(Field):
    """The path of something that is there."""

    wanted = "the path of something that is there"

    def is_valid(self, value: Any) -> bool:
        """Return whether it is there."""
        return os.path.exists(str(value))  # noqa: PTH110 - False also for what is no path


class ExecField(Field):
    """The path of a program."""

    wanted = "the path of a program"

    def is_valid(self, value: Any) -> bool:
        """Return whether it may be run."""
        return isinstance(value, str | os.PathLike) and os.access(value, os.X_OK)


class DirectoryField(Field):
    """The path of a directory, which is made."""

    wanted = "the path of a directory that is there, or can be made"

    def is_valid(self, value: Any) -> bool:
        """Return whether it is there."""
        return Path(str(value)).is_dir()

    def coerce(self, value: Any) -> Any:
        """Make it."""
        with contextlib.suppress(OSError):
            Path(str(value)).mkdir(parents=True, exist_ok=True)
        return value


class BoolField(Field):
    """True or False."""

    wanted = "True or False"

    def is_valid(self, value: Any) -> bool:
        """Return whether it is."""
        return isinstance(value, bool)

    def coerce(self, value: Any) -> Any:
        """Return what text means: ``"True"``, ``"False"``, ``"None"`` or nothing."""
        known = {"True": True, "False": False, "None": False, "": False}
        return known.get(value, value) if isinstance(value, str) else value


class ListField(Field):
    """Several things."""

    wanted = "a list"

    def is_valid(self, value: Any) -> bool:
        """Return whether it can be iterated over, and is no text."""
        return isinstance(value, Iterable) and not isinstance(value, str)

    def coerce(self, value: Any) -> Any:
        """Return the words of ``"[a, b]"``."""
        return string_to_list(value) if isinstance(value, str) else value


class DictField(Field):
    """Things by their names."""

    wanted = "a dictionary"

    def is_valid(self, value: Any) -> bool:
        """Return whether it is a dictionary."""
        return isinstance(value, dict)


class FileList(ListField):
    """Paths of things that are there."""

    wanted = "a list of paths of what is there"

    def is_valid(self, value: Any) -> bool:
        """Return whether all are."""
        return super().is_valid(value) and all(map(os.path.exists, value))


class LOFARingredient(MutableMapping[str, Any]):
    """Values by name, each of which is checked by its field when it is set.

    Parameters
    ----------
    fields
        What there may be.
    is_open
        Whether there may be other names, too.
    """

    def __init__(self, fields: Mapping[str, Field], is_open: bool = False) -> None:
        self._fields, self._is_open = dict(fields), is_open
        self._values: dict[str, Any] = {}

    def __repr__(self) -> str:
        return repr(dict(self))

    def __getitem__(self, key: str) -> Any:
        if key not in self._values and hasattr(self._fields.get(key), "default"):
            field = self._fields[key]
            # a copy, and kept: recipes append to what is a list
            self._values[key] = field.checked(key, copy.deepcopy(field.default))
        return self._values[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if key in self._fields:
            value = self._fields[key].checked(key, value)
        elif not self._is_open:
            raise IngredientError(f"there is no ingredient {key}: {', '.join(self._fields)} are")
        self._values[key] = value

    def __delitem__(self, key: str) -> None:
        del self._values[key]

    def __iter__(self) -> Iterator[str]:
        given = [key for key, field in self._fields.items() if hasattr(field, "default")]
        return iter({**dict.fromkeys(given), **self._values})

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, key: object) -> bool:
        return key in self._values or hasattr(self._fields.get(str(key)), "default")

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Set several; what has no field is taken as it is."""
        for key, value in dict(*args, **kwargs).items():
            field = self._fields.get(key)
            self._values[key] = value if field is None else field.checked(key, value)

    def missing(self) -> list[str]:
        """Return the names of what must be given, and is not."""
        return [
            key
            for key, field in self._fields.items()
            if key not in self._values and field.is_required
        ]

    def complete(self) -> bool:
        """Return whether nothing is missing."""
        return not self.missing()


def fields_of(cls: type) -> tuple[dict[str, Field], dict[str, Field]]:
    """Return the fields of the inputs of a recipe, also inherited ones, and of its outputs."""
    inputs: dict[str, Field] = {}
    for base in reversed(cls.__mro__):
        inputs |= vars(base).get("inputs", {})
    outputs = [vars(base)["outputs"] for base in cls.__mro__ if "outputs" in vars(base)]
    return inputs, dict(outputs[0]) if outputs else {}
