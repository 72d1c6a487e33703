"""A start that is shut down while it waits for a rank that never comes."""

from __future__ import annotations

from typing import Any

import pytest


def check(records: dict[int, dict[str, Any]], ranks: list[int]) -> None:
    """All that waited have given up at once and say why."""
    assert ranks == sorted(records)
    for rank in ranks:
        start = records[rank]["start"]
        assert "ExecutorClosedError" == start["type"]
        assert "shut down while it was starting" in start["text"]
        assert f"rank {rank} failed in launch: was shut down while the ranks were meeting" == start["cause"]
        assert records[rank]["took"] < 2.0  # it would wait for 40
        assert records[rank]["shutdown_took"] < 2.0


@pytest.mark.parametrize("after_s", ["0.0", "1.0"])
@pytest.mark.parametrize("ranks", [[0], [1], [0, 1]])
def test_a_first_start_gives_up(by_hand: Any, ranks: list[int], after_s: str) -> None:
    """Rank 0, which waits for the others; rank 1, which finds no rank 0; and rank 1, which has found it.

    No socket, no thread and no store is left.
    """
    check(by_hand(3, ranks, "given_up.py", "0", "2", after_s, *map(str, ranks[1:])), ranks)


@pytest.mark.parametrize("absent", [0, 2])
def test_a_restart_gives_up(by_hand: Any, absent: int) -> None:
    """The rank that has brought all down ends, or it is rank 0 that does, at which the others would meet."""
    ranks = [rank for rank in range(3) if rank != absent]
    records = by_hand(3, range(3), "given_up.py", "1", str(absent), "1.0", *(str(rank) for rank in ranks if rank))

    check(records, ranks)
