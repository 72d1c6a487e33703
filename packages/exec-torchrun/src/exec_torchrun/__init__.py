"""Executor backend ``torchrun``: one worker in each process of an external launcher."""

from exec_torchrun._digest import PerRank
from exec_torchrun.executor import ExecutorWithExternalLauncher

__all__ = ["ExecutorWithExternalLauncher", "PerRank"]
