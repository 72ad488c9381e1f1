"""What may go wrong in pipelines; node scripts raise some of it."""

from __future__ import annotations

from ostap_parallel.errors import OstapParallelError


class PipelineException(OstapParallelError):
    """Something in a pipeline has gone wrong."""


class PipelineQuit(PipelineException):
    """The pipeline was told to end; its jobs have."""


class PipelineRecipeFailed(PipelineException):
    """A recipe that another one has run has failed."""


class PipelineRecipeNotFound(PipelineException):
    """There is no recipe of that name."""


class ExecutableMissing(PipelineException):
    """A program that is needed is not there."""
