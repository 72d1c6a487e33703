"""The executor's core: its lifecycle, its start, and `collective_rpc`.

    collective_rpc -> Call -> WorkerGroup.run (blocking) or .submit (Future) -> every rank's WorkerWrapper

A backend implements one method, `_launch`, and the `WorkerGroup` that it returns. The calls of an engine, all made of
`collective_rpc`, are in `exec_core.executor`; the states in `exec_core.lifecycle`.
"""

from __future__ import annotations

import abc
import atexit
import itertools
import math
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from time import monotonic
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, Self, TypeVar, overload

from exec_core import private
from exec_core.asynchronous import Room, awaited
from exec_core.calls import Call, check_count, checked_timeout, chosen_ranks, deadline_after
from exec_core.config import ExecutorConfig
from exec_core.errors import ExecutorClosedError, WorkerDiedError
from exec_core.group import WorkerGroup, WorkerInfo
from exec_core.lifecycle import Lifecycle, State
from exec_core.messages import NO_KWARGS, method_name
from exec_core.startup import Phases, died

if TYPE_CHECKING:
    from exec_core.execution_loop import ExecutionLoop

T = TypeVar("T")
OnProgress = Callable[[int, int, int, str], None]

READY = State.READY  # an enum's members take long to look up
_numbers = itertools.count()
_live: weakref.WeakSet[BaseExecutor] = weakref.WeakSet()


class BaseExecutor(abc.ABC):
    """Runs one worker per rank. Constructing it starts it; it is ready when the constructor returns.

    Args:
        config: what to run.
        on_progress: ``fn(rank, done, total, what)`` for what workers report by ``context.report_progress``, called on
            any thread of the driver, one call at a time.

    Raises:
        ConfigError: for a configuration that this backend cannot run, before anything is started.
        DeviceError: for too few devices, likewise.
        WorkerStartupError: when a worker does not become ready; nothing is left running.
    """

    backend: ClassVar[str] = ""
    _call_type: ClassVar[type[Call]] = Call  # what its `WorkerGroup` takes
    _loop: ExecutionLoop  # of this generation

    def __init__(self, config: ExecutorConfig, *, on_progress: OnProgress | None = None) -> None:
        self._config = config
        self._on_progress = on_progress
        self._name = f"exec-{os.getpid()}-{next(_numbers)}"
        self._all_ranks = tuple(range(config.parallel.world_size))
        self._lifecycle = Lifecycle()
        self._group: WorkerGroup[Any] | None = None  # of this generation; set by the thread that starts or tears down
        self._closing = threading.Lock()  # held by the one thread that tears down
        self._started = threading.Event()  # not while a start is in progress, in thread _starter
        self._starter: int | None = None
        self._phases = Phases(self._run, self._call_type, self._all_ranks, config.rpc.startup_timeout_s)
        self._progress_lock = threading.Lock()  # one progress report at a time
        self._restarts_left = config.rpc.max_restarts  # written by the failure thread only
        self._timeout_s = config.rpc.timeout_s
        self._private_root = ""  # of this generation; swept by its group when all workers have ended
        self._room = Room()
        self._reset()
        self._log = self._logger()
        _live.add(self)
        self._start(told=True)

    @abc.abstractmethod
    def _launch(self, deadline: float) -> WorkerGroup[Any]:
        """Makes one `WorkerWrapper` per rank exist and reachable by ``deadline``; the one method a backend must have.

        Raises:
            ConfigError, DeviceError: before anything is started. WorkerStartupError: with nothing left running.
        """

    # Lifecycle

    @property
    def state(self) -> State:
        return self._lifecycle.state

    @property
    def config(self) -> ExecutorConfig:
        return self._config

    @property
    def world_size(self) -> int:
        """Ranks of this replica."""
        return self._config.parallel.world_size

    @property
    def output_rank(self) -> int:
        """Whose value `execute_model` returns."""
        chosen = self._config.output_rank
        return self.world_size - self._config.parallel.tensor_parallel_size if chosen is None else chosen

    @property
    def generation(self) -> int:
        """0, and one more after each restart."""
        return self._lifecycle.generation

    @property
    def workers(self) -> list[WorkerInfo]:
        """What each rank is doing now; empty when closed."""
        group = self._group
        return [] if group is None else group.infos()

    def _logger(self) -> Any:
        from exec_core import logs  # structlog takes longer to import than all of this package

        names = {"executor": self._name, "backend": self.backend, "generation": self.generation}
        return logs.driver_logger(self._config.log, "exec_core.executor", rank=None, pid=os.getpid(), **names)

    def _interrupt_launch(self) -> None:  # noqa: B027 # optional: not every backend waits for something
        """For subclasses: makes a `_launch` in progress, in another thread, give up."""

    def _start(self, told: bool) -> None:
        self._starter = threading.get_ident()
        self._started.clear()
        try:
            self._run_start(told)
        finally:
            self._started.set()

    def _run_start(self, told: bool) -> None:
        started = monotonic()
        self._private_root = private.choose_root(f"{self._name}-{self.generation}")
        self._log.info("executor starting", world_size=self.world_size)
        try:
            group = self._group = self._launch(deadline_after(self._config.rpc.startup_timeout_s))
            self._start_phase("init_worker", (list(group.inits),))
            self._start_phase("init_device")
            self._start_phase("load_model", max_concurrent=self._config.parallel.max_parallel_loading_workers)
            if not self._lifecycle.move(State.READY):
                self._raise_not_ready()
        except BaseException as error:
            shut_down = isinstance(error, Exception) and self.state in {State.CLOSING, State.CLOSED}
            self._clean_up_start(error, told)
            if shut_down:
                raise ExecutorClosedError("shut down while it was starting") from error
            raise
        self._log.info("executor ready", duration_ms=round((monotonic() - started) * 1e3, 1))

    def _clean_up_start(self, error: BaseException, told: bool) -> None:
        self._log.error("executor did not start", exception=_text(error))
        with self._closing:
            self._teardown(error)
        if self.generation:
            self._lifecycle.move(State.FAILED, error, told)
        else:
            self._lifecycle.move(State.CLOSING)
            self._lifecycle.move(State.CLOSED)
            _live.discard(self)

    def _raise_not_ready(self) -> NoReturn:
        doomed = self._lifecycle.doomed
        if isinstance(doomed, WorkerDiedError):
            raise died(doomed, "load_model") from doomed
        raise doomed or ExecutorClosedError("shut down while it was starting")

    def _start_phase(self, phase: str, args: tuple[Any, ...] = (), max_concurrent: int | None = None) -> None:
        if self.state is not State.STARTING:
            self._raise_not_ready()
        self._phases.run(phase, args, max_concurrent)

    def _open_group(self, call: Call) -> WorkerGroup[Any]:
        group = self._group
        if group is None:
            raise ExecutorClosedError(f"the executor is {self.state.value}", call.name)
        return group

    def _run(self, call: Call) -> Any:
        return self._open_group(call).run(call)

    def _submit(self, call: Call, wait: bool) -> Future[Any]:
        return self._open_group(call).submit(call, wait)

    def _teardown(self, error: BaseException) -> None:
        """Under ``_closing``: ends the workers, whatever state they are in."""
        group = self._group
        if group is not None:
            group.close(error, deadline_after(self._config.rpc.shutdown_timeout_s))
            self._group = None  # not before: Ctrl-C in a close leaves the rest of it to the next

    def shutdown(self) -> None:
        """Closes, whatever the state: calls in flight raise `ExecutorClosedError`, workers end.

        Twice is fine; later calls raise.
        A second caller returns when the first has finished.
        """
        if os.getpid() != self._lifecycle.pid:  # a forked child has only a copy
            return
        if self._lifecycle.move(State.CLOSING):
            self._log.info("executor closing")
        deadline = deadline_after(self._config.rpc.shutdown_timeout_s)
        if not self._started.is_set():
            self._interrupt_launch()
        with self._closing:
            self._close()
        if self._starter != threading.get_ident():  # else it is a callback of the start itself that closes
            self._started.wait(None if deadline == math.inf else max(0.0, deadline - monotonic()))

    def _close(self) -> None:
        if self.state is State.CLOSED:
            return
        started = monotonic()
        self._teardown(ExecutorClosedError("the executor was shut down"))
        self._lifecycle.move(State.CLOSED)
        _live.discard(self)
        self._log.info("executor closed", duration_ms=round((monotonic() - started) * 1e3, 1))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()

    def restart(self) -> None:
        """Brings a failed executor back as its next generation: fresh workers, the same start sequence.

        Raises:
            ExecutorClosedError: when it is not in state FAILED.
            WorkerStartupError: when the workers do not become ready; it stays FAILED. Callbacks for failures are not called
                with what is raised here, but for those that are registered later.
        """
        self._restart(told=True)

    def _restart(self, told: bool) -> None:
        if not self._lifecycle.move(State.STARTING):
            raise ExecutorClosedError(f"restart() needs a failed executor, this one is {self.state.value}")
        with self._closing:
            self._teardown(ExecutorClosedError("the executor is being restarted"))
        self._log = self._logger()
        self._reset()
        self._start(told)

    @abc.abstractmethod
    def _reset(self) -> None:
        """`Executor`'s: makes the loop, and forgets what it knows of the workers of the last generation."""

    def register_failure_callback(self, fn: Callable[[BaseException], object]) -> None:
        """``fn(error)`` runs once for a failure, on a thread of its own, after all pending calls have failed.

        At once when the executor has failed already. It may call `shutdown` or `restart`, and raises what that raises: it is
        not called again for a restart of its own. Where the executor restarts itself (``RpcConfig.max_restarts``), it is
        called with what made that necessary, and again if none of the restarts that were left has succeeded.
        """
        self._lifecycle.register(fn, self._log)

    def _fail(self, error: BaseException, fail_pending: Callable[[], None]) -> None:
        """For backends: a worker is gone. Moves to FAILED, fails what is pending, then tells the callbacks."""
        failed = self._lifecycle.fail(error)
        fail_pending()
        if failed:
            self._lifecycle.notify(error, self._log, self._restart_by_itself)
            about = {key: getattr(error, key, None) for key in ("method", "request_id")}
            self._log.error("executor failed", exception=_text(error), **about)

    def _restart_by_itself(self) -> None:
        last = None
        while self._restarts_left > 0 and self.state is State.FAILED:
            self._restarts_left -= 1
            try:
                self._restart(told=False)
            except Exception as error:
                last = error
                self._log.error("restart failed", exception=_text(error), restarts_left=self._restarts_left)
        if last is not None:
            self._lifecycle.tell(last, self._log)

    # Calls

    @overload
    def collective_rpc(
        self, method: str | Callable[..., Any], timeout: float | None = None, args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None, non_block: Literal[False] = False, *,
        ranks: Sequence[int] | None = None,
        reply_ranks: Sequence[int] | None = None, max_concurrent_workers: int | None = None, aggregate: None = None,
    ) -> list[Any]: ...  # fmt: skip
    @overload
    def collective_rpc(
        self, method: str | Callable[..., Any], timeout: float | None = None, args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None, non_block: Literal[False] = False, *,
        ranks: Sequence[int] | None = None,
        reply_ranks: Sequence[int] | None = None, max_concurrent_workers: int | None = None,
        aggregate: Callable[[list[Any]], T],
    ) -> T: ...  # fmt: skip
    @overload
    def collective_rpc(
        self, method: str | Callable[..., Any], timeout: float | None = None, args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None, *, non_block: Literal[True], ranks: Sequence[int] | None = None,
        reply_ranks: Sequence[int] | None = None, max_concurrent_workers: int | None = None, aggregate: None = None,
    ) -> Future[list[Any]]: ...  # fmt: skip
    @overload
    def collective_rpc(
        self, method: str | Callable[..., Any], timeout: float | None = None, args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None, *, non_block: Literal[True], ranks: Sequence[int] | None = None,
        reply_ranks: Sequence[int] | None = None, max_concurrent_workers: int | None = None,
        aggregate: Callable[[list[Any]], T],
    ) -> Future[T]: ...  # fmt: skip
    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        non_block: bool = False,
        *,
        ranks: Sequence[int] | None = None,
        reply_ranks: Sequence[int] | None = None,
        max_concurrent_workers: int | None = None,
        aggregate: Callable[[list[Any]], Any] | None = None,
    ) -> Any:
        """Runs ``method`` on the workers and returns their values in rank order.

        It succeeds when every rank that runs it has acknowledged, and fails at once when one has failed, whoever's
        value was asked for. Calls from many threads reach all ranks in one order.

        Args:
            method: a worker method's name, or a callable that gets the worker first.
            timeout: limit over sending and waiting, in seconds; None: ``RpcConfig.timeout_s``; infinity: none.
            args, kwargs: its arguments, pickled once by cloudpickle's rules. A CUDA tensor arrives in host memory, as it does
                in a value; a worker in the caller's process is given, and returns, the tensor itself.
            non_block: return a `concurrent.futures.Future` once it is sent.
            ranks: who runs it; None: all.
            reply_ranks: whose value is returned; None: of ``ranks``.
            max_concurrent_workers: at most so many ranks run it at a time; None: all.
            aggregate: applied once, in the driver, to the list of values; the call's value is then its result.

        Raises:
            ExecutorBusyError: ``non_block`` and no room within ``timeout``, or a rank is in the execution loop.
            RpcTimeoutError: past the deadline. The executor stays usable, late replies are dropped.
            WorkerDiedError: a worker ended meanwhile. ExecutorFailedError: it had ended before.
            ExecutorClosedError: it is closed, or was while waiting.
            SerializationError, MessageTooLargeError: nothing was sent.
            Exception: what a worker raised, as its own type, with rank and remote traceback.
        """
        call = self._new_call(method, timeout, args, kwargs, ranks, reply_ranks, max_concurrent_workers, aggregate)
        group = self._group or self._open_group(call)
        return group.submit(call, wait=True) if non_block else group.run(call)

    def _new_call(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        ranks: Sequence[int] | None = None,
        reply_ranks: Sequence[int] | None = None,
        max_concurrent_workers: int | None = None,
        aggregate: Callable[[list[Any]], Any] | None = None,
    ) -> Call:
        if self._lifecycle.state is not READY:
            self._lifecycle.check_open(method_name(method))
        if not (isinstance(method, str) or callable(method)):
            raise TypeError(f"method must be a name or a callable, not {type(method).__name__}")
        runs = self._all_ranks if ranks is None else chosen_ranks("ranks", ranks, self._all_ranks)
        replies = runs if reply_ranks is None else chosen_ranks("reply_ranks", reply_ranks, runs)
        if self._loop.running:
            self._loop.refuse(method_name(method), runs)
        if max_concurrent_workers is not None:
            check_count("max_concurrent_workers", max_concurrent_workers)
        timeout_s = self._timeout_s if timeout is None else checked_timeout(timeout)
        deadline = math.inf if timeout_s is None else monotonic() + timeout_s
        return self._call_type(
            method, tuple(args), dict(kwargs) if kwargs else NO_KWARGS, replies != (),
            runs, replies, timeout_s, deadline, max_concurrent_workers, aggregate,
        )  # fmt: skip

    async def collective_rpc_async(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        ranks: Sequence[int] | None = None,
        reply_ranks: Sequence[int] | None = None,
        max_concurrent_workers: int | None = None,
        aggregate: Callable[[list[Any]], Any] | None = None,
    ) -> Any:
        """`collective_rpc`, awaited. Without room it waits for it, within ``timeout``."""
        return await awaited(
            self._submit,
            self._new_call(method, timeout, args, kwargs, ranks, reply_ranks, max_concurrent_workers, aggregate),
            self._room,
        )

    def _report_progress(self, rank: int, done: int, total: int, what: str) -> None:
        """For backends: passes a worker's progress on."""
        with self._progress_lock:
            self._phases.progress(rank, done, total, what)
            if self._on_progress is not None:
                try:
                    self._on_progress(rank, done, total, what)
                except Exception:  # the caller's, and whoever delivers it has other work to do
                    self._log.exception("on_progress raised")


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


@atexit.register
def shutdown_all() -> None:
    """Shuts down every executor of this process; registered for its exit."""
    for executor in list(_live):
        executor.shutdown()
