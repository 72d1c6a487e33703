"""`ExecutorContract`: every behaviour that the executor interface promises, as one test each."""

from __future__ import annotations

from exec_core.testing.calls import CallContract
from exec_core.testing.futures import FutureContract
from exec_core.testing.values import ValueContract


class ExecutorContract(CallContract, FutureContract, ValueContract):
    """Subclass it in a test module, say which backend and which world, and run it with pytest.

    See `ContractBase` for what a subclass sets.
    """
