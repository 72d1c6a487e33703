"""Ctrl-C on one of three ranks, whose number is the argument, which goes on; the executors restart by themselves."""

from __future__ import annotations

import signal
import sys

from common import config, outcome, record

import exec_core as ec
from exec_core.testing import eventually, workers

victim = int(sys.argv[1])


def interrupt(worker: workers.EchoWorker) -> None:
    """Ctrl-C, on one rank."""
    if worker.context.rank == victim:
        signal.raise_signal(signal.SIGINT)


with ec.create_executor(config(workers.EchoWorker, pp=3, rpc={"max_restarts": 1})) as executor:
    try:
        record(call=outcome(executor.collective_rpc, interrupt))
    except KeyboardInterrupt:
        record(call={"type": "KeyboardInterrupt"})
    eventually(lambda: executor.state is ec.State.READY)
    record(generation=executor.generation, next=outcome(executor.collective_rpc, workers.add_up_ranks, args=("world",)))
