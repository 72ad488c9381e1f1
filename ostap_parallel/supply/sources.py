"""The sources of workers that the entries of a server list stand for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from ostap_parallel.config import HostConfig
from ostap_parallel.config.entries import parse_entry
from ostap_parallel.schedulers.scheduler import Runner, Scheduler
from ostap_parallel.schedulers.sge import Sge
from ostap_parallel.schedulers.slurm import Slurm
from ostap_parallel.supply.allocated import AllocationSource
from ostap_parallel.supply.allocations import Allocations, holder
from ostap_parallel.supply.existing import ExistingSource
from ostap_parallel.supply.host import HostSource
from ostap_parallel.supply.site import Here, Site
from ostap_parallel.supply.source import Source


def sources_of(
    hosts: Iterable[HostConfig], secret: str, tasks_per_worker: int | None = None
) -> list[Source]:
    """Return the sources: a server to start on a host, one that is there, or jobs to ask for."""
    found: list[Source] = []
    for host in hosts:
        if host.batch is not None:
            found += _jobs_of(host, secret, tasks_per_worker)
        elif host.server_port is not None:
            found.append(ExistingSource.local(host.server_port, secret, host.ncpus))
        else:
            found.append(HostSource(host, secret, tasks_per_worker=tasks_per_worker))
    return found


def _jobs_of(host: HostConfig, secret: str, tasks_per_worker: int | None) -> Iterator[Source]:
    assert host.batch is not None
    site = site_of(host)
    scheduler = scheduler_of(host.batch.batch, site.run)
    allocations = Allocations(host.name, host.batch, site, scheduler, holder())
    least = host.batch.least()
    for number, share in enumerate(host.batch.shares(host.name, host.ncpus), start=1):
        job = replace(host, name=f"{host.name}/{number}", ncpus=share, batch=None)
        yield AllocationSource(
            job,
            secret,
            allocations,
            tasks_per_worker=tasks_per_worker,
            is_spare=least is not None and number > least,
        )


def site_of(host: HostConfig) -> Site:
    """Return where the commands are that an entry needs."""
    assert host.batch is not None
    if host.batch.login is None:
        return Here()
    # Now, not before, as ssh needs pathos, which bare hosts do not have.
    from ostap_parallel.supply.login import Login

    entry = parse_entry(host.batch.login, "login", "login")
    parts = {key: setting.value for key, setting in entry.items()}
    user, port = parts.get("user"), parts.get("port")
    return Login(replace(host, name=parts["name"], user=user, port=port, batch=None))


def scheduler_of(kind: str, run: Runner) -> Scheduler:
    """Return a batch system whose commands are run so."""
    return Slurm(run) if kind == "slurm" else Sge(run)
