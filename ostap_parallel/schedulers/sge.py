"""SGE: Sun, Univa, Altair, Son of and Open Grid Engine."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from xml.etree import ElementTree

from ostap_parallel.errors import SchedulerUnavailable
from ostap_parallel.schedulers.answers import ask, refuse
from ostap_parallel.schedulers.directives import Directive, enter, print_to, script_of, value_in
from ostap_parallel.schedulers.quantities import clock, parse_memory, parse_walltime
from ostap_parallel.schedulers.scheduler import Done, End, JobSpec, JobState, Phase, Runner

_FULL = ("jobs are allowed per user", "jobs are allowed total", "max_u_jobs", "max_jobs")
_UNSURE = ("unable to contact", "unable to send message", "got no response", "commlib error")
_MAY_BE_GONE = ("do not exist", "does not exist", "is already in deletion", "registered the job")

# What means more in a path than can be quoted: the script sees to such ones itself.
_ODD = re.compile(r"['\"#$,:]")

# Numbers of "failed" in the accounts, see accounting(5): what is none of the job's own doing.
_RESCHEDULED = 25
_LIMIT = 37
_NODE = {26, 27, 28}
_ASKED = 50  # ids of which more is asked at once

# How a shell ends of SIGUSR1, SIGXCPU: s_rt, s_cpu; and of qdel's SIGKILL.
_SOFT = {128 + 10, 128 + 24}


@dataclass(frozen=True)
class Sge:
    """The verbs of `Scheduler`, by SGE's commands.

    Parameters
    ----------
    run
        Runs them.
    qsub, qstat, qdel
        Where they are, if not on PATH.
    parallel_environment
        What gives cores of one host.
    memory_resource
        The resource by which memory is asked for, for each core; several with commas.
    error
        What in a state means that the job is stuck.
    """

    run: Runner
    qsub: str = "qsub"
    qstat: str = "qstat"
    qdel: str = "qdel"
    parallel_environment: str = "smp"
    memory_resource: str = "h_vmem"
    error: str = "E"

    name = "sge"
    job = "JOB_ID"
    index = "SGE_TASK_ID"
    first = 1
    naming = "-N"

    def script(self, spec: JobSpec) -> str:
        """Return what would be submitted."""
        return script_of("#$", self._directives(spec), spec, glued=False)

    def _directives(self, spec: JobSpec) -> Iterator[Directive]:
        yield ("-N",), f"-N {spec.name}"
        yield ("-S",), "-S /bin/bash"
        if spec.cpus > 1:
            yield ("-pe",), f"-pe {self.parallel_environment} {spec.cpus}"
        for resource in self.memory_resource.split(",") if spec.memory else ():
            yield (resource,), f"-l {resource}={_per_core(spec)}M"
        if seconds := parse_walltime(spec.walltime):
            yield ("h_rt",), f"-l h_rt={clock(seconds)}"
        if spec.elements:
            yield ("-t",), f"-t 1-{spec.elements}"
            if spec.limit:
                yield ("-tc",), f"-tc {spec.limit}"
        output = shlex.quote(spec.output) + (".$TASK_ID" if spec.has_outputs else "")
        if _ODD.search(spec.output):
            output = f"/dev/null\n{print_to(spec, self.index)}"
        yield ("-o",), f"-o {output}"
        directory = f"-wd {shlex.quote(spec.directory)}" if spec.directory else "-cwd"
        if _ODD.search(spec.directory):
            directory = f"-wd /\n{enter(spec.directory)}"
        yield ("-cwd", "-wd"), directory
        yield ("-j",), "-j y"
        if spec.warn:
            yield ("-notify",), "-notify"
        if spec.requeue is not None:
            yield ("-r",), f"-r {'y' if spec.requeue else 'n'}"

    def submit(self, script: str, timeout: float = 60.0) -> str:
        """Submit a script; return the id."""
        done = self.run([self.qsub, "-terse"], script, timeout)
        refuse(self.qsub, done, _FULL, _UNSURE)
        found = re.search(
            r"^(\d+)(\.\S+)?$", done.output, re.MULTILINE
        )  # sites add words of theirs
        if found is None:
            raise SchedulerUnavailable(self.qsub, f"no job id in its answer: {done.words}")
        return found[1]

    def find(self, name: str) -> list[str]:
        """Return the ids of the user's jobs of a name, also of those that have just ended."""
        argv = [self.qstat, "-xml", "-u", "$user"]
        jobs = _elements(ask(self.run, argv), "job_list")
        found = {_text(job, "JB_job_number") for job in jobs if _text(job, "JB_name") == name}
        ended = self.run(["qacct", "-j", name])  # fails where there are no accounts, or none such
        return sorted(found | set(re.findall(r"^jobnumber +(\d+)", ended.output, re.MULTILINE)))

    def states(self, ids: Collection[str], *, ended: bool = True) -> dict[str, JobState]:
        """Return the states of all jobs of these ids, and of their elements.

        The accounts know what has left the queue; they lag behind by some seconds.
        """
        if not ids:
            return {}
        arrays = {job.partition("_")[0] for job in ids}
        found: dict[str, JobState] = {}
        argv = [self.qstat, "-xml", "-u", "$user"]
        for job in _elements(ask(self.run, argv), "job_list"):
            if (number := _text(job, "JB_job_number")) in arrays:
                state = self._state(job)
                found |= {name: state for name in _expand(number, _text(job, "tasks"))}
        if ended:
            self._add_reasons(found)
        # of an array that is under way, elements may have ended
        if ended and any(job not in found for job in ids):
            found = dict(self._accounted(sorted(arrays))) | found
        known = {name.partition("_")[0] for name in found} | found.keys()
        return found | {job: JobState(Phase.UNKNOWN) for job in ids if job not in known}

    def _state(self, job: ElementTree.Element) -> JobState:
        state = _text(job, "state")
        queue, _, host = _text(job, "queue_name").partition("@")
        place = f" ({queue})" if queue else ""
        if self.error in state:
            return JobState(Phase.STUCK, f"{state}, in error{place}")
        if "h" in state and "q" in state:  # one that runs goes on, held
            return JobState(Phase.STUCK, f"{state}, held{place}")
        if any(letter in state for letter in "sST"):
            words = f"{state}, suspended{place}"
            return JobState(Phase.RUNNING, words, None, "", host, is_suspended=True)
        if any(letter in state for letter in "rtd"):
            return JobState(Phase.RUNNING, f"{state}{place}", None, "", host)
        return JobState(Phase.QUEUED, f"{state}{place}")

    def _add_reasons(self, found: dict[str, JobState]) -> None:
        """Say why jobs wait, or what their error is: only ``qstat -j`` tells."""
        waiting = {job.partition("_")[0] for job, state in found.items() if _waits(state)}
        if not waiting:
            return
        argv = [self.qstat, "-j", ",".join(sorted(waiting)[:_ASKED])]
        reasons: dict[str, tuple[str, bool]] = {}  # and whether it waits for other jobs to end
        for text in re.split(r"^=+$", self.run(argv).output, flags=re.MULTILINE):
            if number := re.search(r"^job_number: +(\d+)", text, re.MULTILINE):
                error = re.search(r"^error reason .*?: +(.*)", text, re.MULTILINE)
                why = re.search(r"^scheduling info: +(.*(?:\n {10,}.*)*)", text, re.MULTILINE)
                others = re.search(r"^(?:ja_ad|jid)_predecessor_list: +(\S+)", text, re.MULTILINE)
                reason = _line((error or why or [""] * 2)[1])
                follows = others is not None and not error and "in hold state" not in reason
                if others and follows:
                    reason = f"it waits for job {others[1]}"
                reasons[number[1]] = reason, follows
        for job, state in found.items():
            if _waits(state) and (known := reasons.get(job.partition("_")[0])):
                reason, follows = known
                phase = Phase.QUEUED if follows else state.phase
                words = f"{state.words} ({reason})" if reason else state.words
                found[job] = replace(state, phase=phase, words=words, reason=reason)

    def _accounted(self, ids: Collection[str]) -> Iterator[tuple[str, JobState]]:
        """Yield what the accounts say, a later run later; each id has to be asked for itself."""
        script = " ".join(f"qacct -j {shlex.quote(job)};" for job in ids)
        for record in re.split(r"^=+$", self.run(["sh", "-c", script]).output, flags=re.MULTILINE):
            fields = dict(re.findall(r"^(\w+) +(.*?) *$", record, re.MULTILINE))
            if "jobnumber" in fields:
                task = fields.get("taskid", "undefined")
                name = f"{fields['jobnumber']}_{task}" if task.isdigit() else fields["jobnumber"]
                yield name, _ended(fields)

    def gives_way(self, job: str) -> bool:
        """Return that it does not: such jobs are suspended."""
        return False

    def cancel(self, ids: Collection[str]) -> None:
        """Cancel jobs, or elements ``ID_INDEX``; that one has ended is no error."""
        if ids:
            names = [job.replace("_", ".") for job in ids]
            ask(self.run, [self.qdel, ",".join(names)], _MAY_BE_GONE)

    def check(self, script: str) -> str:
        """Return what SGE says to a script that is not submitted."""
        done = self.run([self.qsub, "-w", "v"], script)
        if "no suitable queues" in done.words:
            done = replace(done, status=1)
        refuse(self.qsub, done, (), _UNSURE)
        return done.words

    def largest_array(self) -> int:
        """Return how many elements an array may have."""
        found = re.search(r"^max_aj_tasks +(\d+)", ask(self.run, ["qconf", "-sconf"]).output, re.M)
        return max(1, int(found[1]) if found else 75000)

    def cores(self, options: str) -> int:
        """Return how many slots the queues have that jobs with such options go to."""
        wanted = [name.partition("@")[0] for name in value_in(options, ("-q",)).split(",")]
        queues = _elements(ask(self.run, [self.qstat, "-g", "c", "-xml"]), "cluster_queue_summary")
        return sum(
            int(_text(queue, "total") or 0) - int(_text(queue, "manual_intervention") or 0)
            for queue in queues
            if any(fnmatchcase(_text(queue, "name"), name or "*") for name in wanted)
        )


def _waits(state: JobState) -> bool:
    return state.phase in (Phase.QUEUED, Phase.STUCK)


def _per_core(spec: JobSpec) -> int:
    """Return the MiB that each core is asked with, as SGE multiplies them by the cores."""
    return max(1, -(-parse_memory(spec.memory) // spec.cpus) >> 20)


def _elements(done: Done, name: str) -> list[ElementTree.Element]:
    try:
        return list(ElementTree.fromstring(done.output).iter(name))
    except ElementTree.ParseError as exc:
        raise SchedulerUnavailable("qstat", f"no XML in its answer: {exc}") from None


def _text(element: ElementTree.Element, name: str) -> str:
    return (element.findtext(name) or "").strip()


def _line(text: str) -> str:
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())


def _expand(job: str, tasks: str) -> Iterator[str]:
    """Yield the elements of an array by qstat's text for them, e.g. ``3,7-99:1``."""
    if not tasks:
        yield job
    for part in tasks.split(",") if tasks else ():
        ends, _, step = part.partition(":")
        first, _, last = ends.partition("-")
        for index in range(int(first), int(last or first) + 1, int(step or 1)):
            yield f"{job}_{index}"


def _ended(fields: dict[str, str]) -> JobState:
    """Return the state by a record of the accounts."""
    failed, _, why = fields.get("failed", "0").partition(":")
    status = (fields.get("exit_status", "0").split() or ["0"])[0]
    code, exit_status = int(failed or 0), int(status)
    words = f"exit status {status}" + (f" ({fields['failed']})" if code else "")
    host = fields.get("hostname", "")
    if code == _RESCHEDULED:  # there will be another record
        return JobState(Phase.QUEUED, words, None, why.strip())
    end = End.DONE if not code and not exit_status else End.FAILED
    if code == _LIMIT or exit_status in _SOFT:
        end = End.WALLTIME
    elif code in _NODE:
        end = End.NODE
    return JobState(Phase.ENDED, words, end, why.strip(), host)
