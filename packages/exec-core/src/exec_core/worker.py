"""The worker: what a user writes. One instance per rank, in that rank's process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol

import attrs

from exec_core import messages
from exec_core.context import WorkerContext
from exec_core.errors import ConfigError, ExecutorError


@attrs.frozen
class ReconfigureDistributedRequest:
    """Leave the world, and join another one of a different data-parallel size, or shut down.

    Attributes:
        new_data_parallel_size: replicas of the new world.
        new_data_parallel_rank: this replica's number there, or `KEEP_CURRENT_RANK`, or `SHUTDOWN_CURRENT_RANK`.
        new_data_parallel_master_ip, new_data_parallel_master_port: where rank 0 of the new world listens; a world of one
            rank needs no port.

    Raises:
        ConfigError: for a rank that the new world does not have, or a port that none is.
    """

    KEEP_CURRENT_RANK = -1
    SHUTDOWN_CURRENT_RANK = -2

    new_data_parallel_size: int
    new_data_parallel_rank: int
    new_data_parallel_master_ip: str = "127.0.0.1"
    new_data_parallel_master_port: int = 0

    def __attrs_post_init__(self) -> None:
        size, rank, port = self.new_data_parallel_size, self.new_data_parallel_rank, self.new_data_parallel_master_port
        name = type(self).__name__
        if size < 1:
            raise ConfigError(f"{name}.new_data_parallel_size", "must be an integer >= 1", size)
        if not self.SHUTDOWN_CURRENT_RANK <= rank < size:
            rule = f"must be a rank below {size}, KEEP_CURRENT_RANK (-1) or SHUTDOWN_CURRENT_RANK (-2)"
            raise ConfigError(f"{name}.new_data_parallel_rank", rule, rank)
        if not 0 <= port <= 65535:
            raise ConfigError(f"{name}.new_data_parallel_master_port", "must be a port", port)

    @property
    def shuts_down(self) -> bool:
        return self.new_data_parallel_rank == self.SHUTDOWN_CURRENT_RANK


class Worker:
    """Base class of workers: one rank's device, model and cache. Every hook has a default.

    Methods run on the main thread of the worker's process, one at a time, in the order of the calls. A method may
    return an object with ``get_output()``: the next call then starts at once, and a second thread finishes this one.
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
        """How many KV blocks fit: ``(num_gpu_blocks, num_cpu_blocks)``. Default: what `CacheConfig` says, else 0.

        It need not look at `CacheConfig`: the executor does, and does not ask where both numbers are there.
        """
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
        group = self.context.groups.tp
        box: list[Any] = [b"", 0]
        if self.context.is_driver_worker:
            # Torch would pickle it by rules of its own: an object of a class of ``__main__`` would not arrive.
            encoded = messages.encode(request, "the step's request")
            box = [b"".join(encoded.parts), int(encoded.format)]
        dist.broadcast_object_list(box, src=group.ranks[0], group=group.cpu_group)
        return request if self.context.is_driver_worker else messages.decode(memoryview(box[0]), box[1])

    def check_health(self) -> None:
        """Raises when this worker cannot go on.

        Called by who wants to know, as ``collective_rpc("check_health")``, and in its turn after earlier calls.
        `Executor.check_health` does not call it: that looks at the ranks from outside and never queues behind their work.
        """

    def sleep(self, level: int = 1) -> None:
        """Gives device memory back: level 1 keeps the weights in host memory, level 2 drops them."""

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Takes device memory again, for everything or for ``tags`` (``weights``, ``kv_cache``)."""

    def start_profile(self) -> None:
        """Starts a torch profile of this rank."""
        import torch.autograd.profiler

        # Not torch.profiler: that imports torch's compiler, which takes seconds and keeps the process group alive.
        on_cuda = (self.context.device_name or "").startswith("cuda")
        self._profile = torch.autograd.profiler.profile(use_device="cuda" if on_cuda else None)
        self._profile.__enter__()

    def stop_profile(self) -> str:
        """Ends the profile and returns its table, the most expensive operators first."""
        profile, self._profile = self._profile, None
        if profile is None:
            raise ExecutorError("no profile is running; call start_profile() first")
        profile.__exit__(None, None, None)
        return str(profile.key_averages().table(sort_by="cpu_time_total", row_limit=30))

    _profile: Any = None

    def save_sharded_state(self, path: str, pattern: str | None = None, max_size: int | None = None) -> None:
        """Writes this rank's weights into directory ``path``, in files of at most ``max_size`` bytes of tensors.

        Args:
            pattern: file name with ``{rank}`` and ``{part}``; default ``model-rank-{rank}-part-{part}.pt``
                (`torch.save`).
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
        keep = request.new_data_parallel_rank == request.KEEP_CURRENT_RANK
        dp_rank = context.dp_rank if keep else request.new_data_parallel_rank
        host, port = request.new_data_parallel_master_ip, request.new_data_parallel_master_port
        context.rejoin(dp_rank, request.new_data_parallel_size, f"tcp://{f'[{host}]' if ':' in host else host}:{port}")

    def shutdown(self) -> None:
        """Gives up what this worker holds. The process groups are left afterwards by the wrapper."""


class AsyncOutput(Protocol):
    """What a worker method may return to let the next call start while a second thread finishes this one."""

    def get_output(self) -> Any:
        """The value; may block."""


def as_async_output(value: object) -> AsyncOutput | None:
    """``value`` if its class has ``get_output``, else None. The class decides: objects may answer to any name."""
    if callable(getattr(type(value), "get_output", None)):
        return value  # type: ignore[return-value] # just checked
    return None
