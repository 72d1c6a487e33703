"""The executor contract in a world of one rank; run by pytest in a process that torchrun started."""

from exec_core.testing import ExecutorContract


class TestOneRank(ExecutorContract):
    """One worker, in the caller's process."""

    backend = "torchrun"
    local_ranks = frozenset({0})
