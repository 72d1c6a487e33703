"""What goes into the guard and comes out of it: a call as the ranks together run it, and how it ended on all of them."""

from __future__ import annotations

import struct
from typing import Any

import attrs

from exec_core import messages
from exec_core.calls import Call
from exec_core.errors import RankDivergenceError
from exec_core.messages import Encoded, Failure, Reply

_HEAD = struct.Struct("<BQ")  # of a value or an error: format, pid


@attrs.define(eq=False)
class Plan(Call):
    """A call as the ranks together run it. Its ranks are positions in the replica.

    Attributes:
        gather: every rank gets the values of ``reply_ranks``; otherwise only its own, if it is one of them. None: to be decided.
    """

    gather: bool | None = None

    @property
    def options(self) -> tuple[Any, ...]:
        """What beside method and arguments must be the same on all ranks."""
        return self.ranks, self.reply_ranks, self.gather

    def decide(self, gathers: bool) -> None:
        """Values travel if they are asked for, by ``gathers`` where the call does not say, or if not those of all ranks are wanted."""
        self.gather = (gathers if self.gather is None else self.gather) or self.reply_ranks != self.ranks


@attrs.define  # not frozen: one is made for every call
class Outcome(Reply):
    """How a call ended on all ranks: with the values of its reply ranks, or with an error, and whose it is, as rank and pid.

    Not changed once made, but that what is raised is taken out. ``value`` and ``error`` are empty: they would be this rank's own.
    """

    values: list[Any] = attrs.field(factory=list)
    raised: BaseException | None = None
    failed: tuple[int, int] | None = None


def diverged(calls: dict[int, str], apart_s: float | None) -> RankDivergenceError:
    """The error that names the first differing call of each rank."""
    late = (
        "" if apart_s is None else f"; a rank that may be later than {apart_s:g} s needs another divergence_timeout_s"
    )
    return RankDivergenceError(calls, f"every rank makes the same calls, with the same inputs, in the same order{late}")


def pack(encoded: Encoded, pid: int = 0) -> bytes:
    """A value or an error as other ranks get it."""
    return b"".join((_HEAD.pack(encoded.format, pid), *encoded.parts))


def unpack_value(body: bytes) -> Any:
    """The value in what `pack` made."""
    fmt, _ = _HEAD.unpack_from(body)
    return messages.decode(memoryview(body)[_HEAD.size :], fmt)


def unpack_error(body: bytes, rank: int, method: str, order: int) -> Failure:
    """The error in what `pack` made of one, which came as the ``order``-th from ``rank``."""
    fmt, pid = _HEAD.unpack_from(body)
    return Failure(rank, pid, messages.decode_error(memoryview(body)[_HEAD.size :], fmt, rank, pid, method), order)
