"""One generation of workers: their processes, their channel, the calls in flight.

    run/submit -> encode -> Calls.open -> DriverChannel.publish ==> workers ==> Receiver -> Calls.value -> caller

With ``driver_worker="inline"`` rank 0 is an `InlineWorker` here, and takes its place in the order of sending under the same
lock as the publishing to the other ranks.

``_lock`` guards the calls and what the receiver says it does; ``_send_lock`` the order of sending, and is taken first.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NoReturn

import attrs
from exec_core import messages
from exec_core.asynchronous import Room
from exec_core.calls import Call
from exec_core.context import WorkerInit
from exec_core.errors import (
    ExecutorBusyError,
    ExecutorClosedError,
    ExecutorFailedError,
    MessageTooLargeError,
    RpcTimeoutError,
    WorkerDiedError,
)
from exec_core.group import WorkerInfo
from exec_core.inline import InlineWorker, Job
from exec_core.messages import Encoded, Failure, Reply
from exec_core.wrapper import WorkerWrapper

from exec_mp._calls import Calls, Entry
from exec_mp._channel import DriverChannel
from exec_mp._forkserver import Exited
from exec_mp._layout import Geometry
from exec_mp._launcher import Session, end_groups
from exec_mp._output import WorkerOutput
from exec_mp._receiver import Receiver, Todo
from exec_mp._stacks import Stacks

_KILL_GRACE_S = 1.0  # beyond the deadline of a shutdown, for the kernel to free what killed workers hold


@attrs.frozen(kw_only=True)
class Hooks:
    """What a group tells its executor.

    Attributes:
        failed: ``fn(error, fail_pending)`` when a worker has died unasked.
        progress: ``fn(rank, done, total, what)``.
        room: told when a call has ended.
        log: the executor's logger.
    """

    failed: Callable[[BaseException, Callable[[], None]], None]
    progress: Callable[[int, int, int, str], None]
    room: Room
    log: Any


class Parts:
    """What the workers of one generation share with the driver; made before they are forked, closed after they have ended.

    Attributes:
        pids: process of each rank, entered as they are forked; of rank 0 this one, when it runs inline.
        rendezvous: memfd in which the ranks meet to build process groups.
    """

    def __init__(
        self, session: Session, geometry: Geometry, ranks: Sequence[int], output: Callable[[int], WorkerOutput]
    ) -> None:
        self.session = session
        self.channel = DriverChannel(geometry, ranks)
        self.rendezvous = os.memfd_create("exec-mp-rendezvous", os.MFD_CLOEXEC)
        self.stacks = Stacks(ranks, self.channel.stacks, lambda rank, number: session.signal(number, rank))
        self.output = {rank: output(rank) for rank in ranks}
        self.pids: dict[int, int] = {} if 0 in ranks else {0: os.getpid()}

    def close(self) -> None:
        self.session.close()  # first: the workers end before what they write to does
        self.channel.close()
        self.stacks.close()
        for output in self.output.values():
            output.close()
        os.close(self.rendezvous)


class ProcessGroup:
    """The workers of one generation (see `exec_core.group.WorkerGroup`). Takes over ``parts``; `close` ends everything.

    Args:
        inits: how to build each worker.
    """

    def __init__(self, inits: Sequence[WorkerInit], parts: Parts, hooks: Hooks) -> None:
        config, channel, session = inits[0].config, parts.channel, parts.session
        self.inits = inits
        self._parts, self._hooks = parts, hooks
        self._pids, self._channel, self._session = parts.pids, channel, session
        self._max_message_bytes = config.rpc.max_message_bytes
        self._lock = threading.Lock()
        self._send_lock = threading.Lock()
        self._calls = Calls(config.max_in_flight)
        self._alive = set(channel.remote_ranks)  # guarded by _lock; _ended is set when it becomes empty
        self._ended = threading.Event()
        self._leaving = False  # ends of workers are expected; set once by close
        self._closed = False
        self._wrapper = self._inline = None
        if 0 not in channel.remote_ranks:
            self._wrapper = WorkerWrapper(0, lambda *reported: hooks.progress(0, *reported))
            self._wrapper.update_environment_variables(config.env_of_rank(0))
            self._inline = InlineWorker(self._wrapper)
        self._receiver = Receiver(
            channel,
            self._calls,
            self._lock,
            parts.pids,
            {session.fileno(): self._session_event, **{o.reading: o.read for o in parts.output.values() if o.reading}},
            finish=self._finish,
            settle=self._settle,
            progress=hooks.progress,
            late=lambda rank, name: hooks.log.warning("late reply dropped", method=name, from_rank=rank),
        )

    # Calls

    def run(self, call: Call) -> Any:
        if self._inline is not None:
            self._inline.check_not_inside(call.request)
        if not call.ranks:
            return call.result([])
        entry, job = self._send(call, None, wait=True)
        if job is not None and self._inline is not None:
            self._run_inline(self._inline, entry, job)
        self._receiver.wait(entry)
        self._hooks.room.made()
        return entry.outcome()

    def _run_inline(self, inline: InlineWorker, entry: Entry, job: Job) -> None:
        try:
            reply = inline.run(job, entry.call.deadline, late=lambda reply: self._local_reply(entry, reply))
        except BaseException as error:  # Ctrl-C: rank 0 has left the call, which is over for the others as well
            self._local_reply(entry, Reply.of_error(error))
            with self._lock:
                self._calls.abandon(entry, error)
            raise
        if reply is not None:
            self._local_reply(entry, reply)

    def submit(self, call: Call, wait: bool) -> Future[Any]:
        future: Future[Any] = Future()
        if not call.ranks:
            future.set_result(call.result([]))
            return future
        entry, _ = self._send(call, future, wait)
        self._receiver.future_added(entry)
        return future

    def _send(self, call: Call, future: Future[Any] | None, wait: bool) -> tuple[Entry, Job | None]:
        name, body = messages.encode_call(call.request)
        limit = self._max_message_bytes
        if limit is not None and body.nbytes > limit:
            raise MessageTooLargeError(call.name, body.nbytes, limit, "raise RpcConfig.max_message_bytes or send less")
        while True:
            with self._send_lock:
                sent = self._try_send(call, future, name, body)
            if sent is not None:
                return sent
            if not wait or not self._receiver.wait_for_room(call.deadline):
                self._raise_no_room(call, future)

    def _try_send(
        self, call: Call, future: Future[Any] | None, name: str, body: Encoded
    ) -> tuple[Entry, Job | None] | None:
        with self._lock:
            if self._calls.closed_by is not None:
                self._raise_closed(self._calls.closed_by, call.name)
            entry = self._calls.open(call, future)
        if entry is None:
            return None
        inline = self._inline
        remote = call.ranks if inline is None else tuple(rank for rank in call.ranks if rank != 0)
        if remote:
            if future is not None and not future.running():
                future.set_running_or_notify_cancel()  # a reply may come before publish returns
            try:
                publish = self._channel.publish_gated if entry.ungated else self._channel.publish
                entry.number = publish(entry.id, name, body, remote, call.reply_ranks)
            finally:
                if entry.number is None:
                    with self._lock:
                        self._calls.withdraw(entry)
            if entry.number is None:
                return None
        job = self._enqueue_inline(inline, entry) if inline is not None and 0 in call.ranks else None
        if entry.ungated:
            with self._lock:
                self._receiver.open_gates()
        return entry, job

    def _enqueue_inline(self, inline: InlineWorker, entry: Entry) -> Job | None:
        request, future = entry.call.request, entry.future
        if future is None:
            return inline.enqueue(request)

        def start() -> bool:
            if future.running() or entry.finished or future.set_running_or_notify_cancel():
                return True
            with self._lock:
                self._calls.withdraw(entry)
            return False

        inline.enqueue(request, start, lambda reply: self._local_reply(entry, reply))
        return None

    def _local_reply(self, entry: Entry, reply: Reply) -> None:
        """Rank 0's, which runs here."""
        todo: Todo = []
        with self._lock:
            if reply.error is None:
                value = reply.value if 0 in entry.call.reply_ranks else None
                finished, _ = self._calls.value(0, entry.id, value)
            else:
                failure = Failure(0, os.getpid(), reply.error, reply.time_ns)
                finished, _ = self._calls.error(entry.id, failure, time.monotonic())
            if self._calls.gated:
                self._receiver.open_gates()
        if finished is not None:
            self._receiver.deliver(finished, todo)
        elif reply.error is not None:
            self._receiver.look_again()
        for act in todo:
            act()

    @staticmethod
    def _raise_closed(error: BaseException, method: str) -> NoReturn:
        if isinstance(error, WorkerDiedError):
            raise ExecutorFailedError(error, method) from error
        raise ExecutorClosedError(str(error), method)

    def _raise_no_room(self, call: Call, future: Future[Any] | None) -> None:
        limit = self._calls.max_in_flight
        full = len(self._calls) >= limit
        why = "no room" if full else "a rank is far behind and the ring is full"
        if future is None:
            raise RpcTimeoutError(call.name, call.timeout_s or 0.0, (), call.ranks, why=f"not sent: {why}")
        remedy = "wait for a call, or raise RpcConfig.max_in_flight"
        raise ExecutorBusyError(call.name, why, len(self._calls), limit, remedy)

    def _finish(self, entry: Entry) -> None:
        """Finishes the future of a finished entry."""
        future = entry.future
        assert future is not None  # only such entries are delivered here
        if not future.running() and not future.set_running_or_notify_cancel():
            return
        try:
            value = entry.outcome()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(value)
        self._hooks.room.made()

    def _settle(self, entry: Entry) -> None:
        """Finishes an entry that is due, with its error or as timed out and then with the stacks of the pending ranks."""
        todo: Todo = []
        with self._lock:
            if not self._calls.settle(entry):
                return
            error = entry.error
            pids = {rank: self._pids[rank] for rank in entry.pending if rank in self._alive}
        if isinstance(error, RpcTimeoutError):
            # Asked after the call has failed: a signal may cut a system call short, and so finish the call.
            entry.error = error.with_stacks(self._parts.stacks.ask(pids))
        self._receiver.deliver(entry, todo)
        for act in todo:
            act()

    def infos(self) -> list[WorkerInfo]:
        with self._lock:  # close takes it before the channel goes
            return [self._info(init.rank) for init in self.inits]

    def _info(self, rank: int) -> WorkerInfo:
        pid = self._pids[rank]
        if self._inline is not None and rank == 0:
            current = self._inline.current
            late = current is not None and self._calls.is_late_request(current[0])
            busy = (current[0].name, time.monotonic() - current[1], late) if current else None
        elif rank not in self._alive or self._closed:
            return WorkerInfo(rank, pid, "dead")
        else:
            busy = self._busy(rank)
        return WorkerInfo(rank, pid, "idle") if busy is None else WorkerInfo(rank, pid, "busy", *busy)

    def _busy(self, rank: int) -> tuple[str, float, bool] | None:
        call_id, since_ns = self._channel.current(rank)
        name = self._calls.name_of(call_id) if call_id else None
        if name is None:
            return None
        return name, (time.monotonic_ns() - since_ns) / 1e9, self._calls.is_late(call_id)

    # Ends of workers

    def _session_event(self) -> None:
        """On the background thread: the fork server has something to say, or is gone."""
        ends = self._session.exits()
        if ends is None:
            self._server_gone()
            return
        for end in ends:
            self._worker_ended(end)

    def _worker_ended(self, end: Exited) -> None:
        with self._lock:
            call_id, _ = (0, 0) if self._closed else self._channel.current(end.rank)
            self._alive.discard(end.rank)
            method = self._calls.name_of(call_id) if call_id else None
        if not self._alive:
            self._ended.set()
        output = self._parts.output[end.rank]
        output.read()
        if self._leaving:
            return
        code, signal_name = (end.code, None) if end.code >= 0 else (None, signal.Signals(-end.code).name)
        error = WorkerDiedError(
            end.rank, end.pid, exit_code=code, signal_name=signal_name, method=method,
            last_log_lines=output.last_lines,
        )  # fmt: skip
        self._died(error)

    def _server_gone(self) -> None:
        end_groups([self._pids[rank] for rank in self._alive])
        with self._lock:
            self._alive.clear()
        self._ended.set()
        if not self._leaving:
            why = f"the fork server (pid {self._session.server_pid}) ended, and its workers with it"
            self._died(WorkerDiedError(None, None, why=why))
        self._receiver.forget(self._session.fileno())

    def _died(self, error: WorkerDiedError) -> None:
        self._leaving = True  # the others are stopped: they may be stuck in a collective with the dead one
        self._session.signal(signal.SIGKILL)
        self._hooks.failed(error, lambda: self._fail_pending(error))

    def _fail_pending(self, error: BaseException) -> None:
        todo: Todo = []
        with self._lock:
            for entry in self._calls.close(error):
                self._receiver.deliver(entry, todo)
        self._channel.ring()  # wakes the leader
        for act in todo:
            act()

    # The end

    def close(self, error: BaseException, deadline: float) -> None:
        if self._closed:
            return
        asked = not self._leaving
        self._leaving = True
        if self._inline is not None:
            self._inline.drop_waiting()
        self._fail_pending(error)
        if asked:
            with self._send_lock, contextlib.suppress(Exception):
                self._channel.publish_exit()
        idle = self._inline is None or self._inline.close(deadline)
        if self._wrapper is not None and idle:
            self._wrapper.shutdown()
        self._climb(deadline if asked else 0.0)
        self._receiver.stop()
        with self._send_lock, self._lock:
            self._closed = True
            self._parts.close()

    def _climb(self, deadline: float) -> None:
        """Asked, then TERM at half the time that is left, then KILL, then reaped."""
        now = time.monotonic()
        steps = [(now + max(0.0, deadline - now) * share, number) for share, number in ((0.5, signal.SIGTERM), (0.8, signal.SIGKILL))]
        for until, number in steps:
            if self._wait_ended(until):
                return
            self._session.signal(number)
        if not self._wait_ended(max(deadline, time.monotonic()) + _KILL_GRACE_S):
            self._hooks.log.error("workers outlive SIGKILL; the kernel still holds them", ranks=sorted(self._alive))

    def _wait_ended(self, until: float) -> bool:
        if self._receiver.is_current_thread():
            while not self._ended.is_set() and time.monotonic() < until:
                self._receiver.turn(until)
            return self._ended.is_set()
        return self._ended.wait(None if until == math.inf else max(0.0, until - time.monotonic()))
