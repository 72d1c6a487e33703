"""The executor contract on two ranks that make the same calls; run by pytest in processes that torchrun started."""

import os
from typing import ClassVar

import pytest
from exec_core import ParallelConfig
from exec_core.testing import ExecutorContract
from exec_torchrun import ExecutorWithExternalLauncher


class Gathering(ExecutorWithExternalLauncher):
    """Every call returns the values of all ranks, as on the other backends."""

    gather: ClassVar[bool] = True


class TestTwoRanks(ExecutorContract):
    """Every rank makes every call, and gets every answer."""

    backend = Gathering
    parallel = ParallelConfig(tensor_parallel_size=2)
    local_ranks = frozenset({int(os.environ["RANK"])})
