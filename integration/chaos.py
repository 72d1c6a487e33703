"""Faults at random moments: `python integration/chaos.py --rounds 500 --seed 1`; it prints what it did.

Each round starts an executor and callers, and strikes: signals to a worker, the fork server or the driver, full rings,
slow ranks, odd errors, closed descriptors; while it starts, loads, idles, calls, restarts or closes. It then checks that
every call has ended within its bound with its own answer or the right error, and that no process, descriptor, memfd,
thread, temporary file or entry of /dev/shm is left. A round depends on its seed alone: `--only 1:17` repeats one.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import os
import random
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import exec_mp
from chaos_parts.drivers import play_for_ever, strike_driver
from chaos_parts.rounds import Round, play
from exec_core.testing import leak_check

STUCK_S = 240.0  # a round that takes longer shows its stacks and ends the program
DRIVERS = 0.2  # share of the rounds in which the driver is struck


def main(argv: Sequence[str] | None = None) -> int:
    """Plays the rounds; 1 when something was wrong in one."""
    options = _parse(argv)
    if options.play is not None:
        play_for_ever(options.play)
        return 0
    seeds = options.only or [f"{options.seed}:{number}" for number in range(options.rounds)]
    began, failed = time.monotonic(), []
    for seed in seeds:
        faulthandler.dump_traceback_later(STUCK_S, exit=True)
        try:
            if not one_round(seed):
                failed.append(seed)
        finally:
            faulthandler.cancel_dump_traceback_later()
    exec_mp.stop_fork_server()
    print(f"{len(seeds)} rounds in {time.monotonic() - began:.0f} s; {len(failed)} wrong: {' '.join(failed) or 'none'}")
    return 1 if failed else 0


def one_round(seed: str) -> bool:
    """Plays a round and looks at what it has left; whether all was right."""
    exec_mp.prestart(())
    began = time.monotonic()
    try:
        with leak_check(allowed=_is_foreign):
            played = _play(seed)
            exec_mp.prestart(())  # the check is to find a fork server in the end if there was one before
    except AssertionError as leak:
        played = Round("?")
        played.wrong.append(str(leak))
    print(f"{seed}: {played.text}: {played.outcome}; {time.monotonic() - began:.1f} s", flush=True)
    for wrong in played.wrong:
        print(f"{seed}: WRONG: {wrong}", flush=True)
    return not played.wrong


def _play(seed: str) -> Round:
    if random.Random(f"kind {seed}").random() < DRIVERS:
        return strike_driver(seed)
    return play(seed)


def _is_foreign(kind: str, item: str) -> bool:
    """Whether an entry of /dev/shm is another program's, which uses it."""
    if kind != "shared_memory":
        return False
    ours = os.getpid()
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as maps:
            if pid != ours and any(f"/dev/shm/{item}" in line for line in maps):  # noqa: S108 # only looked for
                return True
    return not os.path.exists(f"/dev/shm/{item}")  # noqa: S108 # likewise


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="*", metavar="SEED:ROUND", help="play these rounds alone")
    parser.add_argument("--play", metavar="SEED", help=argparse.SUPPRESS)  # the driver that is struck
    return parser.parse_args(argv)


if __name__ == "__main__":
    threading.current_thread().name = "main"
    sys.exit(main())
