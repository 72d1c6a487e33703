"""`ExecutorContract`: every behaviour that the executor interface promises, as one test each."""

from __future__ import annotations

from exec_core.testing.calls import CallContract


class ExecutorContract(CallContract):
    """Subclass it in a test module, say which backend and which world, and run it with pytest.

    See `ContractBase` for what a subclass sets.
    """
