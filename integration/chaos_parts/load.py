"""Callers: threads that ask for answers in every way there is, and check each for being their own."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import exec_core
from exec_core import ExecutorError

CALL_S = 20.0  # each call's own limit
SLACK_S = 20.0  # for a call to end beyond it, on a busy machine
ODD_KINDS = {
    "unloadable error": exec_core.WorkerError,
    "unpicklable value": exec_core.SerializationError,
    "bomb": ValueError,
    "exit": exec_core.WorkerError,
    "interrupt": exec_core.WorkerError,
    "group": ExceptionGroup,
}
GONE = (exec_core.WorkerDiedError, exec_core.ExecutorFailedError, exec_core.ExecutorClosedError)


class Callers:
    """Threads that call until they are told to stop or the executor is gone.

    Attributes:
        outcomes: how often what came of a call.
        wrong: what must not have happened.
    """

    def __init__(self, executor: exec_core.Executor, seed: str, kinds: tuple[str, ...], threads: int) -> None:
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._executor, self._kinds = executor, kinds
        self._stopped = threading.Event()
        self._lock = threading.Lock()  # guards outcomes and wrong
        self._tokens = itertools.count()
        self._threads = [
            threading.Thread(target=self._run, args=(random.Random(f"{seed} {n}"),), name=f"caller-{n}", daemon=True)
            for n in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Returns when every call has ended; those that have not within their bound are wrong."""
        self._stopped.set()
        until = time.monotonic() + CALL_S + SLACK_S
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive():
                self.wrong.append(f"{thread.name} is still in a call")

    def _run(self, dice: random.Random) -> None:
        while not self._stopped.is_set():
            kind = dice.choice(self._kinds)
            began = time.monotonic()
            try:
                getattr(self, f"_{kind}")(dice)
                outcome = "answer"
            except GONE as error:
                outcome = type(error).__name__
            except ExecutorError as error:
                outcome = f"{kind}: {type(error).__name__}"
                self._note_wrong(f"{kind} raised {type(error).__name__}: {error}")
            except Exception as error:
                outcome = "wrong"
                self._note_wrong(f"{kind} raised {type(error).__name__}: {error} {getattr(error, '__notes__', '')}")
            took = time.monotonic() - began
            if took > CALL_S + SLACK_S:
                self._note_wrong(f"{kind} took {took:.1f} s")
            with self._lock:
                self.outcomes[outcome] += 1
            if outcome in {"ExecutorFailedError", "ExecutorClosedError"}:
                self._stopped.wait(0.002)  # it may come back

    def _note_wrong(self, text: str) -> None:
        with self._lock:
            self.wrong.append(text)

    def _expect(self, expected: Any, got: Any) -> None:
        if expected != got:
            self._note_wrong(f"expected {expected!r:.200}, got {got!r:.200}")

    def _ranks(self) -> range:
        return range(self._executor.world_size)

    def _blocking(self, dice: random.Random) -> None:
        token = next(self._tokens)
        got = self._executor.collective_rpc("where", CALL_S, (token,))
        self._expect([(rank, token) for rank in self._ranks()], got)

    def _subset(self, dice: random.Random) -> None:
        token, rank = next(self._tokens), dice.choice(self._ranks())
        got = self._executor.collective_rpc("where", CALL_S, (token,), reply_ranks=[rank])
        self._expect([(rank, token)], got)

    def _future(self, dice: random.Random) -> None:
        tokens = [next(self._tokens) for _ in range(dice.randint(1, 6))]
        try:
            futures = [self._executor.collective_rpc("where", CALL_S, (t,), non_block=True) for t in tokens]
        except exec_core.ExecutorBusyError:  # the ring is full: what it is for
            return
        for token, future in zip(tokens, futures, strict=True):
            self._expect([(rank, token) for rank in self._ranks()], future.result(CALL_S + SLACK_S))

    def _tasks(self, dice: random.Random) -> None:
        tokens = [next(self._tokens) for _ in range(dice.randint(1, 4))]

        async def ask() -> list[Any]:
            calls = (self._executor.collective_rpc_async("where", CALL_S, (t,)) for t in tokens)
            return await asyncio.gather(*calls, return_exceptions=True)

        for token, got in zip(tokens, asyncio.run(ask()), strict=True):
            if isinstance(got, BaseException):
                raise got
            self._expect([(rank, token) for rank in self._ranks()], got)

    def _large(self, dice: random.Random) -> None:
        if dice.random() < 0.5:
            data = dice.randbytes(dice.choice([30_000, 300_000, 5_000_000]))
            digest = hashlib.sha256(data).hexdigest()
            got: Any = self._executor.collective_rpc("digest", CALL_S, (data,))
            self._expect([(rank, digest) for rank in self._ranks()], got)
            return
        nbytes, seed = dice.choice([30_000, 300_000, 5_000_000]), dice.randrange(256)
        got = self._executor.collective_rpc("blob", CALL_S, (nbytes, seed))
        self._expect([bytes([(seed + rank) % 256]) * nbytes for rank in self._ranks()], [bytes(blob) for blob in got])

    def _timeout(self, dice: random.Random) -> None:
        token, rank = next(self._tokens), dice.choice(self._ranks())
        try:
            got = self._executor.collective_rpc("slow", 0.02, (0.03, rank, token))
        except exec_core.RpcTimeoutError as error:
            if not set(error.pending_ranks) <= set(self._ranks()):
                self._note_wrong(f"pending ranks {error.pending_ranks}")
        else:
            self._expect([(r, token) for r in self._ranks()], got)

    def _slow(self, dice: random.Random) -> None:
        token, rank = next(self._tokens), dice.choice(self._ranks())
        got = self._executor.collective_rpc("slow", CALL_S, (dice.random() / 50, rank, token))
        self._expect([(r, token) for r in self._ranks()], got)

    def _collective(self, dice: random.Random) -> None:
        times = dice.randint(1, 20)
        got = self._executor.collective_rpc("add_up", CALL_S, (times,))
        self._expect([float(times * self._executor.world_size)] * self._executor.world_size, got)

    def _odd(self, dice: random.Random) -> None:
        kind = dice.choice(list(ODD_KINDS))
        self._raises(ODD_KINDS[kind], lambda: self._executor.collective_rpc("odd", CALL_S, (kind,)))

    def _unpicklable(self, dice: random.Random) -> None:
        lock = threading.Lock()
        self._raises(
            exec_core.SerializationError, lambda: self._executor.collective_rpc("where", CALL_S, ({"lock": lock},))
        )

    def _raises(self, expected: type[BaseException], call: Callable[[], Any]) -> None:
        try:
            got = call()
        except GONE:
            raise
        except expected:
            return
        self._note_wrong(f"expected {expected.__name__}, got {got!r:.200}")

    def _health(self, dice: random.Random) -> None:
        try:
            self._executor.check_health()
        except exec_core.RpcTimeoutError as error:  # a call of ours has timed out there
            self._expect("slow", error.method)
