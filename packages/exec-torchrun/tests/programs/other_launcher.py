"""Two ranks as of a launcher that keeps no store, one of them without a variable. Argument: the port to meet at."""

from __future__ import annotations

import os
import sys

from common import RANK, config, outcome, record

from exec_core import create_executor
from exec_core.testing import workers

os.environ["MASTER_PORT"] = sys.argv[1]
del os.environ["TORCHELASTIC_USE_AGENT_STORE"]
if RANK == 1:
    del os.environ["LOCAL_RANK"]
record(start=outcome(create_executor, config(workers.EchoWorker, tp=2)))
