"""Ranks that differ, ranks that fail, ranks that are late: four ranks of one replica."""

from __future__ import annotations

import gc
import time
import weakref
from typing import ClassVar

import torch
import torch.distributed as dist
from common import RANK, config, outcome, record

import exec_core as ec
from exec_core.testing import workers
from exec_torchrun import ExecutorWithExternalLauncher


class GuardWorker(workers.EchoWorker):
    """`EchoWorker` with methods that fail or wait."""

    def fail_on(self, rank: int) -> int:
        """Raises on one rank."""
        if self.context.rank == rank:
            raise KeyError("layer", rank)
        return self.context.rank

    def fail_holding(self) -> None:
        """Raises while it has something in a variable, see `has_let_go`."""
        held = type("Held", (), {})()
        self._held = weakref.ref(held)
        raise KeyError

    def has_let_go(self) -> bool:
        """Whether that is gone."""
        return self._held() is None

    def fail_before_collective(self, rank: int) -> None:
        """Raises on one rank while the others wait for it in a collective."""
        self.fail_on(rank)
        assert self.context.groups is not None  # there are four ranks
        dist.all_reduce(torch.ones(1), group=self.context.groups.tp.cpu_group)

    def be_late(self, rank: int, seconds: float) -> int:
        """One rank is slow."""
        if self.context.rank == rank:
            time.sleep(seconds)
        return self.context.rank

    def unpicklable(self, rank: int) -> None:
        """Raises what no other process can load."""
        if self.context.rank == rank:
            raise workers.UnpicklableError("held")

    def leave(self, rank: int) -> None:
        """Ends with what is no error."""
        if self.context.rank == rank:
            raise SystemExit(3)


class ProgramError(Exception):
    """Of this program, which every rank runs."""


def program_error(worker: ec.Worker) -> None:
    """Raises it on one rank."""
    if worker.context.rank == 2:
        raise ProgramError


def caught_as_own() -> bool:
    """Whether the program's own ``except`` catches it."""
    try:
        impatient.collective_rpc(program_error)
    except ProgramError:
        return True
    return False


class Impatient(ExecutorWithExternalLauncher):
    """Ranks may be half a second apart, and stay in a failed call for as long."""

    divergence_timeout_s: ClassVar[float | None] = 0.5
    error_grace_s: ClassVar[float] = 0.5


class Unguarded(ExecutorWithExternalLauncher):
    """Calls are not compared."""

    divergence_timeout_s: ClassVar[float | None] = None


executor = ec.create_executor(config(GuardWorker, tp=4))
call = executor.collective_rpc

record(
    other_method=outcome(call, "where" if RANK == 1 else "note", args=(1,)),
    other_arguments=outcome(call, "where", args=({"tokens": [1, 2, RANK == 1]},)),
    other_keyword=outcome(call, "where", kwargs={"x": torch.tensor([1.0, float(RANK == 2)])}),
    other_ranks=outcome(call, "where", ranks=[0, 1] if RANK < 3 else [0, 1, 2]),
    other_step=outcome(executor.execute_model, ("prompt", RANK == 3)),
    nothing_ran=outcome(
        call, lambda worker: [entry for entry in worker.journal if entry not in ("init_device", "load_model")]
    ),
    equal_values=outcome(call, "where", args=({"a", "b", "c"} if RANK % 2 else set("cba"),)),
    equal_objects=outcome(call, "where", args=(ec.CacheConfig(block_size=8 * (1 + 1)),)),
)
record(
    raised=outcome(call, "fail_on", args=(2,)),
    raised_by_all=outcome(call, workers.fail, args=(ValueError("all"),)),
    raised_in_future=outcome(lambda: call("fail_on", args=(3,), non_block=True).result(20)),
    raised_in_wave=outcome(call, "fail_on", args=(0,), max_concurrent_workers=2),
    unpicklable=outcome(call, "unpicklable", args=(1,)),
    system_exit=outcome(call, "leave", args=(1,)),
    unasked=outcome(call, "fail_on", args=(2,), ranks=[2], reply_ranks=[]),
    after_errors=outcome(call, "where", args=(1,)),
    state_after_errors=executor.state.value,
)
record(
    late=outcome(call, "be_late", 0.3, args=(1, 3.0)),
    after_late=outcome(call, "where", args=(2,)),
    busy=outcome(call, "be_late", 0.3, args=(3, 2.5)),
    while_busy=outcome(call, "where", 0.3, args=(3,)),
    after_busy=outcome(call, "where", args=(4,)),
    state_after_late=executor.state.value,
)

# One call less, and rank 1 does something else meanwhile: the others wait for the time that they may be apart.
if RANK == 1:
    time.sleep(8.0)
else:
    record(one_less=outcome(call, "where", args=(5,)))
if RANK == 1:
    record(one_less=outcome(call, "note", args=(5,)))
record(after_one_less=outcome(call, "where", args=(6,)))

# One call less, and rank 1 is through.
if RANK != 1:
    record(last=outcome(call, "where", args=(7,)))
record(shutdown=outcome(executor.shutdown), state_after_shutdown=executor.state.value)

with Impatient(config(GuardWorker, Impatient, tp=4)) as impatient:
    if RANK == 0:
        time.sleep(1.0)
    record(
        hub_late=outcome(impatient.collective_rpc, "where"), after_hub_late=outcome(impatient.collective_rpc, "where")
    )

    # An error while the others wait in a collective: they come out of it, and the executor can be restarted.
    heard: list[str] = []
    impatient.register_failure_callback(lambda error: heard.append(str(error)))
    record(
        stuck=outcome(impatient.collective_rpc, "fail_before_collective", args=(2,)),
        state_after_stuck=impatient.state.value,
        call_after_stuck=outcome(impatient.collective_rpc, "where"),
    )
    impatient.restart()
    record(
        restarted=outcome(impatient.collective_rpc, workers.add_up_ranks, args=("world",)),
        generation=impatient.generation,
        state_after_restart=impatient.state.value,
        heard=len(heard),
        caught_as_own=caught_as_own(),
        gathered_as_own=[
            type(value) is ProgramError
            for value in impatient.collective_rpc(lambda worker: ProgramError(worker.context.rank), gather=True)
        ],
    )

with Unguarded(config(GuardWorker, Unguarded, tp=4)) as unguarded:
    record(
        unguarded=outcome(unguarded.collective_rpc, "where", args=(RANK,)),
        unguarded_gather=outcome(unguarded.collective_rpc, "where", args=(RANK,), gather=True),
        unguarded_error=outcome(unguarded.collective_rpc, "fail_on", args=(2,)),
    )
    gc.collect()
    gc.disable()
    outcome(unguarded.collective_rpc, "fail_holding")
    record(unguarded_let_go=outcome(unguarded.collective_rpc, "has_let_go"))
    gc.enable()

record(
    other_config=outcome(
        ec.create_executor, config(GuardWorker, tp=4, cache=ec.CacheConfig(block_size=16 if RANK else 32))
    ),
    init_fails=outcome(ec.create_executor, config(lambda context: 1 // (context.rank - 2), tp=4)),
    other_sizes=outcome(ec.create_executor, config(GuardWorker, tp=4 if RANK < 2 else 2, pp=1 if RANK < 2 else 2)),
    left_over=dist.is_initialized(),
)
