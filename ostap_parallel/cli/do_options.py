"""The options of ``ostap-parallel do``, which are GNU parallel's where they can be."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

# Exit status if something else is wrong than the commands.
WRONG = 255

# Options of GNU parallel that are not here, by what takes their place.
REFUSED = {
    **dict.fromkeys(
        ("--round-robin", "--roundrobin", "--rr", "--fifo", "--cat", "--tee", "--regexp", "--bin"),
        "with --pipe each block is standard input of a command of its own",
    ),
    **dict.fromkeys(
        ("--semaphore", "--semaphorename", "--fg", "--bg", "--wait", "--id"),
        "there is no semaphore: all commands of a run are given to one `do`, with -j",
    ),
    **dict.fromkeys(
        ("--load", "--memfree", "--memsuspend", "--noswap", "--limit"),
        "the load is not looked at: take -j, and --nice",
    ),
    **dict.fromkeys(
        (
            *("--rpl", "--parens", "-U", "--er", "--bnr", "--extensionreplace"),
            *("--basenamereplace", "--dirnamereplace", "--basenameextensionreplace"),
            *("--seqreplace", "--slotreplace"),
        ),
        "places are those of the manual",
    ),
    **dict.fromkeys(("--tmux", "--tmuxpane", "--tty", "-o"), "commands have no terminal"),
    **dict.fromkeys(("-p", "--interactive"), "nothing is asked: see the commands by --dry-run"),
    **dict.fromkeys(("--sql", "--sqlmaster", "--sqlworker"), "take --joblog and --results"),
    **dict.fromkeys(("--compress", "--files"), "take --results DIR"),
    **dict.fromkeys(("-i", "--replace"), "take -I TEXT"),
    **dict.fromkeys(("--color", "--ctag", "--ctagstring"), "take --tag"),
    **dict.fromkeys(("--latest-line", "--ll"), "take --line-buffer, or --progress"),
    **dict.fromkeys(("--shellquote", "--shell-quote"), "values are quoted: see --dry-run"),
    **dict.fromkeys(
        ("--number-of-cpus", "--number-of-cores", "--number-of-sockets", "--number-of-threads"),
        "nproc tells it",
    ),
    "--filter": "leave values out before, or have the command do so",
    "--process-slot-var": "take $PARALLEL_JOBSLOT",
    "--total-jobs": "their number is known unless they come from standard input",
    "-l": "take -L N",
    "-e": "take -E VALUE",
    "--retry-failed": "take --resume-failed, with the same command and values",
    "--ssh": "take --ssh-config FILE",
    "--sshdelay": "hosts are reached at once, each by one connection",
    "--tempdir": "take --tmpdir DIR, for hosts, or TMPDIR",
    "--profile-file": "options are given on the command line",
    "-J": "options are given on the command line",
    "--hostgroups": "pin values to hosts by --map FILE",
    "--hgrp": "pin values to hosts by --map FILE",
    "--termseq": "what is ended gets SIGTERM, and a second later SIGKILL",
    "--results-format": "results are in DIR/<number>/stdout and stderr",
    "--arg-sep": "values begin behind :::",
    "--arg-file-sep": "files begin behind ::::",
    "--record-env": "take --env NAME",
    "--citation": "nothing is asked for",
    "--shebang": "write `ostap-parallel do ... :::: FILE` into a script",
    "--rsync-opts": "files go through the connection that is there, without rsync",
}


class Parser(argparse.ArgumentParser):
    """A parser that ends with GNU parallel's exit status."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse all there is."""
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            name = rest[0].partition("=")[0]
            why = REFUSED.get(name) or (not name.startswith("--") and REFUSED.get(name[:2]))
            self.error(f"there is no option {rest[0]}" + (f": {why}" if why else ""))
        return found, rest

    def error(self, message: str) -> NoReturn:
        """Print what is wrong and exit."""
        self.print_usage(sys.stderr)
        self.exit(WRONG, f"{self.prog}: error: {message}\n")


def add_arguments(add: Callable[..., object]) -> None:
    """Add the options and what is behind them."""
    _add_places(add)
    _add_values(add)
    _add_filling(add)
    _add_blocks(add)
    _add_output(add)
    _add_course(add)
    _add_files(add)
    for words in (
        ("--will-cite", "--no-notice", "--gnu", "--silent", "--group", "-M", "-x", "--plain"),
    ):
        add(*words, action="store_true", dest="ignored", help=argparse.SUPPRESS)
    text = (
        "a command with places, see the manual, then ::: VALUES or :::: FILES; or standard input"
    )
    add("words", nargs=argparse.REMAINDER, metavar="TEMPLATE", help=text)


def _add_places(add: Callable[..., object]) -> None:
    text = "hosts, [user@]host[:port][*slots], with commas; : is this machine; default: it alone"
    add("-S", "--servers", "--sshlogin", metavar="LIST", action="append", help=text)
    text = "a file with a host on each line"
    add("--sshloginfile", "--slf", metavar="FILE", action="append", default=[], help=text)
    text = "a LOFAR data map, whose files are the values, each on its host"
    add("--map", metavar="FILE", help=text)
    text = "commands at a time on each host, N, or here N%%, +N, -N of the CPUs; 0: as many as "
    text += "there are; default: as many as it has CPUs"
    names = "-j", "--max-per-node", "--jobs", "-P", "--max-procs"
    add(*names, metavar="N", type=_slots, help=text)
    add("--nonall", action="store_true", help="run the command once on each host, without values")
    add("--onall", action="store_true", help="run the command for each value on each host")
    add("--nice", metavar="N", type=int, default=0, help="lower the priority of the commands")
    text = "a variable, or exported function of bash, that commands get from here"
    add("--env", metavar="NAME", action="append", default=[], help=text)
    add("--profile", metavar="FILE", help="script that is on the hosts; sourced first")
    add("--script", metavar="FILE", help="local script, sent to the hosts; sourced last")


def _add_values(add: Callable[..., object]) -> None:
    text = "read values from a file; as :::: FILE"
    names = "-a", "--arg-file"
    add(*names, metavar="FILE", action="append", default=[], help=text)
    add("-0", "--null", action="store_true", help="values in files and standard input end by \\0")
    text = "what ends values in files and standard input"
    add("-d", "--delimiter", metavar="TEXT", type=_delimiter, default=b"\n", help=text)
    text = "regular expression for what is between the columns of a line, which are values each"
    add("-C", "--colsep", metavar="REGEX", default="", help=text)
    add("--csv", action="store_true", help="lines are of comma separated values")
    text = "take blanks away: l(eft), r(ight), lr or n(ot); default: lr with --colsep, else n"
    add("--trim", choices=("n", "l", "r", "lr", "rl"), help=text)
    text = "the first value of each source is a name, for {name}; with --pipe, or N: so many lines"
    text += " are the beginning of each block"
    add("--header", metavar=":", type=_header, default=0, help=text)
    add("-E", "--eof", dest="E", metavar="VALUE", help="the value that is the end of all")
    add("-r", "--no-run-if-empty", action="store_true", help="leave empty values out")
    text = "the first values of all inputs go together, and so on; shorter ones begin anew"
    add("--link", "--xapply", action="store_true", help=text)
    add("--shuf", action="store_true", help="in random order")


def _add_filling(add: Callable[..., object]) -> None:
    add("-n", "--max-args", metavar="N", type=_count, help="so many values for each command")
    text = "the same, and {1} ... {N} are those; with 0 a command gets none; with --pipe records"
    add("-N", "--max-replace-args", metavar="N", type=_count, help=text)
    text = "the same as -n; with --pipe so many lines are a record"
    add("-L", "--max-lines", metavar="N", type=_positive, help=text)
    text = "as many values as there is room for; words with places come for each"
    add("-X", action="store_true", help=text)
    text = "the same, but only the values come again and again"
    add("-m", action="store_true", dest="many", help=text)
    text = "the same as -m, with no heed to how many commands run at a time"
    add("--xargs", action="store_true", help=text)
    text = "bytes that such a command may have"
    add("-s", "--max-chars", metavar="N", type=_positive, help=text)
    add("-I", metavar="TEXT", default="{}", help="what stands for the values, in place of {}")
    add("-q", "--quote", action="store_true", help="the command is words, not text for the shell")
    add("--plus", action="store_true", help="more places, as {..}, {+/} and {##}")


def _add_blocks(add: Callable[..., object]) -> None:
    text = "cut standard input, or the files of -a, into blocks: each is that of a command"
    names = "--pipe", "--spreadstdin", "--pipepart", "--pipe-part"
    add(*names, action="store_true", dest="pipe", help=text)
    text = "bytes of a block, as 10M or 64k, that ends with a record; default: 1M; see -N and -L"
    add("--block", "--block-size", metavar="SIZE", type=_size, default=1 << 20, help=text)
    text = "what a record ends with; default: a line end"
    add("--recend", metavar="TEXT", type=_unescaped, help=text)
    add("--recstart", metavar="TEXT", type=_unescaped, help="what a record begins with")
    text = "leave out what records begin and end with"
    add("--rrs", "--remove-rec-sep", "--removerecsep", action="store_true", help=text)


def _add_output(add: Callable[..., object]) -> None:
    add("--dry-run", "--dryrun", action="store_true", help="print the commands, and run none")
    add("-t", action="store_true", dest="tell", help="tell each command before it runs")
    text = "print each command before what it prints"
    add("-v", action="store_true", dest="prints_commands", help=text)
    text = "begin each line of output with the values"
    add("--tag", action="store_true", help=text)
    text = "begin each line of output with a text, which may have places"
    add("--tagstring", "--tag-string", metavar="TEXT", type=_unescaped, help=text)
    add(
        "-k",
        "--keep-order",
        "--keeporder",
        action="store_true",
        help="print in the order of the values",
    )
    text = "print whole lines as they come, in place of all of a command at its end"
    live = "--line-buffer", "--linebuffer", "--lb", "-u", "--ungroup"
    add(*live, action="store_true", help=text)
    text = "show how far it is, with the time left"
    add("--progress", "--eta", "--bar", action="store_true", help=text)
    add("--results", metavar="DIR", help="keep what is printed in DIR/<number>/stdout and stderr")


def _add_course(add: Callable[..., object]) -> None:
    text = "a file with a line for each command that has ended; +FILE: behind those that are there"
    add("--joblog", metavar="FILE", help=text)
    add("--resume", action="store_true", help="leave out what is in the job log")
    text = "leave out what has ended well by the job log"
    add("--resume-failed", action="store_true", help=text)
    text = "now or soon,fail or success or done=N or N%%: stop early"
    add("--halt", "--halt-on-error", metavar="WHEN", default="never", help=text)
    text = "run what fails N times at most, 0: until it ends well, elsewhere if that is possible"
    add("--retries", metavar="N", type=_count, default=1, help=text)
    text = "end a command that takes longer: 90, 1.5m, 2h; or N%% of the median of the others"
    add("--timeout", metavar="TIME", type=_limit, default=(None, None), help=text)
    text = "time between two commands that begin"
    add("--delay", metavar="TIME", type=_seconds, default=0.0, help=text)


def _add_files(add: Callable[..., object]) -> None:
    text = "directory in which the commands run; . is this one, ... one of its own for each"
    add("--workdir", "--wd", metavar="DIR", default="", help=text)
    text = "a file that goes to the host before the command; it may have places"
    names = "--transferfile", "--transferfiles", "--transfer-file", "--tf"
    add(*names, metavar="FILE", action="append", default=[], help=text)
    add("--transfer", action="store_true", help="the same as --transferfile {}")
    text = "a file that comes back after the command; it may have places"
    add("--return", metavar="FILE", action="append", default=[], dest="fetched", help=text)
    text = "remove what was transferred and returned from the host"
    add("--cleanup", action="store_true", help=text)
    text = "the same as --transfer --return FILE --cleanup"
    add("--trc", metavar="FILE", action="append", default=[], help=text)
    text = "a file that goes to each host once"
    add("--basefile", "--bf", metavar="FILE", action="append", default=[], help=text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number from 1 on is wanted, not {text!r}")
    return int(text)


def _header(text: str) -> int:
    if text != ":" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"':' is wanted, or a number of lines, not {text!r}")
    return 1 if text == ":" else int(text)


_SIZES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def _size(text: str) -> int:
    found = re.fullmatch(r"([1-9]\d*)([kKmMgG]?)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"bytes are wanted, as 64k or 10M, not {text!r}")
    return int(found[1]) * _SIZES[found[2]]


def _slots(text: str) -> str:
    if not re.fullmatch(r"\d+|\d+%|[+-]\d+%?", text):
        wanted = "a number is wanted, or N%, +N or -N of the CPUs"
        raise argparse.ArgumentTypeError(f"{wanted}, not {text!r}")
    return text


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a number from 0 on is wanted, not {text!r}")
    return int(text)


def _unescaped(text: str) -> str:
    """Return a text with its escapes, as of a tab, in their own form, as printf has them."""
    known = {"t": "\t", "n": "\n", "r": "\r", "\\": "\\"}
    return re.sub(r"\\([tnr\\])", lambda found: known[found[1]], text)


def _delimiter(text: str) -> bytes:
    known = {"\\n": b"\n", "\\t": b"\t", "\\0": b"\0", "\\r": b"\r", "\\\\": b"\\"}
    found = known.get(text, text.encode("utf-8", "surrogateescape"))
    if not found:
        raise argparse.ArgumentTypeError("some text is wanted")
    return found


def _limit(text: str) -> tuple[float | None, float | None]:
    """Return seconds, or a percentage."""
    if text.endswith("%"):
        return None, _seconds(text[:-1])
    return _seconds(text) or None, None


_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def _seconds(text: str) -> float:
    parts = re.findall(r"(\d+\.?\d*|\.\d+)([smhd]?)", text.lower())
    if not parts or "".join(map("".join, parts)) != text.lower():
        raise argparse.ArgumentTypeError(f"seconds are wanted, or as in 1.5m, not {text!r}")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)
