"""The multiprocessing executor keeps the contract that all executors share, in every layout it has."""

import exec_core as ec
import exec_mp
from exec_core.testing import ExecutorContract


class MpContract(ExecutorContract):
    """What the layouts below have in common."""

    backend = "mp"

    @classmethod
    def warm_up(cls) -> None:
        """The fork server stays for the next executor."""
        exec_mp.prestart()


class TestProcess(MpContract):
    """One rank in a process of its own."""


class TestProcessTensorParallel(MpContract):
    """Two ranks of one stage, each in a process of its own."""

    parallel = ec.ParallelConfig(tensor_parallel_size=2)


class TestProcessPipelineParallel(MpContract):
    """Two stages of one rank, each in a process of its own."""

    parallel = ec.ParallelConfig(pipeline_parallel_size=2)


class TestInline(MpContract):
    """One rank in the caller's process."""

    parallel = ec.ParallelConfig(driver_worker="inline")
    local_ranks = frozenset({0})


class TestInlineTensorParallel(MpContract):
    """Rank 0 in the caller's process, rank 1 in its own."""

    parallel = ec.ParallelConfig(tensor_parallel_size=2, driver_worker="inline")
    local_ranks = frozenset({0})
    alone = True
