"""What a backend's author tests with: small workers, a check for leaks, and `ExecutorContract`.

    class TestMine(exec_core.testing.ExecutorContract):
        backend = "mine"
        parallel = exec_core.ParallelConfig(tensor_parallel_size=2)

Worker processes import `exec_core.testing.workers` by way of this package, so pytest, which only the contract needs, is
imported with the contract.
"""

from typing import TYPE_CHECKING, Any

from exec_core.testing.leaks import leak_check, snapshot
from exec_core.testing.sync import Gate, eventually

if TYPE_CHECKING:
    from exec_core.testing.contract import ExecutorContract

__all__ = ["ExecutorContract", "Gate", "eventually", "leak_check", "snapshot"]

_PARTS = (
    "base",
    "calls",
    "contract",
    "deadlines",
    "engine",
    "environment",
    "failures",
    "futures",
    "lifecycle",
    "loop",
    "memory",
    "start",
    "values",
)


def __getattr__(name: str) -> Any:
    if name != "ExecutorContract":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    import pytest

    # Before the import: the contract's asserts then explain themselves, as those in a test file do.
    pytest.register_assert_rewrite(*(f"{__name__}.{part}" for part in _PARTS))
    return importlib.import_module(f"{__name__}.contract").ExecutorContract
