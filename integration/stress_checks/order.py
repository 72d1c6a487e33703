"""Many threads call at once: one total order on all ranks, right answers, no deadlock, ring full and collector busy."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from exec_core import Executor
from stress_checks.worker import Litter, answer, checksum, collect_often, comes_back, note

_CALL_S = 60.0  # a call that takes longer is stuck
_COLLECT_EVERY = 30
_SIZES = (1, 1000, 30_000, 300_000, 3_000_000)  # bytes; of the ring and beside it


_Ticket = tuple[int, int, Any]  # thread, number, value


class _Caller:
    """One thread: its tickets, and what went wrong with them."""

    def __init__(self, executor: Executor, thread: int) -> None:
        self._executor, self._thread = executor, thread
        self._ranks = range(executor.world_size)
        self._chance = random.Random(thread)  # noqa: S311 # not for secrets
        self._open: deque[tuple[_Ticket, Future[list[Any]]]] = deque()
        self.tickets = 0

    def run(self, until: float) -> None:
        """Calls in every way there is, until then.

        Raises:
            AssertionError: for a wrong answer.
        """
        ways: list[Callable[[_Ticket], None]] = [self._block, self._block, self._ahead, self._function]
        if self._thread == 0:
            ways.append(self._await)
        while time.monotonic() < until:
            ticket = (self._thread, self.tickets, self._value())
            self.tickets += 1
            self._chance.choice(ways)(ticket)
        while self._open:
            self._settle()

    def _value(self) -> Any:
        if self._chance.random() < 0.9:
            return self._chance.randrange(1 << 40)
        nbytes = self._chance.choice(_SIZES)
        return torch.full((nbytes,), self._chance.randrange(256), dtype=torch.uint8)

    def _block(self, ticket: _Ticket) -> None:
        self._check(ticket, self._executor.collective_rpc("note", _CALL_S, ticket))

    def _ahead(self, ticket: _Ticket) -> None:
        self._open.append((ticket, self._executor.collective_rpc("note", _CALL_S, ticket, non_block=True)))
        if len(self._open) > self._chance.randrange(4):
            self._settle()

    def _function(self, ticket: _Ticket) -> None:
        self._check(ticket, self._executor.collective_rpc(note, _CALL_S, ticket))

    def _await(self, ticket: _Ticket) -> None:
        self._check(ticket, asyncio.run(self._executor.collective_rpc_async("note", _CALL_S, ticket)))

    def _settle(self) -> None:
        ticket, future = self._open.popleft()
        self._check(ticket, future.result(_CALL_S))

    def _check(self, ticket: _Ticket, answers: list[Any]) -> None:
        _, number, value = ticket
        Litter([back for _, _, back in answers])  # views of a reply's memory, dropped by the collector
        back = checksum(value) if comes_back(number, value) else None
        expected = [(rank, answer(value, rank), back) for rank in self._ranks]
        found = [(rank, said, None if back is None else checksum(back)) for rank, said, back in answers]
        if found != expected:
            raise AssertionError(f"thread {self._thread} was answered {found}, not {expected}")


def one_total_order(executor: Executor, threads: int, seconds: float) -> str:
    """``threads`` call at once for ``seconds``.

    Raises:
        AssertionError: for a wrong answer, or an order that differs.
        RpcTimeoutError: for a deadlock.
    """
    executor.collective_rpc("collect_often", args=(_COLLECT_EVERY,))
    collect_often(_COLLECT_EVERY)
    try:
        callers = [_Caller(executor, thread) for thread in range(threads)]
        _run_all(callers, time.monotonic() + seconds)
        orders = executor.collective_rpc("order")
    finally:
        collect_often(0)
    executor.collective_rpc("collect_often", args=(0,))
    tickets = sum(caller.tickets for caller in callers)
    if len(set(orders)) != 1 or orders[0][1] != tickets:
        raise AssertionError(f"{tickets} tickets were sent; the ranks have (order, tickets): {orders}")
    return f"{tickets:,} calls of {threads} threads in one order; {Litter.dropped:,} objects finalized here"


def _run_all(callers: list[_Caller], until: float) -> None:
    errors: list[BaseException] = []

    def run(caller: _Caller) -> None:
        try:
            caller.run(until)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(caller,), name=f"caller-{n}") for n, caller in enumerate(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
