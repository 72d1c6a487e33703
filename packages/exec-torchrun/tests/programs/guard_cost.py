"""What the guard costs: steps of 10 ms with it and without it, in turn.

Two figures: of the steps as their slowest rank sees them, since ranks of one model wait for each other with a guard or without;
and of the mean over steps and ranks, as a stopwatch around the loop of each rank has it.

torchrun --nproc-per-node 4 packages/exec-torchrun/tests/programs/guard_cost.py
"""

from __future__ import annotations

import os
import statistics
import time
from typing import Any, ClassVar

import torch
import torch.distributed as dist

import exec_core as ec
from exec_torchrun import ExecutorWithExternalLauncher

STEP_S, STEPS, ROUNDS = 0.01, 50, 12
REQUEST = {"tokens": [[7]] * 8, "blocks": [list(range(20))] * 8, "sampling": {"temperature": 0.7, "seed": 1}}


class Steps(ec.Worker):
    """Steps that take 10 ms, whose ranks meet at the end as those of a tensor-parallel model do, or not at all."""

    def apart(self, request: Any) -> None:
        """Nothing in common."""
        time.sleep(STEP_S)

    def together(self, request: Any) -> None:
        """One all_reduce."""
        time.sleep(STEP_S)
        assert self.context.groups is not None  # there are several ranks
        dist.all_reduce(torch.ones(8), group=self.context.groups.tp.device_group)

    def nothing(self, request: Any) -> None:
        """The call alone."""


class Unguarded(ExecutorWithExternalLauncher):
    """The same without the guard."""

    divergence_timeout_s: ClassVar[float | None] = None


def start(backend: Any) -> ec.Executor:
    """An executor over all ranks."""
    return ec.create_executor(
        ec.ExecutorConfig(
            worker_cls=Steps,
            backend=backend,
            parallel=ec.ParallelConfig(tensor_parallel_size=int(os.environ["WORLD_SIZE"])),
            device=ec.DeviceConfig(device="cpu"),
            log=ec.LogConfig(level="error"),
        )
    )


def step_s(executor: ec.Executor, method: str) -> tuple[float, float]:
    """Duration of a call in seconds: median over the calls of the slowest rank's, and mean over calls and ranks."""
    times = []
    for _ in range(STEPS):
        began = time.perf_counter()
        executor.collective_rpc(method, args=(REQUEST,))
        times.append(time.perf_counter() - began)
    of_all: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, times)
    return float(statistics.median(map(max, *of_all))), float(statistics.mean(map(statistics.mean, of_all)))


def described(added: list[float]) -> str:
    """What was added in each round, in words."""
    middle, least, most = (1e6 * value for value in (statistics.median(added), min(added), max(added)))
    return f"{middle:5.0f} us ({least:.0f} to {most:.0f}), {middle / STEP_S / 1e4:4.1f} %"


def main() -> None:
    """Measures and prints."""
    with start("torchrun") as guarded, start(Unguarded) as unguarded:
        for method in ("nothing", "apart", "together"):
            rounds = [(step_s(guarded, method), step_s(unguarded, method)) for _ in range(ROUNDS)]
            without_s = statistics.median(off[0] for _, off in rounds)
            slowest, mean = ([on[kind] - off[kind] for on, off in rounds] for kind in range(2))
            if dist.get_rank() == 0:
                print(
                    f"{method:9} {1e6 * without_s:6.0f} us without; adds {described(slowest)} of a step of 10 ms;"
                    f" mean: adds {described(mean)}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
