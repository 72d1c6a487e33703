"""The executor contract in a world of one rank; run by pytest in a process that torchrun started."""

from __future__ import annotations

from typing import Any

import pytest

from exec_core.errors import ConfigError
from exec_core.testing import ExecutorContract


class TestOneRank(ExecutorContract):
    """One worker, in the caller's process."""

    backend = "torchrun"
    local_ranks = frozenset({0})

    def test_unsupported_world_is_refused(self, start: Any) -> None:
        """Replicas in one world are what this backend is for; their number has to be that of the launched ranks."""
        with pytest.raises(ConfigError, match=r"WORLD_SIZE must be 2 \(data parallel\) x 1 .* got 1; start it with"):
            start(parallel=self.parallel_with(data_parallel_size=2))
