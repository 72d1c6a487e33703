"""Correctness under stress: `python integration/stress.py`; it prints what held, and stops at what did not.

Many threads at once with a full ring and a busy garbage collector; messages of every size and kind; views that outlive
their message by a thousand others; writes in place on all sides.
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import exec_core
from exec_core import Executor
from stress_checks.contents import kinds, sizes
from stress_checks.memory import kept_views, own_writes
from stress_checks.order import one_total_order
from stress_checks.worker import StressWorker

MAX_IN_FLIGHT = 3  # so that the ring is full nearly always
_COPIES = 7  # of the largest message, in all processes together
_STUCK_S = 600.0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the checks; 1 when one does not hold."""
    options = _parse(argv)
    faulthandler.dump_traceback_later(options.seconds + _STUCK_S, exit=True, file=2)
    try:
        for world_size in options.workers:
            with exec_core.create_executor(config(world_size)) as executor:
                for name, check in checks(options).items():
                    began = time.monotonic()
                    detail = check(executor)
                    print(f"N={world_size} {name}: {detail} ({time.monotonic() - began:.1f} s)", flush=True)
    except AssertionError as error:
        print(f"FAILED: {error}")
        return 1
    finally:
        faulthandler.cancel_dump_traceback_later()
    return 0


def config(world_size: int) -> exec_core.ExecutorConfig:
    """Processes on CPU, few calls in flight."""
    return exec_core.ExecutorConfig(
        worker_cls=StressWorker,
        parallel=exec_core.ParallelConfig(tensor_parallel_size=world_size),
        device=exec_core.DeviceConfig(device="cpu", distributed_backend="none"),
        rpc=exec_core.RpcConfig(max_in_flight=MAX_IN_FLIGHT),
        log=exec_core.LogConfig(level="warning"),
    )


def checks(options: argparse.Namespace) -> dict[str, Callable[[Executor], str]]:
    """By name, in order."""
    return {
        "order": partial(one_total_order, threads=options.threads, seconds=options.seconds),
        "kinds": kinds,
        "writes": own_writes,
        "views": partial(kept_views, messages=options.messages),
        "sizes": partial(sizes, largest=_affordable(options.largest)),
    }


def _affordable(largest: int) -> int:
    """As large as memory allows; less than was asked for is said aloud."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    if free < _COPIES * largest:
        print(f"only {free >> 20} MiB of memory are free: messages up to {free // _COPIES >> 20} MiB", file=sys.stderr)
        return free // _COPIES
    return largest


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="stress", description="Checks the executor's answers under stress.")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="S", help="that the threads call; default: 60")
    parser.add_argument("--threads", type=int, default=8, metavar="N", help="that call at once; default: 8")
    parser.add_argument("--messages", type=int, default=1000, metavar="N", help="that pass kept views; default: 1000")
    parser.add_argument("--largest", type=int, default=1 << 30, metavar="BYTES", help="message; default: 1 GiB")
    parser.add_argument("--workers", type=int, nargs="+", default=(2,), metavar="N", help="world sizes; default: 2")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
