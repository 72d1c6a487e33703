"""What the executors cost in the long run: `python -m bench.upkeep WHAT [COUNT] [N]`, one line of JSON.

    uniproc     what `collective_rpc` adds to the bare call, with the worker in this process
    calls       growth over COUNT no-op calls
    tensors     growth over COUNT tensors of mixed sizes, whose checksums every rank computes

Growth is what all processes together hold in the end beyond what they held after a warm-up of a tenth of the calls.
"""

from __future__ import annotations

import gc
import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable

import exec_core
from bench import procfs, work
from bench.peers.exec_mp_peer import config

_BATCH = 500
_SETTLE_S = 0.2
_LARGEST = 8 << 20
_ECHO_EVERY = 10  # every so many tensors come back as well


def uniproc(count: int) -> dict[str, float]:
    """Batches of calls through the executor and bare ones take turns."""
    bare = work.Work().noop
    with exec_core.create_executor(config(1, "uniproc")) as executor:

        def through() -> None:
            executor.collective_rpc("noop")

        batches = [(_batch_us(bare), _batch_us(through)) for _ in range(max(3, count // _BATCH))]
    call, rpc = (statistics.median(values) for values in zip(*batches, strict=True))
    overhead = statistics.median(after - before for before, after in batches)
    return {"bare_us": call, "rpc_us": rpc, "overhead_us": overhead}


def _batch_us(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    for _ in range(_BATCH):
        call()
    return (time.perf_counter() - began) / _BATCH * 1e6


def calls(count: int, n: int) -> dict[str, float]:
    """No-ops, one after the other."""
    with exec_core.create_executor(config(n)) as executor:
        return _growth(count, lambda _: executor.collective_rpc("noop") == [None] * n, executor)


def tensors(count: int, n: int) -> dict[str, float]:
    """Tensors of no bytes to 8 MiB, small ones as frequent as large ones."""
    chance = random.Random(0)  # noqa: S311 # the same sizes in each run
    source = work.tensor(_LARGEST)
    with exec_core.create_executor(config(n)) as executor:

        def one(index: int) -> bool:
            nbytes = int(math.exp(chance.uniform(0, math.log(_LARGEST)))) - 1 if index >= _ECHO_EVERY else _LARGEST
            start = chance.randrange(_LARGEST - nbytes + 1)
            sent = source[start : start + nbytes]
            expected = [work.checksum(sent)] * n
            right: bool = executor.collective_rpc("checksum", args=(sent,)) == expected
            if index % _ECHO_EVERY == 0 or index < _ECHO_EVERY:
                right &= [work.checksum(back) for back in executor.collective_rpc("echo", args=(sent,))] == expected
            return right

        return _growth(count, one, executor)


def _growth(count: int, one: Callable[[int], bool], executor: exec_core.Executor) -> dict[str, float]:
    warm_up = count // 10
    wrong = sum(not one(index) for index in range(warm_up))
    before, began = _held(executor), time.perf_counter()
    wrong += sum(not one(index) for index in range(warm_up, count))
    seconds, after = time.perf_counter() - began, _held(executor)
    return {
        "calls": count,
        "wrong": wrong,
        "calls_per_s": (count - warm_up) / seconds,
        "data_mb": after.data / 1e6,
        "data_growth_mb": (after.data - before.data) / 1e6,
        "descriptor_growth": after.descriptors - before.descriptors,
        "memfd_growth": after.memfds - before.memfds,
        "memfd_growth_mb": (after.memfd_bytes - before.memfd_bytes) / 1e6,
    }


def _held(executor: exec_core.Executor) -> procfs.Held:
    """After a last call has had the workers let go of what they were sent before."""
    gc.collect()
    executor.collective_rpc("noop")
    time.sleep(_SETTLE_S)
    return procfs.held(procfs.tree(os.getpid()))


def main(what: str, count: str, n: str = "1") -> None:
    """Prints one measurement."""
    found = uniproc(int(count)) if what == "uniproc" else {"calls": calls, "tensors": tensors}[what](int(count), int(n))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
