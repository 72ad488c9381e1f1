"""Lists of hosts: those that batch systems really write, and hostfiles."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostap_parallel import ConfigError
from ostap_parallel.config.hostlist import expand_hosts, granted_hosts, read_hostfile

# Sections 0 and 2 of the job environment of sbatch(1), the nodes file of PBS, sge_pe(5), and
# the environment that LSF gives a job.
SLURM = {"SLURM_JOB_NODELIST": "node[01-03],gpu7", "SLURM_TASKS_PER_NODE": "2(x3),1"}
GRANTS = {
    "slurm": (SLURM, [("node01", 2), ("node02", 2), ("node03", 2), ("gpu7", 1)]),
    "slurm, cpus per task": (
        {
            "SLURM_NODELIST": "i01r07c03s[10-11]opa",
            "SLURM_TASKS_PER_NODE": "1(x2)",
            "SLURM_CPUS_PER_TASK": "16",
        },
        [("i01r07c03s10opa", 16), ("i01r07c03s11opa", 16)],
    ),
    "slurm, cpus only": (
        {"SLURM_JOB_NODELIST": "tux[1-2]", "SLURM_JOB_CPUS_PER_NODE": "72(x2)"},
        [("tux1", 72), ("tux2", 72)],
    ),
    "slurm, names only": ({"SLURM_JOB_NODELIST": "tux3"}, [("tux3", None)]),
    "torque": (
        {"PBS_NODEFILE": "n012\nn012\nn013\nn013\nn014\n"},
        [("n012", 2), ("n013", 2), ("n014", 1)],
    ),
    "pbs pro": (
        {"PBS_NODEFILE": "r1i0n1.ib0.cluster\nr1i0n2.ib0.cluster\n", "NCPUS": "24"},
        [("r1i0n1.ib0.cluster", 24), ("r1i0n2.ib0.cluster", 24)],
    ),
    "pbs pro, mpiprocs": (
        {"PBS_NODEFILE": "n1\nn1\nn2\nn2\n", "NCPUS": "4"},
        [("n1", 2), ("n2", 2)],
    ),
    "sge": (
        {
            "PE_HOSTFILE": "node07.cluster 4 all.q@node07.cluster UNDEFINED\n"
            "node03.cluster 2 all.q@node03.cluster <NULL>\n"
            "node07.cluster 1 long.q@node07.cluster 0,1:0,2\n"
        },
        [("node07.cluster", 5), ("node03.cluster", 2)],
    ),
    "lsf": (
        {"LSB_MCPU_HOSTS": "hostA 4 hostB 2 ", "LSB_HOSTS": "x"},
        [("hostA", 4), ("hostB", 2)],
    ),
    "lsf, short": ({"LSB_HOSTS": "hostA hostA hostB"}, [("hostA", 2), ("hostB", 1)]),
    "none": ({"SLURM_JOB_ID": "7", "PBS_NODEFILE": ""}, []),
}


@pytest.mark.parametrize(("environ", "wanted"), GRANTS.values(), ids=GRANTS)
def test_what_a_batch_system_grants(tmp_path, environ, wanted):
    for variable in {"PBS_NODEFILE", "PE_HOSTFILE"} & environ.keys():
        if environ[variable]:
            (tmp_path / "file").write_text(environ[variable])
            environ = {**environ, variable: str(tmp_path / "file")}
    assert granted_hosts(environ) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            "host1 worker=8\nhost2 4\nhost3\nh4 0",
            [("host1", 8), ("host2", 4), ("host3", None), ("h4", None)],
        ),
        ("# mine\n\nn[01-02,7] slots=4 max_slots=8 # all\n", [("n01", 4), ("n02", 4), ("n7", 4)]),
        ("a\nb\na\n", [("a", 2), ("b", None)]),
        ("me@a:2222*4\nfe80::1 2\n", [("me@a:2222", 4), ("fe80::1", 2)]),
    ],
)
def test_hostfiles(tmp_path, text, wanted):
    (tmp_path / "hosts").write_text(text)
    assert read_hostfile(tmp_path / "hosts") == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("n[9-11]", "n9 n10 n11"),
        ("n[098-101]", "n098 n099 n100 n101"),
        ("rack[0-1]-[1-2,5].ib", " ".join(f"rack{r}-{n}.ib" for r in (0, 1) for n in (1, 2, 5))),
        ("login,n[3],gpu", "login n3 gpu"),
        ("n[1, 3-4]", "n1 n3 n4"),
    ],
)
def test_expanding(text, wanted):
    assert expand_hosts(text, "here") == wanted.split()


@pytest.mark.parametrize(
    "text", ["n[1-", "n1]", "n[[1]]", "n[]", "n[2-1]", "n[a-b]", "n[0-99999999]", "[0-999][0-999]"]
)
def test_what_is_no_list(text):
    with pytest.raises(ConfigError, match="here"):
        expand_hosts(text, "here")


@pytest.mark.parametrize(
    ("environ", "text"),
    [
        ({**SLURM, "SLURM_TASKS_PER_NODE": "2"}, "SLURM_TASKS_PER_NODE: '2' is not for 4 nodes"),
        ({**SLURM, "SLURM_TASKS_PER_NODE": "many"}, "SLURM_TASKS_PER_NODE: not a list"),
        ({"PBS_NODEFILE": "/gone"}, "PBS_NODEFILE: /gone cannot be read"),
        ({"PE_HOSTFILE": "/dev/null"}, "PE_HOSTFILE: /dev/null names no host"),
        ({"LSB_MCPU_HOSTS": "a 1 b"}, "LSB_MCPU_HOSTS: not hosts and numbers"),
    ],
)
def test_a_grant_that_cannot_be_read(environ, text):
    with pytest.raises(ConfigError, match=text):
        granted_hosts(environ)


LITERALS = st.text("abn-.", max_size=3)


@st.composite
def brackets(draw):
    """Draw a list in brackets, and what it stands for."""
    texts, numbers = [], []
    for _ in range(draw(st.integers(1, 3))):
        first, count = draw(st.integers(0, 1200)), draw(st.integers(1, 12))
        width = draw(st.integers(0, 5))
        digits = [f"{number:0{width}}" for number in range(first, first + count)]
        texts.append(digits[0] if count == 1 else f"{digits[0]}-{digits[-1]}")
        numbers += digits
    return f"[{','.join(texts)}]", numbers


@st.composite
def names(draw):
    """Draw one name with brackets, and what it stands for."""
    text, wanted = draw(LITERALS), [""]
    wanted = [text]
    for _ in range(draw(st.integers(0, 2))):
        inner, numbers = draw(brackets())
        tail = draw(LITERALS)
        text += inner + tail
        wanted = [name + number + tail for name in wanted for number in numbers]
    return text, wanted


@pytest.mark.slow
@given(st.lists(names(), min_size=1, max_size=4))
def test_expanding_is_what_was_drawn(drawn):
    text = ",".join(text for text, _ in drawn)
    assert expand_hosts(text, "") == [name for _, found in drawn for name in found if name]
