"""The guard: every call of a rank is one that all ranks of its replica make, and ends on all of them alike.

    GuardedWrapper.execute:   BEGIN -> GO     the worker's method     END or ERROR -> DONE or FAILED     -> Outcome
                              (agree first)                           (then hear of the others)

No rank starts a call before all want to run the same one with the same inputs, and none returns from it before all have run
it. So a difference shows before it can hang a collective, and an error of one rank is raised by all.
"""

from __future__ import annotations

import functools
import math
import os
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from exec_core import messages
from exec_core.errors import ExecutorError, RankDivergenceError, RpcTimeoutError, WorkerDiedError, WorkerError
from exec_core.messages import Failure, Reply, Request
from exec_core.wrapper import DONE, WorkerWrapper, settle
from exec_torchrun._digest import PerRank, QuickDigest, describe_call, exact_digest, own_value
from exec_torchrun._frames import Frame, Kind, Part
from exec_torchrun._link import Link
from exec_torchrun._plan import Outcome, Plan, diverged, pack, unpack_error, unpack_value
from exec_torchrun._rounds import named

_NOT_COMPARED = bytes(16)


class GuardedWrapper(WorkerWrapper):
    """A `WorkerWrapper` whose calls are those of all ranks.

    Args:
        rank, index, size: in the world, in the replica, and ranks of the replica.
        link: to the replica's other ranks; None when there are none.
        apart_s: how long ranks may come to a call one after the other; None: calls are not compared.
        barrier_s: limit of every wait for other ranks; None: none.
        failed: told when the ranks cannot go on together.
    """

    def __init__(
        self,
        rank: int,
        index: int,
        size: int,
        link: Link | None,
        *,
        apart_s: float | None,
        barrier_s: float | None,
        failed: Callable[[BaseException], None],
        progress: Callable[[int, int, str], None],
    ) -> None:
        super().__init__(rank, progress)
        self._first = rank - index  # rank of the replica's first
        self._index, self._size = index, size
        self._link = link
        self._apart_s = apart_s
        self._barrier_s = math.inf if barrier_s is None else barrier_s
        self._failed = failed
        self._digest = QuickDigest()
        self._turn = 0
        self._calls = 0
        self.leave_by = -math.inf  # until when `shutdown` may wait for the others; set before it
        self.divergence: RankDivergenceError | None = None  # what the others did when this rank left

    def execute(self, request: Request) -> Reply:
        plan = request
        if not isinstance(plan, Plan) or self._link is None:
            return self._local(request)
        if self._apart_s is None and not plan.gather and plan.max_concurrent is None:
            return self._alone(plan)
        try:
            return self._together(self._link, plan)
        except BaseException as error:
            self._break_off(self._link, plan, error)
            return Reply.of_error(error)

    # One call

    def _together(self, link: Link, plan: Plan) -> Outcome:
        refusal = self._begin(link, plan)
        if refusal is not None:
            return self._refused(plan, refusal)
        if plan.max_concurrent is not None:
            reply, refusal = self._in_waves(link, plan, plan.max_concurrent)
            if refusal is not None:
                return self._refused(plan, refusal)
        else:
            reply = self._local(plan) if self._index in plan.ranks else DONE
        if reply is DONE and not plan.gather:
            if link.agree(self._turn, plan.deadline, None, None, None):
                self._turn += 1
                return Outcome(values=[None] if self._index in plan.reply_ranks else [])
            return self._end_by_frame(link, plan, None, None, None)
        value, error, body = self._settled(plan, reply)
        if error is None and link.agree(self._turn, plan.deadline, None, body, None):
            self._turn += 1
            return Outcome(values=self._values(plan, value, link.values() if plan.gather else ()))
        try:
            return self._end_by_frame(link, plan, value, error, body)
        finally:
            del reply, error  # which refers to this frame

    def _end_by_frame(
        self, link: Link, plan: Plan, value: Any, error: BaseException | None, body: bytes | None
    ) -> Outcome:
        kind = Kind.END if error is None else Kind.ERROR
        verdict = link.exchange(self._word(plan, kind, () if body is None else ((self._index, body),)))
        if verdict.kind is Kind.DONE:
            return Outcome(values=self._values(plan, value, verdict.parts))
        if verdict.kind is Kind.FAILED:
            return self._raised(plan, error, verdict)
        return self._refused(plan, verdict, error)

    def _begin(self, link: Link, plan: Plan) -> Frame | None:
        """None when all ranks begin the call, else why they do not."""
        number = self._calls = self._calls + 1
        digest, method = _NOT_COMPARED, plan.method
        name = method if isinstance(method, str) else plan.name
        compared = self._apart_s is not None and self.context is not None  # the start has all the time of the start
        if compared:
            digest = self._digest(method, plan.args, plan.kwargs, plan.options)
        if link.agree(self._turn, plan.deadline, digest, None, (number, name)):
            self._turn += 1
            return None
        word = self._word(plan, Kind.BEGIN, ((self._index, named(number, name)),))
        word.digest = digest
        if compared and self._apart_s is not None:
            word.wait_s = self._apart_s
        verdict = link.exchange(word, functools.partial(self._description, number, plan))
        return None if verdict.kind is Kind.GO else verdict

    def _description(self, number: int, plan: Plan) -> tuple[str, bytes]:
        """The call in words, and exactly which it is."""
        only = f" on ranks {list(plan.ranks)}" if len(plan.ranks) < self._size else ""
        words = f"call {number}: {describe_call(plan.method, plan.args, plan.kwargs)}{only}"
        return words, exact_digest(plan.method, plan.args, plan.kwargs, plan.options)

    def _in_waves(self, link: Link, plan: Plan, at_once: int) -> tuple[Reply, Frame | None]:
        """Runs it when it is this rank's turn, so many ranks at a time; or why they did not go on."""
        reply = DONE
        for start in range(0, len(plan.ranks), at_once):
            if start:
                verdict = link.exchange(self._word(plan, Kind.BEGIN, ((self._index, b"its wave"),)))
                if verdict.kind is not Kind.GO:
                    return reply, verdict
            if self._index in plan.ranks[start : start + at_once]:
                reply = self._local(plan)
        try:
            return reply, None
        finally:
            del reply  # its error refers to this frame

    def _word(self, plan: Plan, kind: Kind, parts: tuple[Part, ...]) -> Frame:
        self._turn += 1
        limit_s = max(0.0, min(self._barrier_s, plan.deadline - time.monotonic()))
        return Frame(kind, self._turn - 1, parts, limit_s=limit_s)

    def _local(self, request: Request) -> Reply:
        if PerRank in map(type, request.args) or (request.kwargs and PerRank in map(type, request.kwargs.values())):
            args, kwargs = tuple(map(own_value, request.args)), {n: own_value(v) for n, v in request.kwargs.items()}
            request = Request(request.method, args, kwargs)
        return super().execute(request)

    def _alone(self, plan: Plan) -> Reply:
        """Runs it here without a word to the others."""
        if self._index not in plan.ranks:
            return Outcome()
        value, error, _ = self._settled(plan, self._local(plan))
        if error is None:
            return Outcome(values=[value] if self._index in plan.reply_ranks else [])
        try:
            return Reply.of_error(error)
        finally:
            del error  # which refers to this frame

    def _settled(self, plan: Plan, reply: Reply) -> tuple[Any, BaseException | None, bytes | None]:
        """The value or the error of this rank, and what the others get of it."""
        wanted = self._index in plan.reply_ranks
        value, error = None, reply.error
        if error is None:
            try:
                # At once, also where it could be finished later: the others hear of its error with the call's end.
                value = settle(reply.value, wanted)
                if not (wanted and plan.gather):
                    return value, None, None
                return value, None, pack(messages.encode(value, f"the value of {plan.name}", same_program=True))
            except BaseException as unsettled:
                error = unsettled
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise error  # the user's Ctrl-C, not the worker's
        if not isinstance(error, Exception):
            why = WorkerError(self.rank, os.getpid(), plan.name, type(error).__qualname__, str(error))
            why.__cause__, error = error, why
        messages.add_origin(error, self.rank, os.getpid(), plan.name)
        return None, error, pack(messages.encode_error(error, same_program=True), os.getpid())

    def _values(self, plan: Plan, value: Any, parts: tuple[Part, ...]) -> list[Any]:
        if not plan.gather:
            return [value] if self._index in plan.reply_ranks else []
        bodies = dict(parts)
        return [value if index == self._index else unpack_value(bodies[index]) for index in plan.reply_ranks]

    # When it did not go well

    def _raised(self, plan: Plan, own: BaseException | None, verdict: Frame) -> Outcome:
        """Some ranks have raised; the first of them counts."""
        failures = []
        for order, (index, body) in enumerate(verdict.parts):
            if body:
                rank = self._first + index
                if own is not None and index == self._index:
                    failures.append(Failure(rank, os.getpid(), own, order))
                else:
                    failures.append(unpack_error(body, rank, plan.name, order))
        error = messages.first_failure(failures)
        inside = [self._first + index for index, body in verdict.parts if not body]
        if inside:
            error.add_note(
                f"ranks {inside} did not come out of the call: the process groups were given up, call restart() on every rank"
            )
            self._give_up(error, own)
        return Outcome(raised=error, failed=(failures[0].rank, failures[0].pid))

    def _refused(self, plan: Plan, verdict: Frame, own: BaseException | None = None) -> Outcome:
        """The ranks have not come to the call, or out of it, together."""
        ranks = [self._first + index for index in verdict.numbers]
        if verdict.kind in {Kind.DIVERGED, Kind.LEFT}:
            calls = {self._first + index: text.decode(errors="replace") for index, text in verdict.parts}
            return Outcome(raised=diverged(calls, self._apart_s))
        if verdict.kind is Kind.TIMEOUT:
            all_ranks = range(self._first, self._first + self._size)
            answered = [rank for rank in all_ranks if rank not in ranks]
            limit = plan.timeout_s if plan.timeout_s is not None else self._barrier_s
            return Outcome(raised=RpcTimeoutError(plan.name, limit, answered, ranks))
        error = self._died(verdict, plan.name)
        error.__cause__ = own
        self._give_up(error, own)
        return Outcome(raised=error)

    def _died(self, verdict: Frame, method: str | None = None) -> WorkerDiedError:
        index, pid = verdict.parts[0]
        why = "its connection to the other ranks has ended"
        remedy = "call restart() on every rank, or shutdown()"
        return WorkerDiedError(self._first + index, int(pid) or None, method=method, why=why, remedy=remedy)

    def check(self) -> None:
        """Says so if a rank is known to be gone, also between calls. It looks only, from any thread."""
        link = self._link
        if link is not None and (verdict := link.death()) is not None:
            self._failed(self._died(verdict))

    def _break_off(self, link: Link, plan: Plan, own: BaseException) -> None:
        """Ctrl-C, say: this rank is out of step with the others from now on, who see its connections end."""
        link.close()
        why = f"rank {self.rank} (pid {os.getpid()}) has left the others in {plan.name!r}: {type(own).__name__}"
        self._give_up(ExecutorError(f"{why}; call restart() on every rank, or shutdown()"), own)

    def _give_up(self, error: BaseException, own: BaseException | None) -> None:
        """Leaves the process groups: that closes their connections, which frees ranks that wait in a gloo collective."""
        if own is not None:
            traceback.clear_frames(own.__traceback__)  # what it came through may hold on to a group
        if self.context is not None:
            self.context.leave()
        self._failed(error)

    def disconnect(self) -> None:
        """Leaves the others without a word. Twice is fine."""
        link, self._link = self._link, None
        if link is not None:
            link.close()

    def shutdown(self) -> None:
        """Leaves the others before the worker and its groups go, so that nobody is left waiting in them."""
        if self._link is not None:
            verdict = self._link.leave(self._turn, self.leave_by)
            self.disconnect()
            if verdict is not None and verdict.kind is Kind.DIVERGED:
                calls = {self._first + index: text.decode(errors="replace") for index, text in verdict.parts}
                self.divergence = diverged(calls, self._apart_s)
        super().shutdown()
