"""Settings from real files, environment mappings and arguments."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ostap_parallel import Executor, WorkManager
from ostap_parallel.config import HostConfig, load_settings
from ostap_parallel.errors import ConfigError

# The example of the manual, as its users copied it.
MANUAL = r"""[Paralell:lxplus701.cern.ch]
 script = my_local_script_for_701.sh

[Paralell:lxplus707.cern.ch]
 environment = #!/bin/bash
     source /cvmfs/sft.cern.ch/lcg/views/LCG_96/${CMTCONFIG}/setup.sh
     export PATH=$(IFS=':';t=($PATH);n=${#t[*]};a=();for ((i=0;i<n;i++)); do p="${t[i]%%*LCG_95*}"; [ "${p}" ] && a[i]="${p}"; done;echo "${a[*]}");
     export PYTHONPATH=$(IFS=':';t=($PYTHONPATH);n=${#t[*]};a=();for ((i=0;i<n;i++)); do p="${t[i]%%*LCG_95*}"; [ "${p}" ] && a[i]="${p}"; done;echo "${a[*]}");
     source ${HOME}/cmtuser/ostap/build/INSTALL/${CMTCONFIG}/thisostap.sh

[Paralell:CERN.CH]
 profile = ostap_profile.sh

[Parallel] 
 script = ostap_profile.sh

"""  # noqa: E501, W291

UNKNOWN = "no-such-host-xyz"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home directory, which is not the current directory."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    # no file of the account that runs the tests can be meant
    (tmp_path / "ssh_config").write_text("Host gpu\n HostName 192.0.2.7\n")
    return home


@pytest.fixture
def load(home):
    """`load_settings` with one file, given as text, and a clean environment."""

    def load(text, servers=(), environ=(), hostname="pc.example.org", **arguments):
        file = home / "rc"
        file.write_text(text)
        arguments.setdefault("ssh_config", home.parent / "ssh_config")
        return load_settings(
            servers, config=file, environ=dict(environ), hostname=hostname, **arguments
        )

    return load


@pytest.fixture
def parse(home):
    """Hosts of a server list, without any file."""

    def parse(servers, **arguments):
        return load_settings(servers, config=(), environ={}, **arguments).hosts

    return parse


def labels(settings):
    return [host.label for host in settings.hosts]


# hosts


@pytest.mark.parametrize(
    ("entry", "label", "ncpus"),
    [
        ("lxplus701.cern.ch", "lxplus701.cern.ch", None),
        ("gpu_box-1", "gpu_box-1", None),
        ("me@lxplus702", "me@lxplus702", None),
        ("me.too_-+1@h", "me.too_-+1@h", None),
        ("h:2222", "h:2222", None),
        ("me@h:2222", "me@h:2222", None),
        ("10.0.0.7:22", "10.0.0.7:22", None),
        ("[2001:DB8:0::7]", "2001:db8::7", None),
        ("[::1]:2222", "[::1]:2222", None),
        ("me@[::1]:2222", "me@[::1]:2222", None),
        ("me@[::1]", "me@::1", None),
        ("::1", "::1", None),
        ("2001:db8::7", "2001:db8::7", None),
        ("fe80::1%eth0", "fe80::1%eth0", None),
        ("localhost", "localhost", None),
        ("me@localhost:2222", "me@localhost:2222", None),
        ("localhost:8081", "localhost:8081", None),
        ("LocalHost:8081", "localhost:8081", None),
        ("8081:localhost", "localhost:8081", None),
        ("8081", "localhost:8081", None),
        (8081, "localhost:8081", None),
        ("h*8", "h", 8),
        ("h:22*8", "h:22", 8),
        ("me@[::1]:22*8", "me@[::1]:22", 8),
        ("h * 8", "h", 8),
        ("  h  ", "h", None),
    ],
)
def test_entry_forms(parse, entry, label, ncpus):
    (host,) = parse([entry])
    assert (host.label, host.ncpus) == (label, ncpus)
    if not isinstance(entry, int):
        assert parse(entry) == (host,)


def test_parts_of_an_entry(parse):
    (host,) = parse("me@[::1]:2222*8~10")
    assert (host.user, host.name, host.port, host.ncpus) == ("me", "::1", 2222, 8)
    assert host.nice == 10
    assert [host.nice for host in parse("a~19 b * 2 ~ 1, ::1~3 c")] == [19, 1, 3, None]
    assert host.server_port is None
    (server,) = parse(["8081:localhost"])
    assert (server.name, server.server_port, server.port) == ("localhost", 8081, None)


@pytest.mark.parametrize(
    "entry",
    [
        "",
        " ",
        "-oProxyCommand=id",
        "-h",
        "me@-h",
        "-me@h",
        "@h",
        "me@",
        "a@b@h",
        "a b",
        "h\nx",
        "h\0",
        "h;id",
        "h|id",
        "h&",
        "$(id)",
        "`id`",
        "$HOME",
        "${x}",
        "h'",
        "a'b'c",
        '"h',
        "h\\",
        "~h",
        "h/x",
        "h?",
        "<h",
        "h(1)",
        "$(id)@h",
        "m'e@h",
        "me$@h",
        "h:",
        "h:x",
        "h:0",
        "h:65536",
        "h:-1",
        "h:99999999999999999999",
        "h:22:33",
        "0",
        "65536",
        0,
        -1,
        True,
        1.5,
        None,
        b"h",
        "0:localhost",
        "localhost:0",
        "localhost:8081*2",
        "8081*2",
        "h*",
        "h*0",
        "h*x",
        "h*-1",
        "h~0",
        "h~20",
        "h~",
        "h~5*2",
        "8081~5",
        "h*2*3",
        "*8",
        "[h]",
        "[h]:22",
        "[::1",
        "::1]",
        "[::1]22",
        "[]",
        "fe80::1%$(id)",
        "1::2::3",
        "1.2.3",
        "300.1.1.1",
        "a..b",
        ".h",
        "h.",
        "h\u00e9",
        "\u0661",
        "x" * 64,
    ],
)
def test_malformed_entries_are_refused(parse, entry):
    with pytest.raises(ConfigError) as caught:
        parse([entry])
    assert f"argument servers: server {entry!r}" in str(caught.value)


def test_a_host_is_a_value():
    host = HostConfig(name="h", user="me", origins={"user": "argument"})
    assert host == HostConfig(name="h", user="me")
    assert len({host, HostConfig(name="h", user="me")}) == 1
    copy = pickle.loads(pickle.dumps(host))
    assert (copy, copy.origins) == (host, {"user": "argument"})
    assert (host.python, host.python_mismatch, host.ssh_options) == ("python3", "refuse", ())


# server lists


@pytest.mark.parametrize(
    ("servers", "expected"),
    [
        ("a,b", ["a", "b"]),
        ("a b\tc\nd", ["a", "b", "c", "d"]),
        (" a , b ,", ["a", "b"]),
        ("[::1]", ["::1"]),
        ("[::1], [::2]", ["::1", "::2"]),
        ("", []),
        ((), []),
        (8081, ["localhost:8081"]),
        (["a", 8081], ["a", "localhost:8081"]),
        (iter(["a"]), ["a"]),
        ("a, A, a:22, a*3, me@a, a", ["a", "a:22", "me@a"]),
        ("8081, localhost:8081, 8081:localhost", ["localhost:8081"]),
    ],
)
def test_server_lists(parse, servers, expected):
    assert [host.label for host in parse(servers)] == expected


def test_the_first_of_duplicates_stays(parse):
    assert [host.ncpus for host in parse("a*3, a*4")] == [3]


def test_a_user_from_a_section_makes_a_duplicate(load):
    assert labels(load("[Parallel]\nuser = me\n", "h, me@h")) == ["me@h"]


def test_blanks_around_a_star_in_a_string(parse):
    assert [(h.name, h.ncpus) for h in parse("a * 8, b *2")] == [("a", 8), ("b", 2)]


@pytest.mark.parametrize("word", ["auto", "AUTO", "config", "Config", "*", " auto "])
@pytest.mark.parametrize("wrap", [str, lambda word: [word]])
def test_auto_is_config_and_variable(load, word, wrap):
    environ = {"OSTAP_PPSERVERS": "b c\n8081,d"}
    settings = load("[Parallel]\nppservers = a, b\n", wrap(word), environ)
    assert labels(settings) == ["a", "b", "c", "localhost:8081", "d"]
    assert settings.hosts[0].origins["name"] == f"{settings.files[0]} [Parallel]"
    assert settings.hosts[2].origins["name"] == "OSTAP_PPSERVERS"


def test_auto_among_others(load):
    settings = load("[Parallel]\nppservers = a, b\n", ["b", 8081, "auto", "c"])
    assert labels(settings) == ["b", "localhost:8081", "a", "c"]


def test_nothing_configured(load):
    assert load("", "auto").hosts == ()


@pytest.mark.parametrize("key", ["ppservers", "workers", "PPServers"])
@pytest.mark.parametrize(
    ("value", "expected"), [("a,b", ["a", "b"]), ("", []), ("\n  a\n  # b\n  c", ["a", "c"])]
)
def test_values_of_lists(load, key, value, expected):
    assert labels(load(f"[Parallel]\n{key} = {value}\nprofile = p\n", "auto")) == expected


def test_ppservers_wins_over_workers(load):
    assert labels(load("[Parallel]\nworkers = w\nppservers = p\nncpus = 1\n", "auto")) == ["p"]


@pytest.mark.parametrize(
    ("hostname", "expected"),
    [
        ("pc.cern.ch", "c.x"),
        ("PC.Cern.Ch", "c.x"),
        ("pc.lhcb.cern.ch", "l.x"),
        ("cern.ch", "c.x"),
        ("notcern.ch", "p.x"),
        ("pc", "p.x"),
    ],
)
def test_the_longest_domain_gives_the_list(load, hostname, expected):
    text = (
        "[Parallel]\nppservers = p.x\n[Parallel:CERN.CH]\nppservers = c.x\n"
        "[parallel:lhcb.cern.ch]\nworkers = l.x\n[Parallel:ch]\nncpus = 3\n"
    )
    assert labels(load(text, "auto", hostname=hostname)) == [expected]


def test_an_empty_list_of_a_domain_is_a_list(load):
    text = "[Parallel]\nppservers = p\n[Parallel:cern.ch]\nppservers =\n"
    assert labels(load(text, "auto", hostname="pc.cern.ch")) == []


def test_the_own_name_is_asked_for(load):
    assert labels(
        load("[Parallel]\nppservers=p\n[Parallel:d.x]\nppservers=d\n", "auto", hostname=None)
    ) == ["p"]


def test_short_names_get_the_domain(load):
    text = f"[Parallel:No.Such]\nppservers = {UNKNOWN}*2, localhost, gpu, a.b, 10.0.0.1, ::1\n"
    settings = load(text, "auto", hostname="pc.no.such")
    full = f"{UNKNOWN}.no.such"
    assert labels(settings) == [full, "localhost", "gpu", "a.b", "10.0.0.1", "::1"]
    assert settings.hosts[0].ncpus == 2


def test_no_ssh_means_no_alias(load, monkeypatch):
    monkeypatch.setenv("PATH", "/none")
    text = "[Parallel:no.such]\nppservers = gpu\n"
    assert labels(load(text, "auto", hostname="pc.no.such")) == ["gpu.no.such"]


def test_short_names_of_other_lists_stay(load):
    text = f"[Parallel]\nppservers = {UNKNOWN}\n[Parallel:cern.ch]\nncpus = 3\n"
    assert labels(load(text, "auto", hostname="pc.no.such")) == [UNKNOWN]
    assert labels(load(text, UNKNOWN, hostname="pc.cern.ch")) == [UNKNOWN]


def test_sections_know_a_short_host_by_its_domain(load):
    text = (
        f"[Parallel:no.such]\nppservers = gpu, {UNKNOWN}\nuser = d\n"
        f"[Parallel:GPU.no.such]\nuser = g\n[Parallel:{UNKNOWN}]\nncpus = 5\n"
    )
    gpu, other = load(text, "auto", hostname="pc.no.such").hosts
    assert (gpu.label, other.label, other.ncpus) == ("g@gpu", f"d@{UNKNOWN}.no.such", 5)


# settings of a host


def test_precedence(load):
    text = (
        "[Parallel]\nprofile = general\n"
        "[Parallel:ch]\nprofile = ch\n"
        "[Parallel:CERN.ch]\nprofile = cern\n"
        "[Parallel:LXplus.cern.CH]\nprofile = host\n"
    )
    servers = "lxplus.CERN.ch, other.cern.ch, x.ch, notcern.org, ch"
    assert [h.profile for h in load(text, servers).hosts] == [
        "host",
        "cern",
        "ch",
        "general",
        "ch",
    ]
    hosts = load(text, servers, profile="argument").hosts
    assert {(h.profile, h.origins["profile"]) for h in hosts} == {("argument", "argument")}


def test_an_entry_wins_over_arguments_over_sections(load):
    text = "[Parallel:h.x]\nuser = s\nport = 1\nncpus = 1\n"
    plain, full = load(text, "h.x, e@h.x:3*3").hosts
    assert (plain.user, plain.port, plain.ncpus) == ("s", 1, 1)
    assert (full.user, full.port, full.ncpus) == ("e", 3, 3)
    (given,) = load(text, "h.x", user="a", port=2, ncpus_per_host=2).hosts
    assert (given.user, given.port, given.ncpus) == ("a", 2, 2)
    (both,) = load(text, "e@h.x", user="a", port=2, ncpus_per_host=2).hosts
    assert (both.user, both.port, both.ncpus) == ("e", 2, 2)


def test_origins(load):
    settings = load(
        "[Parallel]\nport = 1\n[ Pathos : Cern.ch ]\nuser = s\n", "h.cern.ch*2", python="py"
    )
    file = settings.files[0]
    assert settings.hosts[0].origins == {
        "name": "argument",
        "ncpus": "argument",
        "python": "argument",
        "ssh_config": "argument",
        "port": f"{file} [Parallel]",
        "user": f"{file} [ Pathos : Cern.ch ]",
    }
    assert settings.sections["cern.ch"]["user"].value == "s"
    assert settings.sections[""]["port"].origin == f"{file} [Parallel]"


def test_every_key(load, home):
    (home / "s.sh").touch()
    text = (
        "[Parallel]\nprofile = p.sh\nenvironment = export A=1\nscript = s.sh\npython = py\n"
        "ncpus = 4\nuser = me\nport = 2222\nssh_options = -o 'A b' -J gate\ntmpdir = /scratch\n"
        "python_mismatch = allow\n"
    )
    assert load(text, "h").hosts == (
        HostConfig(
            name="h",
            profile="p.sh",
            environment="export A=1",
            script=home / "s.sh",
            python="py",
            ncpus=4,
            user="me",
            port=2222,
            ssh_options=("-o", "A b", "-J", "gate"),
            tmpdir="/scratch",
            python_mismatch="allow",
            ssh_config=home.parent / "ssh_config",
        ),
    )


@pytest.mark.parametrize("options", ["-o 'A b' -v", ["-o", "A b", "-v"], ("-o", "A b", "-v")])
def test_ssh_options_as_argument(parse, options):
    assert parse("h", ssh_options=options)[0].ssh_options == ("-o", "A b", "-v")


def test_empty_values_switch_off(load):
    text = "[Parallel]\nprofile = p\npython = py\nncpus = 3\nssh_options = -v\n[Parallel:a.x]\n"
    text += "profile =\npython =\nncpus =\nssh_options =\n"
    off, on = load(text, "a.x, b.x").hosts
    assert (off.profile, off.python, off.ncpus, off.ssh_options) == (None, "python3", None, ())
    assert off.origins["profile"].endswith("[Parallel:a.x]")
    assert (on.profile, on.python, on.ncpus, on.ssh_options) == ("p", "py", 3, ("-v",))
    assert load(text, "b.x", profile="").hosts[0].profile is None
    assert load(text, "b.x", profile=None).hosts[0].profile == "p"


def test_a_running_server_takes_nothing(load):
    (host,) = load("[Parallel]\nuser = me\nncpus = 3\n", "8081", profile="p").hosts
    assert host == HostConfig(name="localhost", server_port=8081)


def test_scripts(load, home):
    for directory in (home, home / "sub", Path.cwd()):
        directory.mkdir(exist_ok=True)
        (directory / "s.sh").touch()
    for value, expected in [
        ("s.sh", home / "s.sh"),
        ("sub/s.sh", home / "sub/s.sh"),
        ("~/sub/s.sh", home / "sub/s.sh"),
        (str(home / "s.sh"), home / "s.sh"),
    ]:
        assert load(f"[Parallel]\nscript = {value}\n", "h").hosts[0].script == expected
    assert load("", "h", script="s.sh").hosts[0].script == Path.cwd() / "s.sh"
    assert load("", "h", script=Path("~/s.sh")).hosts[0].script == home / "s.sh"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("script", "none.sh"),
        ("script", "/"),
        ("script", "x" * 300),
        ("script", "a\0b"),
        ("ssh_config", "none"),
        ("user", "-l"),
        ("user", "a b"),
        ("port", 0),
        ("port", 65536),
        ("port", True),
        ("ncpus_per_host", 0),
        ("python_mismatch", "maybe"),
        ("python", "a\nb"),
        ("tmpdir", "-x"),
        ("ssh_options", "'"),
    ],
)
def test_bad_arguments(parse, name, value):
    with pytest.raises(ConfigError, match=f"argument {name.removesuffix('_per_host')}: "):
        parse("h", **{name: value})


def test_unknown_arguments(parse):
    with pytest.raises(TypeError, match="profil"):
        parse("h", profil="p")


# sections and their errors


@pytest.mark.parametrize(
    "name", ["Parallel", "PARALLEL", "Paralell", "paralell", "Pathos", " pathos "]
)
def test_spellings(load, name):
    text = f"[{name}]\nuser = g\n[{name}:Cern.CH]\nuser = d\n[{name} : [::1]]\nuser = six\n"
    assert labels(load(text, "h, h.cern.ch, 0:0::1")) == ["g@h", "d@h.cern.ch", "six@::1"]


def test_the_better_spelling_wins(load, home):
    better = "[Parallel]\nuser = a\n"
    worse = "[Pathos]\nuser = c\nport = 3\nncpus = 3\n[paralell]\nuser = b\nport = 2\n"
    for text in (better + worse, worse + better):
        (host,) = load(text, "h").hosts
        assert (host.user, host.port, host.ncpus) == ("a", 2, 3)
    files = [home / "one", home / "two"]
    files[0].write_text(better)
    files[1].write_text(worse)
    (host,) = load_settings("h", config=files).hosts
    assert (host.user, host.port, host.ncpus) == ("a", 2, 3)


def test_a_repeated_section_goes_on(load):
    text = "[Parallel]\nuser = a\nport = 1\n[PARALLEL]\nuser = b\n[Parallel]\nuser = c\n"
    assert labels(load(text, "h")) == ["c@h:1"]


def test_other_sections_may_hold_anything(load):
    text = (
        "[DEFAULT]\nuser = no\n[General]\nbad = %(x)s\nncpus = x\n[Parallels]\nfoo = 1\n"
        "[Parallel] # [x]\nuser: me\n"
    )
    assert labels(load(text, "h")) == ["me@h"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[Parallel]\nprofil = x\n", "[Parallel] profil: unknown key, did you mean 'profile'?"),
        ("[Pathos:a.b]\nscirpt = x\n", "[Pathos:a.b] scirpt: unknown key, did you mean 'script'?"),
        ("[Parallel]\nzzz = x\n", "[Parallel] zzz: unknown key; known are adapt, "),
        ("[Parallel]\nncpus = x\n", "[Parallel] ncpus: not a number of at least 1: 'x'"),
        ("[Parallel]\nncpus = 0\n", "[Parallel] ncpus: "),
        ("[Parallel]\nport = 0\n", "[Parallel] port: not a number from 1 to 65535: '0'"),
        ("[Parallel]\nport = 65536\n", "[Parallel] port: "),
        ("[Parallel]\nuser = -l me\n", "[Parallel] user: not a user name: '-l me'"),
        ("[Parallel]\npython_mismatch = maybe\n", "[Parallel] python_mismatch: neither"),
        ("[Parallel]\nssh_options = 'x\n", "[Parallel] ssh_options: No closing quotation"),
        ("[Parallel]\nprofile = a\n  b\n", "[Parallel] profile: more than one line"),
        ("[Parallel]\ntmpdir = -x\n", "[Parallel] tmpdir: "),
        ("[Parallel]\nscript = none.sh\n", "[Parallel] script: no such file: "),
        ("[Parallel]\nscript = /\n", "[Parallel] script: no such file: /"),
        (
            "[Parallel]\nppservers = a, $(id)\n",
            "[Parallel] ppservers: server '$(id)': not a host name",
        ),
        ("[Parallel]\nworkers = auto\n", "[Parallel] workers: server 'auto' cannot stand here"),
        ("[Parallel:]\nuser = me\n", "[Parallel:]: not a host name"),
        ("[Parallel:a b]\n", "[Parallel:a b]: not a host name, ssh alias or address: 'a b'"),
        ("[Parallel:-x]\n", "[Parallel:-x]: not a host name"),
        ("[Parallel:1.2.3]\n", "[Parallel:1.2.3]: not a host name"),
        ("[paralell:a/b]\n", "[paralell:a/b]: not a host name"),
        ("user = me\n", ", line 1: before the first [section]"),
        ("[Parallel]\nuser = me\n\nnonsense\n", ", line 4: not 'key = value': 'nonsense'"),
        ("[Other]\nnonsense\n", ", line 2: not 'key = value': 'nonsense'"),
    ],
)
def test_errors_name_the_place(load, home, text, expected):
    with pytest.raises(ConfigError) as caught:
        load(text)
    separator = "" if expected.startswith(",") else " "
    assert str(caught.value).startswith(f"{home / 'rc'}{separator}{expected}")


def test_a_variable_is_named(load):
    with pytest.raises(ConfigError, match=r"OSTAP_PPSERVERS: server 'a;b'"):
        load("", "auto", {"OSTAP_PPSERVERS": "a;b"})


def test_not_utf8(home):
    (home / "rc").write_bytes(b"[Parallel]\nuser = \xe9\n")
    with pytest.raises(ConfigError, match=rf"{home}/rc: not UTF-8"):
        load_settings(config=home / "rc")


# bash in values


def test_the_example_of_the_manual(load, home, tmp_path):
    for name in ("my_local_script_for_701.sh", "ostap_profile.sh"):
        (home / name).touch()
    one, seven, other = load(MANUAL, "lxplus701.cern.ch lxplus707.cern.ch h.org").hosts
    assert (one.script, one.profile) == (home / "my_local_script_for_701.sh", "ostap_profile.sh")
    assert (seven.script, seven.profile) == (home / "ostap_profile.sh", "ostap_profile.sh")
    assert (other.script, other.profile) == (home / "ostap_profile.sh", None)
    written = MANUAL.split(" environment = ")[1].split("\n\n")[0]
    assert seven.environment == written.replace("\n     ", "\n")
    subprocess.run(["bash", "-n"], input=seven.environment, text=True, check=True)
    # its filter of PATH does what it was written for
    prepared = seven.environment.replace("source ", ": ")
    done = subprocess.run(
        [shutil.which("bash"), "-c", f"{prepared}\necho $PATH"],
        env={"PATH": "/a:/LCG_95/b:/c", "PYTHONPATH": "", "CMTCONFIG": "x", "HOME": "/"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip().replace("::", ":") == "/a:/c"


BASH = r"""# first
export A="50% $HOME ${B%%x} %(c)s"  ; echo 'a;b' # why

cat <<EOF
# kept
  indented = 1
[NotASection]
; kept
EOF
python3 - <<'END'
if True:
    print("x: \\ \"")
END
	echo tab"""


@pytest.mark.parametrize("indent", ["  ", "\t", "        "])
@pytest.mark.parametrize("key", ["", " "])
def test_bash_is_kept(load, key, indent):
    body = "".join(f"{key}{indent}{line}\n" if line else "\n" for line in BASH.split("\n"))
    text = f"[Parallel]\n{key}user = me\n{key}environment =\n{body}\n\n{key}port = 7\n"
    (host,) = load(text, "h").hosts
    assert host.environment == BASH
    assert host.label == "me@h:7"


def test_blanks_in_bash_are_kept(load):
    text = "[Parallel]\nenvironment = cat <<E\n  a  \n     \n    b\n  E\n \n\n"
    (host,) = load(text, "h").hosts
    assert host.environment == "cat <<E\na  \n   \n  b\nE"


def test_comments_beside_bash_are_dropped(load):
    text = (
        "# c\n[Parallel]\n; c\nenvironment = a\n  # kept\n# dropped\n  b\n; dropped\n\n# dropped\n"
    )
    assert load(text, "h").hosts[0].environment == "a\n# kept\nb"


def test_line_ends_of_other_systems(home):
    (home / "rc").write_bytes(b"\xef\xbb\xbf[Parallel]\r\nenvironment = a\r\n  b\r\n")
    assert load_settings("h", config=home / "rc").hosts[0].environment == "a\nb"


def test_bash_runs(load):
    text = '[Parallel]\nenvironment =\n    A=$(cat <<E\n    # 100% "x"\n      y\n    E\n    )\n'
    script = load(text, "h").hosts[0].environment + '\necho "$A"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == '# 100% "x"\n  y\n'


# files


def test_the_default_files_in_order(home, tmp_path):
    places = [tmp_path / "ostap/.ostaprc", home / ".ostaprc", home / ".config/ostap/.ostaprc"]
    places += [Path.cwd() / ".ostaprc", tmp_path / "x.rc", home / "y.rc"]
    environ = {
        "OSTAP_DIR": str(tmp_path / "ostap"),
        "OSTAP_CONFIG": f"{tmp_path / 'x.rc'}::~/y.rc",
    }
    keys = ["user", "profile", "python", "tmpdir", "ncpus", "port"]
    for number, place in enumerate(places, start=1):
        place.parent.mkdir(parents=True, exist_ok=True)
        # each file sets one key less than the one before
        lines = [f"{key} = {number}" for key in keys[number - 1 :]]
        place.write_text("\n".join(["[Parallel]", *lines]))
    settings = load_settings("h", environ=environ)
    (host,) = settings.hosts
    assert settings.files == tuple(places)
    assert [str(getattr(host, key)) for key in keys] == ["1", "2", "3", "4", "5", "6"]
    assert host.origins["port"] == f"{home / 'y.rc'} [Parallel]"


def test_missing_default_files_are_fine(home):
    settings = load_settings("h", environ={"OSTAP_DIR": "/none"})
    assert (settings.files, labels(settings)) == ((), ["h"])


def test_given_files_replace_the_default_ones(home):
    (home / ".ostaprc").write_text("[Parallel]\nuser = no\n")
    (Path.cwd() / "rc").write_text("[Parallel]\nport = 7\n")
    settings = load_settings("h", config="rc", environ={"OSTAP_CONFIG": "none"})
    assert (labels(settings), settings.files) == (["h:7"], (Path.cwd() / "rc",))
    assert load_settings(config=[], environ={}).files == ()


def test_files_that_were_asked_for_must_exist(home):
    with pytest.raises(ConfigError, match=rf"argument config: cannot read {home}/none: No such"):
        load_settings(config=[home / "none"])
    with pytest.raises(ConfigError, match=r"OSTAP_CONFIG: cannot read .*/none: No such"):
        load_settings(environ={"OSTAP_CONFIG": "none"})
    with pytest.raises(ConfigError, match="Is a directory"):
        load_settings(config=home)


def test_a_file_met_twice_is_read_once(home):
    first, second = home / "first", home / "second"
    first.write_text("[Parallel]\nuser = one\n")
    second.write_text("[Parallel]\nuser = two\n")
    settings = load_settings("h", config=[first, second, first])
    assert (settings.files, labels(settings)) == ((second, first), ["one@h"])


def refusal(path, caplog):
    """Return the warning that refuses the file, ``""`` if it counts."""
    caplog.clear()
    settings = load_settings("h", config=path)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == (not settings.files)
    assert labels(settings) == (["me@h"] if settings.files else ["h"])
    assert all(str(path) in text for text in warnings)
    return "".join(warnings)


@pytest.fixture
def rc(home):
    file = home / "rc"
    file.write_text("[Parallel]\nuser = me\n")
    file.chmod(0o644)
    return file


def test_files_that_others_can_write_are_refused(rc, caplog):
    assert refusal(rc, caplog) == ""
    rc.chmod(0o646)
    assert "everybody can write it" in refusal(rc, caplog)
    rc.chmod(0o600)
    assert refusal(rc, caplog) == ""


def test_no_regular_file(home, caplog):
    os.mkfifo(home / "pipe")
    assert "no regular file" in refusal(home / "pipe", caplog)


def test_a_default_place_that_is_a_directory(home, caplog):
    (home / ".ostaprc").mkdir()
    assert load_settings(environ={}).files == ()
    assert f"{home}/.ostaprc is not read: Is a directory" in caplog.text


root_only = pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")


@root_only
def test_files_of_other_users_are_refused(rc, caplog):
    os.chown(rc, 12345, 0)
    assert "belongs to another user (uid 12345)" in refusal(rc, caplog)


@root_only
def test_files_that_a_group_can_write(rc, caplog):
    rc.chmod(0o664)
    os.chown(rc, 0, 0)  # root's own group
    assert refusal(rc, caplog) == ""
    os.chown(rc, 0, 12345)
    assert "its group (gid 12345) can write it" in refusal(rc, caplog)


@root_only
def test_files_of_root_are_trusted_by_everybody(rc):
    program = (
        "import os, sys; from ostap_parallel.config import load_settings; os.chdir(sys.argv[1]); "
        # another user, who may look into the closed directories of the tests
        "os.setresuid(12345, 0, 0); "
        "print(len(load_settings(config='rc').files))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, rc.parent],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("1\n", "")
    os.chown(rc, 54321, 0)
    done = subprocess.run(
        [sys.executable, "-c", program, rc.parent],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.stdout == "0\n"
    assert "belongs to another user (uid 54321)" in done.stderr


class TestNoSilence:
    """What is asked for and not there, or not read, is told of."""

    @pytest.mark.parametrize(
        ("header", "meant"),
        [
            ("Paralel", "Parallel"),
            ("Paralel:cern.ch", "Parallel:cern.ch"),
            ("parrallel", "Parallel"),
        ],
    )
    def test_a_misspelt_section(self, load, caplog, header, meant):
        load(f"[{header}]\nppservers = a\n")
        (record,) = caplog.records
        text = record.getMessage()
        assert f"[{header}] is not read: did you mean [{meant}]?" in text

    @pytest.mark.parametrize("header", ["Paths", "Path", "Ostap", "Pairs", "pathos", "Parameters"])
    def test_sections_of_others_are_left_alone(self, load, caplog, header):
        load(f"[{header}]\n")
        assert caplog.records == []

    def test_no_configured_server(self, load, home):
        settings = load("[Paralel]\nppservers = a\n", "auto")
        assert settings.notice == (
            f"no server is configured (files read: {home / 'rc'}; sections of ours in them: none; "
            "OSTAP_PPSERVERS names none) (more: ostap-parallel help configured)"
        )
        settings = load("[Parallel]\nncpus = 1\n[Parallel:cern.ch]\nppservers = a\n", "auto")
        assert "lists for other domains, or empty ones, in [Parallel:cern.ch]" in settings.notice
        assert "sections of ours in them: [Parallel], [Parallel:cern.ch]" in settings.notice

    def test_a_refused_file_is_among_those_not_read(self, load, home):
        (home / "rc").touch()
        (home / "rc").chmod(0o666)
        settings = load("[Parallel]\nppservers = a\n", "auto")
        assert f"files read: none; files not read: {home / 'rc'};" in settings.notice

    def test_nothing_is_told_of_what_was_not_asked_for(self, load):
        assert load("", "a").notice == ""
        assert load("[Parallel]\nppservers = a\n", "auto").notice == ""

    @pytest.mark.slow
    def test_a_manager_tells_and_the_default_executor_of_futures_does_not(self, home, caplog):
        for kind in WorkManager, Executor:
            with kind(ncpus=1, servers="auto", config=()):
                (record,) = caplog.records
                assert record.getMessage().startswith("servers: no server is configured (")
            caplog.clear()
        script = "from ostap_parallel import futures; print(list(futures.map(abs, [-1])))"
        environ = {name: value for name, value in os.environ.items() if name[:5] != "OSTAP"}
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=environ
        )
        assert (done.stdout, done.stderr) == ("[1]\n", "")


def test_a_working_directory_that_was_removed(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert load_settings("h:7", ssh_config="/dev/null").hosts[0].port == 7
    with pytest.raises(ConfigError, match="no such file"):
        load_settings("h", script="s.sh")
