"""Ranks that are awake together go to processors of their own, where there are few of those."""

import os
import threading
from typing import Any

import pytest

from exec_mp import _spread
from exec_mp._spread import processor, spread


class Machine:
    """A machine with some processors, as a thread sees it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.allowed, self.here, self.runnable = {4, 6}, 4, 1
        self.went: list[set[int]] = []
        self.refuses = False
        patch.setattr(os, "sched_getaffinity", lambda pid: set(self.allowed))
        patch.setattr(os, "sched_setaffinity", self._go)
        patch.setattr(_spread, "processor", lambda: self.here)
        patch.setattr(_spread, "_runnable", lambda: self.runnable)

    def _go(self, pid: int, mask: set[int]) -> None:
        if self.refuses and mask != self.allowed:
            raise OSError(22, "Invalid argument")
        self.went.append(set(mask))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """One with two processors, of which the calling thread is on the first."""
    return Machine(monkeypatch)


@pytest.mark.parametrize(
    ("rank", "driver", "chosen"), [(0, 4, 6), (1, 4, 4), (2, 4, 6), (0, 6, 4), (1, 6, 6), (0, 99, 4), (1, 99, 6)]
)
def test_ranks_take_turns_from_the_drivers_on(machine: Machine, rank: int, driver: int, chosen: int) -> None:
    """The driver's processor is shared last; where it runs on another, nobody has to mind it."""
    machine.here = 10 - chosen
    spread(rank, 4, driver)

    assert [{chosen}, {4, 6}] == machine.went


def test_every_processor_is_used(machine: Machine) -> None:
    """As many ranks as processors are on one each."""
    machine.allowed, machine.here = {1, 2, 5, 7}, 99
    for rank in range(4):
        spread(rank, 4, 2)

    assert [{5}, {7}, {1}, {2}] == machine.went[::2]


def test_who_is_there_already_stays(machine: Machine) -> None:
    """Nothing is done for nothing."""
    spread(1, 4, 4)

    assert [] == machine.went


@pytest.mark.parametrize("allowed", [{4}, set(range(7))])
def test_with_one_or_many_processors_nothing_is_done(machine: Machine, allowed: set[int]) -> None:
    """There is no choice, or the scheduler finds an idle one."""
    machine.allowed = allowed
    spread(0, 5, 4)

    assert [] == machine.went


@pytest.mark.parametrize(("runnable", "goes"), [(5, True), (6, False)])
def test_others_that_are_busy_leave_it_to_the_scheduler(machine: Machine, runnable: int, goes: bool) -> None:
    """More is running than driver and ranks: a processor chosen by rank may be theirs."""
    machine.runnable = runnable
    spread(0, 4, 4)

    assert goes == bool(machine.went)


def test_processor_that_is_taken_away_changes_nothing(machine: Machine) -> None:
    """It was allowed a moment ago. What is allowed stays so, and nothing is raised."""
    machine.refuses = True
    spread(0, 4, 4)

    assert [] == machine.went


@pytest.fixture
def two_processors() -> list[int]:
    """Two that this process may use."""
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        pytest.fail("needs two processors")
    return allowed[:2]


def test_real_thread_moves_and_may_be_moved_again(two_processors: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs where it was told to, and is as free as before."""
    seen: list[Any] = []
    go = os.sched_setaffinity

    def watched(pid: int, mask: Any) -> None:
        go(pid, mask)
        seen.append(processor())

    def run() -> None:
        go(0, two_processors)
        monkeypatch.setattr(os, "sched_setaffinity", watched)
        monkeypatch.setattr(_spread, "_runnable", lambda: 0)
        monkeypatch.setattr(_spread, "processor", lambda: -1)
        for driver in two_processors:
            spread(0, 1, driver)
        seen.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)

    assert [two_processors[1], two_processors[0], set(two_processors)] == [seen[0], seen[2], seen[-1]]


def test_what_runs_is_counted() -> None:
    """This thread, at least."""
    assert _spread._runnable() >= 1
