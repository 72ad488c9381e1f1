"""What all recipes of LOFAR's are: programs with a log, a configuration, inputs and outputs."""

from __future__ import annotations

import argparse
import configparser
import datetime
import inspect
import logging
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ostap_parallel.errors import ConfigError, OstapParallelError
from ostap_parallel.pipeline import ingredient
from ostap_parallel.pipeline.datamap import store_data_map
from ostap_parallel.pipeline.exceptions import PipelineException, PipelineQuit
from ostap_parallel.pipeline.state import State

FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
DATE_FORMAT = "%Y-%m-%d %H:%M:%S"

# Settings of [remote] that mean something here, and what its methods are.
REMOTE = {"max_per_node", "method"}
METHODS = {
    **{"ssh": "ssh", "local": "local", "srun": "srun", "slurm": "srun"},
    **{"slurm_srun": "srun", "slurm_srun_cep3": "srun", "pbs_ssh": "ssh", "slurm_ssh": "ssh"},
}


# Inputs that all recipes have.
FIELDS: dict[str, ingredient.Field] = {
    "job_name": ingredient.StringField(optional=True),
    "config": ingredient.StringField(optional=True),
    "task_files": ingredient.FileList(
        *("-t", "--task-file"), help="files with sections for tasks", optional=True
    ),
    "runtime_directory": ingredient.FileField(
        *("-r", "--runtime-directory"), help="for [DEFAULT] runtime_directory", optional=True
    ),
    "working_directory": ingredient.StringField(
        *("-w", "--working-directory"), help="for [DEFAULT] working_directory", optional=True
    ),
    "start_time": ingredient.StringField("--start-time", help="when it began", optional=True),
    "dry_run": ingredient.BoolField("-n", "--dry-run", help="for the recipe", default=False),
    "args": ingredient.ListField(default=[]),
}


class BaseRecipe:
    """Base class of recipes.

    Attributes
    ----------
    name
        That of its class.
    logger
        Its log, to which come the records of node scripts, too.
    error
        An event that is set once a job has failed.
    inputs
        What the command line gives; ``inputs["args"]`` are the words behind the options.
    outputs
        What is printed at the end.
    config
        What ``pipeline.cfg`` says.
    scope
        As which recipe of which other one it runs: what is finished there is so in no other.
    """

    inputs: Any = FIELDS

    def __init__(self) -> None:
        self.name = type(self).__name__
        self.logger = logging.getLogger(self.name)
        self.error = _Error()
        inputs, outputs = ingredient.fields_of(type(self))
        is_open = inputs.keys() <= FIELDS.keys()  # it has none of its own
        self.inputs = ingredient.LOFARingredient(inputs, is_open)
        self.outputs = ingredient.LOFARingredient(outputs, not outputs)
        self.environment = {
            name: value for name, value in os.environ.items() if name.endswith(("PATH", "ROOT"))
        }
        self.config = configparser.ConfigParser()
        self.state: State | None = None
        self.scope: tuple[Any, ...] = ()
        self._turns: Counter[str] = Counter()

    @property
    def __file__(self) -> str:
        """The file of the recipe; empty if there is none."""
        try:
            return str(Path(inspect.getsourcefile(type(self)) or "").absolute())
        except (OSError, TypeError):
            return ""

    def go(self) -> int | None:
        """Do the work and return the exit status; to be overridden, and called first by that."""
        self.logger.info("recipe %s started", self.name)
        self.logger.debug("Job name is %s", self.inputs.get("job_name"))
        self._complete()
        return 0

    def _complete(self) -> None:
        """Take inputs that are not given from the configuration; the others must be there."""
        defaults = self.config.defaults()
        for key in ("runtime_directory", "working_directory"):
            if key in self.inputs:
                self.config.set(configparser.DEFAULTSECT, key, self.inputs[key].replace("%", "%%"))
            elif key in defaults:
                self.inputs[key] = self.config.get(configparser.DEFAULTSECT, key)
        if "start_time" not in self.inputs:
            self.inputs["start_time"] = _now()
        if missing := self.inputs.missing():
            raise PipelineException(f"inputs are missing: {', '.join(missing)}")

    def next_turn(self, what: str) -> int:
        """Return how often this was asked for already."""
        self._turns[what] += 1
        return self._turns[what] - 1

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Run it as a program: read the command line, do the work, print the outputs."""
        fields, _ = ingredient.fields_of(type(self))
        parser = _parser(self.name, fields)
        options = parser.parse_args(argv)
        try:
            given = {key: value for key, value in vars(options).items() if value is not None}
            self.inputs.update(given)
        except ingredient.IngredientError as exc:
            parser.error(str(exc))
        self._set_up_log(
            logging.DEBUG
            if options.debug
            else logging.INFO
            if options.verbose
            else logging.WARNING
        )
        begin = time.monotonic()
        try:
            self._read_config(options.config)
            status = self.go()
        except PipelineQuit:
            self.logger.warning("recipe %s was interrupted", self.name)
            return 128 + signal.SIGINT
        except Exception as exc:
            is_ours = isinstance(exc, OstapParallelError)
            self.logger.error("recipe %s failed: %s", self.name, exc, exc_info=not is_ours)
            return 1
        finally:
            if options.report is not None:
                try:
                    text = self.outputs.get("return_json", "[]")
                    options.report.write_text(f"{text}\n", "utf-8")
                except OSError as exc:  # what was computed is not to be lost for this
                    self.logger.error("the report cannot be written: %s", exc)
        if status:
            self.logger.error("recipe %s failed with status %s", self.name, status)
            return int(status)
        self.logger.info("recipe %s completed", self.name)
        self.logger.debug("it took %.1f s", time.monotonic() - begin)
        print("Results:")
        for key, value in self.outputs.items():
            if key != "return_json":
                print(f"{key} = {value}")
        return 0

    def _set_up_log(self, level: int) -> None:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(FORMAT, DATE_FORMAT))
        self.logger.addHandler(handler)
        self.logger.setLevel(level)
        self.logger.propagate = False

    def _set_up_log_file(self) -> None:
        """Log as [logging] of the configuration says."""
        config = self.config
        if config.has_option("logging", "log_file"):
            path = Path(config.get("logging", "log_file"))
            path.parent.mkdir(parents=True, exist_ok=True)
            self.logger.addHandler(logging.FileHandler(path))
        form = config.get("logging", "format", raw=True, fallback=FORMAT)
        dates = config.get("logging", "datefmt", raw=True, fallback=DATE_FORMAT)
        for handler in self.logger.handlers:
            handler.setFormatter(logging.Formatter(form, dates))

    def _store_data_map(self, path: Path | str, data_map: Any, message: str = "") -> None:
        """Write a data map, or what makes one, to a file, and log that with a message."""
        store_data_map(path, data_map)
        self.logger.debug("Wrote data_map <%s>: %s", path, message)

    def _read_config(self, given: str | None) -> None:
        """Read the first file that there is; what means nothing here is told."""
        usual = (Path("pipeline.cfg"), Path.home() / ".pipeline.cfg")
        path = Path(given) if given else next(filter(Path.is_file, usual), None)
        if path is None:
            return
        try:
            started = self.inputs.setdefault("start_time", _now())
            known = {
                "job_name": self.inputs["job_name"],
                "start_time": started,
                "cwd": str(Path.cwd()),
            }
            self.config.read_dict({configparser.DEFAULTSECT: known})
            self.config.read_string(path.read_text("utf-8"), str(path))
            options = self.config.items("remote") if self.config.has_section("remote") else []
            defaults = self.config.defaults()
            for key, value in options:
                if key not in REMOTE and key not in defaults:
                    self.logger.warning("%s: [remote] %s means nothing here", path, key)
                if key == "method" and value not in METHODS:
                    self.logger.warning("%s: method %s: ssh is taken in its place", path, value)
            self._set_up_log_file()
        except (OSError, ValueError, configparser.Error) as exc:
            raise ConfigError(f"{path}: {exc}") from exc


class _Error(threading.Event):
    """An event, also by the name that its question had in older Pythons."""

    isSet = threading.Event.is_set


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")


def _parser(name: str, fields: Mapping[str, ingredient.Field]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=name, conflict_handler="resolve")
    for key, field in fields.items():
        if field.optionstrings and key != "args":
            default = f" [default: {field.default}]" if hasattr(field, "default") else ""
            text = f"{field.help}{default}".replace("%", "%%")
            parser.add_argument(*field.optionstrings, dest=key, metavar="VALUE", help=text)
    parser.add_argument("-j", "--job-name", required=True, help="a name for all this")
    parser.add_argument("-d", "--debug", action="store_true", help="tell everything")
    parser.add_argument("-v", "--verbose", action="store_true", help="tell what is done")
    parser.add_argument("-c", "--config", metavar="FILE", help="in place of pipeline.cfg")
    text = "a file for what became of the jobs, and what they used, as JSON"
    parser.add_argument("--report", metavar="FILE", type=_file_to_be, help=text)
    parser.add_argument("args", nargs="*", metavar="ARGUMENT", help="for the recipe")
    return parser


def _file_to_be(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a directory, or in none that is there")
    return path
