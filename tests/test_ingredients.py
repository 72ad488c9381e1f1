"""Typed inputs and outputs of LOFAR's recipes, and what their programs use besides."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from typing import ClassVar

import pytest

from ostap_parallel.pipeline import (
    BaseRecipe,
    CatchLog4CPlus,
    ComputeJob,
    DataMap,
    PipelineException,
    RemoteCommandRecipeMixIn,
    SubProcessGroup,
    catch_segfaults,
    create_directory,
    delete_directory,
    disk_usage,
    get_mountpoint,
    ingredient,
    is_iterable,
    log_process_output,
    log_time,
    read_initscript,
    string_to_list,
)

PATIENCE = 60

# As recipes of LOFAR's are written.
MASTER = """
import os, sys
from ostap_parallel.pipeline import (
    BaseRecipe, ComputeJob, DataMap, RemoteCommandRecipeMixIn, ingredient, log_process_output
)

class Interface(BaseRecipe, RemoteCommandRecipeMixIn):
    inputs = {"nproc": ingredient.IntField("--nproc", help="processes, 100% of them", default=8)}

    def __init__(self, command):
        self._command = command
        super(Interface, self).__init__()

class copier(Interface):
    inputs = {
        "executable": ingredient.ExecField("--executable", help="a program"),
        "suffix": ingredient.StringField("--suffix", default=".copy"),
        "verify": ingredient.BoolField("--verify", default=False),
        "extra": ingredient.ListField("--extra", default=[]),
        "mapfile": ingredient.StringField("--mapfile", help="what is written"),
        "working_directory": ingredient.StringField("-w", "--working-directory"),
    }
    outputs = {"mapfile": ingredient.FileField(help="what was copied")}

    def __init__(self):
        super(copier, self).__init__(" python %s" % self.__file__.replace("master", "nodes"))

    def go(self):
        super(copier, self).go()
        assert self.config.get("layout", "job_directory").endswith("/jobs/name")
        self.inputs["extra"].append("x")
        data = DataMap.load(self.inputs["args"][0])
        data.iterator = DataMap.SkipIterator
        jobs = []
        for item in data:
            target = os.path.join(self.inputs["working_directory"], os.path.basename(item.file))
            item.file, source = target + self.inputs["suffix"], item.file
            arguments = [self.inputs["executable"], source, item.file, self.environment]
            jobs.append(ComputeJob(item.host, self._command, arguments))
        self._schedule_jobs(jobs, max_per_node=self.inputs["nproc"])
        if self.error.isSet():
            return 1
        self._store_data_map(self.inputs["mapfile"], data, "copies")
        self.outputs["mapfile"] = self.inputs["mapfile"]
        self.logger.info("verify %s extra %s", self.inputs["verify"], self.inputs["extra"])
        return 0

if __name__ == "__main__":
    sys.exit(copier().main())
"""

NODE = """
import sys
from ostap_parallel.pipeline import (
    CatchLog4CPlus, LOFARnodeTCP, catch_segfaults, create_directory, log_time
)

class copier(LOFARnodeTCP):
    def run(self, executable, source, target, environment):
        self.environment.update(environment)
        with log_time(self.logger):
            create_directory(target + ".d")
            with CatchLog4CPlus(target + ".d", self.logger.name + ".cp", "cp") as logger:
                command = [executable, source, target]
                monitor = self.resourceMonitor
                catch_segfaults(command, None, self.environment, logger, usageStats=monitor)
        self.outputs["ok"] = True
        return 0

if __name__ == "__main__":
    jobid, jobhost, jobport = sys.argv[1:4]
    sys.exit(copier(jobid, jobhost, jobport).run_with_stored_arguments())
"""

CONFIGURATION = """
[DEFAULT]
runtime_directory = %(cwd)s
working_directory = %(runtime_directory)s/work
task_files = [%(cwd)s/tasks.cfg]
recipe_directories = [%(cwd)s]
[layout]
job_directory = %(runtime_directory)s/jobs/%(job_name)s
[logging]
log_file = %(cwd)s/logs/%(start_time)s/pipeline.log
format = %(levelname)s|%(message)s
"""

# The program of a recipe that runs the other by a section of tasks.
PIPELINE = """
from ostap_parallel.pipeline import StatefulRecipe

class top(StatefulRecipe):
    def go(self):
        super().go()
        self.outputs["found"] = self.run_task("copies", "in.map", nproc="2")["mapfile"]
        return 0

raise SystemExit(top().main())
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with a recipe, its node script, a configuration and a map."""
    for name, text in {
        "master/copier.py": MASTER,
        "nodes/copier.py": NODE,
        "pipeline.cfg": CONFIGURATION,
        "a": "A",
        "b": "B",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for name in ("work", "jobs/name"):
        (tmp_path / name).mkdir(parents=True)
    DataMap([("localhost", tmp_path / name, name == "b") for name in "ab"]).save(
        tmp_path / "in.map"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(*words, program="master/copier.py"):
    """Run a recipe; return exit status, output and errors."""
    argv = [sys.executable, program, "-j", "name", *words]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE)
    return done.returncode, done.stdout, done.stderr


class TestRecipes:
    def test_options_defaults_and_the_configuration(self, place):
        words = (
            "-d",
            "--executable",
            "/bin/cp",
            "--mapfile",
            "out.map",
            "--verify",
            "True",
            "in.map",
        )
        status, out, err = start(*words)
        assert (status, out) == (0, "Results:\nmapfile = out.map\n"), err
        assert (place / "work/a.copy").read_text() == "A"
        found = [(item.file, item.skip) for item in DataMap.load("out.map")]
        assert found == [(f"{place}/work/a.copy", False), (f"{place}/b", True)]
        assert "INFO|verify True extra ['x']\n" in err
        assert "DEBUG|Wrote data_map <out.map>: copies\n" in err
        assert "INFO|Total time " in err
        (log,) = (place / "logs").glob("20*T*:*:*/pipeline.log")
        assert "INFO|verify True extra ['x']\n" in log.read_text()

    @pytest.mark.parametrize(
        ("words", "status", "told"),
        [
            (["--executable", "/bin/cp"], 1, "inputs are missing: mapfile"),
            (
                ["--executable", "/none"],
                2,
                "executable: the path of a program is wanted, not '/none'",
            ),
            (["--nproc", "many"], 2, "nproc: a whole number is wanted, not 'many'"),
            (["--verify", "maybe"], 2, "verify: True or False is wanted, not 'maybe'"),
            (["-h"], 0, ""),
        ],
    )
    def test_what_is_wrong_is_told_before_anything_runs(self, place, words, status, told):
        found, out, err = start(*words, "in.map")
        assert (found, told in err) == (status, True), err
        if words == ["-h"]:
            assert "processes, 100% of them [default: 8]" in " ".join(out.split())

    def test_an_output_must_be_what_it_is_said_to_be(self, place):
        text = (place / "master/copier.py").read_text()
        wrong = text.replace(
            'self.outputs["mapfile"] = self.inputs', 'self.outputs["map"] = self.inputs'
        )
        (place / "master/copier.py").write_text(wrong)
        status, _, err = start("--executable", "/bin/cp", "--mapfile", "out.map", "in.map")
        assert status == 1
        assert "there is no ingredient map: mapfile are" in err

    def test_a_task_gives_inputs_and_the_name_of_a_map_is_one_argument(self, place):
        (place / "tasks.cfg").write_text(
            "[copies]\nrecipe = copier\nexecutable = /bin/cp\nmapfile = %(cwd)s/of-task.map\n"
        )
        (place / "top.py").write_text(PIPELINE)
        status, out, err = start("-v", program="top.py")
        assert (status, out) == (0, f"Results:\nfound = {place}/of-task.map\n"), err
        assert "INFO|Limiting to 2 simultaneous jobs/node" in err

    def test_on_a_host(self, hosts):
        recipe = Copies()
        recipe.settings = {"ssh_config": hosts.ssh_config, "config": ()}
        command = f"python -c '{NODE}'"
        paths = [host.home / "typed" for host in hosts]
        for path in paths:
            path.write_text("text")
        jobs = [
            ComputeJob(host.name, command, ["/bin/cp", "typed", "copy", {}]) for host in hosts[:2]
        ]
        recipe._schedule_jobs(jobs)
        assert [job.results.get("ok") for job in jobs] == [True, True]
        for host in hosts:
            for name in ("typed", "copy", "copy.d/cp.log_prop"):
                (host.home / name).unlink()
            (host.home / "copy.d").rmdir()


class Copies(BaseRecipe, RemoteCommandRecipeMixIn):
    """It has no fields of its own."""


class Typed(BaseRecipe):
    """A recipe with a field of the user's."""

    class EvenField(ingredient.Field):
        """An even number."""

        def is_valid(self, value):
            return value % 2 == 0

        def coerce(self, value):
            return int(value)

    inputs: ClassVar = {
        "even": EvenField("--even", default="4"),
        "files": ingredient.FileList("--files", optional=True),
        "directory": ingredient.DirectoryField("--directory"),
        "factor": ingredient.FloatField("--factor", default=1),
        "more": ingredient.DictField(default={}),
    }


class TestFields:
    def test_values(self, tmp_path):
        inputs = Typed().inputs
        assert (inputs["even"], inputs["factor"], inputs["args"]) == (4, 1.0, [])
        assert "files" not in inputs
        with pytest.raises(KeyError):
            inputs["files"]
        assert (inputs.missing(), inputs.complete()) == (["directory"], False)
        inputs["directory"] = f"{tmp_path}/a/b"
        assert (tmp_path / "a/b").is_dir()
        assert inputs.complete()
        inputs["files"] = f"[{tmp_path}, /]"
        assert inputs["files"] == [str(tmp_path), "/"]
        inputs.update({"unknown": 1}, even="6")
        assert (inputs["unknown"], inputs["even"]) == (1, 6)
        assert dict(inputs)["even"] == 6

    @pytest.mark.parametrize(
        ("key", "value"),
        [("even", 3), ("files", ["/none"]), ("directory", "/dev/null/x"), ("more", []), ("no", 1)],
    )
    def test_what_is_not_valid(self, key, value):
        recipe = Typed()
        with pytest.raises(TypeError, match=key):
            recipe.inputs[key] = value

    def test_what_is_missing_ends_it(self):
        with pytest.raises(PipelineException, match="inputs are missing: directory"):
            Typed().go()

    def test_a_default_is_not_shared(self):
        one, two = Typed(), Typed()
        one.inputs["more"]["a"] = 1
        assert (one.inputs["more"], two.inputs["more"]) == ({"a": 1}, {})

    def test_without_fields_all_may_be(self):
        recipe = Copies()
        recipe.inputs["anything"] = recipe.outputs["something"] = 7
        assert recipe.go() == 0
        assert (recipe.inputs["anything"], recipe.outputs["something"]) == (7, 7)


class TestHelpers:
    logger = logging.getLogger("test.helpers")

    def test_what_a_process_has_printed(self, caplog):
        caplog.set_level(logging.DEBUG)
        log_process_output("p", b"out\xff\n", "tcgetattr: Invalid argument\n", self.logger)
        assert caplog.record_tuples == [("test.helpers", logging.DEBUG, "p stdout: out\\xff\n")]

    def test_time(self, caplog):
        caplog.set_level(logging.INFO)
        with log_time(self.logger):
            pass
        assert caplog.messages[0].startswith("Total time 0.")

    def test_a_crash_is_tried_again(self, tmp_path, caplog):
        caplog.set_level(logging.DEBUG)
        text = "[ -e there ] && echo done && exit; : >there; kill -SEGV $$"
        cleaned = []
        process = catch_segfaults(
            ["sh", "-c", text], tmp_path, None, self.logger, cleanup=lambda: cleaned.append(1)
        )
        assert (process.returncode, cleaned) == (0, [1])
        assert "sh process segfaulted!" in caplog.messages
        assert "sh stdout: done\n" in caplog.messages

    @pytest.mark.parametrize(("text", "status"), [("kill -SEGV $$", -11), ("exit 3", 3)])
    def test_a_failure_is_raised(self, text, status):
        with pytest.raises(subprocess.CalledProcessError) as caught:
            catch_segfaults(["sh", "-c", text], None, None, self.logger)
        assert caught.value.returncode == status

    def test_a_log_of_a_program(self, tmp_path, caplog):
        caplog.set_level(logging.DEBUG)
        (tmp_path / "pipeline_process.log").write_text("old\n")
        with CatchLog4CPlus(str(tmp_path), "test.helpers", "prog") as logger:
            assert f"FILE.File={tmp_path}/pipeline" in (tmp_path / "prog.log_prop").read_text()
            with (tmp_path / "pipeline_process.log").open("a") as file:
                file.write("one\ntwo\n")
        assert logger.name == "test.helpers"
        assert caplog.messages == ["one", "two"]

    def test_programs_side_by_side(self, tmp_path, caplog):
        caplog.set_level(logging.DEBUG)
        group = SubProcessGroup(self.logger, max_concurrent_processes=2)
        for n in range(3):
            group.run(["sh", "-c", f"echo out{n}; echo err{n} >&2; exit {n}"], cwd=tmp_path)
        found = group.wait_for_finish()
        assert sorted(status for _, status in found) == [1, 2]
        assert {("DEBUG", "out1"), ("WARNING", "err2")} <= {
            (record.levelname, record.message) for record in caplog.records
        }
        group.run("true")
        assert group.wait_for_finish() is None

    def test_programs_that_are_ended(self):
        switch = threading.Event()
        group = SubProcessGroup(self.logger, polling_interval=0.1, killSwitch=switch)
        group.run("sleep 600")
        switch.set()
        assert group.wait_for_finish()[0][0] == ["sleep", "600"]

    def test_the_environment_of_a_script(self, tmp_path, caplog):
        script = tmp_path / "init.sh"
        script.write_text("echo noise; export A='x\ny'\n")
        assert read_initscript(self.logger, str(script))["A"] == "x\ny"
        assert read_initscript(self.logger, "/none") == {}
        assert "Environment initialisation script not found!" in caplog.messages

    def test_files_and_words(self, tmp_path):
        for _ in range(2):
            create_directory(f"{tmp_path}/a/b")
        (tmp_path / "a/b/file").write_bytes(b"x" * 100_000)
        assert 100_000 < disk_usage(f"{tmp_path}/a") < 200_000
        for _ in range(2):
            delete_directory(f"{tmp_path}/a")
        assert list(tmp_path.iterdir()) == []
        assert os.path.ismount(get_mountpoint(f"{tmp_path}/none"))
        assert string_to_list("[a, b ,, c]") == ["a", "b", "c"]
        assert (is_iterable([]), is_iterable(3)) == (True, False)
