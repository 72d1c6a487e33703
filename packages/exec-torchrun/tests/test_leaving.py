"""A rank leaves before the others: by Ctrl-C in a call, or by ending between calls."""

from __future__ import annotations

import os
from typing import Any

import pytest


@pytest.mark.parametrize("victim", [0, 1])
def test_ctrl_c_on_one_rank_ends_all(torchrun: Any, victim: int) -> None:
    """The interrupted rank gets its `KeyboardInterrupt`, the others hear that it is gone, and all can be closed."""
    job = torchrun(3, "interrupted.py", str(victim))

    kinds = ["KeyboardInterrupt" if rank == victim else "WorkerDiedError" for rank in range(3)]
    assert kinds == [call["type"] for call in job.of_all("call")]
    assert ["failed"] * 3 == job.of_all("state")
    assert ["ExecutorFailedError"] * 3 == [call["type"] for call in job.of_all("next")]
    assert f"rank {victim} " in job.ranks[victim]["next"]["text"]
    assert "has left the others in 'meet': KeyboardInterrupt" in job.ranks[victim]["next"]["text"]
    assert [None] * 3 == [closing["value"] for closing in job.of_all("closing")]
    assert ["closed"] * 3 == job.of_all("closed")
    assert [False] * 3 == job.of_all("left_over")
    assert "Traceback" not in job.output


@pytest.mark.parametrize("victim", [0, 1])
def test_ctrl_c_on_one_rank_is_a_failure_that_restarts(torchrun: Any, victim: int) -> None:
    """With ``max_restarts`` all executors restart, also that of the interrupted rank, whose program goes on."""
    job = torchrun(3, "interrupted_restarts.py", str(victim))

    kinds = ["KeyboardInterrupt" if rank == victim else "WorkerDiedError" for rank in range(3)]
    assert kinds == [call["type"] for call in job.of_all("call")]
    assert [1] * 3 == job.of_all("generation")
    assert [[3.0]] * 3 == [call["value"] for call in job.of_all("next")]
    assert "Traceback" not in job.output


@pytest.mark.parametrize("max_restarts", [0, 1])
def test_ctrl_c_at_the_launcher_ends_the_job(torchrun: Any, max_restarts: int) -> None:
    """Every rank gets its `KeyboardInterrupt` and closes; neither torchrun nor the executors bring anything back."""
    job = torchrun(2, "ctrl_c.py", str(max_restarts), options=("--max-restarts", "1"), succeeds=False)

    assert [0, 0] == job.of_all("attempt")
    assert ["closed"] * 2 == job.of_all("closed")
    assert all(closing["seconds"] < 10.0 for closing in job.of_all("closing"))  # torchrun would kill them after 30
    assert [] == [pid for pid in job.of_all("pid") if os.path.exists(f"/proc/{pid}")]


@pytest.mark.parametrize("victim", [0, 2])
def test_health_tells_of_a_rank_that_has_gone(torchrun: Any, victim: int) -> None:
    """`check_health` names a rank that has ended between calls, without a call to show it."""
    job = torchrun(3, "gone.py", str(victim))

    assert [True] * 3 == job.of_all("well")
    for rank in {0, 1, 2} - {victim}:
        health = job.ranks[rank]["health"]
        assert "ExecutorFailedError" == health["type"]
        assert f"rank {victim} (pid {job.ranks[victim]['pid']}) is gone" in health["text"]
        assert ("failed", None) == (job.ranks[rank]["state"], job.ranks[rank]["closing"]["value"])
