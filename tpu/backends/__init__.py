"""The two control planes behind one interface: `get("queued")` and `get("compute")`."""

from ..job import Job
from .compute_engine import ComputeEngine
from .contract import Backend, Request, Row
from .queued_resources import QueuedResources

__all__ = ["BACKENDS", "Backend", "Request", "Row", "get"]

BACKENDS: dict[str, Backend] = {"queued": QueuedResources(), "compute": ComputeEngine()}


def get(job: Job) -> Backend:
    """The back-end of a job. Raises UserError for a job that it cannot run."""
    backend = BACKENDS[job.backend]
    backend.check(job)
    return backend
