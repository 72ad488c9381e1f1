"""SLURM, with and without slurmdbd."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from ostap_parallel.errors import SchedulerUnavailable
from ostap_parallel.schedulers.answers import ask, refuse
from ostap_parallel.schedulers.directives import Directive, enter, print_to, script_of, value_in
from ostap_parallel.schedulers.quantities import clock, parse_memory, parse_walltime
from ostap_parallel.schedulers.scheduler import End, JobSpec, JobState, Phase, Runner

# Texts of sbatch where there is no room for now, or where it could not reach the controller. An
# array of more jobs than the controller may have is refused as one that there is no room for.
_FULL = ("temporarily unavailable", "job submit limit", "SubmitJob", "temporarily unable")
_UNSURE = ("Unable to contact", "timed out", "Connection refused", "connect failure")
_LIMIT = re.compile(r"^sbatch: error: (Assoc|QOS)\w+$", re.MULTILINE)
_MAY_BE_GONE = ("Invalid job id",)

_QUEUED = {"PENDING", "CONFIGURING", "REQUEUED"}
_HELD = {"REQUEUE_HOLD", "SPECIAL_EXIT"}
_RUNNING = {"RUNNING", "COMPLETING", "SUSPENDED", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED"}
_ENDS = {
    "COMPLETED": End.DONE,
    "FAILED": End.FAILED,
    "CANCELLED": End.CANCELLED,
    "REVOKED": End.CANCELLED,
    "TIMEOUT": End.WALLTIME,
    "DEADLINE": End.WALLTIME,
    "OUT_OF_MEMORY": End.MEMORY,
    "NODE_FAIL": End.NODE,
    "BOOT_FAIL": End.NODE,
    "PREEMPTED": End.PREEMPTED,
}

# Reasons for which a job will not start, however long it waits.
_NEVER = re.compile(
    r"held|InvalidAccount|InvalidQOS|BadConstraints|DependencyNeverSatisfied|NotAllowed"
    r"|PartitionTimeLimit|PartitionNodeLimit|PerJobLimit|MaxWallDurationPerJob"
    r"|MaxTRESPerJob|QOSTimeLimit|AccountNotAllowed",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Slurm:
    """The verbs of `Scheduler`, by SLURM's commands.

    Parameters
    ----------
    run
        Runs them.
    sbatch, squeue, scancel
        Where they are, if not on PATH.
    clusters
        Of a federation, as for ``--clusters``.
    """

    run: Runner
    sbatch: str = "sbatch"
    squeue: str = "squeue"
    scancel: str = "scancel"
    clusters: str = ""

    name = "slurm"
    job = "SLURM_JOB_ID"
    index = "SLURM_ARRAY_TASK_ID"
    first = 0
    naming = "--job-name -J"

    def script(self, spec: JobSpec) -> str:
        """Return what would be submitted."""
        return script_of("#SBATCH", _directives(spec), spec, glued=True)

    def submit(self, script: str, timeout: float = 60.0) -> str:
        """Submit a script; return the id."""
        done = self.run([self.sbatch, "--parsable", *self._where()], script, timeout)
        # of all that a site may limit one text is told; the limit that it is, on another line
        is_other = bool(_LIMIT.search(done.words)) and "SubmitJob" not in done.words
        refuse(self.sbatch, done, () if is_other else _FULL, _UNSURE)
        found = re.search(
            r"^(\d+)(;\S+)?$", done.output, re.MULTILINE
        )  # sites add words of theirs
        if found is None:
            raise SchedulerUnavailable(self.sbatch, f"no job id in its answer: {done.words}")
        return found[1]

    def find(self, name: str) -> list[str]:
        """Return the ids of the user's jobs of a name, also of those that have just ended."""
        argv = [self.squeue, *self._where(), "--me", "-h", "-t", "all", "-n", name, "-o", "%F"]
        return sorted({word for word in ask(self.run, argv).output.split() if word.isdigit()})

    def states(self, ids: Collection[str], *, ended: bool = True) -> dict[str, JobState]:
        """Return the states of all jobs of these ids, and of their elements.

        What squeue says now is more than what the accounts say; they are asked only for what
        squeue has forgotten, also of an array that is under way.
        """
        if not ids:
            return {}
        arrays = sorted({job.partition("_")[0] for job in ids})
        asked = ids if len(ids) <= len(arrays) else arrays
        found = dict(self._queued(asked))
        known = {name.partition("_")[0] for name in found} & set(ids) | found.keys()
        if ended and any(job not in known for job in ids):
            found = dict(self._accounted(asked)) | found
            known = {name.partition("_")[0] for name in found} & set(ids) | found.keys()
        return found | {job: JobState(Phase.UNKNOWN) for job in ids if job not in known}

    def _queued(self, ids: Collection[str]) -> Iterator[tuple[str, JobState]]:
        fields = "%i|%A|%L|%T|%N|%S|%r"
        argv = [self.squeue, *self._where(), "-h", "-r", "-t", "all", "-j", ",".join(ids)]
        for line in ask(self.run, [*argv, "-o", fields], _MAY_BE_GONE).output.splitlines():
            job, bar, rest = line.partition("|")
            if bar:
                number, left, word, host, start, reason = rest.split("|", 5)
                state = _state(word, reason, host, start)
                yield job, replace(state, number=number, left=_seconds(left))

    def _accounted(self, ids: Collection[str]) -> Iterator[tuple[str, JobState]]:
        """Yield what the accounts say; nothing where there are none. A later run comes later."""
        argv = ["sacct", *self._where(), "-X", "-n", "-P", "-D", "-j", ",".join(ids)]
        done = self.run([*argv, "-o", "JobID,State,ExitCode,NodeList"])
        if done.status:
            if "storage is disabled" in done.words or done.status == 127:
                return
            raise SchedulerUnavailable("sacct", done.words)
        for line in done.output.splitlines():
            job, word, _, host = line.split("|", 3)
            for name in _expand(job):
                yield name, _state(word, "", host, "")

    def gives_way(self, job: str) -> bool:
        """Return whether a job is being preempted: it runs on for the grace of its partition."""
        done = self.run([self.squeue, *self._where(), "-h", "-j", job, "-O", "PreemptTime"])
        return not done.status and done.output[:1].isdigit()  # else "N/A"

    def cancel(self, ids: Collection[str]) -> None:
        """Cancel jobs, or elements ``ID_INDEX``; that one has ended is no error."""
        if ids:
            argv = [self.scancel, *self._where(), "--quiet", *ids]
            ask(self.run, argv, (*_MAY_BE_GONE, "already completing or completed"))

    def check(self, script: str) -> str:
        """Return what SLURM says to a script that is not submitted."""
        done = self.run([self.sbatch, "--test-only", *self._where()], script)
        refuse(self.sbatch, done, (), _UNSURE)
        return done.words

    def largest_array(self) -> int:
        """Return how many elements an array may have: its greatest index is one less than that."""
        argv = ["scontrol", *self._where(), "show", "config"]
        found = re.search(r"MaxArraySize\s*=\s*(\d+)", ask(self.run, argv).output)
        return max(1, int(found[1]) if found else 1000)

    def cores(self, options: str) -> int:
        """Return how many cores the partitions have that jobs with such options go to."""
        argv = ["sinfo", *self._where(), "--noconvert", "-h", "-o", "%P|%C"]
        wanted = value_in(options, ("--partition", "-p")).split(",")
        total = 0
        for line in ask(self.run, argv).output.splitlines():
            found = re.fullmatch(r"(\S+?)(\*?)\|(\d+)/(\d+)/\d+/\d+", line)  # the rest is down
            if found and (found[1] in wanted or (found[2] and wanted == [""])):
                total += int(found[3]) + int(found[4])
        return total

    def _where(self) -> list[str]:
        return [f"--clusters={self.clusters}"] if self.clusters else []


def _directives(spec: JobSpec) -> Iterator[Directive]:
    yield ("--job-name", "-J"), f"--job-name={spec.name}"
    yield ("--nodes", "-N"), "--nodes=1"
    yield ("--ntasks", "-n", "--ntasks-per-node"), "--ntasks=1"
    yield ("--cpus-per-task", "-c"), f"--cpus-per-task={spec.cpus}"
    if spec.memory:
        others = ("--mem-per-cpu", "--mem-per-gpu")  # one excludes the others
        yield ("--mem", *others), f"--mem={max(1, parse_memory(spec.memory) >> 20)}M"
    if seconds := parse_walltime(spec.walltime):
        yield ("--time", "-t"), f"--time={clock(seconds)}"
    if spec.elements:
        limit = f"%{spec.limit}" if spec.limit else ""
        yield ("--array", "-a"), f"--array=0-{spec.elements - 1}{limit}"
    # a backslash means more there than can be quoted: the script sees to that itself
    element = ".%a" if spec.has_outputs else ""
    output = _quoted(spec.output.replace("%", "%%") + element)
    if "\\" in spec.output:
        output = f"/dev/null\n{print_to(spec, Slurm.index)}"
    yield ("--output", "-o"), f"--output={output}"
    if spec.directory:
        is_odd = "\\" in spec.directory
        directory = f"/\n{enter(spec.directory)}" if is_odd else _quoted(spec.directory)
        yield ("--chdir", "-D"), f"--chdir={directory}"
    yield ("--open-mode",), "--open-mode=append"
    if spec.warn:
        yield ("--signal",), f"--signal={'' if spec.warn_steps else 'B:'}USR1@{spec.warn}"
    if spec.requeue is not None:
        yield ("--requeue", "--no-requeue"), "--requeue" if spec.requeue else "--no-requeue"


def _quoted(text: str) -> str:
    """Return a path as sbatch reads it in a directive, where blanks, quotes and # mean more."""
    if not re.search(r"[\s'\"#\\]", text):
        return text
    escaped = re.sub(r'(["\\])', r"\\\1", text)
    return f'"{escaped}"'


def _state(word: str, reason: str, host: str, start: str) -> JobState:
    first = word.split()[0] if word.split() else ""  # of "CANCELLED by 1000"
    reason = "" if reason in ("None", "(null)") else reason
    words = f"{word} ({reason})" if reason else word
    if first in _QUEUED:
        phase = Phase.STUCK if _NEVER.search(reason) else Phase.QUEUED
        return JobState(phase, words, None, reason, "", "" if start == "N/A" else start)
    if first in _HELD:
        return JobState(Phase.STUCK, words, None, reason or word)
    if first in _RUNNING:
        suspended = first in ("SUSPENDED", "STOPPED")
        return JobState(Phase.RUNNING, words, None, "", host, is_suspended=suspended)
    if first in _ENDS:
        return JobState(Phase.ENDED, words, _ENDS[first], reason, host)
    return JobState(Phase.UNKNOWN, words)


def _seconds(left: str) -> int | None:
    """Return the seconds of what squeue prints as the time that is left, if there is a limit."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", left)
    if found is None:  # UNLIMITED, NOT_SET, INVALID
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _expand(job: str) -> Iterator[str]:
    """Yield the elements of e.g. ``61_[3,7-999%4]``, as the accounts call what has never begun."""
    array, bracket, ranges = job.partition("_[")
    if not bracket:
        yield job
        return
    for part in ranges.rstrip("]").partition("%")[0].split(","):
        first, _, last = part.partition("-")
        for index in range(int(first), int(last or first) + 1):
            yield f"{array}_{index}"
