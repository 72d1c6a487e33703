"""`ExecutorContract`: every behaviour that the executor interface promises, as one test each."""

from __future__ import annotations

from exec_core.testing.calls import CallContract
from exec_core.testing.deadlines import DeadlineContract
from exec_core.testing.engine import EngineContract
from exec_core.testing.environment import EnvironmentContract
from exec_core.testing.failures import FailureContract
from exec_core.testing.futures import FutureContract
from exec_core.testing.lifecycle import LifecycleContract
from exec_core.testing.loop import LoopContract
from exec_core.testing.memory import MemoryContract
from exec_core.testing.start import StartContract
from exec_core.testing.values import ValueContract


class ExecutorContract(
    CallContract,
    ValueContract,
    FailureContract,
    FutureContract,
    DeadlineContract,
    EngineContract,
    LoopContract,
    LifecycleContract,
    StartContract,
    EnvironmentContract,
    MemoryContract,
):
    """Subclass it in a test module, say which backend and which world, and run it with pytest.

    See `ContractBase` for what a subclass sets.
    """
