"""The uniproc executor keeps the contract that all executors share."""

from exec_core.testing import ExecutorContract


class TestUniProc(ExecutorContract):
    """One worker in the caller's process."""

    backend = "uniproc"
    local_ranks = frozenset({0})
