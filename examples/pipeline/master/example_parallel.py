"""A recipe with a job for each host: ``python example_parallel.py -j NAME [HOST ...]``."""

import sys

from ostap_parallel.pipeline import BaseRecipe, ComputeJob, RemoteCommandRecipeMixIn


class example_parallel(BaseRecipe, RemoteCommandRecipeMixIn):
    def go(self):
        super().go()
        node_command = "python %s" % (self.__file__.replace("master", "nodes"))  # noqa: UP031
        hosts = self.inputs["args"] or ["localhost"]
        jobs = [ComputeJob(host, node_command, arguments=["example_argument"]) for host in hosts]
        self._schedule_jobs(jobs)
        if self.error.is_set():
            return 1
        return 0


if __name__ == "__main__":
    sys.exit(example_parallel().main())
