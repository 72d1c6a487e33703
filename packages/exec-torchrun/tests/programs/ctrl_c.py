"""Ctrl-C at the launcher, which passes it on, while all ranks are in a call; the argument is `RpcConfig.max_restarts`."""

from __future__ import annotations

import os
import signal
import sys
import time

from common import config, outcome, record

import exec_core as ec
from exec_core.testing import workers


class WaitingWorker(workers.EchoWorker):
    """Has a call that only Ctrl-C ends."""

    def wait(self) -> None:
        """Rank 0 presses it."""
        if self.context.rank == 0:
            os.kill(os.getppid(), signal.SIGINT)
        time.sleep(30)


record(pid=os.getpid(), attempt=int(os.environ["TORCHELASTIC_RESTART_COUNT"]))
executor = ec.create_executor(config(WaitingWorker, tp=2, rpc={"max_restarts": int(sys.argv[1])}))
try:
    executor.collective_rpc("wait")
except KeyboardInterrupt:
    record(closing=outcome(executor.shutdown), closed=executor.state.value)
