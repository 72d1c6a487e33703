"""Ctrl-C on one of three ranks, whose number is the argument, while the others wait for it in a collective."""

from __future__ import annotations

import signal
import sys

import torch
import torch.distributed as dist
from common import config, outcome, record

from exec_core import create_executor
from exec_core.testing import workers

victim = int(sys.argv[1])


class InterruptedWorker(workers.EchoWorker):
    """Has a call that one rank is interrupted in."""

    def meet(self) -> None:
        """One rank comes only as far as its Ctrl-C."""
        if self.context.rank == victim:
            signal.raise_signal(signal.SIGINT)
        assert self.context.groups is not None  # there are three ranks
        dist.all_reduce(torch.ones(1), group=self.context.groups.world.cpu_group)


executor = create_executor(config(InterruptedWorker, pp=3))
try:
    record(call=outcome(executor.collective_rpc, "meet"))
except KeyboardInterrupt:
    record(call={"type": "KeyboardInterrupt"})
record(
    state=executor.state.value,
    next=outcome(executor.collective_rpc, "where"),
    closing=outcome(executor.shutdown),
    closed=executor.state.value,
    left_over=dist.is_initialized(),
)
