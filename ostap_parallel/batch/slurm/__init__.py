"""pypoolparty's pool for SLURM, a job for each chunk."""

from ostap_parallel.batch.party import SlurmChunkPool as Pool
from ostap_parallel.batch.slurm import array as array

__all__ = ["Pool", "array"]
