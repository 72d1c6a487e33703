"""A job whose rank 1 is killed in its first attempt; torchrun starts it again."""

from __future__ import annotations

import os
import signal

from common import config, record

import exec_core as ec
from exec_core.testing import workers

attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])


def die(worker: workers.EchoWorker) -> None:
    """Kills rank 1."""
    if worker.context.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


with ec.create_executor(config(workers.EchoWorker, tp=2)) as executor:
    record(**{f"sum_{attempt}": executor.collective_rpc(workers.add_up_ranks, args=("tp",))[0]})
    if attempt == 0:
        executor.collective_rpc(die)
    record(done_in=attempt)
