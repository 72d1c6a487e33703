"""A worker process: takes requests from its channel, runs them on the main thread, replies.

    WorkerChannel.requests -> decode -> WorkerWrapper.run -> Replier.send -> WorkerChannel.publish   a value, an error
                                                          -> WorkerChannel.requests, asked again   nothing to say

A common request, a method's name with few arguments, is run where it is read, and comes no further if there is nothing to say.
A second thread, started for the first method that returns an async output, finishes those.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import queue
import random
import sys
import threading
import time
import weakref
from typing import Any

from exec_core import messages
from exec_core.errors import ExecutorError, MessageTooLargeError
from exec_core.messages import Encoded, Reply, Status, method_name
from exec_core.worker import as_async_output
from exec_core.wrapper import DONE, WorkerWrapper, device_failure, select_device, set_threads, settle
from exec_mp._channel import NOTHING, Body
from exec_mp._layout import Geometry
from exec_mp._stacks import StackReporter
from exec_mp._worker_channel import WorkerChannel, unloadable

BOOT_FD, RENDEZVOUS_FD, CHANNEL_FD, BELL_FD, DRIVER_BELL_FD, STACK_BELL_FD, STACKS_FD = range(3, 10)
_PROGRESS_EVERY_S = 0.05
_MAX_PROGRESS_BACKLOG = 8


class Replier:
    """Sends replies from whichever thread has one.

    Args:
        max_message_bytes: a larger result becomes an error; errors arrive whatever their size. None: no limit.
    """

    def __init__(self, channel: WorkerChannel, rank: int, max_message_bytes: int | None) -> None:
        self._channel, self._rank, self._max_message_bytes = channel, rank, max_message_bytes
        self._lock = threading.Lock()  # one writer of the reply ring at a time
        self._progress_at = 0.0  # when progress was sent last; guarded by _lock
        self.unsettled: set[int] = set()  # calls with an async output; taken out by who finishes those, after the reply

    def done(self, call_id: int) -> None:
        """For the main thread: a call has run, and there is nothing to say about it, while async outputs are unsettled.

        An acknowledgement would be one for the calls before it as well.
        """
        self._publish(call_id, Status.VALUE, NOTHING, 0)

    def send(self, call_id: int, name: str, reply: Reply, wants_value: bool) -> bool:
        """Whether it was a value: one that cannot be sent becomes an error."""
        body = NOTHING
        if reply.error is None and wants_value and reply.value is not None:
            try:
                body = self._encode(name, reply.value)
            except BaseException as unsendable:  # pickling runs the user's code, which may also exit
                reply = Reply.of_error(unsendable)
        if reply.error is None:
            self._publish(call_id, Status.VALUE, body, 0)
            return True
        self._publish(call_id, Status.ERROR, _encode_error(reply.error), reply.time_ns)
        return False

    def _encode(self, name: str, value: Any) -> Encoded:
        body, limit = messages.encode(value, f"the result of {name!r}"), self._max_message_bytes
        if limit is not None and body.nbytes > limit:
            what = f"the result of {name!r} on rank {self._rank} (pid {os.getpid()})"
            raise MessageTooLargeError(what, body.nbytes, limit, "raise RpcConfig.max_message_bytes or return less")
        return body

    def _publish(self, call_id: int, status: int, body: Encoded, time_ns: int) -> None:
        with self._lock:
            try:
                self._channel.publish(call_id, status, body, time_ns)
            except ExecutorError as unsendable:  # too large, or no memory: the small error always fits
                self._channel.publish(call_id, Status.ERROR, messages.encode_error(unsendable), time.monotonic_ns())

    def progress(self, done: int, total: int, what: str) -> None:
        now = time.monotonic()
        with self._lock:
            late = self._channel.backlog > _MAX_PROGRESS_BACKLOG  # nobody listens: the ring is for replies
            if late or (now - self._progress_at < _PROGRESS_EVERY_S and done < total):
                return
            self._progress_at = now
            self._channel.publish(0, Status.PROGRESS, messages.encode((done, total, what)), 0)


def _encode_error(error: BaseException) -> Encoded:
    try:
        return messages.encode_error(error)
    except BaseException as unspeakable:  # its own __str__ or __reduce__ raises
        name = type(error).__qualname__
        why = f"{name}, which cannot be told: {type(unspeakable).__name__} in its own methods"
        told = ExecutorError(f"the worker raised {why}")
        return messages.encode_error(told.with_traceback(error.__traceback__))


class _Outputs:
    """Finishes async outputs, in order, on a thread of its own."""

    def __init__(self, wrapper: WorkerWrapper, replier: Replier) -> None:
        self._wrapper, self._replier = wrapper, replier
        self._queue: queue.SimpleQueue[tuple[int, str, Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def put(self, call_id: int, name: str, value: Any) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="exec-output", daemon=True)
            self._thread.start()
        self._replier.unsettled.add(call_id)
        self._queue.put((call_id, name, value))

    def _serve(self) -> None:
        select_device(self._wrapper.context)
        while (item := self._queue.get()) is not None:
            call_id, name, value = item
            try:
                reply = Reply(settle(value, wanted=True))
            except BaseException as error:
                reply = Reply.of_error(error)
            succeeded = self._replier.send(call_id, name, reply, wants_value=True)
            self._replier.unsettled.discard(call_id)
            if not succeeded:
                _leave_if_useless(self._wrapper)
            del item, value, reply  # what they hold does not outlive the call

    def close(self) -> None:
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join()


def _run(name: str, body: Body, channel: WorkerChannel, wrapper: WorkerWrapper) -> tuple[str, Reply]:
    """Runs a call that was not run where it was read. Its name, and the reply. What the body holds does not outlive the call."""
    try:
        method, args, kwargs = messages.decode_call(name, *body)
    except BaseException as error:
        channel.done_reading()
        return name, unloadable(error)
    del body
    channel.done_reading()
    return name or method_name(method), wrapper.run(method, args, kwargs)


def _leave_if_useless(wrapper: WorkerWrapper) -> None:
    """Ends this process when its device is lost to it: no call would ever succeed, and only a new process helps."""
    if why := device_failure(wrapper.context):
        sys.stderr.write(f"rank {wrapper.rank} leaves: CUDA refuses it everything from now on, after {why}\n")
        sys.stderr.flush()
        os._exit(1)


def serve(channel: WorkerChannel, wrapper: WorkerWrapper, replier: Replier) -> None:
    """Until the driver says to leave."""
    outputs = _Outputs(wrapper, replier)
    for call_id, name, wanted, found in channel.requests(wrapper.run, wrapper.run_bare, replier.unsettled):
        if isinstance(found, Reply):
            reply = found
        else:
            name, reply = _run(name, found, channel, wrapper)  # noqa: PLW2901 # the name may have been in the body
        del found  # it does not outlive the call
        silent = reply is DONE or (not wanted and reply.error is None)
        if not silent or replier.unsettled:
            channel.is_answered = True
            if silent:
                replier.done(call_id)
            elif reply.value is None or as_async_output(reply.value) is None:
                if not replier.send(call_id, name, reply, wanted != 0):
                    _leave_if_useless(wrapper)
            else:
                outputs.put(call_id, name, reply.value)
        del reply
    outputs.close()


def _run_exit_functions() -> None:
    """Runs what an interpreter runs at its end: this process leaves by os._exit.

    All but torch's: it would take its operators apart, one by one, which copies much of what a worker shares with the others.
    """
    with contextlib.suppress(Exception):
        for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined] # noqa: SLF001 # no other list
            alive = finalizer.peek()
            if alive is not None and getattr(alive[1], "__module__", None) == "torch.library":
                finalizer.atexit = False
    with contextlib.suppress(Exception):
        atexit._run_exitfuncs()  # noqa: SLF001 # there is no public way


def main(geometry: Geometry, rank: int, threads: int | None, max_message_bytes: int | None) -> None:
    """Entry of a worker process, with its descriptors in place."""
    faulthandler.enable(all_threads=False)  # as for stack reports: other threads may be running
    random.seed()
    numpy_random = sys.modules.get("numpy.random")  # numpy imports it when it is used, which takes 10 ms and more
    if numpy_random is not None:
        numpy_random.seed()  # the fork server's state would be every worker's
    if threads is not None:
        set_threads(threads)
    channel = WorkerChannel(CHANNEL_FD, geometry, rank, BELL_FD, DRIVER_BELL_FD)
    StackReporter(STACK_BELL_FD, STACKS_FD, rank, channel.count_stack)
    replier = Replier(channel, rank, max_message_bytes)
    wrapper = WorkerWrapper(rank, replier.progress)
    # Whatever this raises, the channel is broken and the driver must see the process end: no clean-up that may hang.
    serve(channel, wrapper, replier)
    wrapper.shutdown()
    _run_exit_functions()
