"""Small workers, each for one behaviour, in a module that worker processes can import by name."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from typing import Any

from exec_core.context import WorkerContext
from exec_core.testing.sync import Gate
from exec_core.worker import Worker


class TwoArgumentError(Exception):
    """Pickles, but cannot be loaded again: its constructor takes other arguments than its ``args``."""

    def __init__(self, what: str, code: int) -> None:
        super().__init__(f"{what} ({code})")


class UnpicklableError(Exception):
    """Cannot be pickled: it holds a lock."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class EchoWorker(Worker):
    """Answers with its rank and what it was given, and keeps a journal of what was called in which order."""

    def __init__(self, context: WorkerContext, **worker_kwargs: Any) -> None:
        super().__init__(context)
        self.worker_kwargs = worker_kwargs
        self.journal: list[Any] = []

    def init_device(self) -> None:
        super().init_device()
        self.journal.append("init_device")

    def load_model(self) -> None:
        self.journal.append("load_model")

    def where(self, x: Any = None) -> tuple[int, Any]:
        """The rank, and ``x`` back."""
        return self.context.rank, x

    def note(self, entry: Any) -> int:
        """Appends to the journal; how long it is now."""
        self.journal.append(entry)
        return len(self.journal)

    def entries(self, kind: str) -> list[Any]:
        """Journal entries that are tuples beginning with ``kind``."""
        return [entry for entry in self.journal if isinstance(entry, tuple) and entry[0] == kind]

    def execute_model(self, request: Any) -> Any:
        if isinstance(request, Exception):
            raise request
        self.journal.append(("step", request))
        return self.context.rank, request

    def get_model(self) -> Any:
        """A linear layer whose weights are the rank."""
        import torch

        model = torch.nn.Linear(4, 2)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(self.context.rank)
        return model

    def determine_num_available_blocks(self) -> tuple[int, int]:
        """Fewer on each further rank on the device, more on the host."""
        return 100 - self.context.rank, 10 + self.context.rank

    def initialize_cache(self, num_gpu_blocks: int, num_cpu_blocks: int) -> None:
        self.journal.append(("cache", num_gpu_blocks, num_cpu_blocks))

    def sleep(self, level: int = 1) -> None:
        self.journal.append(("sleep", level))

    def wake_up(self, tags: Any = None) -> None:
        self.journal.append(("wake_up", tags))


class FailingWorker(EchoWorker):
    """Raises in one phase, on one rank or on all.

    Args:
        phase: ``__init__`` or the name of a hook.
        rank: who raises; None: everyone.
        error: what is raised.
    """

    def __init__(
        self, context: WorkerContext, phase: str, rank: int | None = None, error: BaseException | None = None
    ) -> None:
        super().__init__(context)
        self._phase, self._rank = phase, rank
        self._error = ValueError(f"told to fail in {phase}") if error is None else error
        self._reach("__init__")

    def _reach(self, phase: str) -> None:
        if phase == self._phase and self._rank in {None, self.context.rank}:
            raise self._error

    def init_device(self) -> None:
        self._reach("init_device")
        super().init_device()

    def load_model(self) -> None:
        self._reach("load_model")

    def execute_model(self, request: Any) -> Any:
        self._reach("execute_model")
        return super().execute_model(request)

    def shutdown(self) -> None:
        self._reach("shutdown")


class HoldingWorker(EchoWorker):
    """Waits at a gate in one phase."""

    def __init__(self, context: WorkerContext, phase: str, gate: Gate) -> None:
        super().__init__(context)
        self._phase, self._gate = phase, gate

    def load_model(self) -> None:
        if self._phase == "load_model":
            self._gate.wait(self.context.rank)


class LoadingWorker(EchoWorker):
    """Sees how many ranks load at a time: each leaves a mark in a shared directory while it is inside ``load_model``."""

    def __init__(self, context: WorkerContext, directory: str, load_s: float = 0.02) -> None:
        super().__init__(context)
        self._directory, self._load_s = directory, load_s
        self.most_at_once = 0

    def load_model(self) -> None:
        self.most_at_once = overlap(self, self._directory, self._load_s)


class ProgressWorker(EchoWorker):
    """Reports its progress while it loads."""

    def load_model(self) -> None:
        for done in range(4):
            self.context.report_progress(done, 3, "tensors")


class StageWorker(Worker):
    """A pipeline stage: takes a fixed time for each step, and passes what it made on to the next stage.

    Args:
        stage_s: seconds for a step.
    """

    def __init__(self, context: WorkerContext, stage_s: float) -> None:
        super().__init__(context)
        self._stage_s = stage_s
        self.intervals: list[tuple[float, float]] = []  # (begin, end) of each step's work, monotonic seconds

    def execute_model(self, request: int) -> int:
        import torch
        import torch.distributed as dist

        assert self.context.groups is not None  # it needs them
        group = self.context.groups.pp
        hidden = torch.tensor([request])
        if group.rank > 0:
            dist.recv(hidden, group.ranks[group.rank - 1], group.cpu_group)
        begin = time.monotonic()
        time.sleep(self._stage_s)  # the work itself
        self.intervals.append((begin, time.monotonic()))
        hidden += 1
        if group.rank < group.size - 1:
            dist.send(hidden, group.ranks[group.rank + 1], group.cpu_group)
        return int(hidden.item())


class Output:
    """An async output: its value comes when a gate opens."""

    def __init__(self, value: Any, gate: Gate, rank: int) -> None:
        self._value, self._gate, self._rank = value, gate, rank

    def get_output(self) -> Any:
        """The value, or raises it where it is an exception."""
        self._gate.wait(self._rank)
        if isinstance(self._value, BaseException):
            raise self._value
        return self._value, threading.current_thread() is threading.main_thread()


class AsyncOutputWorker(EchoWorker):
    """Returns each step as an async output that waits at the gate."""

    def __init__(self, context: WorkerContext, gate: Gate) -> None:
        super().__init__(context)
        self._gate = gate

    def execute_model(self, request: Any) -> Any:
        self.journal.append(("step", request))
        return Output(request, self._gate, self.context.rank)


class PlainWorker:
    """Not a `Worker`: only the constructor and one method."""

    def __init__(self, context: WorkerContext, factor: int = 1) -> None:
        self._rank, self._factor = context.rank, factor

    def times(self, x: int) -> int:
        """``x`` times the factor, plus the rank."""
        return x * self._factor + self._rank

    def execute_model(self, request: int) -> int:
        """One step."""
        return self.times(request)


class DelegatingWorker:
    """Answers to any name: whatever it is asked for, it has."""

    def __init__(self, context: WorkerContext) -> None:
        self._rank = context.rank

    def __getattr__(self, name: str) -> Any:
        return lambda *args: (self.__dict__["_rank"], name, args)


def make_worker(context: WorkerContext, **worker_kwargs: Any) -> EchoWorker:
    """A factory: any callable will do for a worker class."""
    return EchoWorker(context, made_by="make_worker", **worker_kwargs)


class Outer:
    """Holds a worker class, for paths with more than one name after the module."""

    class Inner(EchoWorker):
        """`EchoWorker` by a longer path."""


HOSTED: Any = None  # an executor of this process, for `call_hosted`
ENVIRONMENT_AT_IMPORT: Mapping[str, str] = dict(os.environ)  # of the process that imported this module


# Callables for collective_rpc: they get the worker first.


def fail(worker: Any, error: BaseException, rank: int | None = None) -> int:
    """Raises ``error`` on ``rank``, or on all."""
    if rank is None or worker.context.rank == rank:
        raise error
    return int(worker.context.rank)


def fail_with(worker: Any, make: Any, rank: int | None = None) -> int:
    """Raises what ``make()`` returns, made in the worker: for errors that would not survive the way there."""
    return fail(worker, make(), rank)


def wait_at(worker: Any, gate: Gate, rank: int | None = None) -> int:
    """Waits at ``gate`` on ``rank``, or on all; returns the rank."""
    if rank is None or worker.context.rank == rank:
        gate.wait(worker.context.rank)
    return int(worker.context.rank)


def touch_groups(worker: Any) -> None:
    """Has all process groups made: those of one rank are not before they are used."""
    groups = worker.context.groups
    if groups is not None:
        for group in (groups.tp, groups.pp, groups.dp, groups.world):
            assert group.device_group is group.cpu_group


def add_up_ranks(worker: Any, group: str) -> float:
    """The sum of the ranks in this rank's ``group``, by an all_reduce in it."""
    import torch
    import torch.distributed as dist

    total = torch.tensor([float(worker.context.rank)])
    dist.all_reduce(total, group=getattr(worker.context.groups, group).device_group)
    return total.item()


def overlap(worker: Any, directory: str, work_s: float = 0.01) -> int:
    """How many ranks were in here at once, at most, as this one saw it."""
    mark = os.path.join(directory, f"inside-{worker.context.rank}")
    seen = 0
    with open(mark, "w", encoding="ascii"):
        until = time.monotonic() + work_s
        while time.monotonic() < until:
            seen = max(seen, len(os.listdir(directory)))
            time.sleep(0.001)
    os.unlink(mark)
    return seen


def call_hosted(worker: Any) -> Any:
    """Calls the executor of the worker's own process: what a worker must not do."""
    return HOSTED.collective_rpc("where")
