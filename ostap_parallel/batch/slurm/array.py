"""pypoolparty's pool for SLURM, an array for all tasks."""

from ostap_parallel.batch.party import SlurmArrayPool as Pool

__all__ = ["Pool"]
