"""The backend of joblib; see `ostap_parallel.faces.joblib`."""

from ostap_parallel.faces.joblib import OstapBackend, register

__all__ = ["OstapBackend", "register"]
