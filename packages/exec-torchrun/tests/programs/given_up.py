"""A rank never comes to a start, which another thread of those that wait shuts down.

Arguments: the generation, 0 for the first start, 1 for a restart; the rank that does not come; after how many seconds; and the
ranks that rank 0 waits for, to be shut down when they have recorded what became of them: it would tell them.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from common import RANK, config, outcome, record

import exec_core as ec
from exec_core.testing import eventually, leaks, workers
from exec_torchrun import ExecutorWithExternalLauncher

generation, absent, after_s = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
files = [Path(os.environ["RECORDS"]) / f"rank-{rank}.jsonl" for rank in sys.argv[4:]]
began: list[float] = []
closers: list[threading.Thread] = []


class Closed(ExecutorWithExternalLauncher):
    """Is shut down while it waits for the others."""

    def _launch(self, deadline: float) -> Any:
        if self.generation == generation:
            closers.append(threading.Timer(after_s, self._close_it))
            closers[0].start()
        return super()._launch(deadline)

    def _close_it(self) -> None:
        if RANK == 0:
            eventually(lambda: all(file.exists() for file in files))
        began.append(time.monotonic())
        self.shutdown()
        began.append(time.monotonic())


def interrupt(worker: Any) -> None:
    """Fails on all ranks, which can then restart."""
    if worker.context.rank == absent:
        signal.raise_signal(signal.SIGINT)


def start() -> Any:
    """The start in question."""
    executor = ec.create_executor(config(workers.EchoWorker, Closed, pp=3))
    try:
        executor.collective_rpc(interrupt)
    except (KeyboardInterrupt, ec.WorkerDiedError):
        if RANK != absent:
            executor.restart()
        eventually(lambda: all(file.exists() for file in files))  # where this is the store's host, the others need it
    executor.shutdown()


# libuv keeps two pipes for the process from the first store on that is hosted.
dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined] # public
if generation:  # so that the store that a process keeps is there already
    ec.create_executor(config(workers.EchoWorker, pp=3)).shutdown()
with leaks.leak_check(orphans=False):
    started = outcome(start)
    ended = time.monotonic()
    for closer in closers:
        closer.join()
if RANK != absent:
    record(start=started, took=ended - began[0], shutdown_took=began[1] - began[0])
