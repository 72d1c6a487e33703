"""What runs a worker: it lives in the worker's process from its start and builds the worker late.

    Request -> WorkerWrapper.execute -> the worker's method -> Reply

First environment variables are set (``update_environment_variables``), then come ``init_worker``, ``init_device``,
``load_model``.
"""

from __future__ import annotations

import functools
import gc
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs

from exec_core.context import ReportProgress, WorkerContext, WorkerInit
from exec_core.errors import ExecutorError
from exec_core.messages import Reply, Request
from exec_core.worker import Worker, as_async_output

DONE = Reply()  # nothing to say but that it has run


class _Plain(Worker):
    """The hooks that a worker which does not inherit from `Worker` lacks."""

    def __init__(self, context: WorkerContext, target: Any) -> None:
        super().__init__(context)
        self._target = target

    def execute_model(self, request: Any) -> Any:
        return self._target.execute_model(request)


_OWN = frozenset({"init_worker", "update_environment_variables"})  # what the wrapper itself does
_HOOKS = frozenset(name for name in vars(Worker) if not name.startswith("_")) - {"get_model", "execute_model"}


def resolve_worker_cls(worker_cls: Callable[..., Any] | str) -> Callable[..., Any]:
    """The class, imported if it is given by its path (``package.module:Class`` or ``package.module.Class``).

    Raises:
        ImportError: naming module and attribute. TypeError: for what is no class or callable.
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
        raise TypeError(f"worker_cls {worker_cls!r} is a {type(found).__name__}, not a class or callable")
    return found  # type: ignore[no-any-return] # checked to be callable


class WorkerWrapper:
    """Holds one rank's worker, builds it late, and turns a `Request` into a `Reply`."""

    def __init__(
        self,
        rank: int,
        progress: ReportProgress = lambda done, total, what: None,
        given_up: Callable[[], bool] | None = None,
    ) -> None:
        self.rank = rank
        self.context: WorkerContext | None = None
        self.worker: Any = None
        self._progress, self._given_up = progress, given_up

    def update_environment_variables(self, env: Mapping[str, str]) -> None:
        """Sets variables before anything of the worker's is imported."""
        os.environ.update(env)

    def init_worker(self, all_kwargs: Sequence[WorkerInit]) -> None:
        """Builds the worker of this rank from its entry in ``all_kwargs``."""
        init = next(one for one in all_kwargs if one.rank == self.rank)
        fields = {a.name: getattr(init, a.name) for a in attrs.fields(WorkerInit)}
        self.context = WorkerContext(**fields, log=_logger(init), progress=self._progress, given_up=self._given_up)
        # Used as it is: an object that delegates by __getattr__ would answer any question put to it.
        self.worker = resolve_worker_cls(init.config.worker_cls)(self.context, **init.config.worker_kwargs)

    def execute(self, request: Request) -> Reply:
        """Runs ``request`` and never raises: whatever the worker raises is in the reply."""
        return self.run(request.method, request.args, request.kwargs)

    def run(self, method: str | Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Reply:
        """`execute`, without a request."""
        try:
            # In one step where it can be: the rest is for the start, for callables, and for what a worker lacks.
            function = getattr(self.worker, method, None) if isinstance(method, str) and method not in _OWN else None
            if function is None:
                function = self._resolve(method)
            value = function(*args, **kwargs) if kwargs else function(*args) if args else function()
            return DONE if value is None else Reply(value)
        except BaseException as error:
            return Reply.of_error(error)

    def run_bare(self, name: str) -> Reply:
        """`run`, of a method without arguments: most of what little such a call costs would be the handling of none."""
        try:
            function = None if name in _OWN else getattr(self.worker, name, None)
            value = self._resolve(name)() if function is None else function()
            return DONE if value is None else Reply(value)
        except BaseException as error:
            return Reply.of_error(error)

    def _resolve(self, method: str | Callable[..., Any]) -> Callable[..., Any]:
        if isinstance(method, str) and method in _OWN:
            return getattr(self, method)  # type: ignore[no-any-return] # one of those names
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

    def abort(self) -> None:
        """For another thread, when a rank has died: gets the worker out of collectives that will not end.

        It neither waits nor raises.
        """
        context = self.context
        if context is not None:
            context.abort()

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
            self._close(context)
            if context.in_driver:  # a process of the worker's own ends
                free_device_memory(context)

    @staticmethod
    def _close(context: WorkerContext) -> None:
        try:
            context.close()
        except Exception:  # of a backend whose peers are gone, say
            context.log.warning("leaving the process groups raised", exc_info=True)


def _logger(init: WorkerInit) -> Any:
    import structlog

    from exec_core import logs

    names: dict[str, object] = {
        "executor": init.executor, "backend": init.backend, "generation": init.generation, "rank": init.rank,
        "pid": os.getpid(),
    }  # fmt: skip
    if init.in_driver:
        return logs.driver_logger(init.config.log, "exec_core.worker", **names)
    logs.configure_worker(init.log_format, init.config.log.level, logger="exec_core.worker", **names)
    return structlog.get_logger().bind()


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


def free_device_memory(context: WorkerContext) -> None:
    """Gives back to the device what torch's allocator keeps for this process when a worker is gone from it.

    Whoever comes next may be another process, an executor's with workers of its own, say.
    """
    torch = sys.modules.get("torch")
    if torch is None or not (context.device_name or "").startswith("cuda") or not torch.cuda.is_initialized():
        return
    gc.collect()  # a model may be part of a cycle
    try:
        torch.cuda.empty_cache()
    except Exception:  # of a device that refuses everything, see `device_failure`
        context.log.warning("giving back the device's memory raised", exc_info=True)


def device_failure(context: WorkerContext | None) -> str | None:
    """Why CUDA refuses this process everything from now on, as it does after a kernel has failed. None: it does not."""
    torch = sys.modules.get("torch")
    if torch is None or context is None or not (context.device_name or "").startswith("cuda"):
        return None
    if not torch.cuda.is_initialized():
        return None
    try:
        if not torch.cuda.is_current_stream_capturing():  # else it may not be asked
            torch.cuda.current_stream(context.device).query()
    except Exception as error:
        text = str(error).splitlines()[0]
        return None if "captur" in text else text  # another thread's, in a mode that concerns all
    return None


def set_threads(threads: int) -> None:
    """CPU threads of torch in this process, whether it is imported already or not yet."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)
