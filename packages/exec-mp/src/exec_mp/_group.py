"""One generation of workers: their processes, their channel, the calls in flight.

    run/submit -> encode -> Calls.open -> DriverChannel.publish ==> workers
    caller <- Calls.acknowledge, value or error <- Answers <- Reader, led by Receiver <- DriverChannel.glance <==

With ``driver_worker="inline"`` rank 0 is an `InlineWorker` here, and takes its place in the order of sending under the same
lock as the publishing to the other ranks.

``_send_lock`` guards the order of sending, and is all that a common call takes; ``_lock`` what the receiver says it does, and the
calls wherever more than a single step is made on them (see `exec_mp._calls`). The first is taken first.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from time import monotonic
from typing import Any, NoReturn

import attrs

from exec_core import messages
from exec_core.context import WorkerInit
from exec_core.errors import (
    ExecutorBusyError,
    ExecutorClosedError,
    ExecutorError,
    ExecutorFailedError,
    MessageTooLargeError,
    RpcTimeoutError,
)
from exec_core.group import WorkerInfo
from exec_core.inline import InlineWorker, Job
from exec_core.messages import Failure, Reply, Request
from exec_core.wrapper import WorkerWrapper
from exec_mp._answers import Answers
from exec_mp._calls import DEATH_GRACE_S, Calls, Entry
from exec_mp._channel import AWAY, GATED
from exec_mp._future import CallFuture, tell
from exec_mp._parts import Hooks, Parts
from exec_mp._poller import Handler
from exec_mp._processes import Processes
from exec_mp._receiver import Receiver

_DYING_S = 5.0  # an error reply waits no longer for the kernel to take a worker down


class ProcessGroup:
    """The workers of one generation (see `exec_core.group.WorkerGroup`). Takes over ``parts``; `close` ends everything.

    Args:
        inits: how to build each worker.
    """

    def __init__(self, inits: Sequence[WorkerInit], parts: Parts, hooks: Hooks) -> None:
        config, channel = inits[0].config, parts.channel
        self._parts, self._hooks, self._room = parts, hooks, hooks.room
        self._pids, self._channel = parts.pids, channel
        self._max_message_bytes = config.rpc.max_message_bytes
        self._lock = threading.Lock()
        self._send_lock = threading.Lock()
        self._calls = Calls(config.max_in_flight, len(inits), parts.pids)
        self._processes = Processes(parts.session, parts.processes, self._call_of, self._died)
        self._closed = False
        self._wrapper = self._inline = None
        if 0 not in channel.remote_ranks:
            report = functools.partial(hooks.progress, 0)
            self._wrapper = WorkerWrapper(0, report, given_up=self._is_hopeless)
            self._wrapper.update_environment_variables(config.env_of_rank(0))
            self._inline = InlineWorker(self._wrapper)
        outputs: dict[int, Handler] = {o.reading: o.read for o in parts.output.values() if o.reading is not None}
        self._answers = Answers(
            channel,
            self._calls,
            self._lock,
            parts.pids,
            finish=self._finish,
            progress=hooks.progress,
            late=lambda entry: hooks.log.warning(
                "late reply dropped", method=entry.name, request_id=entry.id, from_rank=entry.late
            ),
        )
        handlers = {**self._processes.handlers(), **outputs}
        self._receiver = Receiver(
            channel,
            self._calls,
            self._lock,
            self._answers,
            handlers,
            settle=self._settle,
            broken=self._broken,
        )
        self.inits = [self._init_here(init) if init.in_driver else init for init in inits]

    def _init_here(self, init: WorkerInit) -> WorkerInit:
        """For rank 0 in this process: the path where the ranks meet ends with the background thread, before the descriptor does.

        Torch writes to that path also when the last reference to a process group goes, which the host may have. By then
        the number may be that of a file of the host's.
        """
        meeting = f"file:///proc/self/task/{self._receiver.native_id}/fd/{self._parts.rendezvous}"
        return attrs.evolve(init, distributed_init_method=meeting)

    # Calls

    def run(self, call: Entry) -> Any:
        inline = self._inline
        if inline is not None:
            inline.check_not_inside(call)
        if not call.ranks:
            return call.result([])
        try:
            self._send(call, wait=True)
            if inline is not None and call.job is not None:
                self._run_inline(inline, call, call.job)
            self._receiver.wait(call)
        except BaseException:  # Ctrl-C, say, also between those
            self._leave(call)
            raise
        if self._room.line:
            self._room.made()
        return call.outcome()

    def _leave(self, call: Entry) -> None:
        """The caller of ``call`` no longer waits for it. One that was not sent may be tried again."""
        if not call.sent:
            return
        with self._lock:
            self._calls.abandon(call)
        if self._inline is not None and call.job is not None:
            self._inline.leave(call.job, late=functools.partial(self._local_reply, call))
        self._receiver.look_again()

    def _is_hopeless(self) -> bool:
        """Asked by rank 0 here while it waits for the others to join: its thread is the one that would hear of them."""
        self._receiver.wait_for_room(math.inf)
        return self._calls.hopeless

    def _run_inline(self, inline: InlineWorker, entry: Entry, job: Job) -> None:
        try:
            reply = inline.run(job, entry.deadline, late=functools.partial(self._local_reply, entry))
            if reply is not None:
                self._local_reply(entry, reply)
        except BaseException as error:  # Ctrl-C: rank 0 has left the call, which is over for the others as well
            inline.leave(job, late=functools.partial(self._local_reply, entry))
            self._local_reply(entry, Reply.of_error(error))
            raise

    def submit(self, call: Entry, wait: bool) -> Future[Any]:
        # Where rank 0 runs here, its thread has answers of its own, and nobody wakes a caller that reads the others'.
        future = call.future = CallFuture(call, self._receiver, self._room) if self._inline is None else Future()
        if not call.ranks:
            future.set_result(call.result([]))
            return future
        if self._inline is not None and call.ranks != (0,):
            future.set_running_or_notify_cancel()  # as a `CallFuture` does from the start
        try:
            self._send(call, wait)
            if not (isinstance(future, CallFuture) and future.receive_at_once()):
                self._receiver.future_added(call)
        except BaseException:
            self._leave(call)
            raise
        return future

    def _send(self, call: Entry, wait: bool) -> None:  # noqa: C901 # in one: the way of every call
        """Returns when ``call`` has been sent to all its ranks."""
        calls, channel, inline = self._calls, self._channel, self._inline
        ranks = call.ranks if inline is None else tuple(rank for rank in call.ranks if rank != 0)
        name, body = messages.encode_call(call)
        limit = self._max_message_bytes
        if limit is not None and body.nbytes > limit:
            raise MessageTooLargeError(call.name, body.nbytes, limit, "raise RpcConfig.max_message_bytes or send less")
        while True:
            with self._send_lock:
                try:
                    has_room = calls.open(call) if call.max_concurrent is None else self._open_gated(call)
                    if calls.closed_by is not None:
                        self._raise_closed(calls.closed_by, call.name)
                    if has_room and ranks:
                        call.number, kind = channel.sent, GATED if call.ungated else 0
                        call.sent_at = monotonic()
                        alone = call.future is None
                        if not alone:
                            alone = len(calls.in_flight) == 1  # else it is one of many to be sent
                            kind |= AWAY if call.resident else 0
                        has_room = channel.publish(call.id, name, body, ranks, call.reply_ranks, kind, yields=alone)
                    if has_room:
                        if inline is not None and 0 in call.ranks:
                            self._enqueue_inline(inline, call)
                        call.sent = True
                        if call.ungated:
                            self._open_gates()
                        return
                    self._withdraw(call)
                except BaseException:
                    self._cut_short(call)
                    raise
            if not wait or not self._receiver.wait_for_room(call.deadline):
                self._raise_no_room(call)

    def _open_gated(self, call: Entry) -> bool:
        with self._lock:
            return self._calls.open(call)

    def _open_gates(self) -> None:
        with self._lock:
            self._answers.open_gates()

    def _withdraw(self, call: Entry) -> None:
        with self._lock:
            self._calls.withdraw(call)

    def _cut_short(self, call: Entry) -> None:
        """The sending of ``call`` has failed, or Ctrl-C has come; perhaps when ranks had been told of it, which will run it."""
        inline, job = self._inline, call.job
        runs_here = (
            inline is not None and job is not None and inline.leave(job, functools.partial(self._local_reply, call))
        )
        if not runs_here and (call.number is None or self._channel.sent <= call.number):
            self._withdraw(call)
            return
        self._channel.wake_all()  # the call is in their ring, and nothing else may come to wake them for it
        with self._lock:
            self._calls.abandon(call)
            if inline is not None and not runs_here and 0 in call.ranks:
                self._calls.value(0, call.id, None)
            call.sent = True  # so that no rank stays before a closed gate
            self._answers.open_gates()

    def _enqueue_inline(self, inline: InlineWorker, entry: Entry) -> None:
        future = entry.future
        if future is None:
            entry.job = Job(entry)
            inline.enqueue(entry.job)
            return

        def start() -> bool:
            if future.running() or entry.finished or future.set_running_or_notify_cancel():
                return True
            self._withdraw(entry)
            return False

        # A request of its own: what it raises refers to frames that have it, and the call knows the future.
        request = Request(entry.method, entry.args, entry.kwargs, entry.wants_value)
        entry.job = Job(request, start, functools.partial(self._local_reply, entry))
        inline.enqueue(entry.job)

    def _local_reply(self, entry: Entry, reply: Reply) -> None:
        """Rank 0's, which runs here."""
        entry.job = None  # which refers to it: nothing of a call is to wait for the garbage collector
        error, reply.error = reply.error, None  # likewise: it refers to frames that have the reply
        with self._lock:
            if error is None:
                value = reply.value if 0 in entry.reply_ranks else None
                closed = self._calls.value(0, entry.id, value)
            else:
                failure = Failure(0, os.getpid(), error, reply.time_ns)
                closed = self._calls.error(entry.id, failure, monotonic())
            if self._calls.gated:
                self._answers.open_gates()
        if closed and entry.late is None:
            self._answers.deliver(entry)
            self._receiver.act()
        elif error is not None:
            self._receiver.look_again()

    @staticmethod
    def _raise_closed(error: BaseException, method: str) -> NoReturn:
        if isinstance(error, ExecutorClosedError):
            raise ExecutorClosedError(str(error), method)
        raise ExecutorFailedError(error, method) from error

    def _raise_no_room(self, call: Entry) -> NoReturn:
        limit = self._calls.max_in_flight
        count = len(self._calls.in_flight)
        full = count >= limit
        why = "no room" if full else "a rank is far behind and the ring is full"
        if call.future is None:
            late = f"not sent: {why}"
            raise RpcTimeoutError(call.name, call.timeout_s or 0.0, (), call.ranks, why=late, pids=self._pids)
        remedy = "wait for a call, or raise RpcConfig.max_in_flight"
        raise ExecutorBusyError(call.name, why, count, limit, remedy)

    def _finish(self, entry: Entry) -> None:
        """Finishes the future of a finished entry."""
        future = entry.future
        assert future is not None  # only such entries are delivered here
        with self._lock:
            if entry.delivered:
                return
            entry.delivered = True
        if self._inline is not None and not future.running() and not future.set_running_or_notify_cancel():
            return  # cancelled; only a call that waits for rank 0 here can be
        value, error = tell(entry)
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)
        self._room.made()

    def _settle(self, entries: Sequence[Entry]) -> None:
        """Finishes entries that are due: with a held-back error, or as timed out and then with the stacks of the pending ranks."""
        now = monotonic()
        with self._lock:
            final = [entry for entry in entries if not self._waits_for_death(entry, now)]
            # The channel is there as long as a call is not finished.
            acks = () if all(entry.finished for entry in final) else self._channel.newest_acks()
            settled = [entry for entry in final if self._calls.settle(entry, acks)]
            errors = [entry.error for entry in settled if not entry.failures]
            pending = {rank for error in errors if isinstance(error, RpcTimeoutError) for rank in error.pending_ranks}
        pids = {rank: self._pids[rank] for rank in pending & self._processes.alive}
        nobody_waits = all(entry.future is not None for entry in settled)
        if pids and nobody_waits and self._receiver.is_current_thread():  # which has deaths to look out for
            with contextlib.suppress(RuntimeError):  # a limit on threads
                threading.Thread(target=self._report, args=(settled, pids), name="exec-mp-stacks", daemon=True).start()
                return
        self._report(settled, pids)

    def _waits_for_death(self, entry: Entry, now: float) -> bool:
        """Whether an error is held back further: a rank that owes an answer is dying, which takes as long as freeing its memory."""
        if not entry.failures or now >= min(entry.deadline, entry.failures[0].time_ns / 1e9 + _DYING_S):
            return False
        if not self._processes.is_exiting(self._processes.alive.intersection(self._calls.owing(entry))):
            return False
        entry.settle_at = now + DEATH_GRACE_S
        return True

    def _report(self, settled: Sequence[Entry], pids: Mapping[int, int]) -> None:
        try:
            # Asked after the calls have failed: a signal may cut a system call short, and so finish a call.
            stacks = self._parts.stacks.ask(pids, self._processes.signal) if pids else {}
            for entry in settled:
                if isinstance(entry.error, RpcTimeoutError):
                    still = self._calls.owing(entry)
                    entry.error = entry.error.with_stacks({r: text for r, text in stacks.items() if r in still})
        finally:
            for entry in settled:
                self._answers.deliver(entry)
            self._receiver.act()

    def infos(self) -> list[WorkerInfo]:
        with self._lock:  # close takes it before the channel goes
            return [self._info(init.rank) for init in self.inits]

    def _info(self, rank: int) -> WorkerInfo:
        pid = self._pids[rank]
        if rank in self._channel.remote_ranks and (rank not in self._processes.alive or self._closed):
            return WorkerInfo(rank, pid, "dead")
        late, busy = self._calls.late(rank), self._busy(rank)
        if busy is None and late is not None:  # it has not come to it yet
            busy = late.name, max(0.0, monotonic() - late.deadline)
        return WorkerInfo(rank, pid, "idle") if busy is None else WorkerInfo(rank, pid, "busy", *busy, late is not None)

    def _busy(self, rank: int) -> tuple[str, float] | None:
        if self._inline is not None and rank == 0:
            current = self._inline.current
            return None if current is None else (current[0].name, monotonic() - current[1])
        call_id, ready_ns = self._channel.current(rank)
        entry = self._calls.in_flight.get(call_id)
        # A rank that has nothing to do begins a call when that is sent; a busy one, when it is ready for it.
        return None if entry is None else (entry.name, monotonic() - max(entry.sent_at, ready_ns / 1e9))

    # Ends of workers

    def _call_of(self, rank: int) -> tuple[str | None, int | None]:
        """The call that ``rank`` is in, or was when it ended: its method and its number."""
        with self._lock:
            call_id = 0 if self._closed else self._channel.current(rank)[0]
            name = self._calls.name_of(call_id) if call_id else None
            return name, None if name is None else call_id

    def _died(self, error: BaseException) -> None:
        if self._wrapper is not None:
            self._wrapper.abort()  # rank 0 may be in a collective that nobody else will ever end
        self._hooks.failed(error, lambda: self._fail_pending(error))

    def _broken(self, error: Exception) -> None:
        """The background thread has met an error of its own: no answer can be relied on any more."""
        if not self._processes.leaving:
            failure = ExecutorError(f"the thread that receives answers has failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            self._processes.abandon(failure)

    def _fail_pending(self, error: BaseException) -> None:
        with self._lock:
            for entry in self._calls.close(error):
                self._answers.deliver(entry)
        self._channel.ring()  # wakes the leader
        self._receiver.act()

    # The end

    def close(self, error: BaseException, deadline: float) -> None:
        if self._closed:
            return
        asks = not self._processes.leaving  # else they are dying already, or an earlier close was interrupted
        self._processes.leaving = True
        if self._inline is not None:
            self._inline.drop_waiting()
        self._fail_pending(error)
        if asks:
            with self._send_lock, contextlib.suppress(Exception):
                self._channel.publish_exit()
        idle = self._inline is None or self._inline.close(deadline)
        if self._wrapper is not None and idle:
            self._wrapper.shutdown()
        self._processes.stop(deadline if asks else 0.0, self._wait_ended, self._hooks.log)
        self._receiver.stop()
        with self._send_lock, self._lock:
            self._closed = True
            self._parts.close()

    def _wait_ended(self, until: float) -> bool:
        ended = self._processes.ended
        if self._receiver.is_current_thread():
            while not ended.is_set() and monotonic() < until:
                self._receiver.turn(until)
            return ended.is_set()
        return ended.wait(None if until == math.inf else max(0.0, until - monotonic()))
