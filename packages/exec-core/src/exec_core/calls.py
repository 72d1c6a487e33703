"""A call as the driver sees it: what to run, where, until when, and what became of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import attrs

from exec_core.errors import ConfigError
from exec_core.messages import Request


@attrs.define(eq=False)
class Call(Request):
    """One collective call: a request, and what concerns its ranks together. A backend may follow it in a class of its own.

    Attributes:
        ranks: who runs it, ascending.
        reply_ranks: whose value is returned, ascending; a subset of ``ranks``.
        timeout_s, deadline: limit in seconds, and when that is on the monotonic clock (infinity for no limit).
        max_concurrent: at most so many ranks run it at a time; None: all.
        aggregate: applied once to the list of values.
        resident: it runs until another call ends it. It takes no place among the calls in flight, and its ranks keep nobody back.
        failed: rank and pid of who has failed first; set before its error is raised.
    """

    ranks: tuple[int, ...] = ()
    reply_ranks: tuple[int, ...] = ()
    timeout_s: float | None = None
    deadline: float = math.inf
    max_concurrent: int | None = None
    aggregate: Callable[[list[Any]], Any] | None = None
    resident: bool = False
    failed: tuple[int, int] | None = None

    __eq__ = object.__eq__  # two calls are two, whatever they say
    __hash__ = object.__hash__  # type: ignore[assignment] # which `Request` has not

    def result(self, values: list[Any]) -> Any:
        """What the caller gets for ``values``, one per reply rank in rank order."""
        return values if self.aggregate is None else self.aggregate(values)


def deadline_after(timeout_s: float | None) -> float:
    """``timeout_s`` from now on the monotonic clock; infinity for None."""
    return math.inf if timeout_s is None else time.monotonic() + timeout_s


def chosen_ranks(name: str, chosen: Sequence[Any], among: tuple[int, ...]) -> tuple[int, ...]:
    """``chosen`` in rank order.

    Raises:
        ConfigError: for a rank that is not one of ``among``, or is there twice.
    """
    if type(chosen) is tuple and len(chosen) == 1 and type(chosen[0]) is int and chosen[0] in among:
        return chosen  # the commonest, with every step
    picked = tuple(chosen)
    if not all(isinstance(rank, int) and rank in among for rank in picked) or len(set(picked)) != len(picked):
        raise ConfigError(name, f"must be distinct ranks out of {list(among)}", list(picked))
    return tuple(sorted(picked))


def check_count(name: str, count: Any) -> None:
    """Nothing, for a number of something.

    Raises:
        ConfigError: for what is not an integer >= 1.
    """
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ConfigError(name, "must be None or an integer >= 1", count)


def checked_timeout(timeout: Any) -> float | None:
    """``timeout``, None for infinity, which means no limit.

    Raises:
        ConfigError: for a timeout that is not a number of seconds > 0.
    """
    if not isinstance(timeout, int | float) or isinstance(timeout, bool) or not timeout > 0:
        raise ConfigError("timeout", "must be None (the default) or seconds > 0", timeout)
    return None if timeout == math.inf else float(timeout)
