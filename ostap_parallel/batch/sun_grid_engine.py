"""pypoolparty's pool for SGE, a job for each chunk."""

from ostap_parallel.batch.party import SunGridEnginePool as Pool

__all__ = ["Pool"]
