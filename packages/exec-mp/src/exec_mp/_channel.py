"""Bytes between the driver and its workers: shared memory (`exec_mp._layout`), and an eventfd for each to sleep on.

    driver   DriverChannel.publish ==request ring==> WorkerChannel.requests   worker
    driver   DriverChannel.take    <==reply ring==   WorkerChannel.publish    worker (one ring each)
    driver   DriverChannel.look    <==its word==     WorkerChannel.requests   worker, when there is nothing to say

A message up to ``inline_bytes`` lies in its ring slot, a larger one in a block of the writer's arena.

Who writes what, in which order:

* A writer fills the slot, then stores the message's number plus one, in the slot's first word (requests) or the rank's
  ``REPLIES`` word: *one aligned 8-byte store* through a memoryview cast to ``Q``, a single instruction in CPython. On
  x86-64 stores become visible in order, so who sees the number sees the message; elsewhere a system call stands
  between the two (untested). Then it rings the bell, an eventfd, of who sleeps.
* An id in the rank's ``ACKS`` word says that it has answered its calls up to that one: those that have a reply in the ring,
  with that, which is there before the id; all others, with nothing. So most answers are one store, and the driver sees
  those of all ranks at once, however many there are. It looks at ``ACKS`` first, then at ``REPLIES``.
* A reader copies the message out, or holds its block (`exec_mp._arena`), then stores its position; the writer reuses
  the slot.
* Who is going to sleep says so in ``SLEEPS`` or ``DRIVER_SLEEPS``, and looks once more. Between the two, as between a
  writer's number and its look at that word, stands a locked instruction (an uncontended lock's), or a system call: so at
  least one of them sees the other, and nobody sleeps through a message.
* A rank that is to run an `AWAY` request reads nothing until there is another one for it, whose number is then in its ``REJOIN``
  word: the slots between are used again without it.
* A writer killed between the two stores leaves a slot without its number: the message was never sent.
"""

from __future__ import annotations

import math
import select
import struct
from typing import NamedTuple

from exec_core.messages import Encoded, Format, Reply

SPIN_S = 200e-6  # "auto": catches a prompt answer; see `exec_mp._pace` for what does not come promptly

NOTHING = Encoded((), 0, Format.NONE)
EXIT = 0  # instead of a call's id: leave
GATED, SPREAD, AWAY = 1, 2, 4  # flags in the kind of a request
ONE_READER, INLINE = 8, 16  # likewise, of its body, if it has one
FORMAT_SHIFT = 5  # the body's format is above them
REPLY_FIELDS = struct.Struct("<7Q")  # call id, status, format, body bytes, arena position, block, time in ns
LIMITS = "this is the address space that the system allows (ulimit -v, ulimit -f)"
_FD_SETSIZE = 1024  # select(2) knows no higher descriptors; poll(2), as Python calls it, counts in milliseconds


Body = tuple[memoryview, int, bool]
"""A request's body: bytes, format, and whether the bytes are the worker's own; else they are valid until
`WorkerChannel.done_reading`."""

Incoming = tuple[int, str, int, Body | Reply]
"""A request as a worker finds it: call id, method's name, whether the value is wanted (not 0), and its body; or, of one
that was run where it was read, what has become of it."""

Header = tuple[int, int, int, int, int, int, int]
"""A reply as it lies in its slot, see `REPLY_FIELDS`."""


class Answer(NamedTuple):
    """A reply that has a body, which is the driver's own if ``owned``, else valid until `DriverChannel.consume`."""

    rank: int
    status: int
    format: int
    body: memoryview
    owned: bool
    time_ns: int


def rings(bell: int, poll: select.poll, timeout_s: float) -> bool:
    """Whether the bell rings within ``timeout_s``; to the millisecond if ``bell`` is 1024 or more."""
    if timeout_s == math.inf:
        return bool(poll.poll())
    if bell < _FD_SETSIZE:
        return bool(select.select([bell], [], [], max(0.0, timeout_s))[0])
    return bool(poll.poll(max(0.0, timeout_s * 1e3)))
