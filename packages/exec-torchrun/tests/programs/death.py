"""One of three ranks is killed in a call. Arguments: its rank, and where the others are: ``idle`` or ``collective``."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from common import config, outcome, record

import exec_core as ec
from exec_core.testing import workers

victim, where = int(sys.argv[1]), sys.argv[2]


class MortalWorker(workers.EchoWorker):
    """Kills its process on one rank."""

    def die(self, rank: int, where: str) -> None:
        """The others are done, or wait for the dead one in a collective."""
        if self.context.rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        if where == "collective":
            assert self.context.groups is not None  # there are three ranks
            dist.all_reduce(torch.ones(1), group=self.context.groups.world.cpu_group)


def wait_for(heard: list[Any]) -> bool:
    """The failure callback runs on a thread of its own."""
    until = time.monotonic() + 5
    while not heard and time.monotonic() < until:
        time.sleep(0.001)
    return bool(heard)


executor = ec.create_executor(config(MortalWorker, pp=3))
heard: list[BaseException] = []
executor.register_failure_callback(heard.append)
record(pid=os.getpid(), before=executor.collective_rpc("where"))
record(
    died=outcome(executor.collective_rpc, "die", args=(victim, where)),
    state=executor.state.value,
    heard=wait_for(heard),
    next=outcome(executor.collective_rpc, "where"),
    closing=outcome(executor.shutdown),
    left_over=dist.is_initialized(),
)
