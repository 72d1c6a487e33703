"""When a waiter yields and when it sleeps, decided without a clock."""

import math
import os
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from exec_core import Executor
from exec_mp._pace import Pace

SPIN_S = 200e-6
Launch = Callable[..., Executor]


class Waiter:
    """Waits one after the other, on a clock of its own."""

    def __init__(self, spin_s: float = SPIN_S, late_s: float = 0.0, room: float = 1.0) -> None:
        self.pace, self.now, self.late_s = Pace(spin_s, room), 1000.0, late_s
        self.yielded_s = self.asleep_s = 0.0
        self.was_awake = False

    def wait(self, takes_s: float) -> None:
        """A wait that is over after ``takes_s``."""
        pace, comes = self.pace, self.now + takes_s
        pace.begin(self.now)
        while self.now < comes:
            self.was_awake = self.now < pace.spin_until
            if self.was_awake:
                until = min(comes, pace.spin_until)
                self.yielded_s += until - self.now
            else:
                until = self.now + pace.rest(self.now) + self.late_s
                until = min(comes, until)
                self.asleep_s += until - self.now
            slept, self.now = not self.was_awake, until
            if slept:
                pace.woken(self.now)
        if pace.slept:
            pace.came = self.now

    def waits(self, *takes_s: float) -> "Waiter":
        """Some waits. Counts of what was before are forgotten."""
        for each in takes_s:
            self.yielded_s = self.asleep_s = 0.0
            self.wait(each)
        return self


def test_short_waits_are_yielded_through() -> None:
    """What comes promptly is never slept for."""
    waiter = Waiter().waits(*[SPIN_S / 2] * 10)

    assert (0.0, True) == (waiter.asleep_s, waiter.was_awake)


def test_first_long_wait_is_slept_through() -> None:
    """Without anything to go by, a waiter yields for its time and then sleeps until it is woken."""
    waiter = Waiter().waits(0.01)

    assert pytest.approx(SPIN_S) == waiter.yielded_s
    assert not waiter.was_awake


def test_there_is_no_patience_after_a_long_wait() -> None:
    """After a long wait the next one is slept through at once, and after a short one it begins with yielding again."""
    waiter = Waiter().waits(0.01, 0.5)
    assert waiter.yielded_s == 0
    waiter.waits(SPIN_S * 2, 0.5)

    assert pytest.approx(SPIN_S) == waiter.yielded_s


@pytest.mark.parametrize("late_s", [0.0, 60e-6, 150e-6])
@pytest.mark.parametrize("takes_s", [0.002, 0.01, 0.1])
def test_regular_waits_are_met_awake(takes_s: float, late_s: float) -> None:
    """Who waits regularly is awake when it comes, however late naps end, and has slept for nearly all of the time."""
    waiter = Waiter(late_s=late_s).waits(*[takes_s] * 30)

    assert waiter.was_awake
    assert waiter.yielded_s < min(SPIN_S, takes_s / 8)


def test_slowly_changing_waits_are_met_awake() -> None:
    """Steps become longer with the text: the foresight follows."""
    waiter = Waiter().waits(*[0.01] * 30, *[0.01 + 5e-6 * step for step in range(100)])

    assert waiter.was_awake


def test_irregular_waits_are_slept_through() -> None:
    """Where nothing can be foreseen, nothing is yielded for it."""
    waiter = Waiter().waits(*[0.004, 0.011, 0.007, 0.02] * 10)

    assert waiter.yielded_s == 0
    assert not waiter.was_awake


def test_one_odd_wait_is_forgotten_soon() -> None:
    """A step of another kind disturbs the foresight for some steps only."""
    waiter = Waiter().waits(*[0.01] * 30, 0.3, *[0.01] * 5)

    assert waiter.was_awake


def test_waits_of_another_length_become_the_usual_ones() -> None:
    """One odd wait is odd; with two in a row, that is how long steps take now."""
    waiter = Waiter().waits(*[0.01] * 30, *[0.02] * 25)

    assert waiter.was_awake
    assert waiter.yielded_s < SPIN_S


def test_odd_waits_now_and_then_do_not_keep_the_others_asleep() -> None:
    """A busy machine takes the processor from one step in ten; the others are met awake all the same, most of them."""
    waiter, awake = Waiter(room=2 / 3), 0
    for step in range(300):
        waiter.waits(0.014 if step % 10 == 9 else 0.01 + 20e-6 * (step % 3))
        awake += waiter.was_awake

    assert awake > 300 * 0.6


def test_what_does_not_come_is_slept_for() -> None:
    """When the usual time is over, a waiter sleeps: an idle one costs nothing."""
    waiter = Waiter().waits(*[0.01] * 30, 100.0)

    assert waiter.yielded_s < 3 * SPIN_S
    assert not waiter.was_awake


def test_what_comes_late_is_met_awake() -> None:
    """A step that is later than could be foreseen does not find a sleeper."""
    waiter = Waiter().waits(*[0.01] * 30, 0.01 + 1.5 * SPIN_S)

    assert waiter.was_awake


def test_waits_that_vary_are_met_awake() -> None:
    """Waits that differ by some hundred microseconds, too; it takes less than a tenth of their time."""
    waiter = Waiter().waits(*[0.01, 0.0102, 0.0099, 0.0103] * 20)
    yielded = []
    for takes_s in (0.0098, 0.0102, 0.0105):
        waiter.waits(takes_s)
        assert waiter.was_awake
        yielded.append(waiter.yielded_s)

    assert max(yielded) < 0.01 / 10


def yielded_through(*takes_s: float, room: float = 1.0) -> tuple[float, float]:
    """The second half of these waits: seconds yielded on average, and the share of them that was met awake."""
    half = len(takes_s) // 2
    waiter, yielded_s, awake = Waiter(room=room).waits(*takes_s[:half]), 0.0, 0
    for each in takes_s[half:]:
        waiter.waits(each)
        yielded_s += waiter.yielded_s
        awake += waiter.was_awake
    return yielded_s / half, awake / half


def test_late_steps_do_not_cost_the_others() -> None:
    """One in ten is late: that is no reason to be awake much earlier before each."""
    yielded_s, awake = yielded_through(*([0.01] * 9 + [0.0104]) * 40)

    assert 1.0 == awake
    assert yielded_s < 0.0002


@pytest.mark.parametrize("takes_s", [0.0021, 0.01])
def test_nearly_all_are_met_awake(takes_s: float) -> None:
    """However they are distributed, and not by being awake for long: being late is rare, and costs little."""
    chance = random.Random(7)  # noqa: S311 # no secret
    distributions = (
        partial(chance.gauss, 0, 60e-6),
        partial(chance.expovariate, 1 / 80e-6),
        partial(chance.uniform, 0, 2e-4),
    )
    for vary in distributions:
        yielded_s, awake = yielded_through(*(takes_s + vary() for _ in range(2000)))

        assert 0.97 < awake < 1
        assert yielded_s < 0.0002


def test_what_comes_early_ends_a_nap() -> None:
    """A nap is a sleep from which one can be woken; being woken is not being late."""
    waiter = Waiter().waits(*[0.01] * 30, 0.005)
    assert waiter.yielded_s == 0
    assert not waiter.was_awake
    waiter.waits(*[0.01] * 25)

    assert waiter.was_awake


def test_wait_that_is_given_up_teaches_nothing() -> None:
    """Who stops waiting, at a deadline say, knows no more than before."""
    waiter = Waiter().waits(*[0.01] * 30)
    for _ in range(5):
        waiter.pace.begin(waiter.now)
        waiter.pace.rest(waiter.now)
        waiter.now += 0.5
    waiter.waits(0.01)

    assert waiter.was_awake


def test_with_little_room_a_waiter_is_awake_less_early() -> None:
    """Others need the processor: it is awake for less of what comes early, and not at all where that is nearly everything."""
    chance = random.Random(7)  # noqa: S311 # no secret
    takes_s = [0.01 + chance.gauss(0, 2e-4) for _ in range(2000)]
    (much_s, often), (little_s, seldom), (least_s, never) = (
        yielded_through(*takes_s, room=room) for room in (1.0, 0.7, 0.4)
    )

    assert much_s > 1.3 * little_s > 2 * least_s
    assert often > 0.9 > seldom > 0.5
    assert never < 0.1


@pytest.mark.parametrize(
    ("processors", "driver_worker", "room"),
    [(1, "process", 1 / 3), (2, "process", 2 / 3), (2, "inline", 1.0), (3, "process", 1.0), (16, "process", 1.0)],
)
def test_room_is_for_every_process(
    monkeypatch: pytest.MonkeyPatch, launch: Launch, processors: int, driver_worker: str, room: float
) -> None:
    """A processor for each rank, and one for a driver that is not a rank itself, is as much as they can use."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(processors)))
    group: Any = launch(2, parallel={"driver_worker": driver_worker})._group

    assert pytest.approx(room) == group._channel.geometry.room


def test_without_yielding_there_are_no_naps() -> None:
    """A waiter that must not yield only sleeps."""
    pace = Pace(0.0)
    for step in range(30):
        pace.begin(float(step))
        assert math.inf == pace.rest(float(step))
        pace.came = step + 0.01
