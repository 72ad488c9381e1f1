"""``ostap-parallel do`` beside GNU parallel: the same words, the same output, the same status."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys

import pytest

DO = [sys.executable, "-m", "ostap_parallel", "do"]
PEER = shutil.which("parallel")
PATIENCE = 60

# Options and all that is behind them; standard input; what GNU parallel prints, and its status.
CASES = [
    ("-k -N2 echo '{1}-{2}' ::: a b c", b"", b"a-b\nc-\n", 0),
    ("-k -n2 echo '{}' ::: a b c", b"", b"a b\nc\n", 0),
    ("-k -j2 -X echo 'p-{}-q' ::: a b c d e", b"", b"p-a-q p-b-q p-c-q\np-d-q p-e-q\n", 0),
    ("-k -j2 -m echo 'p-{}-q' ::: a b c d e", b"", b"p-a b c-q\np-d e-q\n", 0),
    ("-k -j1 -X echo", b"a\nb\nc d\n", b"a b c d\n", 0),
    ("-k -j1 -X -n2 echo", b"a\nb\nc d\n", b"a b\nc d\n", 0),
    ("-k --xargs echo ::: a b", b"", b"a b\n", 0),
    ("-k -X -j1 -s 20 echo ::: aaaa bbbb cccc dddd", b"", b"aaaa bbbb cccc\ndddd\n", 0),
    (
        "-k -X -j1 -s 20 echo '{.}.x{}y' ::: aaaa bbbb cccc dddd",
        b"",
        b"aaaa.xaaaay\nbbbb.xbbbby\ncccc.xccccy\ndddd.xddddy\n",
        0,
    ),
    ("-k --pipe -N2 'cat; echo -'", b"1\n2\n3\n", b"1\n2\n-\n3\n-\n", 0),
    ("-k --pipe -n2 --tag cat", b"1\n2\n3", b"\t1\n\t2\n\t3", 0),
    ("-k --pipe -N2 -L2 'echo {#}; cat'", b"1\n2\n3\n4\n5\n", b"1\n1\n2\n3\n4\n2\n5\n", 0),
    ("-k --pipe -L2 --block 4 'cat; echo -'", b"1\n2\n3\n4\n5\n", b"1\n2\n-\n3\n4\n-\n5\n-\n", 0),
    ("-k --pipe -L2 'cat; echo -'", b"1\n2\n3\n", b"1\n2\n-\n3\n-\n", 0),
    ("-k --pipe -L2 --block 4 'cat; echo -'", b"\n\n1\n2\n", b"\n\n-\n1\n2\n-\n", 0),
    ("-k --pipe --block 10 wc -c", b"".join(b"%d\n" % n for n in range(9, 14)), b"8\n6\n", 0),
    ("-k --pipe --block 1k wc -c", b"long\n" * 250 + b"x" * 3000, b"1000\n250\n3000\n", 0),
    ("-k --pipe --recstart '>' -N1 'cat; echo -'", b">a\n1\n>b\n", b">a\n1\n-\n>b\n-\n", 0),
    ("-k --pipe --recstart '>' --rrs -N1 'cat; echo -'", b">a\n1\n>b\n", b"a\n1\n-\nb\n-\n", 0),
    ("-k --pipe --recend ';' --rrs -N2 'cat; echo -'", b"a;b;c;d", b"ab-\ncd-\n", 0),
    ("-k --pipe --recend '' --block 2 'cat; echo -'", b"abcde", b"ab-\ncd-\ne-\n", 0),
    ("-k --pipe --header : -N2 'cat; echo -'", b"h\n1\n2\n3\n", b"h\n1\n2\n-\nh\n3\n-\n", 0),
    ("-k --pipe 'cat; echo -'", b"1\n2", b"1\n2-\n", 0),
    ("-k --pipe --block 4 'cat; echo -'", b"1\n2\n3\n4", b"1\n2\n-\n3\n4-\n", 0),
    ("-k --pipe --recstart '>' 'cat; echo -'", b">a\n>b\n", b">a\n>b\n-\n", 0),
    ("-k --pipe --header : 'cat; echo -'", b"h\n", b"", 0),
    ("--pipe cat", b"", b"", 0),
    ("-k --pipe -N1 'cat; exit 3'", b"1\n2\n", b"1\n2\n", 2),
    ("-k -v echo {} ::: 'a b' c", b"", b"echo 'a b'\na b\necho c\nc\n", 0),
    ("-k -v --tag echo ::: a", b"", b"a\techo a\na\ta\n", 0),
    ("--retries 0 'echo {} >> r; test $(wc -l < r) = 3' ::: a", b"", b"", 0),
    ("-k -N0 echo hi ::: 1 2", b"", b"hi\nhi\n", 0),
    ("-k --tag echo '{1}{2}' ::: a b ::: 1 2", b"", b"a 1\ta1\na 2\ta2\nb 1\tb1\nb 2\tb2\n", 0),
    ("-k --tag -N2 echo ::: a b c", b"", b"a b\ta b\nc\tc\n", 0),
    ("-k --tagstring '{1}:{#}' echo ::: 'a b' c", b"", b"a b:1\ta b\nc:2\tc\n", 0),
    ("-k -q echo 'a  b' '{}' '$x' ::: 'x  y'", b"", b"a  b x  y $x\n", 0),
    ("-k -q printf '%s|%s\n' '{}x' 'it'\"'\"'s' ::: 'x  y'", b"", b"x  yx|it's\n", 0),
    ("-k --colsep , echo '{2}={1}' ::: 'a , b' c,d", b"", b"b=a\nd=c\n", 0),
    ("-k -C ' ' --trim n echo '{2}={1}' ::: 'a b' 'c d e'", b"", b"b=a\nd=c\n", 0),
    ("-k --colsep '\t' echo '{1}/{3}'", b"a\tb\tc\nd\te\n", b"a/c\nd/\n", 0),
    ("-k -C '[,;]' echo '{}'", b"a,b;c\n", b"a b c\n", 0),
    ("-k --header : echo '{x}={y}' ::: x 1 2 ::: y 3 4", b"", b"1=3\n1=4\n2=3\n2=4\n", 0),
    (
        "-k --header : --colsep , echo '{name}:{age} {1}'",
        b"name,age\nann,3\nbob,4\n",
        b"ann:3 ann\nbob:4 bob\n",
        0,
    ),
    ("-k --header : echo '{f.}-{f/}' ::: f a/b.c", b"", b"a/b-b.c\n", 0),
    (
        "-k --plus echo '{..} {...} {/..} {/...} {+/} {+.} {+..} {##}' ::: /a/b.c.d.e x/y.z",
        b"",
        b"/a/b.c /a/b b.c b /a e d.e 2\nx/y.z x/y.z y.z y.z x z  2\n",
        0,
    ),
    ("-k echo '{-1}{1}{-2/.}' ::: d/a.x ::: b", b"", b"bd/a.xa\n", 0),
    (
        "-k -j1 'echo $PARALLEL_SEQ $PARALLEL_JOBSLOT {%} {#}' ::: a b",
        b"",
        b"1 1 1 1\n2 1 1 2\n",
        0,
    ),
    ("-k -I ,, 'echo ,, {} {.}' ::: a.b", b"", b"a.b {} a\n", 0),
    ("-k -r echo", b"a\n\nb\n", b"a\nb\n", 0),
    ("-k -L2 echo", b"a\nc\nb\n", b"a c\nb\n", 0),
    ("-k --trim lr 'echo \"{}\"' ::: ' a '", b"", b"a\n", 0),
    ("-k -d , echo '<{}>'", b"a,b,c\n", b"", 3),
    ("-k -d '\\t' echo", b"a\tb", b"a\nb\n", 0),
    ("-k -d :: echo", b"a::b::c", b"a\nb\nc\n", 0),
    ("-k -E x echo", b"a\nx\nb\n", b"a\n", 0),
    ("-k --link echo ::: a b ::: 1 2 3", b"", b"a 1\nb 2\na 3\n", 0),
    ("-k --xapply echo ::: a b ::: 1 2 3", b"", b"a 1\nb 2\na 3\n", 0),
    ("-k echo ::: a b :::+ 1 2 3", b"", b"a 1\nb 2\n", 0),
    ("-k echo ::: a b :::+ 1 2 ::: x y", b"", b"a 1 x\na 1 y\nb 2 x\nb 2 y\n", 0),
    ("-k echo '{}{}' ::: a ::: b", b"", b"a ba b\n", 0),
    (
        "-k 'echo {/} {//} {.} {/.}' ::: a/b.c ./x a.b/c .. /x/y/",
        b"",
        b"b.c a a/b b\nx . ./x x\nc a.b a.b/c c\n.. . . .\n /x /x/y/ \n",
        0,
    ),
    ("-k echo x", b"", b"", 0),
    ("-k echo :::", b"", b"", 0),
    ("-k false ::: 1 2", b"", b"", 2),
    ("-k --nice 5 'nice; : {}' ::: a", b"", b"5\n", 0),
    ("-k --delay 0.1 echo ::: a b", b"", b"a\nb\n", 0),
    ("-j0 -k echo ::: a b", b"", b"a\nb\n", 0),
    ("-j100% -k echo ::: a", b"", b"a\n", 0),
    ("-j+0 -k echo ::: a", b"", b"a\n", 0),
    ("-j-1 -k echo ::: a", b"", b"a\n", 0),
    ("-k --dryrun echo ::: a", b"", b"echo a\n", 0),
    ("-k -j1 --halt now,success=1 'exit {}' ::: 1 0 3", b"", b"", 0),
    ("-k -j1 --halt now,fail=50% 'exit {}' ::: 0 3 4 0", b"", b"", 50),
    ("-k -j1 --halt soon,fail=2 'exit {}' ::: 0 3 4 0", b"", b"", 2),
    ("-k -j1 --halt soon,done=1 'exit {}' ::: 3 0 4 0", b"", b"", 3),
    ("-k -j1 --halt soon,fail=1 'exit {}' ::: 3 0", b"", b"", 3),
    ("-k -j1 --halt now,fail=1 'kill -15 $$; : {}' ::: 3 0", b"", b"", 143),
    ("-k -j1 --halt now,fail=3 'exit {}' ::: 3 0", b"", b"", 1),
    ("-k -j1 --halt now,fail=90% 'exit {}' ::: 3 0 0", b"", b"", 34),
    ("-k -j1 --halt 2 'exit {}' ::: 3 0 0", b"", b"", 3),
    ("-k -j1 --halt 1 'exit {}' ::: 3 0 0", b"", b"", 3),
    ("-k -j1 --halt soon,fail=1 --timeout 3 sleep ::: 60 0 0", b"", b"", 255),
    ("-k --timeout 3 sleep ::: 60 0", b"", b"", 1),
    ("-k --timeout 0.05m sleep ::: 60 0", b"", b"", 1),
    ("-k -j3 --timeout 300% sleep ::: 0.5 0.4 0.3 20", b"", b"", 1),
    ("-k ::: 'echo a; echo b' 'exit 3'", b"", b"a\nb\n", 1),
    ("-k", b"echo a\nexit 4\n", b"a\n", 1),
    ("-k --retries 3 'echo x; false {}' ::: 1", b"", b"x\n", 1),
    ("-k -a one -a two echo", b"", b"1 x\n1 y\n1 z\n2 x\n2 y\n2 z\n", 0),
    ("-k -a one -a two --link echo", b"", b"1 x\n2 y\n1 z\n", 0),
    ("-k echo :::: one two", b"", b"1 x\n1 y\n1 z\n2 x\n2 y\n2 z\n", 0),
    ("-k echo :::: one ::::+ two ::: x", b"", b"1 x x\n2 y x\n", 0),
    ("-k echo :::: - ::: x", b"1\n2\n", b"1 x\n2 x\n", 0),
    ("-kj2 echo ::: a b", b"", b"a\nb\n", 0),
    ("-k -0 echo", b"a\x00b c\x00", b"a\nb c\n", 0),
    ("-k 'echo -n {}; echo -j4 --tag' ::: a", b"", b"a-j4 --tag\n", 0),
    ("-k echo -n '{}' --tag ::: a", b"", b"a --tag", 0),
    ("-k 'echo {1} {2} {3}' :::: one ::: A B ::: z", b"", b"1 A z\n1 B z\n2 A z\n2 B z\n", 0),
    ("-k -u echo ::: a", b"", b"a\n", 0),
    ("-k --lb echo ::: a", b"", b"a\n", 0),
    ("-k 'cat; echo' ::: a", b"not me", b"a\n", 0),
    ("-k echo '{1}' '{2}' ::: a ::: -n", b"", b"a -n\n", 0),
    ("-k 'echo '\"'\"'{}'\"'\"'' ::: a", b"", b"a\n", 0),
    ("-k 'if [ {} -gt 1 ]; then echo big; else echo small; fi' ::: 1 2", b"", b"small\nbig\n", 0),
    ("-k echo '{#}:{}' :::: one", b"", b"1:1\n2:2\n", 0),
    ("-k -m 'echo {} x{}y' ::: a b", b"", b"a xay\nb xby\n", 0),
    ("-k -j1 -m 'echo {} x{}y' ::: a b", b"", b"a b xa by\n", 0),
    ("-k -N3 --tag 'echo {3}{2}{1}' ::: a b c d e f g", b"", b"a b c\tcba\nd e f\tfed\ng\tg\n", 0),
    ("-k -n3 'echo {2}' ::: a b c d", b"", b"b\n\n", 0),
    ("-j1 'sleep 0.{}; echo {}' ::: 3 1", b"", b"3\n1\n", 0),
    ("-k --tagstring '{}\\t{#}' echo ::: a b", b"", b"a\t1\ta\nb\t2\tb\n", 0),
    ("-k -d , echo ::: a,b c,", b"", b"a\nb\nc\n\n", 0),
    ("-k echo ::: 'a\nb' c", b"", b"a\nb\nc\n", 0),
    ("-k -r echo ::: '' ' ' a", b"", b"a\n", 0),
    ("-k -n0 echo x ::: a b", b"", b"x\nx\n", 0),
    ("-k -s 10 -X -j1 echo ::: a b c d", b"", b"a b\nc d\n", 0),
    ("-k -s 10 -m -j1 echo ::: aaa bbb c d", b"", b"aaa\nbbb\nc d\n", 0),
    ("-k -s 5 echo ::: aaaaaaaaaa", b"", b"", 255),
    ("--keeporder --linebuffer --plain -x --eof=B echo ::: A B C", b"", b"A\n", 0),
]


@pytest.fixture
def run(tmp_path):
    """A function that runs a program with some words; returns status and output."""
    (tmp_path / "one").write_text("1\n2\n")
    (tmp_path / "two").write_text("x\ny\nz\n")

    def run(program, words, stdin):
        done = subprocess.run(
            [*program, *words],
            input=stdin,
            capture_output=True,
            cwd=tmp_path,
            env={**os.environ, "VALUE": "it's $HOME"},
            timeout=PATIENCE,
        )
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("text", "stdin", "out", "status"), CASES, ids=[c[0] for c in CASES])
def test_what_it_prints(run, text, stdin, out, status):
    words = shlex.split(text)
    found = run(DO, words, stdin)
    assert found[:2] == (status, out), found[2]


@pytest.mark.slow
def test_the_peer_prints_the_same(run):
    if PEER is None:
        pytest.skip("GNU parallel is not installed")
    for text, stdin, out, status in CASES:
        found = run([PEER, "--will-cite"], shlex.split(text), stdin)
        assert (text, *found[:2]) == (text, status, out)


@pytest.mark.slow
def test_variables_and_functions_of_bash(run):
    script = 'twice() { echo "$1$1 $VALUE"; }; export -f twice; '
    for program in ([PEER, "--will-cite"] if PEER else DO, DO):
        words = [*program, "-k", "--env", "twice", "--env", "VALUE", "twice", ":::", "a", "b c"]
        found = run(["bash", "-c", script + shlex.join(words)], [], b"")
        assert found[:2] == (0, b"aa it's $HOME\nb cb c it's $HOME\n"), found[2]


@pytest.mark.slow
def test_the_log_of_jobs(run, tmp_path):
    words = ["-j1", "--joblog", "log", "echo {}; echo {} >&2; exit {}", ":::", "0", "3"]
    logs = []
    for program in ([PEER, "--will-cite"] if PEER else DO, DO):
        assert run(program, words, b"")[0] == 1
        head, *lines = (tmp_path / "log").read_text().splitlines()
        rows = [line.split("\t") for line in lines]
        logs.append((head, [row[:2] + row[4:] for row in rows]))
        assert all(len(row[3]) == 10 and "." in row[2] for row in rows)
    assert logs[1][1][0] == ["1", ":", "0", "4", "0", "0", "echo 0; echo 0 >&2; exit 0"]
    assert logs[0][0] == logs[1][0]
    # The peer counts standard output alone.
    assert [row[5:] for row in logs[0][1]] == [row[5:] for row in logs[1][1]]


@pytest.mark.slow
def test_the_log_of_jobs_of_several_runs(run, tmp_path):
    words = ["-k", "--joblog", "+log", "echo", ":::", "a", "b"]
    assert [run(DO, words, b"")[1] for _ in range(3)] == [b"a\nb\n"] * 3
    head, *lines = (tmp_path / "log").read_text().splitlines()
    assert head.startswith("Seq\t")
    assert sorted(line.split("\t")[0] for line in lines) == ["1"] * 3 + ["2"] * 3


@pytest.mark.slow
def test_each_goes_on_with_the_log_of_the_other(run):
    if PEER is None:
        pytest.skip("GNU parallel is not installed")
    words = ["-k", "--joblog", "log", "echo {}; test {} != 2", ":::", "1", "2", "3"]
    for first, then in (([PEER, "--will-cite"], DO), (DO, [PEER, "--will-cite"])):
        assert run(first, words, b"")[0] == 1
        assert run(then, ["--resume-failed", *words, "4"], b"")[:2] == (1, b"2\n4\n")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--pipe --round-robin wc -l", "a command of its own"),
        ("--pipe", "--pipe takes a command"),
        ("--pipe wc ::: a", "-a is for files"),
        ("--pipepart -a none wc", "none"),
        ("--pipe --block 1x wc", "64k or 10M, not '1x'"),
        ("--pipe --header x wc", "a number of lines, not 'x'"),
        ("--header 2 echo ::: a", "--header"),
        ("--results out/{1} echo ::: a", "without places"),
        ("--results out.csv echo ::: a", "a directory is wanted"),
        ("--rpl x echo ::: a", "places are those"),
        ("--load 80% echo ::: a", "take -j"),
        ("--tmux echo ::: a", "no terminal"),
        ("--retry-failed --joblog l", "take --resume-failed"),
        ("--ssh x echo ::: a", "--ssh-config"),
        ("echo {= s/a/b/ =} ::: a", "{= s/a/b/ =}"),
        ("--plus echo {%.gz} ::: a", "{%.gz}"),
        ("--plus echo {0#} ::: a", "{0#}"),
        ("-i echo {} ::: a", "take -I TEXT"),
        ("-l2 echo ::: a b", "-l2: take -L N"),
        ("--filter x echo ::: a", "leave values out"),
        ("-n -1 echo ::: a", "-n"),
        ("-s 5 echo ::: aaaaaaaaaa", "15 bytes is too long, with 'aaaaaaaaaa'"),
        ("-j 3x echo ::: a", "-j"),
        ("-S h1 -j 50% echo ::: a", "about this machine"),
        ("-S 'ssh -p 22 h' echo ::: a", "--ssh-config"),
        ("--nonall uptime", "-S"),
        ("--timeout soon echo ::: a", "soon"),
        ("--colsep ( echo ::: a", "regular expression"),
        ("--env NO_SUCH echo ::: a", "NO_SUCH"),
        ("--slf none echo ::: a", "none"),
    ],
)
def test_what_is_not_there_is_told(run, words, told):
    status, out, err = run(DO, shlex.split(words), b"")
    assert (status, out) == (255, b"")
    assert told in err.decode()


def test_random_order(run):
    words = ["-k", "--shuf", "echo", ":::", *map(str, range(40))]
    _, out, _ = run(DO, words, b"")
    assert sorted(out.split(), key=int) == [str(n).encode() for n in range(40)] != out.split()


@pytest.mark.parametrize(
    ("words", "stdin", "out", "err"),
    [
        (["-k", "--csv", "echo {1}+{2}"], b'"a b",c\n"d,e",f\n', b"a b+c\nd,e+f\n", b""),
        (["-t", "echo", ":::", "a b"], b"", b"a b\n", b"echo 'a b'\n"),
    ],
)
def test_what_the_peer_prints_otherwise(run, words, stdin, out, err):
    """It has no Text::CSV, or tells more."""
    assert run(DO, words, stdin) == (0, out, err)


def test_what_is_no_csv(run):
    status, _, err = run(DO, ["--csv", "echo {1}"], b'"' + 200_000 * b"x" + b'"\n')
    assert status == 255
    assert b"what is read is no CSV: field larger than" in err
    assert b"Traceback" not in err


class TestOnHosts:
    @pytest.fixture
    def options(self, hosts):
        return ["--ssh-config", str(hosts.ssh_config), "-S", "h1*1,1/h2"]

    @pytest.mark.slow
    def test_files_go_there_and_come_back(self, run, options, tmp_path, hosts):
        (tmp_path / "d").mkdir()
        names = ["it's $HOME", "d/two\nlines", "three"]
        for name in names:
            (tmp_path / name).write_text(f"<{name}>")
        (tmp_path / "base").write_text("base ")
        text = "cat base {} > {}.out; echo {host} >&2"
        words = [*options, "--trc", "{}.out", "--bf", "base", text, ":::", *names]
        status, _, err = run(DO, words, b"")
        assert status == 0, err
        for name in names:
            assert (tmp_path / f"{name}.out").read_text() == f"base <{name}>"
        used = {name for name in ("h1", "h2") if name.encode() in err}
        for host in hosts:
            found = {path.name for path in host.home.rglob("*") if path.is_file()}
            assert not {*names, *(f"{name}.out" for name in names), "two\nlines"} & found
            assert not (host.home / "d").exists()
            (host.home / "base").unlink(missing_ok=True)
        assert used

    @pytest.mark.slow
    def test_a_directory_of_its_own(self, run, options, tmp_path, hosts):
        (tmp_path / "in").write_text("a")
        words = [*options, "--wd", "...", "--transfer", "--return", "{}.out", "--cleanup"]
        status, out, err = run(DO, [*words, "pwd; cp {} {}.out", ":::", "in"], b"")
        assert status == 0, err
        assert (tmp_path / "in.out").read_text() == "a"
        assert b"/.parallel/tmp/" in out
        for host in hosts:
            assert not list((host.home / ".parallel" / "tmp").glob("*"))

    @pytest.mark.slow
    def test_a_file_that_is_missing(self, run, options, tmp_path):
        (tmp_path / "in").write_text("a")
        status, _, err = run(DO, [*options, "--transfer", "echo", ":::", "in", "none"], b"")
        assert status == 1
        assert b"none cannot be sent" in err
        words = [*options, "--trc", "{}.out", "true", ":::", "in"]
        status, _, err = run(DO, words, b"")
        assert status == 1
        assert b"in.out cannot be fetched" in err

    def test_here_nothing_is_sent(self, run, tmp_path):
        (tmp_path / "in").write_text("a")
        words = ["--trc", "{}.out", "cp {} {}.out", ":::", "in"]
        assert run(DO, words, b"") == (0, b"", b"")
        assert (tmp_path / "in.out").read_text() == (tmp_path / "in").read_text() == "a"

    @pytest.mark.slow
    def test_all_hosts(self, run, options):
        status, out, err = run(DO, [*options, "-k", "--tag", "--nonall", "echo {host}"], b"")
        assert (status, out) == (0, b"h1\th1\nh2\th2\n"), err
        words = [*options, "-k", "--onall", "echo {} {host} {#}", ":::", "a", "b"]
        assert run(DO, words, b"")[1] == b"a h1 1\na h2 2\nb h1 3\nb h2 4\n"

    @pytest.mark.slow
    def test_a_file_of_hosts(self, run, options, tmp_path):
        (tmp_path / "hosts").write_text("# mine\n1/h1\n\nh2*1 # another\n")
        words = [*options[:2], "--slf", "hosts", "-k", "--nonall", "echo $PARALLEL_SSHHOST"]
        assert run(DO, words, b"")[:2] == (0, b"h1\nh2\n")

    @pytest.mark.slow
    def test_variables(self, run, options):
        words = [*options, "-k", "--env", "VALUE", "echo $VALUE $PARALLEL_SEQ {}", ":::", "a", "b"]
        assert run(DO, words, b"")[:2] == (0, b"it's $HOME 1 a\nit's $HOME 2 b\n")
