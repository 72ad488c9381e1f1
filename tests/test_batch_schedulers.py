"""SLURM and SGE by their verbs, on the real ones."""

from __future__ import annotations

import signal
from datetime import timedelta
from functools import partial

import pytest
from functions import PATIENCE
from helpers import wait_until

from ostap_parallel.errors import JobRefused, QueueFull, SchedulerUnavailable
from ostap_parallel.schedulers.quantities import parse_memory, parse_walltime
from ostap_parallel.schedulers.scheduler import Done, End, JobSpec, Phase
from ostap_parallel.schedulers.sge import Sge
from ostap_parallel.schedulers.slurm import Slurm
from ostap_parallel.supply.here import clean, run_here


@pytest.fixture
def scheduler(cluster):
    return {"slurm": Slurm, "sge": Sge}[cluster.name](run_here)


@pytest.fixture
def on_slurm(slurm, monkeypatch):
    """SLURM alone."""
    for name, value in slurm.environ.items():
        monkeypatch.setenv(name, value)
    return Slurm(run_here)


@pytest.fixture
def on_sge(sge, monkeypatch):
    """SGE alone."""
    for name, value in sge.environ.items():
        monkeypatch.setenv(name, value)
    return Sge(run_here)


def submit(scheduler, body, name="op-test", **given):
    return scheduler.submit(scheduler.script(JobSpec(name=name, body=f"{body}\n", **given)))


def until(scheduler, job, phase):
    """Wait until a job is in a phase; return its state."""

    def look():
        state = scheduler.states([job])[job]
        return state if state.phase is phase else None

    return wait_until(look, PATIENCE, f"{job} is {phase.value}: {scheduler.states([job])}")


class TestOnBoth:
    def test_a_job_from_its_submission_to_its_end(self, scheduler, tmp_path):
        assert isinstance(scheduler.check(scheduler.script(JobSpec(name="a", body="true"))), str)
        output = tmp_path / "a file.txt"
        go = tmp_path / "go"
        body = f"echo here; while [ ! -e {go} ]; do sleep 0.05; done"
        job = submit(scheduler, body, "op-first", output=str(output), directory=str(tmp_path))
        running = until(scheduler, job, Phase.RUNNING)
        assert running.host
        assert job in scheduler.find("op-first")
        assert scheduler.find("op-none") == []
        go.touch()
        assert until(scheduler, job, Phase.ENDED).end is End.DONE
        assert output.read_text() == "here\n"

    def test_ends_are_told_apart(self, scheduler):
        failed, killed = submit(scheduler, "exit 7"), submit(scheduler, "kill -9 $$")
        long = submit(scheduler, "exec sleep 300")
        until(scheduler, long, Phase.RUNNING)
        scheduler.cancel([long])
        assert until(scheduler, failed, Phase.ENDED).end is End.FAILED
        assert until(scheduler, killed, Phase.ENDED).end is End.FAILED
        # SGE cannot tell its own cancelling from a signal that the job sent itself
        expected = End.CANCELLED if scheduler.name == "slurm" else End.FAILED
        assert until(scheduler, long, Phase.ENDED).end is expected

    def test_elements_of_an_array(self, scheduler, tmp_path):
        body = f"echo x > {tmp_path}/n${scheduler.index}; exec sleep 300"
        job = submit(scheduler, body, elements=6, limit=2)
        first = scheduler.first
        wait_until(lambda: len(list(tmp_path.iterdir())) == 2, PATIENCE, "two have begun")
        states = scheduler.states([job])
        assert set(states) == {f"{job}_{i}" for i in range(first, first + 6)}
        phases = [state.phase for state in states.values()]
        assert (phases.count(Phase.RUNNING), phases.count(Phase.QUEUED)) == (2, 4)
        running = next(name for name, state in states.items() if state.phase is Phase.RUNNING)
        scheduler.cancel([running])
        until(scheduler, running, Phase.ENDED)
        scheduler.cancel([job])
        last = f"{job}_{first + 5}"

        def is_over():
            states = scheduler.states([job])
            return all(state.phase in (Phase.ENDED, Phase.UNKNOWN) for state in states.values())

        wait_until(is_over, PATIENCE, "all have ended")
        # of what has never begun SGE keeps no account
        expected = Phase.ENDED if scheduler.name == "slurm" else Phase.UNKNOWN
        assert scheduler.states([last])[last].phase is expected
        scheduler.cancel([job])  # again is no error

    def test_what_is_not_known(self, scheduler):
        assert scheduler.states(["999999"])["999999"].phase is Phase.UNKNOWN
        assert {s.phase for s in scheduler.states(["99998", "99999"]).values()} == {Phase.UNKNOWN}
        assert scheduler.states([]) == {}
        scheduler.cancel(["999999"])
        assert scheduler.largest_array() > 100

    def test_how_many_cores_there_are(self, scheduler):
        option = {"slurm": "-p", "sge": "-q"}[scheduler.name]
        known = {"slurm": ["urgent", "main"], "sge": ["all.q", "a*@host1"]}[scheduler.name]
        assert scheduler.cores("") == 4
        assert [scheduler.cores(f"{option} {name}") for name in known] == [4, 4]
        assert scheduler.cores(f"{option} nowhere") == 0

    def test_options_win_and_skip_leaves_out(self, scheduler):
        spec = JobSpec(name="a", body="", cpus=2, memory="4G", walltime="1:00:00", elements=3)
        text = scheduler.script(spec)
        if scheduler.name == "slurm":
            assert "--mem=4096M" in text
            assert "--time=1:00:00" in text
            assert "--array=0-2" in text
            options = {"options": "--mem-per-cpu=1G -t 5 -pmain", "skip": ("--array",)}
        else:
            assert "-l h_vmem=2048M" in text
            assert "-l h_rt=1:00:00" in text
            assert "-t 1-3" in text
            options = {"options": "-l h_vmem=1G,h_rt=300 -q all.q -tc 5", "skip": ("-t", "-pe")}
            assert "-pe smp 2" in text
        fewer = scheduler.script(JobSpec(**{**vars(spec), **options}))
        for word in ("4096M", "1:00:00", "--array", "2048M", "-t 1-3", "-pe "):
            assert word not in fewer
        assert options["options"] in fewer

    def test_an_array_for_which_there_is_room_only_later_is_found_by_its_name(self, scheduler):
        job = submit(scheduler, "exec sleep 300", "op-lost-answer", elements=2)
        assert wait_until(lambda: scheduler.find("op-lost-answer"), PATIENCE, "found") == [job]
        scheduler.cancel([job])


class TestSlurm:
    @pytest.mark.parametrize("name", ["it's #1", 'a "b" %c', "a # b"])
    def test_names_of_files(self, on_slurm, tmp_path, name):
        place = tmp_path / name
        place.mkdir()
        job = submit(on_slurm, "pwd", output=str(place / "out"), directory=str(place))
        assert until(on_slurm, job, Phase.ENDED).end is End.DONE
        assert (place / "out").read_text() == f"{place}\n"

    def test_refusals(self, on_slurm):
        for options in ("--partition=nowhere", "--mem=100T", "--nonsense=1", "--time=abc", "a"):
            with pytest.raises(JobRefused, match=r"nvalid|Memory|configuration|unrecognized"):
                submit(on_slurm, "true", options=options)
        with pytest.raises(JobRefused, match="Invalid partition"):
            on_slurm.check(on_slurm.script(JobSpec(name="a", body="", options="-p nowhere")))
        spec = JobSpec(name="a", body="true", elements=on_slurm.largest_array() + 1)
        with pytest.raises(JobRefused, match="array"):
            on_slurm.submit(on_slurm.script(spec))

    def test_what_will_never_start_is_told(self, on_slurm):
        held = submit(on_slurm, "true", options="--hold")
        assert "Held" in until(on_slurm, held, Phase.STUCK).reason
        long = submit(on_slurm, "true", options="--partition=short", walltime="2:00:00")
        assert "TimeLimit" in until(on_slurm, long, Phase.STUCK).reason
        on_slurm.cancel([held, long])

    def test_what_waits_has_its_reason(self, on_slurm, slurm):
        blocks = submit(on_slurm, "exec sleep 300", options="--exclusive -N2 -n2")
        until(on_slurm, blocks, Phase.RUNNING)
        waits = submit(on_slurm, "true")
        found = wait_until(lambda: on_slurm.states([waits])[waits].reason, PATIENCE, "a reason")
        assert found in ("Resources", "Priority")
        on_slurm.cancel([blocks, waits])

    def test_begun_anew(self, on_slurm, slurm, tmp_path):
        mark = tmp_path / "mark"
        body = f"echo $SLURM_RESTART_COUNT >> {mark}; exec sleep 300"
        job = submit(on_slurm, body, requeue=True)
        wait_until(mark.exists, PATIENCE, "it has begun")
        slurm.run("scontrol", "requeue", job)
        wait_until(lambda: mark.read_text().split() == ["1"], PATIENCE, "it has begun anew")
        assert until(on_slurm, job, Phase.RUNNING)
        on_slurm.cancel([job])
        preempted = submit(
            on_slurm, "exec sleep 300", options="--exclusive -N2 -n2", requeue=False
        )
        until(on_slurm, preempted, Phase.RUNNING)
        urgent = submit(on_slurm, "true", options="--exclusive --partition=urgent")
        assert until(on_slurm, preempted, Phase.ENDED).end is End.PREEMPTED
        until(on_slurm, urgent, Phase.ENDED)

    def test_out_of_memory(self, on_slurm, slurm):
        if not slurm.has_groups:
            pytest.skip("memory is not limited here")
        job = submit(on_slurm, "head -c 200M /dev/zero | tail > /dev/null", memory="50M")
        assert until(on_slurm, job, Phase.ENDED).end is End.MEMORY

    def test_the_accounts_know_what_the_queue_has_forgotten(self, on_slurm, slurm):
        job = submit(on_slurm, "exit 3")
        until(on_slurm, job, Phase.ENDED)

        def forgetful(argv, data="", timeout=60.0):
            return Done(0, "", "") if argv[0] == "squeue" else run_here(argv, data, timeout)

        state = wait_until(
            lambda: (s := Slurm(forgetful).states([job])[job]).phase is Phase.ENDED and s,
            PATIENCE,
            "it is in the accounts",
        )
        assert state.end is End.FAILED

    def test_without_accounts_the_unknown_is_unknown(self, on_slurm):
        # slurmctld without slurmdbd says this
        def without(argv, data="", timeout=60.0):
            if argv[0] == "sacct":
                return Done(1, "", "Slurm accounting storage is disabled")
            return run_here(argv, data, timeout)

        assert Slurm(without).states(["999999"])["999999"].phase is Phase.UNKNOWN

    def test_a_controller_that_is_away_says_nothing(self, on_slurm, slurm):
        job = submit(on_slurm, "exec sleep 300")
        until(on_slurm, job, Phase.RUNNING)
        slurm.stop("slurmctld", signal.SIGTERM)  # it keeps what it knows
        try:
            for ask in (partial(on_slurm.states, [job]), partial(on_slurm.find, "op")):
                with pytest.raises(SchedulerUnavailable, match="squeue"):
                    ask()
            with pytest.raises(SchedulerUnavailable, match="sbatch"):
                submit(on_slurm, "true")
        finally:
            slurm.start("slurmctld")
        wait_until(lambda: slurm.try_("squeue", "-h"), PATIENCE, "it is back")
        assert until(on_slurm, job, Phase.RUNNING)
        on_slurm.cancel([job])

    def test_accounts_of_what_has_never_begun(self):
        lines = "61_1|COMPLETED|0:0|n1\n61_[2,5-7%2]|CANCELLED by 0|0:0|None assigned\n"

        def told(argv, data="", timeout=60.0):  # as recorded from SLURM 22.05
            return Done(0, lines if argv[0] == "sacct" else "", "")

        states = Slurm(told).states(["61"])
        assert sorted(states) == ["61_1", "61_2", "61_5", "61_6", "61_7"]
        assert states["61_6"].end is End.CANCELLED


class TestSge:
    def test_refusals(self, on_sge):
        for options, words in {
            "-q nowhere": "unknown queue",
            "-pe nothing 2": "nothing",
            "-l nonsense=1": "nonsense",
        }.items():
            with pytest.raises(JobRefused, match=words):
                submit(on_sge, "true", options=options)
        spec = JobSpec(name="a", body="true", options="-l mem_free=900T")
        with pytest.raises(JobRefused, match="no suitable queues"):
            on_sge.check(on_sge.script(spec))

    def test_what_will_never_start_is_told(self, on_sge):
        stuck = submit(on_sge, "true", output="/nowhere/at/all")
        assert "/nowhere/at/all" in until(on_sge, stuck, Phase.STUCK).reason
        assert "Eqw, in error" in on_sge.states([stuck])[stuck].words
        held = submit(on_sge, "true", options="-h")
        assert "hqw, held (" in until(on_sge, held, Phase.STUCK).words
        both = submit(on_sge, "true", options=f"-h -hold_jid {held}")
        until(on_sge, both, Phase.STUCK)
        after = submit(on_sge, "true", options=f"-hold_jid {held}", elements=2)
        waits = on_sge.states([after])
        assert {state.phase for state in waits.values()} == {Phase.QUEUED}
        assert {state.reason for state in waits.values()} == {f"it waits for job {held}"}
        large = submit(on_sge, "true", options="-l mem_free=900T")
        reason = wait_until(lambda: on_sge.states([large])[large].reason, PATIENCE, "a reason")
        assert "mem_free" in reason
        on_sge.cancel([stuck, held, both, after, large])

    def test_what_is_suspended_is_told(self, on_sge, sge):
        job = submit(on_sge, "exec sleep 300")
        until(on_sge, job, Phase.RUNNING)
        sge.run("qmod", "-sj", job)
        wait_until(  # it may be on its way to the node still
            lambda: (s := on_sge.states([job])[job]).is_suspended and s.words.startswith("s,"),
            PATIENCE,
            "it is suspended",
        )
        state = on_sge.states([job])[job]
        assert (state.phase, state.words) == (Phase.RUNNING, "s, suspended (all.q)")
        on_sge.cancel([job])

    def test_begun_anew(self, on_sge, sge, tmp_path):
        mark = tmp_path / "mark"
        job = submit(on_sge, f"echo $RESTARTED >> {mark}; [ $RESTARTED = 1 ] || exit 99")
        wait_until(lambda: mark.exists() and len(mark.read_text()) == 4, PATIENCE, "again")
        assert mark.read_text().split() == ["0", "1"]
        assert until(on_sge, job, Phase.ENDED).end is End.DONE

    def test_wall_time(self, on_sge):
        job = submit(on_sge, "exec sleep 300", walltime=1)
        assert until(on_sge, job, Phase.ENDED).end is End.WALLTIME

    def test_a_master_that_is_away_says_nothing(self, on_sge, sge):
        def away(argv, data="", timeout=60.0):
            port = {"env": "SGE_QMASTER_PORT=1"}["env"]
            return run_here(["env", port, *argv], data, timeout)

        with pytest.raises(SchedulerUnavailable, match="qstat"):
            Sge(away).states(["1"])
        with pytest.raises(SchedulerUnavailable, match="qsub"):
            submit(Sge(away), "true")

    def test_one_that_runs_while_it_is_held_runs(self):
        job = "<a><job_list><JB_job_number>7</JB_job_number><state>{}</state></job_list></a>"

        def phase(state):
            return Sge(lambda *_: Done(0, job.format(state), "")).states(["7"])["7"].phase

        assert phase("hr") is Phase.RUNNING
        assert {phase("hqw"), phase("Eqw")} == {Phase.STUCK}


class TestWithoutAny:
    def test_quantities(self):
        assert [parse_memory(text) for text in ("", "500M", "4G", "1.5GB", "2 TiB")] == [
            *(0, 500 << 20, 4 << 30, 3 << 29),
            2 << 40,
        ]
        assert [parse_walltime(t) for t in ("", "0:10:00", "1-12:00:00", "90m", 45)] == [
            *(0, 600, 129600, 5400),
            45,
        ]
        slurm = {"1-0": 86400, "1-12": 129600, "1-12:30": 131400, "4 hours": 14400, "30min": 1800}
        assert {text: parse_walltime(text) for text in slurm} == slurm
        assert parse_walltime(timedelta(hours=1)) == 3600
        for wrong in ("4", "G", "-1G", "0G", 4):
            with pytest.raises(ValueError, match="with its unit"):
                parse_memory(wrong)
        for wrong in ("90", "1:30", "soon", -1, True, timedelta(0), "4 moons"):
            with pytest.raises(ValueError, match="such as 4:00:00"):
                parse_walltime(wrong)

    @pytest.mark.parametrize(
        "given",
        [
            *({"name": "a b"}, {"cpus": 0}, {"memory": "4"}, {"walltime": "x"}),
            *({"options": "a\nb"}, {"directory": "/a\nb"}, {"output": "/a\nb"}),
        ],
    )
    def test_bad_specifications(self, given):
        with pytest.raises(ValueError, match=r"must be|has letters"):
            JobSpec(**{"name": "a", "body": "", **given})
        with pytest.raises(ValueError, match="quotation"):
            Slurm(run_here).script(JobSpec(name="a", body="", options='--comment="a'))

    def test_commands_that_are_missing_or_slow(self):
        with pytest.raises(SchedulerUnavailable, match="is it on PATH"):
            Slurm(run_here, sbatch="no-such-sbatch").submit("")
        with pytest.raises(SchedulerUnavailable, match=r"no answer in 0\.1 s"):
            run_here(["sleep", "60"], timeout=0.1)
        assert clean({"SLURM_CONF": "1", "SLURM_JOB_ID": "2", "SBATCH_X": "3"}) == {
            "SLURM_CONF": "1",
            "SBATCH_X": "3",
        }

    def test_answers_of_full_queues(self):
        # what real ones say whose limits are reached
        texts = {
            Slurm: "sbatch: error: Batch job submission failed: Resource temporarily unavailable",
            Sge: "job rejected: Only 2 jobs are allowed per user (current job count: 2)",
        }
        for kind, text in texts.items():
            with pytest.raises(QueueFull, match=r"allowed|temporarily"):
                kind(lambda *_, text=text: Done(1, "", text)).submit("")
        with pytest.raises(SchedulerUnavailable, match="no job id"):
            Slurm(lambda *_: Done(0, "", "")).submit("")
        chatty = Done(0, "Welcome to our site\n123;cluster\n", "")
        assert Slurm(lambda *_: chatty).submit("") == "123"
