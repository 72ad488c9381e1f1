"""Recipes that run other recipes, and that go on after the last one that they have finished."""

from __future__ import annotations

import ast
import configparser
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ostap_parallel.errors import ConfigError
from ostap_parallel.pipeline.base import FIELDS, BaseRecipe
from ostap_parallel.pipeline.exceptions import (
    PipelineException,
    PipelineRecipeFailed,
    PipelineRecipeNotFound,
)
from ostap_parallel.pipeline.state import State, key_of


class TaskMixIn(BaseRecipe):
    """A recipe that runs others."""

    def run_task(
        self, configblock: str, datafiles: Sequence[Any] | str = (), **kwargs: Any
    ) -> dict[str, Any]:
        """Run a recipe and return its outputs.

        Parameters
        ----------
        configblock
            A section of the files that ``task_files`` of the configuration names, with ``recipe``
            and inputs; or the name of a recipe.
        datafiles
            Its ``inputs["args"]``.
        kwargs
            More inputs, which go before those of the section.

        Raises
        ------
        PipelineRecipeFailed
            Its exit status was not 0.
        """
        name, inputs = self._task(configblock)
        return self.cook_recipe(name, {**inputs, **kwargs, "args": _files(datafiles)})

    def _task(self, configblock: str) -> tuple[str, dict[str, Any]]:
        """Return the name of the recipe of a task, and the inputs that its section gives."""
        defaults = dict(self.config.items(configparser.DEFAULTSECT, raw=True))
        tasks = configparser.ConfigParser(defaults)
        tasks.read(self.inputs.get("task_files") or _list(self.config, "task_files"), "utf-8")
        if not tasks.has_section(configblock):
            return configblock, {}
        own = {
            key for key, value in tasks.items(configblock, raw=True) if value != defaults.get(key)
        }
        try:
            inputs: dict[str, Any] = {key: tasks.get(configblock, key) for key in sorted(own)}
        except configparser.InterpolationError as exc:
            raise ConfigError(f"task {configblock}: {exc}") from exc
        return inputs.pop("recipe", configblock), inputs

    def cook_recipe(self, name: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Run the recipe of a name with some inputs; return its outputs.

        It is a class of that name in ``name.py``, in one of ``recipe_directories`` or their
        ``master``, or beside this one.
        """
        recipe = self._find(name)()
        ours = {key: self.inputs[key] for key in FIELDS if key in self.inputs}
        recipe.inputs.update({**ours, **inputs})
        recipe.config, recipe.logger = self.config, self.logger.getChild(name)
        recipe.scope = (*self.scope, self.next_turn("recipe"), name)
        for setting in ("servers", "settings"):
            if not getattr(recipe, setting, None) and hasattr(self, setting):
                setattr(recipe, setting, getattr(self, setting))
        status = recipe.go()
        if status:
            raise PipelineRecipeFailed(f"{name} failed with status {status}")
        return dict(recipe.outputs)

    def _find(self, name: str) -> type[BaseRecipe]:
        folders = [Path(folder) for folder in _list(self.config, "recipe_directories")]
        if self.__file__:
            folders.append(Path(self.__file__).parent)
        for folder in folders:
            for path in (folder / "master" / f"{name}.py", folder / f"{name}.py"):
                if path.is_file():
                    spec = importlib.util.spec_from_file_location(f"recipes.{name}", path)
                    assert spec is not None
                    assert spec.loader is not None
                    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
                    spec.loader.exec_module(module)
                    found: type[BaseRecipe] = getattr(module, name)
                    return found
        raise PipelineRecipeNotFound(f"there is no {name}.py in {', '.join(map(str, folders))}")


class StatefulRecipe(TaskMixIn):
    """A recipe that goes on after what it has finished when it is run again by the same job name.

    What is finished is in ``statefile`` in ``[layout] job_directory``, or else in
    ``<job name>.state`` here: each job of `_schedule_jobs` that has ended well, and each recipe of
    `run_task`. To begin anew, remove it. A job or recipe whose command, host, arguments or inputs
    have changed runs again, and so does what has failed.
    """

    def go(self) -> int | None:
        """Begin, with what is finished already."""
        status = super().go()
        name = self.inputs.get("job_name") or self.name
        folder = self.config.get("layout", "job_directory", fallback=None)
        path = Path(folder, "statefile") if folder else Path(f"{name}.state")
        self.state = State(path)
        if self.state:
            self.logger.info("%d jobs and tasks are finished by %s", len(self.state), path)
        return status

    def run_task(
        self, configblock: str, datafiles: Sequence[Any] | str = (), **kwargs: Any
    ) -> dict[str, Any]:
        """Run a recipe, or return the outputs of the time when it was finished."""
        state = self.state
        if state is None:
            raise PipelineException("go of StatefulRecipe is to be called first")
        name, inputs = self._task(configblock)
        # now: the recipe may change what it is given
        turn = self.next_turn("task")
        key = key_of("task", self.scope, turn, name, _files(datafiles), {**inputs, **kwargs})
        found = state.get(key)
        if found is not None:
            self.logger.info("Task %s is finished already: it is not run again", configblock)
            self.next_turn("recipe")  # those behind it have the same scope as the other time
            return dict(found)
        outputs = super().run_task(configblock, datafiles, **kwargs)
        state.put(key, outputs)
        return outputs


def _files(datafiles: Sequence[Any] | str) -> list[Any]:
    """Return the arguments of a recipe; LOFAR's pipelines give the name of one map as it is."""
    return [datafiles] if isinstance(datafiles, str) else list(datafiles)


def _list(config: configparser.ConfigParser, key: str) -> list[str]:
    """Return the names in a setting: a literal, or ``[a, b]`` as LOFAR writes it."""
    try:
        text = config.get(configparser.DEFAULTSECT, key, fallback="").strip()
    except configparser.InterpolationError as exc:
        raise ConfigError(f"{key}: {exc}") from exc
    try:
        found = ast.literal_eval(text) if text else []
        if isinstance(found, list | tuple):
            return [str(name) for name in found]
    except (ValueError, SyntaxError):
        names = text.strip("[]").split(",")
        return [name.strip().strip("'\"") for name in names if name.strip()]
    raise ConfigError(f"{key}: a list is wanted, not {text!r}")
