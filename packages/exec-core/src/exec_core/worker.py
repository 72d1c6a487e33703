"""The worker: what a user writes (`Worker`), what it is given (`WorkerContext`), and what runs it (`WorkerWrapper`).

    Request -> WorkerWrapper.execute -> the worker's method -> Reply

The wrapper lives in the worker's process from its start and builds the worker late, after environment variables are set:
``update_environment_variables``, then ``init_worker``, ``init_device``, ``load_model``.
"""

from __future__ import annotations

import functools
import importlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import attrs

from exec_core import distributed, logs
from exec_core.config import ExecutorConfig
from exec_core.errors import ExecutorError
from exec_core.messages import Reply, Request

ReportProgress = Callable[[int, int, str], None]


@attrs.frozen
class ReconfigureDistributedRequest:
    """Leave the world, and join another one of a different data-parallel size, or shut down.

    Attributes:
        new_data_parallel_size: replicas of the new world.
        new_data_parallel_rank: this replica's number there, or `KEEP_CURRENT_RANK`, or `SHUTDOWN_CURRENT_RANK`.
        new_data_parallel_master_ip, new_data_parallel_master_port: where rank 0 of the new world listens.
    """

    KEEP_CURRENT_RANK = -1
    SHUTDOWN_CURRENT_RANK = -2

    new_data_parallel_size: int
    new_data_parallel_rank: int
    new_data_parallel_master_ip: str = "127.0.0.1"
    new_data_parallel_master_port: int = 0

    @property
    def shuts_down(self) -> bool:
        return self.new_data_parallel_rank == self.SHUTDOWN_CURRENT_RANK


@attrs.define(kw_only=True, eq=False)
class WorkerContext:
    """What a worker knows of its place.

    Attributes:
        config: the executor's.
        rank, local_rank: in the world, and on this machine.
        distributed_init_method: where the world meets; None: a world of one.
        device_name: ``cuda:N`` or ``cpu``; None when the worker handles devices itself.
        executor, backend, generation: which executor this belongs to, and its restarts so far.
        in_driver: the worker shares the host's process, whose settings are left alone.
        existing_group: see `exec_core.distributed.World`.
        groups: process groups, from ``init_device`` on; None before, and when the worker joins none.
        log: structlog logger bound to the rank.
    """

    config: ExecutorConfig
    rank: int
    local_rank: int
    distributed_init_method: str | None
    device_name: str | None
    private_root: str
    executor: str = "executor"
    backend: str = ""
    generation: int = 0
    in_driver: bool = False
    existing_group: str = "refuse"
    groups: distributed.ProcessGroups | None = None
    log: Any = None
    _progress: ReportProgress = lambda done, total, what: None
    _membership: distributed.Membership | None = None

    @property
    def tp_size(self) -> int:
        return self.config.parallel.tensor_parallel_size

    @property
    def pp_size(self) -> int:
        return self.config.parallel.pipeline_parallel_size

    @property
    def dp_size(self) -> int:
        return self.config.parallel.data_parallel_size

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size * self.dp_size

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp_size

    @property
    def pp_rank(self) -> int:
        return self.rank // self.tp_size % self.pp_size

    @property
    def dp_rank(self) -> int:
        return self.rank // (self.tp_size * self.pp_size)

    @property
    def is_driver_worker(self) -> bool:
        """Whether this is the first rank of its tensor-parallel group."""
        return self.rank % self.tp_size == 0

    @property
    def device(self) -> Any:
        """The `torch.device` of this rank; None when the worker handles devices itself."""
        if self.device_name is None:
            return None
        import torch

        return torch.device(self.device_name)

    @property
    def private_dir(self) -> str:
        """A directory of this rank's own (mode 0700), made on first use and swept when the generation ends."""
        path = os.path.join(self.private_root, f"rank-{self.rank}")
        os.makedirs(self.private_root, mode=0o700, exist_ok=True)
        os.makedirs(path, mode=0o700, exist_ok=True)
        return path

    def report_progress(self, done: int, total: int, what: str) -> None:
        """Tells the driver how far a long step is: ``done`` of ``total`` units of ``what``."""
        self._progress(done, total, what)

    def init_device(self) -> None:
        """The default of `Worker.init_device`: selects the device, joins torch.distributed, builds the groups."""
        if self.device_name is None:
            return
        if self.device_name.startswith("cuda"):
            import torch

            torch.cuda.set_device(self.device)
        if self.config.device.distributed_backend != "none":
            self.join(self.rank, self.world_size, self.distributed_init_method)

    def join(self, rank: int, world_size: int, init_method: str | None) -> None:
        """Joins a world as ``rank`` of ``world_size``, leaving the present one first."""
        self.leave()
        self._membership = distributed.join(
            distributed.World(
                rank=rank,
                world_size=world_size,
                tensor_parallel_size=self.tp_size,
                pipeline_parallel_size=self.pp_size,
                init_method=init_method,
                backend=self.config.device.distributed_backend,
                device=self.device_name or "cpu",
                timeout_s=self.config.parallel.distributed_timeout_s,
                existing="use" if self.existing_group == "use" else "refuse",
            )
        )
        self.groups = self._membership.groups

    def leave(self) -> None:
        """Leaves the world, if any."""
        membership, self._membership, self.groups = self._membership, None, None
        if membership is not None:
            membership.leave()

    def close(self) -> None:
        """Gives up everything the context made."""
        try:
            self.leave()
        finally:
            if self.in_driver:  # elsewhere the launcher sweeps, which also outlives a killed worker
                shutil.rmtree(self.private_root, ignore_errors=True)


class Worker:
    """Base class of workers: one rank's device, model and cache. Every hook has a default.

    Methods run on the main thread of the worker's process, one at a time, in the order of the calls. A method may return an
    object with ``get_output()``: the next call then starts at once, and a second thread finishes this one.
    """

    def __init__(self, context: WorkerContext, **worker_kwargs: Any) -> None:
        if worker_kwargs:
            raise TypeError(f"{type(self).__name__} got unknown worker_kwargs {sorted(worker_kwargs)}")
        self.context = context

    def init_device(self) -> None:
        """Selects the device, joins torch.distributed, builds ``context.groups``."""
        self.context.init_device()

    def load_model(self) -> None:
        """Loads this rank's share of the weights."""

    def get_model(self) -> Any:
        """The model, usually a `torch.nn.Module`."""
        raise NotImplementedError(f"{type(self).__name__} does not implement get_model")

    def determine_num_available_blocks(self) -> tuple[int, int]:
        """How many KV blocks fit: ``(num_gpu_blocks, num_cpu_blocks)``. Default: what `CacheConfig` says, else 0."""
        cache = self.context.config.cache
        return cache.num_gpu_blocks or 0, cache.num_cpu_blocks or 0

    def initialize_cache(self, num_gpu_blocks: int, num_cpu_blocks: int) -> None:
        """Allocates the KV cache."""

    def execute_model(self, request: Any) -> Any:
        """Runs one step. The value of the executor's ``output_rank`` is the step's."""
        raise NotImplementedError(f"{type(self).__name__} does not implement execute_model")

    def start_worker_execution_loop(self) -> None:
        """On a rank that is no TP driver: runs the steps that its driver broadcasts, until that is None."""
        while (request := self._broadcast_request(None)) is not None:
            self.execute_model(request)

    def drive_execution_loop(self, request: Any) -> Any:
        """On a TP driver while the loop runs: hands ``request`` to its group and runs it; None ends the loops.

        Overridden together with `start_worker_execution_loop`, or not at all.
        """
        self._broadcast_request(request)
        return None if request is None else self.execute_model(request)

    def _broadcast_request(self, request: Any) -> Any:
        import torch.distributed as dist

        if self.context.tp_size == 1:
            return request
        if self.context.groups is None:
            raise ExecutorError("the execution loop needs process groups; distributed_backend='none' makes none")
        group, box = self.context.groups.tp, [request]
        dist.broadcast_object_list(box, src=group.ranks[0], group=group.cpu_group)
        return box[0]

    def check_health(self) -> None:
        """Raises when this worker cannot go on."""

    def sleep(self, level: int = 1) -> None:
        """Gives device memory back: level 1 keeps the weights in host memory, level 2 drops them."""

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Takes device memory again, for everything or for ``tags`` (``weights``, ``kv_cache``)."""

    def start_profile(self) -> None:
        """Starts a torch profile of this rank."""
        import torch.profiler

        self._profile = torch.profiler.profile()
        self._profile.start()

    def stop_profile(self) -> str:
        """Ends the profile and returns its table, the most expensive operators first."""
        profile, self._profile = self._profile, None
        if profile is None:
            raise ExecutorError("no profile is running; call start_profile() first")
        profile.stop()
        return profile.key_averages().table(sort_by="cpu_time_total", row_limit=30)

    _profile: Any = None

    def save_sharded_state(self, path: str, pattern: str | None = None, max_size: int | None = None) -> None:
        """Writes this rank's weights into directory ``path``, in files of at most ``max_size`` bytes of tensors.

        Args:
            pattern: file name with ``{rank}`` and ``{part}``; default ``model-rank-{rank}-part-{part}.pt`` (`torch.save`).
        """
        import torch

        os.makedirs(path, exist_ok=True)
        part: dict[str, Any] = {}
        number = 0
        for name, tensor in [*self.get_model().state_dict().items(), (None, None)]:
            full = max_size is not None and part and tensor is not None
            if tensor is None or (full and sum(t.nbytes for t in part.values()) + tensor.nbytes > max_size):
                file = (pattern or "model-rank-{rank}-part-{part}.pt").format(rank=self.context.rank, part=number)
                torch.save(part, os.path.join(path, file))
                part, number = {}, number + 1
            part[name] = tensor

    def reinitialize_distributed(self, request: ReconfigureDistributedRequest) -> None:
        """Leaves the world, and joins the one that ``request`` describes unless it shuts this replica down."""
        context = self.context
        if request.shuts_down:
            context.leave()
            return
        replica = context.tp_size * context.pp_size
        keep = request.new_data_parallel_rank == request.KEEP_CURRENT_RANK
        dp_rank = context.dp_rank if keep else request.new_data_parallel_rank
        url = f"tcp://{request.new_data_parallel_master_ip}:{request.new_data_parallel_master_port}"
        context.join(dp_rank * replica + context.rank % replica, request.new_data_parallel_size * replica, url)

    def shutdown(self) -> None:
        """Gives up what this worker holds. The process groups are left afterwards by the wrapper."""


class AsyncOutput(Protocol):
    """What a worker method may return to let the next call start while a second thread finishes this one."""

    def get_output(self) -> Any:
        """The value; may block."""


def as_async_output(value: object) -> AsyncOutput | None:
    """``value`` if its class has ``get_output``, else None. The class decides: objects may answer to any name."""
    return value if callable(getattr(type(value), "get_output", None)) else None  # type: ignore[return-value] # just checked


class _Plain(Worker):
    """The hooks that a worker which does not inherit from `Worker` lacks."""

    def __init__(self, context: WorkerContext, target: Any) -> None:
        super().__init__(context)
        self._target = target

    def execute_model(self, request: Any) -> Any:
        return self._target.execute_model(request)


_HOOKS = frozenset(name for name in vars(Worker) if not name.startswith("_")) - {"get_model", "execute_model"}


def resolve_worker_cls(worker_cls: Callable[..., Any] | str) -> Callable[..., Any]:
    """The class, imported if it is given by its path (``package.module:Class`` or ``package.module.Class``).

    Raises:
        ImportError: naming module and attribute.
    """
    if not isinstance(worker_cls, str):
        return worker_cls
    module_name, colon, attribute = worker_cls.partition(":")
    if not colon:
        module_name, _, attribute = worker_cls.rpartition(".")
    try:
        found: Any = importlib.import_module(module_name)
        for name in attribute.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"worker_cls {worker_cls!r} cannot be imported: {error}; it must be importable from the driver's sys.path"
        ) from error
    if not callable(found):
        raise ImportError(f"worker_cls {worker_cls!r} is a {type(found).__name__}, not a class or callable")
    return found  # type: ignore[no-any-return] # checked to be callable


@attrs.frozen(kw_only=True)
class WorkerInit:
    """What ``init_worker`` needs for one rank (see `WorkerContext` for the meanings)."""

    config: ExecutorConfig
    rank: int
    local_rank: int
    distributed_init_method: str | None
    device_name: str | None
    private_root: str
    executor: str
    backend: str
    generation: int
    in_driver: bool = False
    existing_group: str = "refuse"


class WorkerWrapper:
    """Holds one rank's worker, builds it late, and turns a `Request` into a `Reply`."""

    def __init__(self, rank: int, progress: ReportProgress = lambda done, total, what: None) -> None:
        self.rank = rank
        self.context: WorkerContext | None = None
        self.worker: Any = None
        self._progress = progress

    def update_environment_variables(self, env: Mapping[str, str]) -> None:
        """Sets variables before anything of the worker's is imported."""
        os.environ.update(env)

    def init_worker(self, all_kwargs: Sequence[WorkerInit]) -> None:
        """Builds the worker of this rank from its entry in ``all_kwargs``."""
        init = next(one for one in all_kwargs if one.rank == self.rank)
        names = {"executor": init.executor, "backend": init.backend, "generation": init.generation, "rank": init.rank}
        log = logs.driver_logger(init.config.log, "exec_core.worker", pid=os.getpid(), **names)
        if not init.in_driver:
            logs.configure_worker(
                logs.resolve_format(init.config.log), init.config.log.level, pid=os.getpid(), logger="worker", **names
            )
            log = logs.structlog.get_logger().bind()
        fields = {a.name: getattr(init, a.name) for a in attrs.fields(WorkerInit)}
        self.context = WorkerContext(**fields, log=log, progress=self._progress)
        # Used as it is: an object that delegates by __getattr__ would answer any question put to it.
        self.worker = resolve_worker_cls(init.config.worker_cls)(self.context, **init.config.worker_kwargs)

    def execute(self, request: Request) -> Reply:
        """Runs ``request`` and never raises: whatever the worker raises is in the reply."""
        try:
            return Reply(value=self._resolve(request.method)(*request.args, **request.kwargs))
        except BaseException as error:
            return Reply(error=error)

    def _resolve(self, method: str | Callable[..., Any]) -> Callable[..., Any]:
        if method == "init_worker":
            return self.init_worker
        if method == "update_environment_variables":
            return self.update_environment_variables
        if self.context is None:
            raise ExecutorError(f"the worker of rank {self.rank} is not built yet; init_worker comes first")
        if not isinstance(method, str):
            return functools.partial(method, self.worker)
        try:
            return getattr(self.worker, method)  # type: ignore[no-any-return] # a method, or calling it says what it is
        except AttributeError:
            if method not in _HOOKS:
                raise
            return getattr(_Plain(self.context, self.worker), method)  # type: ignore[no-any-return] # a method

    def shutdown(self) -> None:
        """Shuts the worker down and leaves its process groups; errors are logged, since nobody waits for them."""
        context, self.context = self.context, None
        if context is None:
            return
        try:
            if self.worker is not None:
                getattr(self.worker, "shutdown", Worker(context).shutdown)()
        except Exception:
            context.log.warning("worker's shutdown raised", exc_info=True)
        finally:
            self.worker = None
            context.close()


def settle(value: Any, wanted: bool) -> Any:
    """Finishes an async output: its value where it is wanted, else None without asking for it."""
    output = as_async_output(value)
    if output is None:
        return value if wanted else None
    return output.get_output() if wanted else None


def select_device(context: WorkerContext | None) -> None:
    """Makes the worker's device the calling thread's current one: CUDA keeps it per thread."""
    torch = sys.modules.get("torch")
    if torch is not None and context is not None and (context.device_name or "").startswith("cuda"):
        torch.cuda.set_device(context.device)


def set_threads(threads: int) -> None:
    """CPU threads of torch in this process, whether it is imported already or not yet."""
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)


def monotonic_deadline(timeout_s: float | None) -> float:
    """When ``timeout_s`` from now is, on the monotonic clock; infinity for None."""
    return float("inf") if timeout_s is None else time.monotonic() + timeout_s
