"""Functions and tasks that read a shared object, for workers here and on hosts."""

from __future__ import annotations

import hashlib
import os
import re
import time
from pathlib import Path

from functions import wait_for

from ostap_parallel import Task, shared

PAGE = 4096


def look_up(item, table):
    return table[item]


def look_up_deeper(item, table):
    return shared("table")[item]


def add_shared(item):
    return item + shared()


def digest(item):
    return os.getpid(), hashlib.sha256(shared()).hexdigest()


def digest_later(item):
    time.sleep(0.02)
    return hashlib.sha256(shared()).hexdigest()


def digest_after(item, data, path):
    if item:
        wait_for(path)
    return hashlib.sha256(data).hexdigest()


def overwrite(item, data):
    memoryview(data)[0:1] = b"x"


def pages(item):
    """Map all of the shared object, with another worker; return how many kB are whose."""
    assert sum(shared()[::PAGE]) >= 0
    deadline = time.monotonic() + 20
    while True:
        smaps = Path("/proc/self/smaps").read_text()
        found = re.findall(r"(?m)^\S+ r--s .*\(deleted\)\n(?:[A-Z]\w+: .*\n)+", smaps)
        mapped = [dict(re.findall(r"(\w+): +(\d+) kB", lines)) for lines in found]
        (sizes,) = [sizes for sizes in mapped if int(sizes["Size"]) * 1024 > len(shared())]
        if int(sizes["Pss"]) < 0.6 * int(sizes["Rss"]) or time.monotonic() > deadline:
            return os.getpid(), int(sizes["Rss"]), int(sizes["Pss"])


def mapped(item):
    """Return how many blobs this process has mapped."""
    return Path("/proc/self/maps").read_text().count("(deleted)")


class Scale(Task):
    """Multiplies by what its run shares."""

    def initialize_local(self):
        self.found = []

    def worker_init(self):
        self.factor = shared("factor")

    def initialize_remote(self, jobid=-1):
        assert shared("factor") == self.factor

    def process(self, jobid, item):
        return self.factor * item

    def merge_results(self, result, jobid=-1):
        self.found.append(result)

    def results(self):
        return sorted(self.found)
