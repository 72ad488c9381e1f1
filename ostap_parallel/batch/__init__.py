"""Pools of a batch system's jobs, and their runs, which outlive the process that began them.

`SlurmPool` and `SgePool` are `multiprocessing.Pool` by arrays of jobs; `Run` attaches to a run
again. `slurm` and `sun_grid_engine` have the pools of pypoolparty, by its names.
"""

from ostap_parallel.arrays.layout import DIRECTORY as DIRECTORY
from ostap_parallel.arrays.run import Run
from ostap_parallel.batch import slurm as slurm
from ostap_parallel.batch import sun_grid_engine as sun_grid_engine
from ostap_parallel.batch.pool import SgePool, SlurmPool
from ostap_parallel.errors import JobRefused, SchedulerUnavailable

__all__ = ["JobRefused", "Run", "SchedulerUnavailable", "SgePool", "SlurmPool"]
