"""The executor: the calls of an engine, each made of `collective_rpc`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from time import monotonic
from typing import Any, ClassVar, Literal, TypeVar, overload

from exec_core.asynchronous import awaited, awaited_future, submitted
from exec_core.base import READY, BaseExecutor, OnProgress
from exec_core.calls import Call, checked_timeout
from exec_core.config import ExecutorConfig
from exec_core.errors import ConfigError, RpcTimeoutError, WorldJoinError
from exec_core.execution_loop import ExecutionLoop
from exec_core.lifecycle import State
from exec_core.messages import NO_KWARGS
from exec_core.worker import ReconfigureDistributedRequest

T = TypeVar("T")
_SLEEPERS = frozenset({"weights", "kv_cache"})  # tags of `Worker.wake_up`
_SLEEP_LEVELS = (1, 2)  # of `Worker.sleep`


class Executor(BaseExecutor):
    """Runs one worker per rank, and drives them as an inference engine does.

    Constructing it starts it; it is ready when the constructor returns. See `BaseExecutor` for arguments and errors.
    """

    uses_ray: ClassVar[bool] = False

    def __init__(self, config: ExecutorConfig, *, on_progress: OnProgress | None = None) -> None:
        limit = config.rpc.execute_model_timeout_s
        self._step_timeout_s = None if limit is None else checked_timeout(limit)
        super().__init__(config, on_progress=on_progress)
        self._output_ranks = (self.output_rank,)

    def _reset(self) -> None:
        self._asleep: frozenset[str] = frozenset()  # tags that workers have given up the memory of
        self._loop = ExecutionLoop(self)

    @staticmethod
    def get_class(config: ExecutorConfig) -> type[Executor]:
        """The executor class that ``config.backend`` names; starts nothing."""
        from exec_core.backends import find_backend

        return find_backend(config.backend)

    @overload
    def execute_model(self, request: Any, non_block: Literal[False] = False) -> Any: ...
    @overload
    def execute_model(self, request: Any, non_block: Literal[True]) -> Future[Any]: ...
    def execute_model(self, request: Any, non_block: bool = False) -> Any:
        """Runs one step on every rank and returns the value of `output_rank`.

        While the execution loop runs, only the TP drivers are called, and hand the step to their groups; None stops
        the loop.
        """
        if self._loop.running and (step := self._loop.step(request)) is not None:
            if non_block:
                return step
            try:
                return step.result()
            finally:
                del step  # its error does not refer to it
        call = self._step_call("execute_model", request, None)
        group = self._group or self._open_group(call)
        return group.submit(call, wait=True) if non_block else group.run(call)

    def submit_step(self, method: str, request: Any, ranks: Sequence[int]) -> Future[Any]:
        """`execute_model` by another name, on some ranks only; for the execution loop."""
        return self._submit(self._step_call(method, request, ranks), wait=True)

    async def submit_step_async(self, method: str, request: Any, ranks: Sequence[int]) -> Future[Any]:
        """`submit_step`, which awaits room."""
        return await submitted(self._submit, self._step_call(method, request, ranks), self._room)

    def enter_loop(self, rank: int) -> Future[Any]:
        """Sends one rank into the execution loop, past the check that keeps other calls from such ranks."""
        call = self._call_type("start_worker_execution_loop", wants_value=False, ranks=(rank,), resident=True)
        return self._submit(call, wait=True)

    def check_open(self, method: str) -> None:
        """Raises unless a call may be sent now; see `Lifecycle.check_open`."""
        self._lifecycle.check_open(method)

    @property
    def is_down(self) -> bool:
        """Whether no call can be sent any more."""
        return self.state is not State.READY

    def _step_call(self, method: str, request: Any, ranks: Sequence[int] | None) -> Call:
        limit = self._step_timeout_s
        if ranks is not None or self._lifecycle.state is not READY:
            timeout = math.inf if limit is None else limit
            return self._new_call(method, timeout, (request,), None, ranks, self._output_ranks, aggregate=_only)
        # Of every step: nothing of it is the caller's choice, so nothing needs to be checked.
        ranks, deadline = self._all_ranks, math.inf if limit is None else monotonic() + limit
        if self._loop.running:
            self._loop.refuse(method, ranks)
        return self._call_type(
            method, (request,), NO_KWARGS, True, ranks, self._output_ranks, limit, deadline, None, _only
        )

    def start_worker_execution_loop(self) -> Future[Any]:
        """Starts the loop on the ranks that are no TP drivers; the future is done when all loops have ended."""
        return self._loop.start()

    def stop_remote_worker_execution_loop(self) -> None:
        """Ends the loop, if it runs, and raises what a rank raised in it."""
        if (end := self._loop.step(None)) is not None:
            try:
                end.result()
            finally:
                del end  # likewise

    def determine_num_available_blocks(self) -> tuple[int, int]:
        """KV blocks that fit on every rank: ``(num_gpu_blocks, num_cpu_blocks)``, the minimum over the ranks.

        A number that `CacheConfig` has is taken instead of theirs, and with both of them no worker is asked: profiling takes
        long, and may not even work where somebody knows better.
        """
        gpu, cpu = self._config.cache.num_gpu_blocks, self._config.cache.num_cpu_blocks
        if gpu is not None and cpu is not None:
            self.check_open("determine_num_available_blocks")
            return gpu, cpu
        limit = self._config.rpc.startup_timeout_s
        answers = self._profiled_blocks(math.inf if limit is None else limit)
        least_gpu, least_cpu = min(int(gpus) for gpus, _ in answers), min(int(cpus) for _, cpus in answers)
        return least_gpu if gpu is None else gpu, least_cpu if cpu is None else cpu

    def _profiled_blocks(self, timeout: float) -> list[Any]:
        """For subclasses: what each rank answers."""
        return self.collective_rpc("determine_num_available_blocks", timeout)

    def initialize_cache(self, num_gpu_blocks: int, num_cpu_blocks: int) -> None:
        """Allocates the KV cache on every rank."""
        self._log.info("kv cache", num_gpu_blocks=num_gpu_blocks, num_cpu_blocks=num_cpu_blocks)
        self.collective_rpc("initialize_cache", args=(num_gpu_blocks, num_cpu_blocks))

    def apply_model(self, fn: Callable[[Any], T]) -> list[T]:
        """``fn(model)`` on every rank."""
        return self.collective_rpc(_apply_model, args=(fn,))

    @property
    def is_sleeping(self) -> bool:
        """Whether anything has been put to sleep and not been woken up."""
        return bool(self._asleep)

    def sleep(self, level: int = 1) -> None:
        """Workers give device memory back; see `Worker.sleep`. Already asleep is fine.

        Raises:
            ConfigError: for a ``level`` that is neither 1 nor 2, asleep or awake; nothing was sent.
        """
        if level not in _SLEEP_LEVELS:
            raise ConfigError("level", "must be 1 (weights to the host) or 2 (weights dropped)", level)
        if self._asleep != _SLEEPERS:
            self.collective_rpc("sleep", kwargs={"level": level})
            self._asleep = _SLEEPERS

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Workers take device memory again, all of it or ``tags``; see `Worker.wake_up`."""
        if self._asleep:
            self.collective_rpc("wake_up", kwargs={"tags": None if tags is None else list(tags)})
            self._asleep = frozenset() if tags is None else self._asleep - frozenset(tags)

    def save_sharded_state(self, path: str, pattern: str | None = None, max_size: int | None = None) -> None:
        """Every rank writes its weights into directory ``path``; see `Worker.save_sharded_state`."""
        self.collective_rpc("save_sharded_state", kwargs={"path": path, "pattern": pattern, "max_size": max_size})

    def start_profile(self) -> None:
        """Every rank starts a profile."""
        self.collective_rpc("start_profile")

    def stop_profile(self) -> list[Any]:
        """Every rank ends its profile; what each returned (the default worker: its table as text)."""
        return self.collective_rpc("stop_profile")

    def reinitialize_distributed(self, request: ReconfigureDistributedRequest) -> None:
        """Leaves the world and joins the one that ``request`` describes; the model stays.

        Or shuts this replica down.

        Raises:
            ConfigError: this executor cannot do that; nothing has changed.
            WorldJoinError: the new world could not be joined. A replica of one rank is on its own again and the
                executor goes on; otherwise it is FAILED.
        """
        try:
            self.collective_rpc("reinitialize_distributed", args=(request,))
        except WorldJoinError as error:
            if not error.is_alone:
                self._fail(error, lambda: None)
            raise
        if request.shuts_down:
            self.shutdown()

    def check_health(self) -> None:
        """Raises when a rank is dead, in a call that has timed out, or in one call for longer than ``stuck_after_s``.

        A rank in the execution loop is not stuck: its TP driver is, if a step is. It reads what the ranks say of
        themselves and never queues behind their work.

        Raises:
            ExecutorFailedError, ExecutorClosedError: it is not running.
            RpcTimeoutError: naming rank and method.
        """
        self._lifecycle.check_open("check_health")
        limit = self._config.rpc.stuck_after_s
        infos, loop = self.workers, self._loop
        stuck = [w for w in infos if w.timed_out or (limit is not None and w.busy_s > limit and not loop.holds(w.rank))]
        if stuck:
            fine = [w.rank for w in infos if w not in stuck]
            longest = max(stuck, key=lambda worker: worker.busy_s)
            why = ", ".join(f"rank {w.rank} (pid {w.pid}) has been in {w.method!r} for {w.busy_s:.1f} s" for w in stuck)
            raise RpcTimeoutError(
                longest.method or "?",
                longest.busy_s if limit is None else limit,
                fine,
                [w.rank for w in stuck],
                why=why,
            )

    async def execute_model_async(self, request: Any) -> Any:
        """`execute_model`, awaited. Several may be in flight; each rank runs them in the order of the calls."""
        if self._loop.running and (step := await self._loop.step_async(request)) is not None:
            try:
                return await awaited_future(step)
            finally:
                del step  # likewise
        return await awaited(self._submit, self._step_call("execute_model", request, None), self._room)

    async def check_health_async(self) -> None:
        """`check_health`, which does not block."""
        self.check_health()

    async def stop_remote_worker_execution_loop_async(self) -> None:
        """`stop_remote_worker_execution_loop`, awaited."""
        if (end := await self._loop.step_async(None)) is not None:
            try:
                await awaited_future(end)
            finally:
                del end  # likewise


def _only(values: list[Any]) -> Any:
    return values[0]


def _apply_model(worker: Any, fn: Callable[[Any], T]) -> T:
    return fn(worker.get_model())
