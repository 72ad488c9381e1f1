"""What `--help` shows at its end: how the commands are used."""

from __future__ import annotations

# Under the name of the command; without a name, of `ostap-parallel` itself.
EXAMPLES = {
    "": """
ostap-parallel hosts h1 h2                     # do these hosts work, and what is wrong?
ostap-parallel run --hosts h1 'h2*4' fit.py    # a program with its tasks on hosts
ostap-parallel do -S h1,h2 "gzip {}" ::: *.log # a command for each of many values
""",
    "run": """
ostap-parallel run -n 4 fit.py --toys 100
ostap-parallel run --hosts h1 'h2*4' fit.py
ostap-parallel run --hostfile hosts.txt --sync mypackage -m mypackage.fit
""",
    "do": """
ostap-parallel do -j 4 "gzip -k {}" ::: *.log
ostap-parallel do -S h1,h2 --tag "echo {} on {host}" ::: a b c
ls *.root | ostap-parallel do --joblog jobs.log --resume --retries 2 "python fit.py {} {.}.pdf"
""",
    "hosts": """
ostap-parallel hosts
ostap-parallel hosts -v h1 me@h2:2222
ostap-parallel hosts --python python3.11 --tmpdir /var/tmp h1
""",
    "config": """
ostap-parallel config
ostap-parallel config h1 'h2*4'
""",
    "launch": """
ostap-parallel launch h1 h2 > servers.sh       # in one terminal
. ./servers.sh                                 # in another one, then servers="auto"
""",
    "connect": """
ostap-parallel connect h1 8888                 # localhost:34567 leads to localhost:8888 of h1
ostap-parallel connect --reverse h1 5432       # a port of h1 leads to 5432 here
""",
    "report": """
ostap-parallel report run.db                   # how far are the runs, what failed?
ostap-parallel report run.db --html            # a page for a browser: run.db.html
ostap-parallel report jobs.log --html jobs.html
ostap-parallel report .ostap_parallel_jobs/20300101T120000-1a2b3c
""",
    "top": """
ostap-parallel top                             # all runs of yours here, every second
ostap-parallel top -s 10 run.db                # a run by its checkpoint, from anywhere
""",
    "status": """
ostap-parallel status
ostap-parallel status --json | jq '.[].left'
""",
    "help": """
ostap-parallel help                            # the pages
ostap-parallel help hosts
ostap-parallel help page#while-it-goes-on
""",
    "jobs": """
ostap-parallel jobs                            # what runs there are here, and how far they are
ostap-parallel jobs --resubmit .ostap_parallel_jobs/20300101T120000-1a2b3c
""",
    "sync-dirs": """
ostap-parallel sync-dirs --parallel 8 results /backup/results
""",
}


def epilog(name: str) -> str | None:
    """Return the examples of a command as the end of its help."""
    text = EXAMPLES.get(name, "").strip()
    return "examples:\n  " + text.replace("\n", "\n  ") if text else None
