"""Executor backend ``mp``: one process per rank on this machine."""

from exec_mp._launcher import prestart, stop_fork_server
from exec_mp.executor import MultiprocessingDistributedExecutor

__all__ = ["MultiprocessingDistributedExecutor", "prestart", "stop_fork_server"]
