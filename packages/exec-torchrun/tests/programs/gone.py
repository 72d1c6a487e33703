"""One of three ranks, whose number is the argument, ends between calls without a word; the others ask for their health."""

from __future__ import annotations

import os
import sys
import time

from common import RANK, config, outcome, record

import exec_core as ec
from exec_core.testing import workers

executor = ec.create_executor(config(workers.EchoWorker, pp=3))
record(pid=os.getpid(), well=outcome(executor.check_health)["value"] is None, where=executor.collective_rpc("where"))
if int(sys.argv[1]) == RANK:
    os._exit(0)  # torchrun leaves the others alone: it counts as done
until = time.monotonic() + 10.0
while (health := outcome(executor.check_health)).get("type") is None and time.monotonic() < until:
    time.sleep(0.001)
record(health=health, state=executor.state.value, closing=outcome(executor.shutdown))
