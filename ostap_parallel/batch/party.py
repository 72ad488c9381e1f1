"""The pools of pypoolparty, by its names and parameters."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from ostap_parallel.batch.pool import SgePool, SlurmPool
from ostap_parallel.schedulers.directives import joined

# How often pypoolparty submits again if nobody says how often.
UNLIMITED = 1_000_000


def _common(python: str | None, polling: float, keep: bool) -> dict[str, Any]:
    """Return what all of them have, as parameters of our pools."""
    return {
        "python": python or sys.executable,
        "polling": float(polling),
        "keep": True if keep else None,
    }


class SlurmArrayPool(SlurmPool):
    """pypoolparty's ``slurm.array.Pool``; `settings` are those of `SlurmPool`.

    Parameters
    ----------
    num_simultaneously_running_tasks
        Jobs at the same time at most.
    python_path
        Python on the nodes; by default the one that runs this.
    polling_interval
        Seconds between looks at the files, at most.
    work_dir, keep_work_dir
        Where each call keeps its files, and whether also of those that went well.
    verbose
        Print how many items are done.
    slurm_call_timeout
        Seconds that ``sbatch`` may take.
    max_num_resubmissions
        How often what was lost is submitted again; ``None`` for no limit.
    """

    def __init__(
        self,
        num_simultaneously_running_tasks: int | None = None,
        python_path: str | None = None,
        polling_interval: float = 5.0,
        work_dir: str | None = None,
        keep_work_dir: bool = False,
        verbose: bool = False,
        slurm_call_timeout: float = 60.0,
        max_num_resubmissions: int | None = None,
        sbatch_path: str = "sbatch",
        squeue_path: str = "squeue",
        scancel_path: str = "scancel",
        **settings: Any,
    ) -> None:
        super().__init__(
            work_dir,
            limit=num_simultaneously_running_tasks,
            **_common(python_path, polling_interval, keep_work_dir),
            verbose=verbose,
            submit_timeout=float(slurm_call_timeout) or 60.0,
            retries=UNLIMITED if max_num_resubmissions is None else max_num_resubmissions,
            sbatch=sbatch_path,
            squeue=squeue_path,
            scancel=scancel_path,
            **settings,
        )


class SlurmChunkPool(SlurmPool):
    """pypoolparty's ``slurm.Pool``; `settings` are those of `SlurmPool`.

    Parameters
    ----------
    num_chunks
        Jobs of a call.
    clusters
        Names for ``--clusters``.
    """

    def __init__(
        self,
        num_chunks: int | None = None,
        python_path: str | None = None,
        polling_interval: float = 5.0,
        work_dir: str | None = None,
        keep_work_dir: bool = False,
        max_num_resubmissions: int = 10,
        verbose: bool = False,
        sbatch_path: str = "sbatch",
        clusters: str | Iterable[str] | None = None,
        squeue_path: str = "squeue",
        scancel_path: str = "scancel",
        **settings: Any,
    ) -> None:
        names = clusters if isinstance(clusters, str) else ",".join(clusters or ())
        super().__init__(
            work_dir,
            chunks=num_chunks,
            **_common(python_path, polling_interval, keep_work_dir),
            retries=max_num_resubmissions,
            verbose=verbose,
            sbatch=sbatch_path,
            squeue=squeue_path,
            scancel=scancel_path,
            clusters=names,
            **settings,
        )


class SunGridEnginePool(SgePool):
    """pypoolparty's ``sun_grid_engine.Pool``; `settings` are those of `SgePool`.

    Parameters
    ----------
    num_chunks
        Jobs of a call.
    queue_name
        As for ``-q``.
    error_state_indicator
        What in the state of a job means that it is stuck.
    """

    def __init__(
        self,
        num_chunks: int | None = None,
        python_path: str | None = None,
        polling_interval: float = 5.0,
        work_dir: str | None = None,
        keep_work_dir: bool = False,
        max_num_resubmissions: int = 10,
        verbose: bool = False,
        qsub_path: str = "qsub",
        queue_name: str | None = None,
        qstat_path: str = "qstat",
        error_state_indicator: str = "E",
        qdel_path: str = "qdel",
        **settings: Any,
    ) -> None:
        if queue_name:
            others = joined("options", settings.get("options", ""), " ")
            settings["options"] = f"-q {queue_name} {others}".strip()
        super().__init__(
            work_dir,
            chunks=num_chunks,
            **_common(python_path, polling_interval, keep_work_dir),
            retries=max_num_resubmissions,
            verbose=verbose,
            qsub=qsub_path,
            qstat=qstat_path,
            qdel=qdel_path,
            error=error_state_indicator,
            **settings,
        )
