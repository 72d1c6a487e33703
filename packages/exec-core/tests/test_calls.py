"""The small rules of a call: time-outs, ranks, deadlines."""

import math
from typing import Any

import pytest

from exec_core import ConfigError
from exec_core.calls import Call, checked_timeout, chosen_ranks, deadline_after


@pytest.mark.parametrize(("timeout", "expected"), [(2, 2.0), (math.inf, None), (0.001, 0.001)])
def test_timeout(timeout: float, expected: float | None) -> None:
    """A time-out is a number of seconds, and infinity means none."""
    assert expected == checked_timeout(timeout)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), "1", [1], True])
def test_bad_timeout(timeout: Any) -> None:
    """What is no positive number of seconds is refused."""
    with pytest.raises(ConfigError, match="timeout must be"):
        checked_timeout(timeout)


def test_deadline() -> None:
    """No limit is infinitely far away; a limit is on the monotonic clock."""
    assert math.inf == deadline_after(None)
    assert deadline_after(1.0) < deadline_after(60.0) < math.inf


def test_chosen_ranks() -> None:
    """A choice is sorted."""
    assert (0, 2) == chosen_ranks("ranks", [2, 0], (0, 1, 2))
    assert () == chosen_ranks("ranks", [], (0, 1, 2))


@pytest.mark.parametrize("chosen", [[3], [-1], [0, 0], ["0"], [0.0], [None]])
def test_bad_ranks(chosen: Any) -> None:
    """Ranks are distinct integers of the world."""
    with pytest.raises(ConfigError, match=r"ranks must be distinct ranks out of \[0, 1, 2\]"):
        chosen_ranks("ranks", chosen, (0, 1, 2))


def test_result() -> None:
    """The values themselves, or what the aggregate makes of them."""
    call = Call("load", ranks=(0, 1), reply_ranks=(0, 1))
    assert [1, 2] == call.result([1, 2])
    call.aggregate = sum
    assert 3 == call.result([1, 2])
